"""A model of this machine as the writing model: batches, kept responses, prompts that do not fit, signals."""

import shutil

import pytest

from finetune.context import Context, StopFlag
from finetune.errors import Stopped
from finetune.recipe import LanguageModel, Runtime, Tracking
from finetune.synth import asking
from finetune.synth.asking import Ask, Budget, ask_user, open_asker
from finetune.tiny import model as tiny_model
from tests.helpers.tiny_models import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("local") / "base"
    tokenizer = tiny_model.train_tokenizer(["What colour is the sea? It is blue and wide, as they say."] * 5, 320)
    save_tiny(root, vocab_size=len(tokenizer), max_position_embeddings=128)
    tokenizer.save_pretrained(root)
    return root


def answers(folder, scratch, asks, budget=None, stop=None):
    ctx = Context(scratch, Runtime(), Tracking(), device="cpu", stop=stop or StopFlag())
    with open_asker(LanguageModel(local=str(folder)), folder, budget or Budget(), ctx, "f") as asker:
        return asker.ask_all(asks, "a"), asker


def test_answers_do_not_depend_on_what_else_is_asked_and_are_kept(folder, tmp_path, monkeypatch):
    asks = [ask_user(f"What colour is sea {n}?", 6 + n, temperature=(n % 2) * 0.9, seed=n) for n in range(5)]
    together, asker = answers(folder, tmp_path / "a", asks)
    assert all(r.finish in ("stop", "length") and r.prompt_tokens > 3 for r in together) and asker.kept == 0
    alone = [answers(folder, tmp_path / "b", [ask])[0][0] for ask in asks]
    assert alone == together
    monkeypatch.setattr("finetune.eval.voice.folder_voice", lambda *_: pytest.fail("loaded although all is kept"))
    again, asker = answers(folder, tmp_path / "a", asks)
    assert again == together and asker.kept == 5 and asker.budget.requests == 5
    assert asker.budget.tokens == sum(r.tokens for r in together)


def test_turns_that_do_not_fit_are_told_apart_from_answers(folder, tmp_path):
    asks = [
        ask_user("blue " * 200, 8),
        Ask(({"role": "assistant", "content": "a"},), 8),
        ask_user("blue", 8),
    ]
    found, _ = answers(folder, tmp_path, asks)
    assert [r.finish for r in found[:2]] == ["too_long", "template"] and found[2].finish in ("stop", "length")


def test_a_budget_leaves_the_rest_unasked(folder, tmp_path):
    budget = Budget(requests=2)
    found, _ = answers(folder, tmp_path, [ask_user(f"sea {n}", 4) for n in range(4)], budget)
    assert [r is None for r in found] == [False, False, True, True] and budget.used_up == "max_requests 2"


def test_a_signal_keeps_the_batches_before_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "BATCH_TOKENS", 1)  # each request is a batch
    stop, put = StopFlag(), asking.Kept.put

    def put_and_stop(self, request, reply):
        put(self, request, reply)
        stop.signal_number = 15

    monkeypatch.setattr(asking.Kept, "put", put_and_stop)
    asks = [ask_user(f"sea {n}", 4) for n in range(3)]
    with pytest.raises(Stopped):
        answers(folder, tmp_path, asks, stop=stop)
    monkeypatch.setattr(asking.Kept, "put", put)
    found, asker = answers(folder, tmp_path, asks)
    assert asker.kept == 1 and all(found)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "generation_config.json", "template.json", "template/inference.jinja",
             "additional_chat_templates/tool_use.jinja", "special_tokens_map.json", "model.safetensors"],
)  # fmt: skip
def test_every_file_that_is_read_tells_a_model_from_others(folder, tmp_path, name):
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    (copied / name).parent.mkdir(exist_ok=True)
    model, found = LanguageModel(local=str(copied)), []
    for content in ("{}", "{ }"):
        (copied / name).write_text(content)
        found.append(asking.identity(model))
    assert found[0] != found[1]
    assert asking.identity(LanguageModel(local=str(folder))) not in found


def test_a_broken_file_of_responses_is_asked_again(folder, tmp_path):
    asks = [ask_user("sea", 4)]
    found, _ = answers(folder, tmp_path, asks)
    (path,) = (tmp_path / "responses").glob("*/*.json")
    for content in ("", "{", "[]", '{"text": "a"}', '{"text": 5, "finish": "stop"}'):
        path.write_text(content)
        assert answers(folder, tmp_path, asks)[0] == found

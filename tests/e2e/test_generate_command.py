"""`finetune generate`: rows in several formats, answers of each kind of model, and what a kill leaves."""

import json
import shutil
import signal
import time

import pytest
from typer.testing import CliRunner

from finetune.cli import generate as cli_generate
from finetune.cli.generate import read_output
from finetune.cli.main import app
from finetune.cli.voice import folder_voice, prompt_ids
from finetune.errors import FinetuneError, InputError
from finetune.eval.prompts import read_prompts
from finetune.pipeline import run_view
from finetune.pipeline.store import Store
from finetune.utils.console import Screen
from finetune.utils.files import canonical_json

ROWS = 12


@pytest.fixture
def work(finished, tmp_path, monkeypatch):
    """The finished workspace as a command's roots; inputs and outputs lie in `tmp_path`."""
    monkeypatch.chdir(finished.folder)
    asked = [{"prompt": f"What does the tree number {i} do" + " again" * (i % 7) + "?"} for i in range(ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in asked))
    return finished


def command(work, tmp_path, *options, name="small", source="rows.jsonl", target="out.jsonl"):
    roots = [part for n in ("artifacts", "scratch") for part in (f"--{n}", str(work.folder / n))]
    files = ["--input", str(tmp_path / source), "--output", str(tmp_path / target)]
    return ["generate", name, *files, "--max-new-tokens", "12", *options, *roots]


class Done:
    """What a command in this process left: its output, and an error as the command line tells it."""

    def __init__(self, arguments, status=0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "200")
            result = CliRunner().invoke(app, [str(a) for a in arguments])
        error = result.exception
        found = error.exit_status if isinstance(error, FinetuneError) else result.exit_code
        assert found == status, (result.output, error)
        self.stdout, self.stderr = result.stdout, result.stderr + str(error or "")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


SAMPLED = ("--temperature", "1.0", "--top-p", "0.9", "--n", "2", "--seed", "3")


def test_neither_batch_nor_death_nor_torn_line_changes_a_sampled_answer(work, tmp_path, monkeypatch):
    done = Done(command(work, tmp_path, *SAMPLED))
    assert "tokens/s" in done.stderr and done.stdout.strip() == str(tmp_path / "out.jsonl")
    whole = (tmp_path / "out.jsonl").read_bytes()
    found = lines(tmp_path / "out.jsonl")
    assert [(a["row"], a["sample"]) for a in found] == [(i, k) for i in range(ROWS) for k in range(2)]
    assert len({a["answer"] for a in found}) > ROWS  # two samples of a row differ
    # A few rows at a time, dead on the way: what is there stays, what is torn is made again.
    append, calls = cli_generate.append, []

    def dies(target, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise FinetuneError("dead")
        append(target, batch)

    small = command(work, tmp_path, *SAMPLED, "--batch-tokens", "60", target="cut.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(cli_generate, "append", dies)
        Done(small, status=1)
    cut = tmp_path / "cut.jsonl"
    before = cut.read_bytes()
    kept = before.count(b"\n")
    assert 3 <= kept < 2 * ROWS
    cut.write_bytes(before + b'{"answer": "to')
    assert f"{kept} of {2 * ROWS} answers are in" in Done(small).stderr
    assert cut.read_bytes() == whole
    assert f"{2 * ROWS} of {2 * ROWS} answers" in Done(small).stderr and cut.read_bytes() == whole


@pytest.mark.slow
def test_a_killed_process_leaves_whole_answers(work, tmp_path):
    Done(command(work, tmp_path, *SAMPLED))
    cut = tmp_path / "cut.jsonl"
    small = command(work, tmp_path, *SAMPLED, "--batch-tokens", "60", target="cut.jsonl")
    process = work.start(*small)
    deadline = time.monotonic() + 120
    while not (cut.exists() and cut.read_bytes().count(b"\n") >= 5) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    Done(small)
    assert cut.read_bytes() == (tmp_path / "out.jsonl").read_bytes()


@pytest.mark.slow
def test_a_merged_folder_answers_the_same_at_temperature_0_whatever_the_batch(work, tmp_path):
    store = Store(work.folder / "artifacts", work.folder / "scratch")
    merged = run_view.read(store, "small")["stages"]["merge"]["path"]
    for number, tokens in enumerate(("1", "100000")):
        target = f"{number}.jsonl"
        work.run(
            *command(work, tmp_path, "--batch-tokens", tokens, "--system", "Be brief.", name=merged, target=target)
        )
    assert len({(tmp_path / f"{number}.jsonl").read_bytes() for number in range(2)}) == 1
    assert all(a["messages"][0] == {"role": "system", "content": "Be brief."} for a in lines(tmp_path / "0.jsonl"))


def test_a_base_on_the_hub_answers_without_a_run(work, tmp_path):
    commit = "c" * 40  # a cache as huggingface_hub leaves it, so that no network is asked
    scratch = tmp_path / "scratch"
    shutil.copytree(work.folder / "base", scratch / "hub" / "models--them--base" / "snapshots" / commit)
    roots = ["--artifacts", str(tmp_path / "artifacts"), "--scratch", str(scratch)]
    asked = command(work, tmp_path, name=f"them/base@{commit}")[:-4]
    Done([*asked, *roots])
    found = lines(tmp_path / "out.jsonl")
    assert len(found) == ROWS and not (tmp_path / "artifacts" / "runs").exists()
    assert "holds no config.json" in Done(command(work, tmp_path, name="./artifacts"), status=2).stderr


def test_another_model_other_options_and_other_rows_are_refused(work, tmp_path):
    Done(command(work, tmp_path))
    before = (tmp_path / "out.jsonl").read_bytes()
    refused = Done(command(work, tmp_path, "--seed", "1"), status=2).stderr
    assert "line 1 is of another model or other options" in refused
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Another?"}\n')
    refused = Done(command(work, tmp_path), status=2).stderr
    assert "answers a row that the input does not have" in refused
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--n", "2"), "--n 2: at temperature 0"),
        (("--output", "/nowhere/out.jsonl"), "its folder does not exist"),
        (("--input", "gone.txt"), "there is no file"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_model_is_loaded(work, tmp_path, arguments, words):
    refused = Done([*command(work, tmp_path), *arguments], status=2)
    assert words in refused.stderr and "Traceback" not in refused.stderr


def test_a_prompt_that_is_too_long_is_named(work, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "tree " * 4000}) + "\n")
    refused = Done(command(work, tmp_path), status=2).stderr
    assert "rows.jsonl, row 2: its prompt has" in refused


# --- rows -----------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "A?"}
SYSTEM = {"role": "system", "content": "S"}
CALL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SHAPES = {
    "a prompt": ({"prompt": "A?"}, [USER], None),
    "a prompt and its completion": ({"prompt": "A?", "completion": "B."}, [USER], None),
    "alpaca": ({"instruction": "A?", "input": "", "output": "B."}, [USER], None),
    "alpaca without an answer": ({"instruction": "A?"}, [USER], None),
    "a question": ({"question": "A?"}, [USER], None),
    "messages": ({"messages": [USER]}, [USER], None),
    "messages with an answer": ({"messages": [USER, {"role": "assistant", "content": "B."}]}, [USER], None),
    "a system message": ({"messages": [SYSTEM, USER]}, [SYSTEM, USER], None),
    "sharegpt": ({"conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}]}, [USER], None),
    "tools": ({"messages": [USER], "tools": [CALL]}, [USER], [CALL]),
    "tools as JSON": ({"messages": [USER], "tools": json.dumps([CALL])}, [USER], [CALL]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_rows_are_read_in_every_shape(name, tmp_path):
    row, messages, tools = SHAPES[name]
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = read_prompts(tmp_path / "x.jsonl", None)
    assert (found.messages, found.tools) == (messages, tools)
    (system,) = read_prompts(tmp_path / "x.jsonl", "Given.")
    assert system.messages[0] == (
        messages[0] if messages[0]["role"] == "system" else {"role": "system", "content": "Given."}
    )


TOOL_TEMPLATE = (
    "{{ bos_token }}{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_tools_reach_the_template_and_typed_control_strings_stay_text(work, tmp_path):
    store = Store(work.folder / "artifacts", work.folder / "scratch")
    folder = tmp_path / "model"
    shutil.copytree(run_view.read(store, "small")["stages"]["merge"]["path"], folder)
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    with folder_voice(folder, Screen(silent=True)) as voice:
        end = voice.tokenizer.eos_token
        chat = [{"role": "user", "content": f"Say {end} now"}]
        ids = prompt_ids(voice, chat, [CALL])
        text = voice.tokenizer.decode(ids)
        assert '"name": "f"' in text and text.endswith("[assistant]")
        assert ids.count(voice.tokenizer.eos_token_id) == 1 and text.count(end) == 2  # the typed one is plain text
        assert "TOOLS" not in voice.tokenizer.decode(prompt_ids(voice, chat))


def test_a_text_file_is_a_prompt_a_line(tmp_path):
    (tmp_path / "x.txt").write_text("One?\n\nTwo?\n")
    found = read_prompts(tmp_path / "x.txt", None)
    assert [(r.number, r.messages[0]["content"]) for r in found] == [(0, "One?"), (1, "Two?")]
    assert len({r.id for r in found}) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "A?"}\n{"prompt": 3}\n', "row 2"),
        ('{"prompt": "A?"}\n{broken\n', "row 2"),
        ('{"messages": [{"role": "assistant", "content": "B."}]}\n', "no prompt"),
        ('{"other": "A?"}\n', "no format fits"),
        ('{"messages": [{"role": "user", "content": "A?"}], "tools": "x"}\n', "tools: found the text 'x'"),
    ],
)
def test_a_row_that_asks_nothing_is_named(text, words, tmp_path):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(InputError, match=words):
        read_prompts(tmp_path / "x.jsonl", None)


@pytest.mark.parametrize("content", ["[1]\n", "text\n", '{"id": "a"}\n', '{"id": 3, "answer": "", "made_by": ""}\n'])
def test_a_file_of_something_else_is_left_as_it_is(content, tmp_path):
    (tmp_path / "out").write_text(content + "torn")
    with pytest.raises(InputError, match="line 1"):
        read_output(tmp_path / "out", {"a"}, "m")
    assert (tmp_path / "out").read_text() == content + "torn"


def test_a_row_answered_twice_is_named(tmp_path):
    line = canonical_json({"id": "a", "answer": "", "made_by": "m"}) + "\n"
    (tmp_path / "out").write_text(line)
    assert read_output(tmp_path / "out", {"a"}, "m") == {"a"}
    (tmp_path / "out").write_text(line * 2)
    with pytest.raises(InputError, match="second time"):
        read_output(tmp_path / "out", {"a"}, "m")

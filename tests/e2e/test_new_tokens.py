"""`tokens.add` from base to GGUF: tied and untied bases, in spare rows of the embedding, with growth, and with both.

The merge is held to peft's own merge in fp32, the certificate's logits to the ordinary forward of each model.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from finetune.context import Context
from finetune.merge.blocks import merged_tensor
from finetune.merge.plan import plan_merge
from finetune.merge.unmerged import attach_empty
from finetune.models import loading
from finetune.models.layerwise import StreamedModel, empty_model
from finetune.models.new_tokens import read_new_tokens
from finetune.pipeline import runner
from finetune.pipeline.runs import Run
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.recipe.load import parse_recipe
from finetune.tiny.model import train_tokenizer
from finetune.utils.files import read_json
from finetune.utils.safetensors_io import read_folder
from tests.e2e.conftest import rows
from tests.helpers.tiny_models import load, save_tiny

PLACE, CALL = "<|place|>", "⟦call⟧"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
RECIPE = """\
schema: 1
name: more
model: {base}
tokens: {{add: ["<|place|>", "⟦call⟧"], special: {special}}}
data: [{{source: local, path: rows.jsonl, take: 60}}]
filter: null
dedup: null
split: {{eval_fraction: 0.1}}
render: {{max_length_tokens: 128}}
lora: {{r: 4, alpha: 8{saved}}}
train: {{learning_rate: 5e-3, max_steps: 4, batch_rows: 2, warmup_fraction: 0, optimizer: adamw}}
evaluate: {{max_rows: 4, generations: 1}}
certify: {{tokens: 150, base: original, min_agreement: 0.01, max_perplexity_ratio: 10}}
export: {{gguf: [f32]}}
"""


@dataclasses.dataclass(frozen=True)
class Finished:
    """A recipe that ran to its end; `known`: tokens of its base before."""

    base: Path
    known: int
    stages: dict[str, Path]
    metrics: dict[str, dict[str, Any]]
    recipe: Recipe
    said: list[str]
    scratch: Path


def finish(folder: Path, *, tied: bool, spare: int, special: bool, saved: str = "") -> Finished:
    data = [{**r, "output": f"{PLACE}{r['output']} {CALL}{PLACE}"} for r in rows()]
    texts = [f"[INST] {r['instruction']} [/INST] {r['output']}" for r in rows()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in data))
    tokenizer = train_tokenizer(texts, 400)
    base = save_tiny(folder / "base", "llama", vocab_size=len(tokenizer) + spare, tie_word_embeddings=tied)
    tokenizer.save_pretrained(base)
    text = RECIPE.format(base=json.dumps(str(base)), special=str(special).lower(), saved=saved)
    recipe = parse_recipe(text, folder / "more.yaml", [])
    store, said = Store(folder / "artifacts", folder / "scratch"), list[str]()
    ctx = Context(store.scratch, recipe.runtime, recipe.tracking, device="cpu", say=said.append)
    steps = runner.run(recipe, store, ctx, Run(store.artifacts, recipe.name, text, (), "0" * 8, write=False))
    return Finished(
        base,
        len(tokenizer),
        {s.stage.name: s.folder for s in steps if s.folder and s.manifest},
        {s.stage.name: dict(s.manifest.metrics) for s in steps if s.manifest},
        recipe,
        said,
        store.scratch,
    )


CASES = {
    "tied, grown": {"tied": True, "spare": 0, "special": True},
    "untied, one spare row and one grown": {"tied": False, "spare": 1, "special": False},
    "tied, spare": {"tied": True, "spare": 5, "special": False},
    "untied, spare": {"tied": False, "spare": 2, "special": True},
    "untied, grown, the embedding whole": {
        "tied": False, "spare": 0, "special": False, "saved": ", modules_to_save: [embed_tokens]",
    },
    "tied, grown, both whole": {
        "tied": True, "spare": 0, "special": False, "saved": ", modules_to_save: [embed_tokens, lm_head]",
    },
}  # fmt: skip
FAST = ("tied, grown", "untied, one spare row and one grown")


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in CASES])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish(tmp_path_factory.mktemp("tokens"), **CASES[request.param])


def test_rows_hold_each_new_token_as_one_id(done: Finished) -> None:
    place, call = done.known, done.known + 1
    ids = pq.read_table(done.stages["render"] / "train.parquet")["input_ids"].to_pylist()
    assert all(row.count(place) == 2 and row.count(call) == 1 for row in ids)
    for folder in (done.stages["base"], done.stages["train"] / "adapter", done.stages["merge"]):
        tokenizer = loading.load_tokenizer(folder)
        assert tokenizer.convert_tokens_to_ids([PLACE, CALL]) == [place, call]
        assert tokenizer.added_tokens_decoder[call].special == done.recipe.tokens.special
        assert (CALL in tokenizer.decode([call], skip_special_tokens=True)) != done.recipe.tokens.special


def merged_by_peft(done: Finished) -> dict[str, torch.Tensor]:
    """peft's own merge in fp32 on the base, resized as its users do it."""
    from peft import PeftModel

    original = load(done.base)
    size = max(done.known + 2, len(original.get_input_embeddings().weight))
    original.resize_token_embeddings(size, mean_resizing=False)
    return PeftModel.from_pretrained(original, done.stages["train"] / "adapter").merge_and_unload().state_dict()


def test_the_merge_is_pefts_and_old_rows_stay_bitwise(done: Finished) -> None:
    expected, whole = merged_by_peft(done), bool(done.recipe.lora.modules_to_save)
    found, report = loading_of(done.stages["merge"])
    assert not any(report.values()) and set(found) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6, msg=name)
    before = load(done.base).state_dict()
    new = [done.known, done.known + 1]
    for name in (EMBEDDING, HEAD):
        old = [i for i in range(len(before[name])) if i not in new]
        if name == EMBEDDING and whole:
            continue
        if not (whole and name == HEAD and "lm_head" in done.recipe.lora.modules_to_save):
            assert torch.equal(found[name][old], before[name][old])
        mean = before[name][: done.known].mean(0)
        assert not torch.equal(found[name][new[0]], found[name][new[1]])
        assert (found[name][new] - mean).abs().max() < 0.1  # four steps of 5e-3 from where they began
    size = max(done.known + 2, len(before[EMBEDDING]))
    assert read_json(done.stages["merge"] / "config.json")["vocab_size"] == size == len(found[EMBEDDING])


def loading_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.state_dict(), report


def test_the_base_that_is_trained_begins_at_the_mean(done: Finished) -> None:
    ctx = Context(done.scratch, done.recipe.runtime, done.recipe.tracking, device="cpu")
    state = torch.get_rng_state()
    model = loading.load_base(done.recipe.model, done.stages["base"], ctx, None, "fp32", "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    before = load(done.base).state_dict()
    for name in (EMBEDDING, HEAD):
        own = model.state_dict()[name]
        new = own[[done.known, done.known + 1]]
        torch.testing.assert_close(new, before[name][: done.known].mean(0).expand(2, -1), rtol=0, atol=1e-7)
        assert torch.equal(own[: done.known], before[name][: done.known])


def test_what_is_certified_is_the_ordinary_forward(done: Finished) -> None:
    ctx = Context(done.scratch, done.recipe.runtime, done.recipe.tracking, device="cpu")
    base, adapter = done.stages["base"], done.stages["train"] / "adapter"
    ids = (torch.arange(80).reshape(2, 40) * 7) % (done.known - 3) + 5  # the new tokens among them
    plan = plan_merge(done.base, adapter, "float32", tokens=read_new_tokens(base))
    plain = loading.load_base(done.recipe.model, base, ctx, None, "fp32", "cpu")
    trained, untied = empty_model(base), empty_model(base, untie=plan.untie)
    for streamed, ordinary in (
        (StreamedModel(trained, attach_empty(trained, adapter, plan)), loading.attach_adapter(plain, adapter)),
        (StreamedModel(untied, partial(merged_tensor, plan)), load(done.stages["merge"])),
    ):
        with torch.no_grad():
            expected = ordinary(input_ids=ids, use_cache=False).logits
        hidden = streamed.hidden([ids])[0]
        with streamed.head() as head:
            logits = head(hidden.reshape(-1, hidden.shape[-1])).reshape(expected.shape)
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)


def test_the_gguf_carries_the_vocabulary(done: Finished) -> None:
    import gguf

    reader = gguf.GGUFReader(done.stages["export"] / "model-f32.gguf")
    tokens, kinds = (reader.get_field(f"tokenizer.ggml.{n}").contents() for n in ("tokens", "token_type"))
    assert [tokens[done.known], tokens[done.known + 1]] == [PLACE, CALL]
    assert kinds[done.known] == (3 if done.recipe.tokens.special else 4)  # control, user-defined
    assert done.metrics["export"]["reload_difference"]["model-f32.gguf"] <= 1e-6


def test_the_adapter_holds_no_more_than_was_trained(done: Finished) -> None:
    names = {n for n in read_folder(done.stages["train"] / "adapter") if "lora_" not in n}
    rows = {f"base_model.model.{n}.token_adapter.trainable_tokens_delta" for n in ("model.embed_tokens", "lm_head")}
    whole = {f"base_model.model.{n}" for n in (EMBEDDING, HEAD)}
    saved = done.recipe.lora.modules_to_save
    tied = read_json(done.base / "config.json")["tie_word_embeddings"]
    if not saved:
        assert names == {n for n in rows if not tied or "embed" in n}
    else:
        assert names == {n for n in whole | rows if any(s in n for s in saved) == (n in whole)}

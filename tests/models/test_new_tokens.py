"""New tokens: in tokenizers of every kind, what is refused, and where, and what stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.context import Context
from finetune.errors import InputError
from finetune.lora import config as lora_config
from finetune.models.layerwise import empty_model
from finetune.models.loading import load_tokenizer
from finetune.models.new_tokens import NewTokens, add_to_tokenizer, embedding_rows, grow, with_rows
from finetune.pipeline.recipe_checks import absent, refuse_tokenizer
from finetune.recipe import Lora, Recipe, Runtime, Tokens, Tracking
from finetune.recipe.load import load_recipe
from finetune.stages import base as base_stage
from finetune.tokenization.encoder import Encoder, choose_pad
from finetune.utils.files import read_json, write_json
from tests.helpers import families
from tests.helpers.tiny_models import load, save_tiny
from tests.helpers.tiny_tokenizers import KINDS, build

NEW = ["<|sql|>", "⟦tool⟧", "two words"]


def added(folder: Path, kind: str, special: bool = False, texts: list[str] = NEW) -> NewTokens:
    build(kind).save_pretrained(folder)
    return add_to_tokenizer(folder, Tokens(add=texts, special=special), 5000, load_tokenizer)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_tokenizer_takes_them_and_keeps_its_own(kind: str, special: bool, tmp_path: Path) -> None:
    before = build(kind)
    found = added(tmp_path, kind, special)
    after = load_tokenizer(tmp_path)
    assert found.ids == tuple(range(len(before), len(before) + 3)) and found.rows == 5000
    assert after.convert_tokens_to_ids(NEW) == list(found.ids)
    assert {t: i for t, i in after.get_vocab().items() if i < len(before)} == before.get_vocab()
    for text in ("Where is the sea?", "x <s> y", " accents é ∑\n\n\tend"):
        assert after(text)["input_ids"] == before(text)["input_ids"]
    ids = after(f"a{NEW[0]}b {NEW[1]}", add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i in found.ids] == [found.ids[0], found.ids[1]]
    assert (NEW[1] in after.decode(ids, skip_special_tokens=True)) != special


def test_special_ones_are_tokens_in_rows_where_the_bases_own_stay_text(tmp_path: Path) -> None:
    found = added(tmp_path, "byte_level", special=True)
    tokenizer = load_tokenizer(tmp_path)
    encoder = Encoder(tokenizer, frozenset(NEW))
    assert not encoder.controls.in_text(f"a {NEW[0]}") and encoder.controls.in_text("a <|end_of_text|>")
    assert Encoder(tokenizer).controls.in_text(f"a {NEW[0]}")
    assert found.ids[0] in encoder.encode([f"a {NEW[0]}"])[0][0]


def test_a_new_token_pads_only_if_its_name_says_so(tmp_path: Path) -> None:
    added(tmp_path, "byte_level", special=True, texts=["<|sql|>", "<|my_pad|>"])
    tokenizer: Any = load_tokenizer(tmp_path)
    ours = {"<|sql|>", "<|my_pad|>"}
    others = [t.content for t in tokenizer.added_tokens_decoder.values() if t.content not in ours]
    assert choose_pad(tokenizer, " ".join(others), (), ours) == "<|my_pad|>"
    with pytest.raises(Exception, match=r"tokens: \{add: \[<pad>\], special: true\}"):
        choose_pad(tokenizer, " ".join([*others, "<|my_pad|>"]), (), ours)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<|end_of_text|>", r"is a token of the base already \(id 490\)"),
        ("a", "is a token of the base already"),
        ("<|end_of_text|> two", r"own token '<\|end_of_text\|>' is split into other ids"),
    ],
)
def test_what_the_base_has_or_would_lose_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        added(tmp_path, "byte_level", texts=["<|new|>", text])


@pytest.mark.parametrize(
    ("add", "words"),
    [
        ([], "tokens.add"),
        (["<a>", "<a>"], "<a> is listed twice"),
        ([""], "not only white space"),
        ([" \n"], "not only white space"),
        (["\ud800"], "unicode"),
        ([f"<{i}>" for i in range(10_001)], "10"),
    ],
)
def test_bad_lists_are_refused_by_the_recipe(add: list[str], words: str) -> None:
    recipe = {"name": "x", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}], "tokens": {"add": add}}
    with pytest.raises(ValueError, match=words):
        Recipe.model_validate(recipe)


RECIPE = """\
schema: 1
name: any
model: ./base
data: [{source: pydoc}]
tokens:
  add:
    - <|new|>
    - some
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("byte_level").save_pretrained(tmp_path / "base")
    save_tiny(tmp_path / "base", vocab_size=len(build("byte_level")) + 1)
    (tmp_path / "any.yaml").write_text(RECIPE.replace("some", "<|end_of_text|>"))
    return tmp_path


def test_a_token_that_is_there_is_refused_at_validate_and_plan_with_its_field(folder: Path) -> None:
    loaded = load_recipe(str(folder / "any.yaml"), [])
    (problem,) = absent(loaded)
    assert "any.yaml:8: tokens.add.1: '<|end_of_text|>' is a token of the base already (id 490)" in problem
    with pytest.raises(InputError, match=r"tokens\.add\.1: .*already"):
        refuse_tokenizer(loaded.recipe, None)
    (folder / "any.yaml").write_text(RECIPE.replace("some", "<|other|>"))
    fine = load_recipe(str(folder / "any.yaml"), [])
    assert not absent(fine)
    refuse_tokenizer(fine.recipe, None)


def test_the_base_stage_pins_them_and_the_key_follows(folder: Path) -> None:
    (folder / "any.yaml").write_text(RECIPE.replace("some", "<|other|>"))
    recipe, out = load_recipe(str(folder / "any.yaml"), []).recipe, folder / "out"
    out.mkdir()
    context = Context(scratch=folder / "scratch", runtime=Runtime(), tracking=Tracking(), device="cpu")
    metrics = base_stage.run(base_stage.spec(recipe), {}, out, context)
    known = len(build("byte_level"))
    assert read_json(out / "base.json")["tokens"] == {
        "add": ["<|new|>", "<|other|>"], "special": False, "known": known, "stored": known + 1, "rows": known + 2,
    }  # fmt: skip
    assert read_json(out / "config.json")["vocab_size"] == known + 2
    assert metrics["parameters"] == empty_model(out).num_parameters()
    again = base_stage.spec(recipe.model_copy(update={"tokens": None}))
    assert "tokens" not in again.model_dump(exclude_defaults=True)


@pytest.mark.parametrize("family", ["gemma3", "phi", "gpt_neox", "gemma2"])
def test_the_new_rows_are_the_mean_and_no_other_changes(family: str, tmp_path: Path) -> None:
    model = families.build(family)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    rows, state = embedding_rows(model), torch.get_rng_state()
    grow(model, NewTokens(("<a>", "<b>"), False, known=rows - 1, stored=rows, rows=rows + 1))
    assert torch.equal(torch.get_rng_state(), state) and embedding_rows(model) == rows + 1
    grown = 0
    for name, tensor in model.state_dict().items():
        if tensor.shape == before[name].shape:
            assert torch.equal(tensor, before[name]), name
            continue
        grown += 1
        mean = before[name][: rows - 1].mean(0)
        assert torch.equal(tensor[: rows - 1], before[name][: rows - 1])
        torch.testing.assert_close(tensor[rows - 1 :], mean.expand_as(tensor[rows - 1 :]))
    assert grown == sum(
        "embed" in n or "lm_head" in n or "embed_out" in n for n in before if before[n].shape[0] == rows
    )


def test_a_second_table_of_token_embeddings_is_refused() -> None:
    with pytest.raises(InputError, match="second table of token embeddings"):
        embedding_rows(families.build("gemma3n text"))


def test_rows_that_would_stay_untrained_are_refused(tmp_path: Path) -> None:
    tied = load(save_tiny(tmp_path / "tied", tie_word_embeddings=True))
    lora_config.check_tokens(Lora(), tied)
    lora_config.check_tokens(Lora(modules_to_save=["embed_tokens", "lm_head"]), tied)
    with pytest.raises(InputError, match=r"name both \(embed_tokens, lm_head\) or neither"):
        lora_config.check_tokens(Lora(modules_to_save=["embed_tokens"]), tied)
    biased = families.build("phi")
    with pytest.raises(InputError, match="head has a bias"):
        lora_config.check_tokens(Lora(), biased)
    lora_config.check_tokens(Lora(modules_to_save=["lm_head"]), biased)


def test_sizes_inside_a_wrapper_follow() -> None:
    assert with_rows({"vocab_size": 3, "text_config": {"a": 1}}, 5) == {
        "vocab_size": 5, "text_config": {"a": 1, "vocab_size": 5},
    }  # fmt: skip
    assert with_rows({"text_config": {}}, 5) == {"text_config": {"vocab_size": 5}}


def test_a_merge_refuses_an_adapter_without_their_rows(tmp_path: Path) -> None:
    from finetune.merge.plan import plan_merge
    from tests.helpers.tiny_models import adapted

    base = save_tiny(tmp_path / "base", tie_word_embeddings=False)
    tokens = NewTokens(("<a>",), False, known=128, stored=128, rows=129)
    model = load(base)
    grow(model, tokens)
    adapted(model, tmp_path / "adapter", trainable_token_indices={"embed_tokens": [128]})
    with pytest.raises(InputError, match=r"lm_head.weight: it does not hold the row of new token 128"):
        plan_merge(base, tmp_path / "adapter", "float32", tokens=tokens)
    assert json.dumps(tokens.as_json()) and write_json

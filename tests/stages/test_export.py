"""The export folder: files that read back, a Modelfile that speaks the template, the same bytes every time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.backends.ollama import Pieces, modelfile, read_pieces
from finetune.context import Metrics
from finetune.errors import FinetuneError, InputError
from finetune.recipe import Export, Recipe
from finetune.stages import export
from tests.base_templates import ALL, kind_of
from tests.stages.exported import merged
from tests.stages.finished import context
from tests.tiny_tokenizers import build

pytest.importorskip("gguf")


def run(folder: Path, out: Path, *kinds: str) -> Metrics:
    out.mkdir()
    return export.run(Export.model_validate({"gguf": kinds}), {"merge": folder}, out, context(out))


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_files_read_back_and_say_so(tmp_path: Path, kind: str) -> None:
    folder = merged(tmp_path / "merge", kind, "bfloat16")
    metrics: dict[str, Any] = run(folder, tmp_path / "out", "f32", "f16", "bf16", "q8_0")
    names = {f"model-{k}.gguf" for k in ("f32", "f16", "bf16", "q8_0")}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*names, "Modelfile"}
    assert metrics["bytes"] == {n: (tmp_path / "out" / n).stat().st_size for n in names}
    difference = metrics["reload_difference"]
    assert difference["model-f32.gguf"] == difference["model-bf16.gguf"] == 0.0
    assert difference["model-f16.gguf"] < 1e-6  # only what bfloat16 has below the smallest f16
    assert metrics["tokenizer_exact"] is True


def test_the_tokenizer_in_the_file_makes_the_same_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = merged(tmp_path / "merge", "qwen2")
    run(folder, tmp_path / "out", "f32")
    there = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model-f32.gguf")
    here = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "I've 3 cafés\n\n 12345"}]
    for text in (here.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), "The sea is wide.\n"):
        assert there(text)["input_ids"] == here(text)["input_ids"]
    assert there.chat_template == here.chat_template


def test_canonical_bytes(tmp_path: Path) -> None:
    folder = merged(tmp_path / "merge", tokens="metaspace")
    for name in ("first", "second"):
        run(folder, tmp_path / name, "bf16", "q4_0", "bf16")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_weights_that_read_back_as_others_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.backends import gguf_file

    folder = merged(tmp_path / "merge")
    monkeypatch.setattr(gguf_file, "permute", lambda weight, heads: weight)
    with pytest.raises(FinetuneError, match=r"blk\.0\.attn_k\.weight reads back as other weights"):
        run(folder, tmp_path / "out", "f32")


def test_the_modelfile(tmp_path: Path) -> None:
    run(merged(tmp_path / "merge"), tmp_path / "out", "q8_0", "f16")
    lines = (tmp_path / "out/Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model-q8_0.gguf"
    assert lines[1].startswith('TEMPLATE """{{ if .System }}{{ "<|im_start|>system\\n" }}{{ .System }}')
    assert lines[2:] == ['PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|end_of_text|>"']
    run(merged(tmp_path / "bos", tokens="sentencepiece"), tmp_path / "with_bos", "f16")
    text = (tmp_path / "with_bos/Modelfile").read_text()
    assert "<s>" not in text  # the tokenizer in the GGUF puts it there
    assert '{{ " [/INST]" }}' in text


@pytest.mark.parametrize("name", ALL)
def test_pieces_write_what_the_template_writes(name: str) -> None:
    tokenizer = build(kind_of(name), ALL[name])
    pieces = read_pieces(lambda chat, prompt: export._rendered(tokenizer, chat, prompt))
    assert pieces is not None  # read_pieces has compared a longer conversation itself
    assert '"""' not in modelfile("x.gguf", pieces, [], None).split('TEMPLATE """', 1)[1].rsplit('"""', 1)[0]


def test_a_template_that_is_no_row_of_turns_is_left_to_ollama(tmp_path: Path) -> None:
    assert read_pieces(lambda chat, prompt: f"{len(chat)} messages, " + " | ".join(m["content"] for m in chat)) is None
    assert "TEMPLATE" not in modelfile("x.gguf", None, ["</s>"], "<s>")
    assert "\\u0022\\u0022\\u0022" in modelfile("x.gguf", Pieces('"""', None, "", "", "", ""), [], None)


def test_other_models_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = merged(tmp_path / "merge")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["PhiForCausalLM"]}))
    with pytest.raises(InputError, match="no GGUF of PhiForCausalLM"):
        run(folder, tmp_path / "out", "f16")
    assert not list((tmp_path / "out").iterdir())


def test_without_the_package_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = merged(tmp_path / "merge")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="pip install gguf"):
        run(folder, tmp_path / "out", "f16")
    assert not list((tmp_path / "out").iterdir())


def test_it_is_off_unless_asked_for() -> None:
    recipe = {"name": "tiny", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}]}
    assert export.spec(Recipe.model_validate(recipe)) is None
    asked = Recipe.model_validate({**recipe, "export": {"gguf": ["f16"]}})
    assert export.spec(asked) == Export(gguf=["f16"])
    assert export.spec(asked.model_copy(update={"merge": None})) is None

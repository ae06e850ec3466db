"""The export folder: files that read back, a Modelfile that speaks the template, the same bytes every time."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.errors import FinetuneError, GateRefused, InputError
from finetune.eval.scoring import row_nll
from finetune.gguf import reader as gguf_reader
from finetune.gguf import scoring
from finetune.gguf import writer as gguf_writer
from finetune.gguf.writer import TYPES
from finetune.metrics import ExportMetrics
from finetune.recipe import Export, Recipe
from finetune.recipe.outlets import GgufKind
from finetune.stages import export
from finetune.tokenization.token_rows import read_token_rows
from tests.helpers.exported import merged
from tests.stages.finished import context, write_rows

pytest.importorskip("gguf")
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def run(
    folder: Path,
    out: Path,
    *kinds: str,
    rows: int = 0,
    tokens: int = 8192,
    say: Callable[[str], None] = lambda _: None,
    **fields: object,
) -> ExportMetrics:
    """Export a merged folder; with `rows`, random held-out rows of its vocabulary are scored."""
    out.mkdir()
    render = out.with_name(f"{out.name}-render")
    render.mkdir()
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(0)
    write_rows(render / "eval.parquet", [rng.integers(3, size, 20 + i).tolist() for i in range(rows)])
    asked = Export.model_validate({"gguf": kinds, "perplexity_rows": rows, **fields})
    return export.run(
        export.Spec(export=asked, tokens=tokens),
        {"merge": folder, "render": render},
        out,
        dataclasses.replace(context(out), say=say),
    )


def quantizer(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a stand-in for llama.cpp's program on the PATH: it shows the plumbing, not what a K-quant is."""
    folder.mkdir(exist_ok=True)
    path = folder / "llama-quantize"
    path.write_text(f"#!{sys.executable}\nimport shutil, sys\nsource, target, kind = sys.argv[1:]\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


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
    assert metrics["tokenizer_exact"] is (kind == "mistral")  # transformers has Qwen2 join accents to letters first
    assert metrics.get("tokenizer_differs", "").startswith("accents") is (kind == "qwen2")


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
    from finetune.gguf import writer as gguf_writer

    folder = merged(tmp_path / "merge")
    monkeypatch.setattr(gguf_writer, "permute", lambda weight, heads: weight)
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


def test_perplexity_of_every_file_beside_the_merged_model(tmp_path: Path) -> None:
    folder = merged(tmp_path / "merge", "qwen2", intermediate_size=128)
    metrics: dict[str, Any] = run(folder, tmp_path / "out", "q8_0", "f16", "q4_0", "f32", rows=24)
    found = metrics["perplexity"]
    assert list(found) == ["merged", "q8_0", "f16", "q4_0", "f32"] and metrics["perplexity_rows"] == 24
    assert found["f32"] == pytest.approx(found["merged"], rel=1e-5)
    assert found["f16"] == pytest.approx(found["merged"], rel=1e-3)
    away = {kind: abs(found[kind] / found["merged"] - 1) for kind in found}
    assert away["f16"] < away["q8_0"] < away["q4_0"]  # a random model need not be worse, only further away
    assert "perplexity_unknown" not in metrics


def by_transformers(folder: Path, out: Path, kind: str | None, rows: int) -> float:
    """The perplexity of a file as transformers reads it and runs it whole."""
    source = {"pretrained_model_name_or_path": folder} if kind is None else {"gguf_file": f"model-{kind}.gguf"}
    model = AutoModelForCausalLM.from_pretrained(
        **{"pretrained_model_name_or_path": out, **source}, dtype=torch.float32
    )
    held_out = read_token_rows(out.with_name(f"{out.name}-render") / "eval.parquet", rows)
    nll, counts = row_nll(model.eval(), held_out, 512, context(out), "")
    return float(np.exp(nll.sum() / counts.sum()))


@pytest.mark.parametrize("kind", ["mistral", "llama", "qwen2"])
def test_a_layer_at_a_time_scores_what_transformers_scores(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a large model, on a small one: with the rows of q and k left in llama.cpp's order it would fail."""
    shape = {"intermediate_size": 128, "tie_word_embeddings": kind == "qwen2"}
    folder, out = merged(tmp_path / "merge", kind, "bfloat16", **shape), tmp_path / "out"
    monkeypatch.setattr(export, "MAX_LOADED_PARAMETERS", 1000)
    metrics: dict[str, Any] = run(folder, out, "bf16", "q8_0", "q5_1", "q4_0", rows=12)
    assert metrics["not_loaded"].startswith("a model over 0 M parameters")
    assert metrics["reload_difference"] == {"model-bf16.gguf": 0.0}
    for name, value in metrics["perplexity"].items():
        assert value == pytest.approx(by_transformers(folder, out, None if name == "merged" else name, 12), rel=1e-5)
    shares = [metrics["agreement"][name] for name in ("bf16", "q8_0", "q5_1", "q4_0")]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and shares[-1] < 1
    apart = [metrics["mean_kl"][name] for name in ("bf16", "q8_0", "q5_1", "q4_0")]
    assert apart == sorted(apart) and abs(apart[0]) < 1e-9


def test_rows_left_in_llama_cpps_order_would_be_scored_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = merged(tmp_path / "merge")
    monkeypatch.setattr(export, "MAX_LOADED_PARAMETERS", 1000)
    right: dict[str, Any] = run(folder, tmp_path / "right", "q8_0", rows=6)
    monkeypatch.setattr(gguf_reader, "unpermute", lambda weight, heads: weight)
    wrong: dict[str, Any] = run(folder, tmp_path / "wrong", "q8_0", rows=6)
    assert abs(wrong["perplexity"]["q8_0"] / right["perplexity"]["q8_0"] - 1) > 1e-3
    monkeypatch.undo()
    monkeypatch.setattr(gguf_reader, "unpermute", lambda weight, heads: weight)
    with pytest.raises(FinetuneError, match=r"attn_[qk]\.weight reads back as other weights"):
        run(folder, tmp_path / "small", "q8_0")  # transformers reads it too


def test_a_large_model_is_scored_on_no_more_tokens_than_its_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = merged(tmp_path / "merge")
    monkeypatch.setattr(export, "MAX_LOADED_PARAMETERS", 1000)
    monkeypatch.setattr(scoring, "WORTH_SAYING_SECONDS", 0.0)
    said: list[str] = []
    metrics: dict[str, Any] = run(folder, tmp_path / "out", "q8_0", "q4_0", rows=20, tokens=100, say=said.append)
    assert metrics["perplexity_rows"] == 4 and metrics["perplexity_tokens"] == 20 + 21 + 22 + 23 - 4 * 4
    said = [line for line in said if "scoring" in line]
    assert len(said) == 1
    assert "the merged model and 2 files on 92 tokens, a layer at a time, takes about" in said[0]


def test_what_transformers_does_not_read_is_scored_all_the_same(tmp_path: Path) -> None:
    folder = merged(tmp_path / "merge", "llama", attention_bias=True)
    metrics: dict[str, Any] = run(folder, tmp_path / "out", "f32", rows=4)
    assert metrics["not_loaded"] == "it has no biases for Llama's GGUF"
    assert metrics["reload_difference"] == {"model-f32.gguf": 0.0}
    assert metrics["perplexity"]["f32"] == pytest.approx(metrics["perplexity"]["merged"], rel=1e-6)


def test_what_is_not_scored_says_why(tmp_path: Path) -> None:
    folder = merged(tmp_path / "merge")
    metrics = run(folder, tmp_path / "none", "f16")
    assert "perplexity" not in metrics and "perplexity_rows is 0" in str(metrics["perplexity_unknown"])


def test_a_block_that_is_not_finite_is_found_where_nothing_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = merged(tmp_path / "merge")
    run(folder, tmp_path / "fine", "q8_0")
    dequantized = gguf_reader.GgufWeights.__call__
    monkeypatch.setattr(gguf_reader.GgufWeights, "__call__", lambda self, name: dequantized(self, name) / 0)
    monkeypatch.setattr(export, "MAX_LOADED_PARAMETERS", 1000)  # transformers does not read it first
    with pytest.raises(FinetuneError, match=r"model-q8_0\.gguf: .* holds values that are not finite"):
        run(folder, tmp_path / "broken", "q8_0")
    with pytest.raises(FinetuneError, match="perplexity of q8_0 is nan"):
        run(folder, tmp_path / "scored", "q8_0", rows=4)


def test_k_quants_go_through_llama_quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer(tmp_path / "bin", "assert kind == 'Q4_K_M', kind; shutil.copy(source, target)", monkeypatch)
    folder = merged(tmp_path / "merge", dtype="bfloat16")
    metrics: dict[str, Any] = run(folder, tmp_path / "out", "q4_k_m", rows=4)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model-q4_k_m.gguf", "Modelfile"}  # its source is gone
    assert (tmp_path / "out/Modelfile").read_text().startswith("FROM ./model-q4_k_m.gguf\n")
    assert set(metrics["perplexity"]) == {"merged", "q4_k_m"}
    run(folder, tmp_path / "both", "q4_k_m", "bf16")
    same = [(tmp_path / "both" / f"model-{kind}.gguf").read_bytes() for kind in ("q4_k_m", "bf16")]
    assert same[0] == same[1]  # the stand-in copies: the exact file that was asked for was its source, and stays


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("print('main: failed to quantize'); sys.exit(1)", r"failed on q2_k \(status 1\): main: failed to quantize"),
        ("sys.exit(0)", r"failed on q2_k \(status 0\): no output"),
        (
            "import os; open(target, 'wb').write(b'half'); os.kill(os.getpid(), 9)",
            r"llama-quantize was killed by SIGKILL \(out of memory\?\) while it made q2_k",
        ),
        (
            "data = open(source, 'rb').read(); open(target, 'wb').write(data.replace(b'output_norm', b'output_morn'))",
            "other tensors, another template",
        ),
    ],
    ids=["fails", "writes nothing", "is killed", "writes another model"],
)
def test_a_quantizer_that_fails_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, words: str
) -> None:
    quantizer(tmp_path / "bin", body, monkeypatch)
    with pytest.raises(FinetuneError, match=words):
        run(merged(tmp_path / "merge"), tmp_path / "out", "q2_k")


def test_another_llama_quantize_is_another_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, plain = (export.Spec(export=Export(gguf=g), tokens=64) for g in (["q8_0", "q4_k_m"], ["q8_0"]))
    quantizer(tmp_path / "bin", "", monkeypatch)
    first = export.fingerprint(asked)
    assert first and export.fingerprint(asked) == first and export.fingerprint(plain) == {}
    (tmp_path / "bin/libggml-base.so.0").write_bytes(b"where a release keeps its arithmetic")
    second = export.fingerprint(asked)
    quantizer(tmp_path / "bin", "print()", monkeypatch)
    assert len({str(f) for f in (first, second, export.fingerprint(asked))}) == 3
    monkeypatch.setenv("PATH", str(tmp_path))
    assert export.fingerprint(asked) == {"llama_quantize": None}  # a plan is still made; to build it is refused


def test_without_llama_quantize_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.gguf.llama_cpp import K_QUANTS, require_quantizer

    assert set(get_args(GgufKind)) == {*TYPES, *K_QUANTS}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert require_quantizer(["q8_0", "f16"]) == ""
    with pytest.raises(InputError, match=r"q4_k_m is made by llama\.cpp's llama-quantize, .*releases") as error:
        run(merged(tmp_path / "merge"), tmp_path / "out", "q8_0", "q4_k_m")
    assert "\n" not in str(error.value) and not list((tmp_path / "out").iterdir())


def test_a_run_is_refused_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.pipeline import preflight, runner
    from finetune.pipeline.store import Store

    raw = {"name": "tiny", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}]}
    recipe = Recipe.model_validate({**raw, "export": {"gguf": ["q4_k_m"]}})
    steps = runner.plan(recipe, Store(tmp_path / "artifacts", tmp_path / "scratch"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="llama-quantize"):
        preflight.check(recipe, steps)
    preflight.check(recipe, steps[:-1])  # asked for an earlier stage only
    quantizer(tmp_path, "", monkeypatch)
    preflight.check(recipe, steps)


def test_it_is_off_unless_asked_for() -> None:
    recipe = {"name": "tiny", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}]}
    assert export.spec(Recipe.model_validate(recipe)) is None
    asked = Recipe.model_validate({**recipe, "export": {"gguf": ["f16"]}})
    assert export.spec(asked) == export.Spec(export=Export(gguf=["f16"]), tokens=8192)
    assert export.spec(asked.model_copy(update={"certify": None})) == export.spec(asked)
    assert export.spec(asked.model_copy(update={"merge": None})) is None


def test_quantised_folders_are_scored_beside_the_gguf_files(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder = merged(tmp_path / "merge", "mistral", "bfloat16", **WIDE)
    metrics: dict[str, Any] = run(
        folder, tmp_path / "out", "q8_0", rows=8, hf=["fp8", "w4a16", "nf4"], max_perplexity_ratio=1000
    )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model-q8_0.gguf", "Modelfile", "fp8", "w4a16", "nf4"}
    assert list(metrics["perplexity"]) == ["merged", "q8_0", "fp8", "w4a16", "nf4"]
    assert 1 > metrics["agreement"]["fp8"] > metrics["agreement"]["w4a16"]
    bits = metrics["bits_per_weight"]
    assert bits["merged"] == pytest.approx(16, abs=0.01) and bits["fp8"] > bits["nf4"] > bits["w4a16"]


def test_templates_beside_the_default_one_are_no_other_template_and_travel(tmp_path: Path) -> None:
    folder = merged(tmp_path / "merge", "mistral", "float16", **WIDE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    run(folder, tmp_path / "out", "f16", hf=["nf4"])
    facts = gguf_writer.read_facts(tmp_path / "out" / "model-f16.gguf")
    assert facts["template"] == (folder / "chat_template.jinja").read_text()
    assert (tmp_path / "out" / "nf4" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"


def test_folders_alone_need_no_gguf_and_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    folder = merged(tmp_path / "merge", "mistral", "float16", **WIDE)
    metrics: dict[str, Any] = run(folder, tmp_path / "out", hf=["nf4"])
    assert set(metrics) == {"bytes", "bits_per_weight", "perplexity_unknown"}


def test_a_file_that_costs_too_much_is_refused(tmp_path: Path) -> None:
    folder = merged(tmp_path / "merge", "mistral", "bfloat16", **WIDE)
    fine: dict[str, Any] = run(folder, tmp_path / "fine", "q8_0", rows=4, max_perplexity_ratio=1.5)
    assert fine["perplexity"]["q8_0"] < 1.5 * fine["perplexity"]["merged"]
    scores = {"merged": 10.0, "q8_0": 10.2, "w4a16": 15.1, "q2_k": 40.0}
    with pytest.raises(GateRefused, match=r"max_perplexity_ratio 1\.5 in w4a16 \(1\.51\), q2_k \(4\.00\)"):
        export._refuse_ruined(scores, 1.5)
    export._refuse_ruined(scores, 4.0)


def test_a_layer_that_transformers_runs_otherwise_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rounding of inputs, fp8's perplexity is not the one that transformers computes."""
    from finetune.quantized import reader

    pytest.importorskip("compressed_tensors")
    folder = merged(tmp_path / "merge", "mistral", "bfloat16", **WIDE)
    monkeypatch.setattr(reader, "NEAR", 1e-6)
    run(folder, tmp_path / "right", rows=6, hf=["fp8"], max_perplexity_ratio=1000)
    monkeypatch.setattr(reader.QuantizedWeights, "prepare", lambda self, model: None)
    with pytest.raises(FinetuneError, match="transformers computes perplexity"):
        run(folder, tmp_path / "wrong", rows=6, hf=["fp8"], max_perplexity_ratio=1000)

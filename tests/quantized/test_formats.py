"""Quantised folders: both readers agree, what each format costs, and which models have none."""

import pytest
import torch

from finetune.errors import FinetuneError, InputError
from finetune.quantized import formats, writer
from finetune.quantized.reader import QuantizedWeights
from finetune.utils.safetensors_io import read_folder
from tests.helpers.exported import merged
from tests.stages.finished import context

pytest.importorskip("compressed_tensors")
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
KINDS = ("fp8", "w4a16", "nf4")


def written(folder, kind, model="mistral", dtype="bfloat16", **config):
    source = merged(folder / "merge", model, dtype, **SHAPE, **config)
    planned = writer.plan(source, kind)
    writer.write(source, folder / kind, planned, context(folder))
    return source, folder / kind, planned


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_weights_that_the_definition_gives(tmp_path, kind, dtype, monkeypatch):
    monkeypatch.setattr(writer, "BLOCK_ELEMENTS", 128 * 7)  # blocks that do not divide the rows
    source, out, planned = written(tmp_path, kind, "qwen2", dtype)
    weights, refs = QuantizedWeights(out), read_folder(source)
    weights.require_loaded([], None, context(tmp_path))
    assert set(weights.quantized) == set(planned.quantized) and len(planned.quantized) == 14
    # half a step of each format: e4m3 has 3 bits of mantissa; 4 bits cut the largest value by half a step of 2/15
    for name in weights.quantized:
        w, found = refs[name].load().float(), weights(name)
        allowed = {"fp8": w.abs() / 16, "w4a16": torch.full_like(w, float(w.abs().max()) / 7.4)}.get(kind)
        allowed = float(w.abs().max()) * 0.2 if allowed is None else allowed + 2e-3 * w.abs().max()
        assert ((found - w).abs() <= allowed).all()
    for name in set(refs) - set(weights.quantized):
        assert torch.equal(weights(name), refs[name].load())


def test_a_reading_that_differs_from_transformers_is_found(tmp_path, monkeypatch):
    _, out, _ = written(tmp_path, "w4a16")
    right = QuantizedWeights._int4
    monkeypatch.setattr(QuantizedWeights, "_int4", lambda self, name, scale: right(self, name, scale) * 1.001)
    with pytest.raises(FinetuneError, match="as other weights"):
        QuantizedWeights(out).require_loaded([], None, context(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_zeros_and_a_large_one_stay_what_they_are(kind):
    rows = torch.zeros(4, 128, dtype=torch.float16)
    rows[1] = 60000.0
    for suffix in {"fp8": ("", "_scale"), "w4a16": ("_packed", "_scale"), "nf4": ("", ".absmax")}[kind]:
        made = {"fp8": writer._fp8, "w4a16": writer._int4, "nf4": writer._nf4}[kind](rows, suffix)
        assert made.float().isfinite().all()


def test_the_same_model_is_the_same_bytes(tmp_path):
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _, out, _ = written(tmp_path / name, "fp8")
        digests.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert digests[0] == digests[1]
    assert {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors"} <= set(digests[0])


def test_bytes_are_those_predicted(tmp_path):
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        source, out, planned = written(tmp_path / kind, kind, dtype="float32")
        refs = read_folder(source)
        matrices = [tuple(reversed(refs[n].shape)) for n in planned.quantized]
        others = sum(r.size_bytes // 4 for n, r in refs.items() if n not in planned.quantized)
        found = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        assert found == pytest.approx(formats.bytes_of(kind, matrices, others, 4), rel=0.02)


LLAMA = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512}


@pytest.mark.parametrize(
    ("config", "kinds", "words"),
    [
        ({}, KINDS, None),
        ({"hidden_size": 576}, ["w4a16"], "divisible by 128, found hidden_size 576; take fp8 or nf4"),
        ({"hidden_size": 576}, ["fp8", "nf4"], None),
        ({"intermediate_size": 1000}, ["nf4"], "divisible by 64, found intermediate_size 1000"),
        ({"head_dim": 24}, ["w4a16"], "found heads together 96"),
        ({"num_local_experts": 8}, ["fp8"], "mixture of experts"),
        ({"num_experts": 1}, ["fp8"], None),
        ({"text_config": {"a": 1}}, ["fp8"], "wrapper"),
        ({"auto_map": {"a": "b"}}, ["nf4"], "its own code"),
    ],
)
def test_which_models_have_the_formats(config, kinds, words):
    found = formats.problem({**LLAMA, **config}, kinds)
    assert found is None if words is None else words in found


def test_gpt2s_layers_are_refused():
    assert "hidden_size" in formats.problem({"model_type": "gpt2", "n_embd": 768}, ["fp8"])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    assert "pip install" in formats.missing(["nf4", "fp8"]) and formats.missing(["nf4"]) is None


def test_a_layer_whose_width_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    folder = merged(tmp_path / "merge", "mistral", **{**SHAPE, "intermediate_size": 200})
    with pytest.raises(InputError, match="w4a16 needs widths divisible by 128"):
        writer.plan(folder, "w4a16")

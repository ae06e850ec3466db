"""Loading a base: every weight is there, four bits are the four bits of training, and evaluating changes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import FinetuneError, InputError
from finetune.models import loading
from finetune.models.device import pick_device, pick_precision
from finetune.recipe import Model, Quantization
from finetune.utils.files import write_json
from tests.helpers.hub_server import LoopbackHub
from tests.helpers.pinned import NF4, Base, adapted, evaluate, gradients
from tests.helpers.quantized import dequantized_weight, quantized_modules
from tests.helpers.tiny_models import save_adapter


@pytest.fixture
def base(make_base: Callable[..., Base]) -> Base:
    return make_base()


# --- device and precision


def test_auto_takes_what_there_is() -> None:
    assert pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="sees no GPU"):
        pick_device("cuda")


def test_precision_on_a_cpu() -> None:
    assert pick_precision("auto", "cpu")[0] == "fp32"
    assert pick_precision("bf16", "cpu")[0] == "bf16"
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        pick_precision("fp16", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_precision_on_a_gpu_follows_its_generation() -> None:
    expected = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    assert pick_precision("auto", "cuda")[0] == expected


# --- four bits


def test_every_linear_layer_but_the_head_is_in_four_bits(base: Base) -> None:
    model = loading.load_base(*base, NF4, "fp32", "cpu")
    names = quantized_modules(model)
    assert len(names) == 2 * 7
    assert not [n for n in names if re.search(r"lm_head|embed|norm", n)]
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_nothing_is_quantised_unless_asked(base: Base) -> None:
    model = loading.load_base(*base, None, "bf16", "cpu")
    assert quantized_modules(model) == set()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("memory", [None, 1 << 40])
def test_gradients_after_an_evaluation_are_the_gradients_before(
    base: Base, memory: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "available_memory", lambda world: memory)
    model = adapted(loading.load_base(*base, NF4, "fp32", "cpu"))
    before = gradients(model)
    evaluate(model)
    after = gradients(model)
    assert len(before) == 2 * 7 * 2
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name


def test_bitsandbytes_still_repacks_weights_on_this_cpu(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """When this fails on a CPU with AVX512-BF16, `_keep_weights_unpacked` is no longer needed."""
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("only CPUs with AVX512-BF16 repack")
    monkeypatch.setattr(loading, "available_memory", lambda world: None)
    model = loading.load_base(*base, NF4, "fp32", "cpu")
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = True
    model = adapted(model)
    before = gradients(model)
    evaluate(model)
    after = gradients(model)
    wrong = [n for n, g in before.items() if (after[n] - g).norm() > 0.05 * g.norm()]
    assert len(wrong) > len(before) / 2


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_dequantised_weight_is_what_the_layer_multiplies_by(base: Base, kind: str, double: bool) -> None:
    model = loading.load_base(*base, Quantization(type=kind, double=double), "fp32", "cpu")
    layer = model.model.layers[0].mlp.down_proj
    evaluate(model)
    weight = dequantized_weight(layer)
    assert weight.shape == (64, 128)
    assert weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(layer(torch.eye(128)).T, weight, atol=1e-6)
    original = load_file(base[1] / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    error = ((weight - original).norm() / original.norm()).item()
    assert 0.02 < error < 0.2


# --- weights that do not fit


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_weight_is_fatal(base: Base) -> None:
    change_weights(base[1], lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(FinetuneError, match=r"missing model\.layers\.1\.mlp\.up_proj"):
        loading.load_base(*base, None, "fp32", "cpu")


def test_an_unexpected_weight_is_fatal(base: Base) -> None:
    change_weights(base[1], lambda t: t.update({"model.layers.0.mlp.extra.weight": torch.zeros(2)}))
    with pytest.raises(FinetuneError, match=r"unexpected model\.layers\.0\.mlp\.extra"):
        loading.load_base(*base, NF4, "fp32", "cpu")


def test_a_weight_of_another_shape_is_fatal(base: Base) -> None:
    change_weights(base[1], lambda t: t.update({"model.norm.weight": torch.zeros(3)}))
    with pytest.raises(FinetuneError, match=r"mismatch|size"):
        loading.load_base(*base, None, "fp32", "cpu")


def test_tied_embeddings_need_no_head(make_base: Callable[..., Base]) -> None:
    made = make_base(tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(made[1] / "model.safetensors")
    loading.load_base(*made, NF4, "fp32", "cpu")


def test_parameters_are_counted_from_the_configuration(base: Base) -> None:
    stored = sum(t.numel() for t in load_file(base[1] / "model.safetensors").values())
    assert loading.count_parameters(base[1]) == stored
    (base[1] / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match="no causal language model"):
        loading.count_parameters(base[1])


# --- adapters


def test_an_adapter_is_attached_and_frozen(base: Base, tmp_path: Path) -> None:
    trained = save_adapter(base[1], tmp_path / "adapter")
    model = loading.attach_adapter(loading.load_base(*base, None, "fp32", "cpu"), tmp_path / "adapter")
    assert not [n for n, p in model.named_parameters() if p.requires_grad]
    assert torch.allclose(evaluate(model), evaluate(trained), atol=1e-5)


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_an_adapter_whose_keys_do_not_fit_is_fatal(base: Base, tmp_path: Path, change: str) -> None:
    save_adapter(base[1], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if change == "missing":
        del tensors[name]
    else:
        name = name.replace("layers.0", "layers.7")
        tensors[name] = torch.zeros(4, 64)
    save_file(tensors, file)
    with pytest.raises(FinetuneError, match=re.escape(name)):
        loading.attach_adapter(loading.load_base(*base, None, "fp32", "cpu"), tmp_path / "adapter")


def test_a_folder_without_an_adapter_is_said_to_be_one(base: Base, tmp_path: Path) -> None:
    with pytest.raises(FinetuneError, match=r"no adapter_model\.safetensors"):
        loading.attach_adapter(loading.load_base(*base, None, "fp32", "cpu"), tmp_path)


# --- files


def test_local_paths_do_not_travel(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    write_json(tmp_path / "from" / "tokenizer_config.json", {"name_or_path": "/home/me/model", "bos_token": "<s>"})
    (tmp_path / "from" / "tokenizer.model").write_bytes(b"\0pieces")
    loading.copy_tokenizer(tmp_path / "from", tmp_path / "to")
    assert json.loads((tmp_path / "to" / "tokenizer_config.json").read_text()) == {"bos_token": "<s>"}
    assert (tmp_path / "to" / "tokenizer.model").read_bytes() == b"\0pieces"
    assert len(list((tmp_path / "to").iterdir())) == 2


def test_the_pad_token_of_training_is_written_down(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"pad_token": "</s>", "bos_token": "<s>"})
    write_json(tmp_path / "special_tokens_map.json", {"pad_token": {"content": "</s>"}})
    loading.set_pad_token(tmp_path, "<pad>")
    read = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert read == {"pad_token": "<pad>", "bos_token": "<s>"}
    assert json.loads((tmp_path / "special_tokens_map.json").read_text()) == {"pad_token": "<pad>"}


def test_a_folder_that_changed_since_it_was_pinned_is_refused(base: Base, tmp_path: Path) -> None:
    _, folder, context = base
    model = Model.model_validate(str(folder))
    pinned = tmp_path / "pinned"
    pinned.mkdir()
    digest = loading.file_digest(folder / "model.safetensors")
    write_json(pinned / "base.json", {"revision": None, "weights": {"model.safetensors": digest}})
    assert loading.ensure_base(model, pinned, context) == folder
    change_weights(folder, lambda t: t["model.norm.weight"].add_(1))
    with pytest.raises(InputError, match="not the file this run began with"):
        loading.ensure_base(model, pinned, context)


def planted(hub: LoopbackHub, folder: Path, **files: bytes | None) -> str:
    content: dict[str, Any] = {p.name: p.read_bytes() for p in folder.iterdir()} | {"README.md": b"# hello"}
    content |= {"consolidated.safetensors": b"twice", "onnx/model.safetensors": b"elsewhere"}
    content |= {name.replace("__", "."): c for name, c in files.items()}
    return hub.plant("lab/model", {n: c for n, c in content.items() if c is not None})


def test_weights_come_from_the_hub_and_come_again_if_they_are_gone(
    base: Base, hub: LoopbackHub, tmp_path: Path
) -> None:
    import shutil

    _, folder, context = base
    commit = planted(hub, folder)
    model = Model(id="lab/model", revision="main")
    pinned = tmp_path / "pinned"
    pinned.mkdir()
    write_json(pinned / "base.json", {"revision": commit, "weights": {}})
    small = loading.hub_snapshot(model, commit, context, weights=False)
    assert not list(small.glob("*.safetensors"))
    where = loading.ensure_base(model, pinned, context)
    assert {p.name for p in where.iterdir()} >= {"config.json", "model.safetensors"}
    assert not {p.name for p in where.iterdir()} & {"consolidated.safetensors", "onnx", "README.md"}
    asked = len(hub.requests)
    assert loading.ensure_base(model, pinned, context) == where
    assert len(hub.requests) == asked  # all there: the network is not needed
    shutil.rmtree(context.scratch)
    assert (loading.ensure_base(model, pinned, context) / "model.safetensors").exists()


def test_pickled_weights_are_refused(base: Base, hub: LoopbackHub) -> None:
    _, folder, context = base
    commit = planted(hub, folder, model__safetensors=None, pytorch_model__bin=b"pickle")
    with pytest.raises(InputError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        loading.hub_snapshot(Model(id="lab/model"), commit, context, weights=False)


def test_a_missing_shard_is_no_model(tmp_path: Path) -> None:
    write_json(tmp_path / loading.INDEX, {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    assert loading.weight_files(tmp_path) == []
    (tmp_path / "model-2.safetensors").write_bytes(b"")
    assert [p.name for p in loading.weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors", "weights.bin"])
def test_an_index_cannot_name_a_file_outside_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write_json(tmp_path / "base" / loading.INDEX, {"weight_map": {"a": name}})
    with pytest.raises(InputError, match=re.escape(repr(name))):
        loading.weight_files(tmp_path / "base")

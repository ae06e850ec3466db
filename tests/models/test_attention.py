"""Documents of a packed row do not see each other under any attention there is here, and the right one is chosen."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune.errors import FinetuneError
from finetune.models import attention, loading, trial
from finetune.recipe import Model, Runtime
from finetune.utils.files import write_json
from tests.helpers import varlen_reference
from tests.helpers.tiny_models import VOCABULARY, save_tiny
from tests.helpers.tiny_models import load as load_tiny
from tests.helpers.trainings import assert_close, documents, job, packed, trained

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= attention.LEAST_CAPABILITY
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a GPU of sm80 or newer")]
BACKENDS = [
    "sdpa",
    "eager",
    varlen_reference.NAME,
    attention.BY_DOCUMENT,
    *(
        pytest.param(name, marks=NEEDS_GPU)
        for name in (attention.VARLEN, "flash_attention_2", "flash_attention_3", "flash_attention_4")
    ),
]
KINDS = {"mistral": {"sliding_window": 6}, "llama": {}, "qwen2": {}, "gemma2": {"attn_logit_softcapping": None}}
LENGTHS = (9, 1, 14, 5)


def usable(name):
    """The name, registered where it has to be; skips without the package."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

    packages = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_3": is_flash_attn_3_available,
        "flash_attention_4": is_flash_attn_4_available,
    }
    if name in packages and not packages[name]():
        pytest.skip(f"{name} is not installed")
    if name == varlen_reference.NAME:
        varlen_reference.register()
    if name == attention.VARLEN:
        attention.register(name, attention.torch_kernel())
    if name == attention.BY_DOCUMENT:
        attention.register(name, attention.by_document)
    return name


def flattened(ids, device="cpu"):
    """What TRL's padding-free collator makes of documents of LENGTHS."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(
        [{"input_ids": ids.tolist(), "seq_lengths": list(LENGTHS)}]
    )
    batch.pop("labels")
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_logits_and_gradients_are_those_of_each_document_alone(tmp_path, backend, kind):
    name = usable(backend)
    on_gpu = name not in ("sdpa", "eager", varlen_reference.NAME, attention.BY_DOCUMENT)
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    if kind == "gemma2" and name == "sdpa":
        pytest.skip("transformers has no SDPA for it")
    base = save_tiny(tmp_path / "base", kind, **KINDS[kind])
    ids = torch.randint(3, VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(5))

    def pass_through(kept, given):
        model = load_tiny(base).to(device, dtype)
        model.set_attn_implementation(kept)
        logits = torch.cat([model(**batch, use_cache=False).logits[0] for batch in given])
        logits.float().square().mean().backward()
        return logits.detach().float(), torch.cat([p.grad.float().flatten() for p in model.parameters()])

    alone = [{"input_ids": part[None].to(device)} for part in ids.split(LENGTHS)]
    expected = pass_through("eager", alone)
    found = pass_through(name, [flattened(ids, device)])
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < (0.03 if on_gpu else 2e-6)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("version", varlen_reference.VERSIONS)
def test_every_version_of_torchs_function_is_called_by_what_it_takes(version, window):
    kernel = varlen_reference.kernel(version)
    place = {"device": "cpu", "dtype": torch.float32}
    if version == "2.10" and window:
        with pytest.raises(ValueError, match="no sliding window"):
            attention.deviation(kernel, 4, 2, 16, place, window=window)
        return
    assert attention.deviation(kernel, 4, 2, 16, place, window=window) < 1e-6


def test_a_wrong_kernel_shows_in_the_trial():
    def blind(query, key, value, bounds, longest, scale, window):
        whole = torch.tensor([0, len(query)], dtype=torch.int32)
        return varlen_reference.kernel()(query, key, value, whole, len(query), scale, window)

    assert attention.deviation(blind, 4, 2, 16, {"device": "cpu", "dtype": torch.float32}) > attention.TRIAL_TOLERANCE


def test_this_torchs_own_function_takes_what_it_is_given():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    seen = {}

    def caught(*tensors, **options):
        seen.update(inspect.signature(varlen.varlen_attn).bind(*tensors, **options).arguments)
        return tensors[0]

    kernel = attention.adapted(caught, inspect.signature(varlen.varlen_attn).parameters)
    query, key = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8)
    kernel(query, key, key, torch.tensor([0, 6], dtype=torch.int32), 6, 0.3, 5)
    assert (seen["max_q"], seen["max_k"], seen["scale"]) == (6, 6, 0.3)
    assert seen["window_size"] == (4, 0)  # beside the own token


def test_padded_rows_go_another_way_and_rows_without_bounds_or_mask_are_refused(tmp_path):
    name = varlen_reference.register()
    model = load_tiny(save_tiny(tmp_path / "base", sliding_window=6))
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 7:] = mask[2, 10:] = 0
    for rows in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}):
        found = []
        for kept in ("sdpa", name):
            model.set_attn_implementation(kept)
            with torch.no_grad():
                found.append(model(**rows, use_cache=False).logits[mask.bool()])
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-5)
    heads, groups = torch.zeros(1, 4, 12, 16), torch.zeros(1, 2, 12, 16)
    with pytest.raises(FinetuneError, match="neither the documents' bounds nor a mask"):
        ALL_ATTENTION_FUNCTIONS[name](model.model.layers[0].self_attn, heads, groups, groups, None)


def test_several_packed_rows_at_once_train_what_one_at_a_time_does(load, base, ctx, tmp_path):
    name = varlen_reference.register()
    rows = packed(documents(), tmp_path)
    one = trained(job(tmp_path, "one"), load(), base, rows, ctx)[1]
    model = load()
    model.set_attn_implementation(name)
    two_a_time = dataclasses.replace(ctx, runtime=Runtime(save_steps=100, micro_batch_rows=2))
    result, two = trained(job(tmp_path, "two"), model, base, rows, two_a_time)
    assert result.micro_batch_rows == 2
    assert_close(one, two)


# --- what is chosen


def said(tmp_path, *arguments, **config):
    lines = []
    folder = save_tiny(tmp_path / "base", **config)
    return attention.choose(*arguments, folder, lines.append), lines


def test_on_a_cpu_packed_documents_are_computed_one_by_one(tmp_path):
    name, lines = said(tmp_path, "cpu", True, "fp32")
    assert name == attention.BY_DOCUMENT and attention.is_varlen(name)
    assert lines == ["attention by_document: each packed document alone"]
    assert said(tmp_path, "cpu", False, "fp32") == ("sdpa", ["attention sdpa: the rows are not packed"])


def test_a_base_whose_tiny_copy_differs_keeps_its_dense_mask(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "deviation", lambda *_: 0.4)
    name, lines = said(tmp_path, "cpu", True, "fp32")
    assert name == "sdpa" and "40% off" in lines[0]


@pytest.mark.parametrize("window", [None, 4, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_one_by_one_are_sdpa_of_each(window, dtype, monkeypatch):
    monkeypatch.setattr(attention, "SHORT", 6)
    place = {"device": "cpu", "dtype": dtype}
    off = attention.deviation(attention.by_document, 4, 2, 16, place, window)
    assert off < (1e-5 if dtype is torch.float32 else 0.02)


def test_capped_scores_take_eager(tmp_path):
    assert said(tmp_path, "cpu", True, "fp32", kind="gemma2")[0] == "eager"


@pytest.mark.parametrize(
    "precision, settings, why",
    [
        ("fp32", {}, "computes in 16 bits"),
        ("bf16", {"attention_dropout": 0.1}, "drops out"),
        ("bf16", {"head_dim": 264}, "no heads of 264"),
        ("bf16", {}, None),
    ],
)
def test_what_a_kernel_cannot_do_is_said(monkeypatch, precision, settings, why):
    monkeypatch.setattr(attention, "_capability", lambda _: (8, 0))
    found = attention._missing("cuda", precision, {"num_attention_heads": 4, "hidden_size": 64, **settings})
    assert (found is None) if why is None else (why in found)


@pytest.mark.parametrize(
    "wrong, name", [(None, attention.VARLEN), ("says: no kernel for this GPU", "sdpa"), ("outputs are 40% off", "sdpa")]
)
def test_on_a_gpu_that_has_it_the_kernel_is_taken_if_its_trial_went_well(tmp_path, monkeypatch, wrong, name):
    monkeypatch.setattr(attention, "_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention, "_trial", lambda *_: wrong)
    monkeypatch.setattr(attention, "_model_trial", lambda *_: None)
    found, lines = said(tmp_path, "cuda", True, "bf16")
    assert found == name and attention.is_varlen(found) == (wrong is None)
    assert wrong is None or wrong in lines[0]


@pytest.mark.parametrize("off, name", [(0.0, attention.VARLEN), (0.4, "sdpa")])
def test_a_tiny_copy_of_the_base_must_compute_the_same(off, name, tmp_path, monkeypatch):
    """gpt-oss hands its attention sinks, Llama 4 its chunks: a kernel that does not heed them would train without."""
    monkeypatch.setattr(attention, "_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention, "_trial", lambda *_: None)
    monkeypatch.setattr(attention, "torch_kernel", varlen_reference.kernel)
    monkeypatch.setattr(trial, "deviation", lambda *_: off)
    lines = []
    assert attention.choose("cuda", True, "bf16", save_tiny(tmp_path / "base", "llama"), lines.append) == name
    assert ("40% off" in lines[0]) == (name == "sdpa")


def test_names_that_are_told_where_documents_end():
    assert [attention.is_varlen(n) for n in (attention.VARLEN, attention.BY_DOCUMENT, "flash_attention_2", "sdpa")] == [
        True, True, True, False,
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU of sm80 or newer")
def test_on_a_gpu_packed_rows_take_a_variable_length_kernel(tmp_path):
    name, lines = said(tmp_path, "cuda", True, "bf16")
    assert attention.is_varlen(name), lines


def test_a_base_whose_scores_are_capped_loads(tmp_path, ctx):
    folder = save_tiny(tmp_path / "base", "gemma2")
    write_json(folder / "base.json", {"id": "builtin:tiny-mistral", "kind": "builtin", "revision": None})
    model = loading.load_base(Model.model_validate("builtin:tiny-mistral"), folder, ctx, None, "fp32", "cpu")
    assert model.config._attn_implementation == "eager"

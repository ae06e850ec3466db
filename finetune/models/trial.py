"""Test an architecture's features on a tiny copy: the same configuration with small sizes and random weights.

Whether documents can be packed into one row, and which attention computes what the eager one does, are properties of
the architecture's code, and no list of names keeps up with them.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import has_no_memory
from finetune.models.architecture import KNOWN
from finetune.utils.files import read_json
from finetune.utils.format import first_line
from finetune.utils.limits import memory_is_short
from finetune.utils.quiet import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

DOCUMENTS = (13, 21, 6)  # tokens; longer than the reduced sliding window
VOCABULARY, WINDOW, CAP = 96, 8, 1.0
LARGEST = 60_000_000  # parameters of a copy: more take seconds
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}  # RMS of the logits' difference, of their own
VISIBLE = 0.01  # what documents that see each other must change at least, or the trial proves nothing


@dataclass(frozen=True)
class Facts:
    """Results of the trial. `packing` is None if documents can be packed, else why they cannot."""

    packing: str | None
    attention: str  # "sdpa", or "eager" where the architecture has no SDPA or computes something else in it
    training: str | None = None  # why TRL cannot train it; None if it can, or was not tried
    quantized: str | None = None  # why it cannot be trained in 4 bits, likewise

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


def try_architecture(base: Path, *, trust_remote_code: bool = False) -> Facts:
    """Try the architecture of the config.json in `base` on the CPU, in fp32; the random generators are left alone."""
    with _seeded():
        attention = _attention(base, trust_remote_code)
        packing = _packing(base, attention, trust_remote_code)
        if read_json(base / "config.json").get("model_type") in KNOWN:
            return Facts(packing, attention)  # known to be trained as they should: no library for training is imported
        training = _training(base, attention, trust_remote_code)
        return Facts(packing, attention, training, training or _quantized(base, attention, trust_remote_code))


def deviation(
    base: Path, attention: str, device: str = "cpu", precision: str = "fp32", *, trust_remote_code: bool = False
) -> float:
    """How far the logits of packed documents under `attention` are from those of each alone under the architecture's
    ordinary attention: RMS, of their own. Raises what the model's code raises.
    """
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with _seeded():
        copied: Any = tiny_copy(base, attention, trust_remote_code=trust_remote_code)  # mypy knows no `to` of it
        model: PreTrainedModel = copied.to(device)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not torch.float32):
            packed = _logits(model, [DOCUMENTS])
        ordinary = _attention(base, trust_remote_code)
        model.set_attn_implementation(ordinary)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not torch.float32):
            alone = _logits(model, [(n,) for n in DOCUMENTS])
    return _relative(packed, alone)


def _attention(base: Path, trust_remote_code: bool) -> str:
    """SDPA if the architecture has it and it computes what the eager attention does."""
    try:
        model = tiny_copy(base, "sdpa", trust_remote_code=trust_remote_code)
        fast = _logits(model, [(n,) for n in DOCUMENTS])
    except FAILURES as error:
        refuse_no_memory(error)
        return "eager" if _is_built(base, "eager", trust_remote_code) else "sdpa"
    try:
        model.set_attn_implementation("eager")
        slow = _logits(model, [(n,) for n in DOCUMENTS])
    except FAILURES as error:
        refuse_no_memory(error)
        return "sdpa"  # an architecture that has nothing else
    return "sdpa" if _relative(fast, slow) <= TOLERANCE["fp32"] else "eager"


def _training(base: Path, attention: str, trust_remote_code: bool) -> str | None:
    """Whether TRL's head, which never holds all logits, gives the log-probabilities of the model's own."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    try:
        model: Any = tiny_copy(base, attention, trust_remote_code=trust_remote_code)
    except FAILURES as error:
        refuse_no_memory(error)
        return None  # nothing is known
    ids = torch.randint(3, VOCABULARY, (1, DOCUMENTS[0]), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    expected = own[:, :-1].gather(-1, ids[:, 1:, None]).sum()
    try:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        with torch.no_grad():
            log_likelihood = (
                model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False).log_probs.float().sum()
            )
    except FAILURES as error:
        refuse_no_memory(error)
        return f"TRL's training forward fails ({_first_line(error, base)})"
    if not torch.allclose(log_likelihood, expected, rtol=TOLERANCE["fp32"]):
        return "TRL's training forward gives other log-probabilities than the model's own"
    return None


def _quantized(base: Path, attention: str, trust_remote_code: bool) -> str | None:
    """Whether a copy whose matrices bitsandbytes holds in 4 bits runs at all."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    auto: Any = AutoModelForCausalLM
    settings: Any = BitsAndBytesConfig
    try:
        # Beside what is built, so that a full disk is named by its folder.
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=base) as folder, quiet():
            tiny_copy(base, attention, trust_remote_code=trust_remote_code).save_pretrained(folder)
            if trust_remote_code:
                for code in base.glob("*.py"):
                    shutil.copy(code, folder)
            four = settings(load_in_4bit=True)
            options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "attn_implementation": attention}
            model = auto.from_pretrained(folder, quantization_config=four, device_map={"": "cpu"}, **options)
            for module in model.modules():
                module.support_avx512bf16_for_cpu = False  # as loading.load_base has it; others read no such name
            _logits(model.train(), [(6,)])  # some code runs in training alone
    except FAILURES as error:
        refuse_no_memory(error)
        return f"its code fails on matrices in 4 bits ({_first_line(error, base)})"
    return None


def _is_built(base: Path, attention: str, trust_remote_code: bool) -> bool:
    try:
        tiny_copy(base, attention, trust_remote_code=trust_remote_code)
    except FAILURES as error:
        refuse_no_memory(error)
        return False
    return True


def _packing(base: Path, attention: str, trust_remote_code: bool) -> str | None:
    try:
        model = tiny_copy(base, attention, trust_remote_code=trust_remote_code)
        alone = _logits(model, [(n,) for n in DOCUMENTS])
    except FAILURES as error:
        refuse_no_memory(error)
        return f"a tiny copy of it cannot be tried ({_first_line(error, base)})"
    try:
        packed = _logits(model, [DOCUMENTS])
    except FAILURES as error:
        refuse_no_memory(error)
        return f"its code fails on packed rows ({_first_line(error, base)})"
    if not _relative(_logits(model, [(sum(DOCUMENTS),)]), alone) >= VISIBLE:
        return "whether documents see each other does not show in a tiny copy of it"
    return None if _relative(packed, alone) <= TOLERANCE["fp32"] else "packed documents see each other"


FAILURES = (
    AttributeError, AssertionError, ImportError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


def refuse_no_memory(error: BaseException) -> None:
    """Raise MemoryError if memory ran out: this is no result of the trial, and trial results are stored."""
    if has_no_memory(error) or memory_is_short():
        raise MemoryError("none was left for the trial of the architecture") from error


def _logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits (T, vocabulary) fp32 of the same tokens, in `rows`, each a list of the lengths of its documents.

    A row of several documents is given what TRL's padding-free collator gives a model.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (sum(DOCUMENTS),), generator=generator)
    parts, start = [], 0
    for lengths in rows:
        given: dict[str, Any] = {"input_ids": ids[start : start + sum(lengths)][None]}
        start += sum(lengths)
        if len(lengths) > 1:
            bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            number = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))
            given |= {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None], "seq_idx": number[None]}
            given |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            given |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        given = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        with torch.no_grad():
            parts.append(model(**given, use_cache=False).logits[0].float())
    return torch.cat(parts)


def _relative(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).pow(2).mean().sqrt() / second.pow(2).mean().sqrt().clamp(min=1e-12))


# --- the copy -------------------------------------------------------------------------------------------------------


def tiny_copy(base: Path, attention: str | None = None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A random model in fp32 and eval mode of the configuration in `base`, with small sizes: every kind of layer, every
    switch and multiplier stays. Sizes that its code does not take together are left as they are, layers apart.

    Raises RuntimeError if no copy can be built in under `LARGEST` parameters.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    error: Exception = RuntimeError("its configuration has no layers")
    for widths in (True, False):
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, local_files_only=True)
        reduce(config, widths=widths)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the copy has plain matrices
        settings: dict[str, Any] = {"attn_implementation": attention, "trust_remote_code": trust_remote_code}
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in auto.from_config(copy.deepcopy(config), **settings).parameters())
            if size > LARGEST:
                raise RuntimeError(f"the smallest copy has {size / 1e6:.0f} M parameters")
            model: PreTrainedModel = auto.from_config(config, dtype=torch.float32, **settings)
        except FAILURES as failed:
            refuse_no_memory(failed)
            error = failed
            continue
        _fill(model)
        return model.eval()
    raise RuntimeError(_first_line(error)) from error


def _fill(model: PreTrainedModel) -> None:
    """Random weights large enough that attention, caps and multipliers show in the logits."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(noise * (0.02 if parameter.ndim == 1 else 0.15))


SMALL: Mapping[str, int] = {  # attribute → the most it is in a tiny copy
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "n_positions": 256, "image_size": 28,
    "max_position_embeddings": 256, "sliding_window": WINDOW, "attention_chunk_size": WINDOW, "window_size": WINDOW,
    "attention_window_size": WINDOW, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4,
    "moe_num_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0,
}  # fmt: skip
NARROW: Mapping[str, int] = {
    "intermediate_size": 96, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "ffn_dim": 96,
    "intermediate_size_mlp": 96, "n_inner": 96, "head_dim": 16, "global_head_dim": 16, "q_lora_rank": 24,
    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "rotary_dim": 8,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "hidden_size_per_layer_input": 8, "lru_width": 64,
    "word_embed_proj_dim": 32, "qk_head_dim": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip


def reduce(config: PreTrainedConfig, *, widths: bool = True) -> None:
    """Make the sizes in `config`, and in the configurations inside it, small, in place."""
    for part in _parts(config):
        _keep_few_layers(part)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if hasattr(part, name):
                setattr(part, name, None)
        for name, most in {**SMALL, **(NARROW if widths else {})}.items():
            value = getattr(part, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > most:
                setattr(part, name, most)
        if widths:
            _narrow_heads(part)
        for name, value in list(vars(part).items()):
            if "softcap" in name and isinstance(value, float):
                setattr(part, name, min(value, CAP))  # low enough to be reached


def _keep_few_layers(part: PreTrainedConfig) -> None:
    layers = int(getattr(part, "num_hidden_layers", 0) or 0)
    if not layers:
        return
    kept = _layers_kept(part, layers)
    for name, value in list(vars(part).items()):
        if isinstance(value, list | tuple) and len(value) == layers:
            setattr(part, name, list(value)[:kept])
    part.num_hidden_layers = kept
    if getattr(part, "num_kv_shared_layers", None):
        part.num_kv_shared_layers = 0
    if getattr(part, "first_k_dense_replace", None):
        part.first_k_dense_replace = 1


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name, value in vars(config).items():
        if name.endswith("_config") and hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _parts(value)


def _layers_kept(part: PreTrainedConfig, layers: int) -> int:
    """The fewest first layers with one of every kind, two at least."""
    kinds = getattr(part, "layer_types", None) or getattr(part, "layers_block_type", None)
    if not kinds or len(kinds) != layers:
        return min(layers, 2)
    return min(layers, max(2, max(list(kinds).index(kind) for kind in set(kinds)) + 1))


def _narrow_heads(part: PreTrainedConfig) -> None:
    """Four query heads of 16, with the shares of key-value heads that there are; hidden size 64."""
    heads = getattr(part, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        return
    groups = getattr(part, "num_key_value_heads", None)
    part.num_attention_heads = min(heads, 4)
    if isinstance(groups, int):
        part.num_key_value_heads = max(1, min(groups, part.num_attention_heads * groups // heads))
    if isinstance(getattr(part, "hidden_size", None), int):
        part.hidden_size = 16 * part.num_attention_heads


@contextmanager
def _seeded() -> Iterator[None]:
    """With the same random numbers every time; the generators are put back."""
    import torch

    from finetune.utils.runtime import RandomState

    before = RandomState.now()
    torch.manual_seed(0)
    try:
        yield
    finally:
        before.restore()


def _first_line(error: Exception, base: Path | None = None) -> str:
    """The first line of an error, without the folder: the same base gives the same words anywhere."""
    text = first_line(error)
    return (text.replace(str(base), "the base") if base else text)[:160]

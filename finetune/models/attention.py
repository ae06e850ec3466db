"""Which attention a training uses, and kernels that take the bounds of documents, as transformers calls one.

With SDPA each micro-batch of packed rows carries a dense (T, T) mask, which no fused kernel takes and which grows with
the square of its tokens. A GPU has torch's variable-length kernel; a CPU computes one document after the other.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError
from finetune.models.inventory import FILE
from finetune.utils.files import read_json
from finetune.utils.format import first_line

if TYPE_CHECKING:
    import torch

    # query (T, H, D), key and value (T, K, D), bounds of documents (N + 1,) int32, longest, scale, window → (T, H, D)
    Kernel = Callable[..., torch.Tensor]

VARLEN = "torch_varlen"  # transformers looks for a package of its own where a name holds "flash"
BY_DOCUMENT = "by_document"  # on a CPU
SHORT = (
    256  # tokens of a document whose attention is computed in fp32 on a CPU: torch 2.13's bf16 kernel is slower there
)
LEAST_CAPABILITY = (8, 0)  # of the GPU: flash kernels need Ampere
HEAD_SIZES = 256  # the largest head that torch's flash kernel has
BEYOND_SOFTMAX = ("softcap", "s_aux")  # what transformers hands to an attention for capped scores and for sinks
TRIAL_TOLERANCE = 0.03  # of outputs and gradients, relative: bf16 has 8 bits


def is_varlen(name: str) -> bool:
    """Return whether attention `name` gets the document ends of a packed row, and so supports several rows at once."""
    return name in (VARLEN, BY_DOCUMENT) or name.startswith("flash_attention")


def choose(
    device: str,
    packed: bool,
    precision: str,
    base: Path,
    say: Callable[[str], None],
    *,
    trust_remote_code: bool = False,
) -> str:
    """The attention to train with, in transformers' words, and a line with the reason.

    `base` is a folder with config.json. Variable-length attention is taken if rows are packed, on a GPU and in a
    precision that have it, after a trial on that GPU with the base's heads and with a tiny copy of the base; elsewhere
    that of `ordinary`.
    """
    settings = settings_of(base, trust_remote_code=trust_remote_code)
    name, why = _choice(device, packed, precision, base, settings, trust_remote_code)
    say(f"attention {name}: {why}")
    return name


def _choice(
    device: str, packed: bool, precision: str, base: Path, settings: Mapping[str, Any], trust_remote_code: bool
) -> tuple[str, str]:
    plainly = ordinary(base, trust_remote_code=trust_remote_code)
    if not packed:
        return plainly, "the rows are not packed"
    if device == "cpu" and plainly == "sdpa" and not trust_remote_code:
        wrong = _model_trial(BY_DOCUMENT, base, device, precision)
        if wrong is None:
            return BY_DOCUMENT, "each packed document alone"
        return plainly, f"one packed row at a time with a dense mask: documents one by one failed ({wrong})"
    missing = _missing(device, precision, settings)
    if trust_remote_code:
        missing = "the model brings its own code"
    if missing:
        return plainly, f"one packed row at a time with a dense mask, for {missing}"
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    tried = base, device, precision
    if is_flash_attn_3_available() and _capability(device)[0] == 9 and not _model_trial("flash_attention_3", *tried):
        return "flash_attention_3", "the package is installed and takes the bounds of documents"
    wrong = _trial(device, precision, settings) or _model_trial(VARLEN, *tried)
    if wrong is None:
        return VARLEN, "torch's variable-length kernel takes the bounds of documents"
    if is_flash_attn_2_available() and not _model_trial("flash_attention_2", *tried):
        return "flash_attention_2", "the package is installed and takes the bounds of documents"
    return plainly, f"one packed row at a time with a dense mask: torch's variable-length kernel failed ({wrong})"


def _model_trial(name: str, base: Path, device: str, precision: str) -> str | None:
    """Return the error of attention `name` in a tiny copy of the base on this device, or None."""
    from finetune.models import trial

    try:
        off = trial.deviation(base, prepared(name, base), device, precision)
    except (FinetuneError, *trial.FAILURES) as error:
        trial.refuse_no_memory(error)
        return f"in a tiny copy of the base: {first_line(error)}"
    if not off <= trial.TOLERANCE[precision]:
        return f"packed documents of a tiny copy of the base have logits that are {off:.0%} off"
    return None


def ordinary(base: Path, *, trust_remote_code: bool = False) -> str:
    """The attention that every device has: by the base stage's trial, else that of `plain`."""
    path = base / FILE
    if path.is_file():
        return str(read_json(path)["attention"])
    return plain(settings_of(base, trust_remote_code=trust_remote_code))


def plain(settings: Mapping[str, Any]) -> str:
    """Return the fallback for every device: SDPA, or eager if scores are capped (Gemma 2), which SDPA does not
    support.
    """
    return "eager" if settings.get("attn_logit_softcapping") else "sdpa"


def settings_of(base: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The text model's configuration, its defaults filled in. Raises FinetuneError for one that cannot be read."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            base, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise FinetuneError(f"{base / 'config.json'} cannot be read: {error}") from error
    return dict(config.get_text_config().to_dict())


def _missing(device: str, precision: str, settings: Mapping[str, Any]) -> str | None:
    """Return the missing requirement of a variable-length kernel, or None."""
    if not device.startswith("cuda") or _capability(device) < LEAST_CAPABILITY:
        return "a variable-length kernel needs a GPU of sm80 or newer"
    if precision == "fp32":
        return "a variable-length kernel computes in 16 bits"
    if settings.get("attention_dropout"):
        return "the base drops out attention weights"
    size = _heads(settings)[2]
    if size > HEAD_SIZES or size % 8:
        return f"a variable-length kernel has no heads of {size}"
    return None


def _capability(device: str) -> tuple[int, int]:
    import torch

    from finetune.models.device import gpu_index

    return torch.cuda.get_device_capability(gpu_index(device))


def _heads(settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """Heads, key-value heads, and the size of one."""
    heads = int(settings["num_attention_heads"])
    size = settings.get("head_dim") or settings["hidden_size"] // heads
    return heads, int(settings.get("num_key_value_heads") or heads), int(size)


# --- torch's kernel -------------------------------------------------------------------------------------------------


def torch_kernel() -> Kernel:
    """The variable-length attention of torch, causal within each document. Raises ImportError before torch 2.10."""
    from torch.nn.attention.varlen import varlen_attn

    return adapted(varlen_attn, inspect.signature(varlen_attn).parameters)


def by_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """A kernel for CPUs: causal SDPA of one document after the other."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    dtype, lengths = query.dtype, bounds.diff().tolist()
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    done = []
    for own in zip(*(t.transpose(0, 1)[None].split(lengths, 2) for t in (query, key, value)), strict=True):
        count = own[0].shape[2]
        q, k, v = (t.float() for t in own) if count <= SHORT else own
        mask = None if window is None or count <= window else _seen(torch.arange(count)[None], window)
        done.append(scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale).to(dtype))
    return torch.cat(done, 2)[0].transpose(0, 1)


def adapted(varlen_attn: Callable[..., Any], parameters: Collection[str]) -> Kernel:
    """`varlen_attn` by what its version takes: torch 2.10 has only `is_causal`; then came `scale` and `window_size`
    (tokens to the left and right beside the own one), at last `enable_gqa`.

    The kernel raises ValueError for a window that the version does not know.
    """

    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bounds: torch.Tensor,
        longest: int,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        options: dict[str, Any] = {}
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        elif query.shape[1] != key.shape[1]:
            key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
        if "window_size" in parameters:
            options["window_size"] = (-1 if window is None else window - 1, 0)
        elif window is None:
            options["is_causal"] = True
        else:
            raise ValueError("this torch's varlen_attn has no sliding window")
        if "scale" in parameters:
            options["scale"] = scale
        else:
            query = query * (scale * math.sqrt(query.shape[-1]))  # its own scale is 1 / √D
        out: torch.Tensor = varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)
        return out

    return kernel


def _trial(device: str, precision: str, settings: Mapping[str, Any]) -> str | None:
    """Return the error of torch's kernel on this GPU, with the base's heads and window, or None."""
    import torch

    from finetune.models.device import gpu_index

    heads, groups, size = _heads(settings)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    place = {"device": f"cuda:{gpu_index(device)}", "dtype": dtype}
    try:
        kernel = torch_kernel()
        off = deviation(kernel, heads, groups, size, place)
        if settings.get("sliding_window"):
            off = max(off, deviation(kernel, heads, groups, size, place, window=4))
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        return f"says: {first_line(error)}"
    return None if off <= TRIAL_TOLERANCE else f"outputs or gradients are {off:.0%} off"


def deviation(
    kernel: Kernel, heads: int, groups: int, size: int, place: Mapping[str, Any], window: int | None = None
) -> float:
    """How far `kernel` is from SDPA of each document alone, in outputs and gradients, relative (the largest of them).

    `place` names device and dtype. Leaves the random generators alone.
    """
    import torch

    lengths = (5, 12, 1)
    bounds = torch.tensor([0, *lengths], device=place["device"]).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(0)

    def values(count: int) -> torch.Tensor:
        return torch.randn(sum(lengths), count, size, generator=generator).to(**place).requires_grad_()

    inputs = [values(heads), values(groups), values(groups)]
    weights = torch.randn(sum(lengths), heads, size, generator=generator).to(place["device"])
    scale = 0.5 / math.sqrt(size)
    output = kernel(*inputs, bounds, max(lengths), scale, window)
    plainly = [t.detach().float().requires_grad_() for t in inputs]
    documents = zip(*(t.split(lengths) for t in plainly), strict=True)
    expected = torch.cat([_one_document(q, k, v, scale, window) for q, k, v in documents])
    pairs = [(output, expected)]
    gradients = (
        torch.autograd.grad((o.float() * weights).sum(), i) for o, i in ((output, inputs), (expected, plainly))
    )
    pairs += zip(*gradients, strict=True)
    return max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)


def _one_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    import torch

    mask = _seen(torch.arange(len(query), device=query.device)[None], window)[0, 0]
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(0, 1)


# --- as transformers calls it ---------------------------------------------------------------------------------------


def prepared(name: str | None, base: Path, *, trust_remote_code: bool = False) -> str:
    """The `attn_implementation` to load `base` with; a kernel of this module is registered first."""
    if name is None:
        return ordinary(base, trust_remote_code=trust_remote_code)
    if name == VARLEN:
        register(VARLEN, torch_kernel())
    if name == BY_DOCUMENT:
        register(BY_DOCUMENT, by_document)
    return name


def register(name: str, kernel: Kernel) -> None:
    """Make `kernel` an attention of transformers, under `name`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, partial(_forward, kernel))
    AttentionMaskInterface.register(name, _mask)


def _mask(*sizes: int, attention_mask: torch.Tensor | None = None, **settings: object) -> torch.Tensor | None:
    """No mask for packed rows (the kernel takes document bounds); for padded ones that of SDPA."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None:
        return None
    settings |= {"attention_mask": attention_mask, "allow_is_causal_skip": False}
    dense: Callable[..., torch.Tensor | None] = sdpa_mask
    return dense(*sizes, **settings)


def _forward(
    kernel: Kernel,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: torch.Tensor | None = None,
    **more: object,
) -> tuple[torch.Tensor, None]:
    """An attention of transformers: query (B, H, T, D), key and value (B, K, T, D) in; (B, T, H, D) out.

    TRL's padding-free collator gives the bounds of the documents. Rows that come without them (held-out ones, padded)
    go through SDPA with a dense mask. Raises FinetuneError if nothing defines which tokens see each other.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if asked := [name for name in BEYOND_SOFTMAX if more.get(name) is not None]:
        raise FinetuneError(f"the architecture's attention has {asked[0]}, which this kernel does not compute")
    if attention_mask is None and cu_seq_lens_q is not None and max_length_q is not None and not dropout:
        autocast = torch.is_autocast_enabled(query.device.type)
        dtype = torch.get_autocast_dtype(query.device.type) if autocast else query.dtype
        flat = (t.transpose(1, 2).flatten(0, 1).to(dtype) for t in (query, key, value))  # (T, heads, D)
        window = sliding_window if sliding_window and sliding_window < max_length_q else None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = kernel(*flat, cu_seq_lens_q, max_length_q, scale, window)
        return out.unflatten(0, (query.shape[0], query.shape[2])), None
    if attention_mask is None:
        if position_ids is None or query.shape[2] != key.shape[2]:
            raise FinetuneError("variable-length attention was given neither the documents' bounds nor a mask")
        attention_mask = _seen(position_ids, sliding_window)
    dense: Callable[..., tuple[torch.Tensor, None]] = sdpa_attention_forward
    return dense(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False, **more)


def _seen(position_ids: torch.Tensor, window: int | None) -> torch.Tensor:
    """(B, 1, T, T) bool: which tokens each one sees; documents begin where `position_ids` (B, T) are 0."""
    import torch

    document = (position_ids == 0).cumsum(-1)
    place = torch.arange(position_ids.shape[-1], device=position_ids.device)
    behind = place[:, None] - place[None, :]
    seen = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    return ((document[:, :, None] == document[:, None, :]) & seen)[:, None]

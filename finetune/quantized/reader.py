"""Read a quantised folder back: by the formats' own definitions, and by transformers.

Nothing here uses the writer, compressed-tensors or bitsandbytes to turn stored values into weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune.context import Context
from finetune.errors import FinetuneError
from finetune.eval.scoring import row_nll
from finetune.tokenization.token_rows import TokenRow
from finetune.utils.files import read_json
from finetune.utils.quiet import quiet
from finetune.utils.safetensors_io import read_folder, torch_dtype

# Appendix E of the QLoRA paper, https://arxiv.org/abs/2305.14314
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP8_MAX = 448.0
FIRST_TOKENS = 8  # of the forward that makes compressed-tensors decompress a model
NEAR = 0.01  # largest relative difference of a perplexity that transformers computes from the one computed here


class QuantizedWeights:
    """The weights of a quantised folder by their names in the merged folder, one in memory at a time."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`; only headers are read."""
        self.folder = folder
        self.settings: dict[str, Any] = read_json(folder / "config.json")["quantization_config"]
        self._refs = read_folder(folder)
        ends = (".weight_scale", ".weight.absmax")
        names = (name.removesuffix("_scale").removesuffix(".absmax") for name in self._refs if name.endswith(ends))
        self.quantized = tuple(names)

    def __call__(self, name: str) -> torch.Tensor:
        """Return the tensor `name`: fp32 if it is quantised, else as stored."""
        if name not in self.quantized:
            return self._refs[name].load()
        if f"{name}.absmax" in self._refs:
            return self._nf4(name)
        scale = self._refs[f"{name}_scale"].load().float()
        if name in self._refs:
            return self._refs[name].load().float() * scale
        return self._int4(name, scale)

    def _int4(self, name: str, scale: torch.Tensor) -> torch.Tensor:
        rows, width = self._refs[f"{name}_shape"].load().tolist()
        packed = self._refs[f"{name}_packed"].load()
        weight = torch.empty(rows, width)
        for place in range(8):
            weight[:, place::8] = ((packed >> (4 * place)) & 15) - 8.0
        weight.view(rows, scale.shape[1], -1).mul_(scale.unsqueeze(2))
        return weight

    def _nf4(self, name: str) -> torch.Tensor:
        state = json.loads(bytes(self._refs[f"{name}.quant_state.bitsandbytes__nf4"].load().tolist()))
        packed, scale = self._refs[name].load().view(-1), self._refs[f"{name}.absmax"].load()
        weight = torch.empty(len(packed), 2)
        for place, codes in enumerate((packed >> 4, packed & 15)):
            weight[:, place] = torch.tensor(NF4)[codes.int()]
        weight = weight.view(len(scale), state["blocksize"]).mul_(scale.unsqueeze(1))
        return weight.view(state["shape"]).to(torch_dtype(state["dtype"])).float()

    def require_finite(self) -> None:
        """Read every quantised weight. Raises FinetuneError if a value is not finite."""
        for name in self.quantized:
            if not self(name).isfinite().all():
                raise FinetuneError(f"{self.folder.name}: {name} holds values that are not finite")

    def prepare(self, model: PreTrainedModel) -> None:
        """Make the linear layers of `model` round their inputs as the format does: fp8, one scale per token."""
        groups = self.settings.get("config_groups") or {}
        if not any(group["input_activations"] for group in groups.values()):
            return
        kept = set(self.settings["ignore"])
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name not in kept:
                module.register_forward_pre_hook(lambda _, inputs: (_through_fp8(inputs[0]), *inputs[1:]))

    def require_loaded(self, rows: Sequence[TokenRow], perplexity: float | None, ctx: Context) -> None:
        """Load the folder with transformers, in fp32 on the CPU, and compare.

        compressed-tensors and bitsandbytes turn what is stored into weights, which must be those read here; `rows` must
        have the perplexity that was computed here, to 1 %. Raises FinetuneError if one differs.
        """
        with ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(redirect_stderr(StringIO()))  # bars and lines of compressed-tensors
            model = load(self.folder)
            if "config_groups" in self.settings:
                with torch.inference_mode():
                    model(torch.ones(1, FIRST_TOKENS, dtype=torch.int64))
            loaded = _weights(model)
        for name in self.quantized:
            if name not in loaded or not torch.equal(loaded[name], self(name)):
                raise FinetuneError(
                    f"{self.folder.name}: {name} is read by transformers as other weights; this is a mistake in this "
                    "program"
                )
        if perplexity is None:
            return
        nll, counts = row_nll(model, rows, 4096, ctx, f"{self.folder.name} in transformers")
        theirs = math.exp(nll.sum() / counts.sum())
        if not abs(theirs / perplexity - 1) <= NEAR:
            raise FinetuneError(
                f"{self.folder.name}: transformers computes perplexity {theirs:.6g}, its weights give "
                f"{perplexity:.6g}; this is a mistake in this program"
            )


def load(folder: Path) -> PreTrainedModel:
    """Return the model of a quantised folder as transformers loads it, computing in fp32 on the CPU."""
    # typed Any: transformers' auto classes carry no annotations
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # bitsandbytes' layers compute in the dtype of config.json
            module.compute_dtype = torch.float32
    return model.eval()


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights of a loaded model by name, fp32, decompressed by its own library."""
    weights = {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        value = parameter.data if state is None else dequantize_4bit(parameter.data, state)
        weights[name] = value.float()
    return weights


def _through_fp8(values: torch.Tensor) -> torch.Tensor:
    """Round to float8_e4m3fn and back, with the scale of each token's (last dimension's) largest magnitude."""
    scale = (values.abs().amax(dim=-1, keepdim=True) / FP8_MAX).clamp(min=torch.finfo(values.dtype).tiny)
    return (values / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(values.dtype) * scale

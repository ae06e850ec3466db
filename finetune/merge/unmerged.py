"""The unmerged trained model for a streamed forward: peft's modules on an empty model, weights loaded by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

from finetune.errors import InputError
from finetune.merge.blocks import merged_tensor
from finetune.merge.deltas import PREFIX
from finetune.merge.plan import MergePlan
from finetune.models.device import widen_saved
from finetune.models.layerwise import Weights
from finetune.utils.safetensors_io import read_file

INSIDE = (
    ".token_adapter.base_layer",
    ".base_layer",
    ".original_module",
)  # names under which peft's modules keep the base's module


def attach_empty(model: PreTrainedModel, adapter: Path, plan: MergePlan) -> Weights:
    """Put the adapter's modules, unmerged, into `model` (from `empty_model`); return a function that loads its weights.

    The base's weights are those of `plan` before its changes: through 4 bits if planned, as stored in training
    (bitsandbytes multiplies by the dequantised weight, so a plain layer with those values is the same model). The
    adapter's tensors are in fp32, as trained. Raises InputError if the model has no module for one of them.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    config.inference_mode = True
    for target in plan.targets.values():
        if target.round_trip is not None:
            model.get_submodule(target.module).register_forward_hook(_as_in_four_bits)
    attached = get_peft_model(model, config, low_cpu_mem_usage=True).eval()
    widen_saved(attached)
    own = dict(attached.named_parameters(remove_duplicate=False))
    saved = get_peft_model_state_dict(attached, state_dict=own, save_embedding_layers=False)
    keys = {id(parameter): key for key, parameter in saved.items()}
    places = {n: keys.get(id(p), PREFIX + n) for n, p in model.named_parameters(remove_duplicate=False)}
    places |= {n: PREFIX + n for n, _ in model.named_buffers()}
    stored = read_file(adapter / "adapter_model.safetensors")
    if lost := sorted(set(stored) - set(places.values())):
        raise InputError(f"{adapter}: the base has no module for the adapter tensor {lost[0]}")
    bare = replace(plan, targets={n: replace(t, changes=()) for n, t in plan.targets.items()})

    def weights(name: str) -> torch.Tensor:
        if places[name] in stored:
            return stored[places[name]].load()
        for part in INSIDE:
            name = name.replace(part, "")
        return merged_tensor(bare, name)

    return weights


def _as_in_four_bits(module: torch.nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """Cast the output to the input's dtype, as `Linear4bit.forward` does. If fully trained modules make the residual
    stream fp32, autocast would return 16 bits, and so would the sum with the adapter.
    """
    return output.to(given[0].dtype)

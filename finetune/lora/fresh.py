"""Write an adapter that changes nothing yet: every B matrix is zero."""

from __future__ import annotations

import math
from pathlib import Path

from finetune.errors import InputError
from finetune.lora.start import CONFIG, WEIGHTS
from finetune.metrics import TrainMetrics
from finetune.recipe import Lora
from finetune.utils.files import read_json, write_json


def write_zero_adapter(lora: Lora, base: Path, target: Path, seed: int, trust_remote_code: bool) -> TrainMetrics:
    """Write the recipe's adapter as peft initialises it: A uniform in ±1/√(its inputs), from `seed`; B zero; fp32.

    `base` is a finished base stage; none of its weights are read.

    Returns:
        {"tensors", "trainable_parameters"}: how many, and their elements.

    Raises:
        InputError: the recipe trains more than A and B matrices, whose start would be the base's own values.
    """
    import torch
    from peft import get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    from finetune.lora.config import lora_config
    from finetune.models.layerwise import empty_model

    model = empty_model(base, trust_remote_code=trust_remote_code)
    config = lora_config(lora, model)
    shapes = get_peft_model_state_dict(get_peft_model(model, config, low_cpu_mem_usage=True))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, empty in sorted(shapes.items()):
        if ".lora_A." in name:
            bound = 1 / math.sqrt(empty[0].numel())
            tensors[name] = torch.empty(empty.shape).uniform_(-bound, bound, generator=generator)
        elif ".lora_B." in name:
            tensors[name] = torch.zeros(empty.shape)
        else:
            raise InputError(f"lora: an adapter that begins at zero holds A and B matrices only, and this has {name}")
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(target / WEIGHTS), metadata={"format": "pt"})
    config.save_pretrained(str(target))
    pinned, written = read_json(base / "base.json"), read_json(target / CONFIG)
    written |= {"base_model_name_or_path": pinned["id"], "revision": pinned["revision"], "inference_mode": True}
    if isinstance(written.get("target_modules"), list):
        written["target_modules"] = sorted(written["target_modules"])
    write_json(target / CONFIG, written)
    return {"tensors": len(tensors), "trainable_parameters": sum(t.numel() for t in tensors.values())}

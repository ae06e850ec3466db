"""The 4-bit weights of a model, read through bitsandbytes."""

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit


def quantized_modules(model: torch.nn.Module) -> set[str]:
    """Names of the modules whose weights are held in 4 bits."""
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def dequantized_weight(module: torch.nn.Module) -> torch.Tensor:
    """(out_features, in_features) fp32, with the rounding to the dtype that the model was loaded in."""
    weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight.reshape(module.out_features, module.in_features).float()

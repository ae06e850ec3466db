"""Two-layer models and small adapters with random weights, saved as transformers and peft save them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

VOCABULARY = 128


def save_tiny(folder: Path, kind: str = "mistral", dtype: str = "float32", seed: int = 0, **config: Any) -> Path:
    """Save a random `kind` model (mistral, llama, qwen2, …; hidden 64, 2 layers) in `folder` and return it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **config,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 if parameter.ndim == 1 else 0.15))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    """The model in `folder`, in fp32 and eval mode."""
    import torch
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def save_adapter(base: Path, folder: Path, seed: int = 1, size: float = 0.05, **lora: Any) -> PeftModel:
    """Save an adapter on `base` with every trainable tensor moved at random; returns the model that carries it."""
    return adapted(load(base), folder, seed, size, **lora)


def adapted(model: PreTrainedModel, folder: Path, seed: int = 1, size: float = 0.05, **lora: Any) -> PeftModel:
    """The same on a model that is loaded, and is changed."""
    import torch
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **lora}
    torch.manual_seed(seed)
    carrying: PeftModel = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in carrying.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    carrying.eval().save_pretrained(folder)
    return carrying

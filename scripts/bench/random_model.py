"""A random bf16 checkpoint of Mistral's shape and a LoRA adapter for it, as peft saves one; for the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from finetune.utils.safetensors_io import TensorShape

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "tiny": (256, 704, 4, 4, 2, 2048),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "7b": (4096, 14336, 32, 32, 8, 32000),  # Mistral-7B
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 64, 16
MAX_SHARD_BYTES = 5_000_000_000
POOL = 1 << 25


def make(folder: Path, size: str) -> int:
    """Write `folder`/base and `folder`/train/adapter; the base's bytes.

    Every value is drawn from a normal distribution: zeros would be quick to compute with, and quick to store. A tensor
    is a stretch of one pool of 2^25 draws from a random place on, as drawing seven billion takes minutes.
    """
    import torch

    from finetune.utils.safetensors_io import TensorShape, plan_shards, write_shards

    base, adapter = folder / "base", folder / "train" / "adapter"
    base.mkdir(parents=True)
    (adapter / "template").mkdir(parents=True)
    _json(base / "config.json", config_of(size))
    shapes = shapes_of(size)
    plan = plan_shards([TensorShape(n, "BF16", s) for n, s in shapes.items()], MAX_SHARD_BYTES)
    torch.manual_seed(0)
    write_shards(base, plan, _random(plan.tensors, 0.02))
    _json(base / "base.json", {"dtype": "bfloat16", "parameters": plan.total_size // 2})
    factors = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in LINEARS:
            key = f"base_model.model.{module}"
            factors |= {f"{key}.lora_A.weight": (RANK, shape[1]), f"{key}.lora_B.weight": (shape[0], RANK)}
    small = plan_shards([TensorShape(n, "F32", s) for n, s in factors.items()], 10**12)
    write_shards(adapter, small, _random(small.tensors, 0.02))
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    _json(
        adapter / "adapter_config.json",
        {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": LINEARS},
    )
    _json(adapter / "template" / "template.json", {"terminators": [2]})
    return plan.file_bytes


def config_of(size: str) -> dict[str, object]:
    """The checkpoint's config.json."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[size]
    return {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "max_position_embeddings": 4096,
        "sliding_window": None, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
    }  # fmt: skip


def shapes_of(size: str) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, by name."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[size]
    narrow = hidden // heads * kv_heads
    linears = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        f"{n}.weight": (vocabulary, hidden) for n in ("model.embed_tokens", "lm_head")
    }
    shapes["model.norm.weight"] = (hidden,)
    return shapes | {f"model.layers.{i}.{n}.weight": s for i in range(layers) for n, s in linears.items()}


def bytes_of(size: str) -> int:
    """Bytes of the checkpoint's tensors."""
    return 2 * sum(prod(s) for s in shapes_of(size).values())


def _random(tensors: Iterator[TensorShape], deviation: float) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    from finetune.utils.safetensors_io import torch_dtype

    pool = torch.randn(POOL) * deviation
    for tensor in tensors:
        step = max(1, (POOL // 2) // max(1, tensor.size_bytes // tensor.shape[0] // 2))
        for start in range(0, tensor.shape[0], step):
            shape = (min(step, tensor.shape[0] - start), *tensor.shape[1:])
            count = torch.Size(shape).numel()
            place = int(torch.randint(POOL - count, ()))
            values = pool[place : place + count].view(shape).to(torch_dtype(tensor.dtype))
            yield tensor.name, values + 1 if len(shape) == 1 else values


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")

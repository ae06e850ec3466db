"""Mistrals of several sizes in real NF4 with real adapters, and the bytes that live while they learn."""

from functools import partial

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from torch.utils.checkpoint import checkpoint

from finetune.estimate.activations import Decoder, MicroBatch, peak
from finetune.estimate.operators import Linear
from finetune.lora import fused_linear
from finetune.train import activation_checkpointing
from tests.helpers.live_storage import LiveStorages

PARTIAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj")
RANK, VOCABULARY = 8, 512


def config(hidden, intermediate, layers, heads, kv_heads):
    from transformers import MistralConfig

    return MistralConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=hidden // heads, vocab_size=VOCABULARY, sliding_window=None,
        max_position_embeddings=4096,
    )  # fmt: skip


def quantized(config, folder, dtype=torch.float32, double=False):
    """The base, as `models.load_base` loads one."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", device_map={"": "cpu"}, quantization_config=settings
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # as finetune.models.loading says why
    return model.requires_grad_(False)


def adapted(model, targets, dropout, fused=False, **settings):
    """With fp32 adapters, TRL's head, and in training."""
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    lora = LoraConfig(
        r=RANK, lora_alpha=16, lora_dropout=dropout, target_modules=targets or "all-linear", task_type="CAUSAL_LM",
        **settings,
    )  # fmt: skip
    if fused:
        fused_linear.use(lora)
    whole = get_peft_model(model, lora)
    for parameter in whole.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return whole.train()


def keep_inputs_elsewhere(model):
    """Offloading as on a GPU: what transformers moves to RAM goes to NumPy, where no storage is counted."""

    def out(tensor):
        return tensor.detach().view(torch.uint8).numpy().copy(), tensor.dtype

    def back(packed):
        return torch.from_numpy(np.asarray(packed[0])).clone().view(packed[1])

    def offloaded(function, *given, **options):
        with torch.autograd.graph.saved_tensors_hooks(out, back):
            return checkpoint(function, *given, **options)

    for module in model.modules():
        if "_gradient_checkpointing_func" in vars(module):
            module._gradient_checkpointing_func = partial(offloaded, use_reentrant=False)


def apply(model, policy):
    on, settings = activation_checkpointing.settings(policy, "cuda")
    if not on:
        model.activation_checkpointing_disable()
        return
    activation_checkpointing.enable(model, settings)
    if policy == "offload":
        keep_inputs_elsewhere(model)


def measured(model, batch, packed=False):
    """Peak bytes of one forward and backward."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (batch.rows, batch.length), generator=generator)
    if packed:
        half = batch.length // 2
        inputs = {"position_ids": torch.cat([torch.arange(half), torch.arange(batch.length - half)])[None]}
    else:
        mask = torch.ones_like(ids)
        if batch.rows > 1:
            mask[0, -20:] = 0
        inputs = {"attention_mask": mask}
    with LiveStorages() as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=batch.half):
            outputs = model(input_ids=ids, labels=ids, fused_lm_head=True, **inputs)
        (-outputs.log_probs).sum().backward()
        del outputs
    return live.peak


def predicted(config, targets, dropout, batch: MicroBatch):
    hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    widths = {
        "q_proj": (hidden, hidden), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (hidden, hidden),
        "gate_proj": (hidden, config.intermediate_size), "up_proj": (hidden, config.intermediate_size),
        "down_proj": (config.intermediate_size, hidden),
    }  # fmt: skip
    layer = {n: Linear(*w, RANK if targets is None or n in targets else 0) for n, w in widths.items()}
    decoder = Decoder(
        hidden, config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.vocab_size,
        (layer,) * config.num_hidden_layers, dropout=dropout > 0,
    )  # fmt: skip
    return peak(decoder, batch)

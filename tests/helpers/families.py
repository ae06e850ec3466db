"""Tiny configurations of many model families, at values that are easily ignored (caps, windows, multipliers)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 128
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
HEAD = {"head_dim": 16}
WINDOW = {"sliding_window": 8}
TEXT = {**TINY, **HEAD, "num_hidden_layers": 4}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**HEAD, **WINDOW}),
    "qwen2": ("qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**HEAD}),
    "gemma": ("gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, **WINDOW, "attn_logit_softcapping": 2.0,
                          "final_logit_softcapping": 3.0}),
    "gemma3 text": ("gemma3_text", {"head_dim": 32, **WINDOW, "query_pre_attn_scalar": 32, "num_hidden_layers": 6}),
    "gemma3": ("gemma3", {"text_config": {**TEXT, **WINDOW}, "vision_config": VISION, "mm_tokens_per_image": 4}),
    "phi": ("phi", {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "phi3": ("phi3", {**WINDOW}),
    "olmo": ("olmo", {"clip_qkv": 0.5}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {**WINDOW, "num_hidden_layers": 4}),
    "granite": ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
                            "attention_multiplier": 0.1, "attention_bias": True}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "stablelm 2 12B": ("stablelm", {"partial_rotary_factor": 0.5, "use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", {**WINDOW, "use_bias": True}),
    "cohere": ("cohere", {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": ("cohere2", {**WINDOW, "num_hidden_layers": 4, "head_dim": 16}),
    "glm": ("glm", {**HEAD, "partial_rotary_factor": 0.5}),
    "glm4": ("glm4", {**HEAD, "partial_rotary_factor": 0.5}),
    "exaone4": ("exaone4", {**HEAD, **WINDOW, "sliding_window_pattern": 2}),
    "ministral": ("ministral", {**HEAD, **WINDOW}),
    "ministral3": ("ministral3", {**HEAD}),
    "seed_oss": ("seed_oss", {**HEAD, "attention_bias": True}),
    "apertus": ("apertus", {}),
    "nemotron": ("nemotron", {"partial_rotary_factor": 0.5}),
    "hunyuan": ("hunyuan_v1_dense", {**HEAD}),
    "ernie4_5": ("ernie4_5", {**HEAD, "use_bias": True}),
    "arcee": ("arcee", {**HEAD, "attention_bias": True}),
    "minicpm3": ("minicpm3", {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
                              "v_head_dim": 16, "num_key_value_heads": 4, "scale_emb": 3.0, "scale_depth": 1.4}),
    "helium": ("helium", {**HEAD}),
    "diffllama": ("diffllama", {**HEAD}),
    "persimmon": ("persimmon", {"partial_rotary_factor": 0.5}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.25, "use_parallel_residual": True}),
    "gptj": ("gptj", {"rotary_dim": 8}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 8}),
    "codegen": ("codegen", {"rotary_dim": 8, "num_attention_heads": 4}),
    "gpt_bigcode": ("gpt_bigcode", {"multi_query": True}),
    "gpt2": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "alibi": False}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "falcon_h1": ("falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16,
                                "mamba_n_groups": 1, "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5}),
    "qwen3_next": ("qwen3_next", {**HEAD, **MOE, "layer_types": ["linear_attention", "full_attention"],
                                  "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
                                  "linear_value_head_dim": 16, "num_experts": 4,
                                  "shared_expert_intermediate_size": 48}),
    "qwen3_5 text": ("qwen3_5_text", {**HEAD, "layer_types": ["linear_attention", "full_attention"],
                                 "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
                                 "linear_value_head_dim": 16}),
    "qwen3_5": ("qwen3_5", {  # saved as the wrapper that it is published as; only its language model is loaded
        "text_config": {**TINY, **HEAD, "layer_types": ["linear_attention", "full_attention"],
                        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
                        "linear_value_head_dim": 16},
        "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
                          "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": []}}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2}),
    "recurrent_gemma": ("recurrent_gemma", {"lru_width": 64, "attention_window_size": 8, "num_hidden_layers": 3}),
    "mixtral": ("mixtral", {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("qwen3_moe", {**HEAD, **MOE, "num_experts": 4}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.5}),
    "phimoe": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", {**HEAD, **WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": ("deepseek_v3", {**MOE, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "q_lora_rank": 24,
                                    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
                                    "v_head_dim": 16, "num_key_value_heads": 4, "first_k_dense_replace": 1}),
    "gemma3n text": ("gemma3n_text", {**HEAD, **WINDOW, "num_hidden_layers": 4, "hidden_size_per_layer_input": 8,
                                      "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 8,
                                      "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4,
                                      "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gemma4 text": ("gemma4_text", {"head_dim": 16, **WINDOW, "num_hidden_layers": 4, "global_head_dim": 16,
                                    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
                                    "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "llama4 text": ("llama4_text", {**HEAD, "num_local_experts": 4, "intermediate_size_mlp": 96,
                                    "attention_chunk_size": 16, "num_hidden_layers": 4}),
}  # fmt: skip


WRAPPED = ("qwen3_5",)  # what AutoModelForCausalLM loads is a part of what is saved


def build(family: str, seed: int = 0, vocabulary: int = VOCABULARY, *, whole: bool = False) -> PreTrainedModel:
    """A random model of `family` in fp32 and eval mode; norms and biases are moved off their initial values.

    `whole`: with the parts beside the language model that AutoModelForCausalLM leaves out.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    kind, own = FAMILIES[family]
    settings = own if "text_config" in own else {**TINY, **own}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **settings)
    config.get_text_config().vocab_size = vocabulary
    if hasattr(config, "vocab_size_per_layer_input"):
        config.vocab_size_per_layer_input = vocabulary
    auto: Any = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 if parameter.ndim == 1 else 0.1))
    ready: PreTrainedModel = model.float().eval()
    return ready


def save(family: str, folder: Path, seed: int = 0, dtype: str = "float32", vocabulary: int = VOCABULARY) -> Path:
    """Save a random model of `family` in `folder`, as transformers saves it; returns the folder."""
    import torch

    build(family, seed, vocabulary, whole=family in WRAPPED).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder

"""LoRA settings in peft's terms, continuing an adapter, the fused layer."""

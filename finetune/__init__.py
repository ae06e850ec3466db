"""QLoRA fine-tuning from one recipe: curate, train, certify, merge, publish."""

__version__ = "0.1.0"

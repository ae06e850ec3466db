"""One file a stage, in the order of `finetune.pipeline.STAGES`; each reads top to bottom."""

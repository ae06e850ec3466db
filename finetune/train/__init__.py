"""TRL trainers: arguments, callbacks, checkpoints, out-of-memory, distributed, tracking."""

"""Memory and speed before training."""

"""Plan and write base + adapter, a tensor at a time."""

"""What a training will need, from shapes alone: bytes, steps and seconds; no weights, no network, no torch."""

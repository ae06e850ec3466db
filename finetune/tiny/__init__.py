"""The built-in base for machines without GPU and network."""

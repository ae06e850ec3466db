"""Row filters and the registry that names them."""

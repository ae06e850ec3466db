"""Stage list and runner, content-addressed store, run records, preflight, plan, launch, mirror."""

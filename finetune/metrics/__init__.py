"""Pure scoring."""

"""NLL, generation, model comparison, lm-eval, bootstrap, metrics."""

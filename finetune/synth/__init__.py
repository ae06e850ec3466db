"""Rows and verdicts written by a language model."""

"""Helpers that know nothing of training or recipes: files, console, formatting, SVG, threads."""

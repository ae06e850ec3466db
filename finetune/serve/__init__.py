"""Serve a model behind an OpenAI-compatible API, check what it answers, and talk to such a server."""

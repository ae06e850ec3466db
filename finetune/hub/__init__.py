"""Hugging Face Hub client: revisions, access, push, errors, a private repository as a folder."""

"""Find what looks like a credential before it leaves the machine."""

from __future__ import annotations

import re

# An older W&B key is 40 hex digits, like a git commit: it is matched only next to a name such as wandb_key.
_PATTERNS = (
    ("a Hugging Face token", re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")),
    ("a Weights & Biases key", re.compile(r"\bwandb_v\d+_[A-Za-z0-9_]{20,}")),
    ("a Weights & Biases key", re.compile(r"(?i:wandb)\w{0,20}(?i:key|token)\W{1,5}[0-9a-f]{40}\b")),
    ("a Weights & Biases key", re.compile(r"(?i:api\.wandb\.ai)\W.{0,80}?[0-9a-f]{40}\b")),
    ("a GitHub token", re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})")),
    ("an AWS access key", re.compile(r"\bAKIA[0-9A-Z]{16}\b")),
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
)


def find_secrets(text: str) -> list[str]:
    """Return kind and 1-based line of each apparent credential in `text`, never the credential itself."""
    kinds = []
    for kind, pattern in _PATTERNS:
        for match in pattern.finditer(text):
            kinds.append(f"{kind} in line {text.count(chr(10), 0, match.start()) + 1}")
    return kinds


def redact(text: str) -> str:
    """Return `text` with every apparent credential replaced by `[hidden]`."""
    for _, pattern in _PATTERNS:
        text = pattern.sub("[hidden]", text)
    return text

"""Rows and tokenizers of real size for the measurements of render and pack."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from finetune.data.records import Example, Message

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = {"v1": "mistral", "v3": "mistral-v3", "tekken": "mistral-tekken"}


def read(path: Path, most: int | None = None) -> list[Example]:
    """The rows of a .jsonl.gz with instruction, input and output, as conversations of two turns."""
    rows: list[Example] = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            row = json.loads(line)
            asked = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
            turns = (Message("user", asked), Message("assistant", row["output"]))
            rows.append(Example(f"{path.name}:{number}", path.name, turns))
            if len(rows) == most:
                break
    return rows


def tokenizer(version: str) -> PreTrainedTokenizerFast:
    """One of Mistral's tokenizers, by the files that mistral-common carries (the `test` extra)."""
    sys.path.insert(0, str(ROOT))
    from finetune.tokenization.chat import strip_markers
    from finetune.tokenization.chat_template import template_text
    from tests.helpers.mistral_tokenizers import load

    plain = strip_markers(template_text(TEMPLATES[version], None))
    return load(version, plain, prepend="every" if version == "v1" else "first")

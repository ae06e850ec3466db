"""Merged folders as export finds them: tiny random weights, a small real tokenizer, a template and terminators."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from finetune.utils.files import read_json, write_json
from tests.helpers.base_templates import CHATML, MISTRAL_LATER
from tests.helpers.tiny_models import save_tiny
from tests.helpers.tiny_tokenizers import LINES, build

SPLITS = {"qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + LINES.replace("{1,3}", "")}
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + LINES
TEMPLATES = {"byte_level": CHATML, "sentencepiece": MISTRAL_LATER, "metaspace": MISTRAL_LATER}


def merged(
    folder: Path, kind: str = "mistral", dtype: str = "float32", tokens: str = "byte_level", **config: Any
) -> Path:
    """Write a merged folder; the vocabulary of the model is that of its tokenizer, and some rows more."""
    tokenizer = build(tokens, TEMPLATES[tokens])
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    if tokens == "byte_level":  # split as the model's own tokenizer does
        split = SPLITS.get(kind, LLAMA3)
        path.write_text(path.read_text().replace(json.dumps(LINES)[1:-1], json.dumps(split)[1:-1]))
        ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end_of_text|>"])
    else:
        _complete_merges(path)
        ends = tokenizer.eos_token_id
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    save_tiny(folder, kind, dtype, **{"vocab_size": len(tokenizer) + 5, **ids, **config})
    write_json(folder / "generation_config.json", {"eos_token_id": ends, "bos_token_id": tokenizer.bos_token_id})
    return folder


def _complete_merges(path: Path) -> None:
    """Make the merges those a conversion from SentencePiece gives: every pair of pieces that is a piece itself."""
    content = read_json(path)
    vocabulary = content["model"]["vocab"]
    made = {"".join(m): rank for rank, m in reversed(list(enumerate(content["model"]["merges"])))}
    content["model"]["merges"] = [
        [piece[:i], piece[i:]]
        for piece in sorted(made, key=made.__getitem__)
        for i in range(1, len(piece))
        if piece[:i] in vocabulary and piece[i:] in vocabulary
    ]
    write_json(path, content)


def sentencepiece_file(path: Path) -> list[tuple[str, int, float]]:
    """Write a tokenizer.model of a few pieces by hand, as the protocol buffer it is; returns them."""
    pieces = [("<unk>", 2, 0.0), ("<s>", 3, 0.0), ("</s>", 3, 0.0), ("<0x0A>", 6, 0.0), ("▁", 1, -1.0), ("▁a", 1, -0.5)]
    data = b""
    for text, kind, score in pieces:
        raw = text.encode()
        inner = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score)
        inner += b"" if kind == 1 else b"\x18" + bytes([kind])
        data += b"\x0a" + bytes([len(inner)]) + inner
    path.write_bytes(data + b"\x12\x02\x18\x02")  # trainer settings: model type 2, BPE
    return pieces

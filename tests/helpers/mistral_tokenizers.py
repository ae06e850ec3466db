"""Mistral's real tokenizers, from the files that `mistral-common` carries, as transformers would load them."""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path

import mistral_common
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3", "tekken": "tekken_240718.json"}


@cache
def _sentencepiece(version: str, prepend: str) -> str:
    """A byte-pair model whose merges are read off the vocabulary, as transformers' own conversion does."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(DATA / FILES[version]))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    found = []
    for i, piece in enumerate(pieces):
        if not (model.is_control(i) or model.is_byte(i) or model.is_unknown(i)):
            cuts = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
            local = [c for c in cuts if c[0] in vocabulary and c[1] in vocabulary]
            found += [(-model.get_score(i), vocabulary[a], vocabulary[b], (a, b)) for a, b in local]
    merges = [pair for *_, pair in sorted(found)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prepend == "every":  # as in the tokenizer.json that Mistral-7B-Instruct was published with
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:  # as transformers converts the same file today
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [p for i, p in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)]
    if version == "v3":  # its control tokens are ordinary pieces to SentencePiece
        control += [p for p in pieces if p.startswith("[") and p.endswith("]") and len(p) > 3 and p[1].isupper()]
    tokenizer.add_special_tokens(control)
    return str(tokenizer.to_str())


@cache
def _tekken() -> str:
    """Byte-level byte-pair encoding; its merges are read off the ranks."""
    content = json.loads((DATA / FILES["tekken"]).read_text(encoding="utf-8"))
    config = content["config"]
    special = config["default_num_special_tokens"]
    names = _byte_names()
    ranks = {
        base64.b64decode(t["token_bytes"]): t["rank"]
        for t in content["vocab"][: config["default_vocab_size"] - special]
    }
    merges = []
    for token, rank in ranks.items():
        for n in range(1, len(token)):
            if token[:n] in ranks and token[n:] in ranks:
                merges.append((rank, ranks[token[:n]], ranks[token[n:]], token[:n], token[n:]))

    def name(token: bytes) -> str:
        return "".join(names[b] for b in token)

    controls = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    vocabulary = {name(token): rank + special for token, rank in ranks.items()}
    vocabulary |= {c: i for i, c in enumerate(controls)}
    pairs = [(name(a), name(b)) for *_, a, b in sorted(merges)]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(config["pattern"]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(controls)
    return str(tokenizer.to_str())


def _byte_names() -> dict[int, str]:
    """GPT-2's printable stand-in of each byte: a printable byte is itself, the others follow from U+0100."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in own]
    return {b: chr(b) for b in own} | {b: chr(256 + i) for i, b in enumerate(rest)}


def load(version: str, chat_template: str | None = None, prepend: str = "every") -> PreTrainedTokenizerFast:
    """The tokenizer of `v1`, `v3` or `tekken`; `prepend` says before which pieces SentencePiece's space is put."""
    description = _tekken() if version == "tekken" else _sentencepiece(version, prepend)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(description), **names)
    tokenizer.chat_template = chat_template
    return tokenizer

"""A tokenizer in the words of GGUF: tokens, their types and scores, merges, and how llama.cpp splits text.

llama.cpp has its own tokenizers, chosen by `tokenizer.ggml.model` and `tokenizer.ggml.pre`
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A tokenizer that none of them repeats exactly is refused:
the model would be asked in other tokens than it was trained on, and only answer worse.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import InputError
from finetune.utils.limits import reading

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the same numbers in GGUF and SentencePiece
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # the pattern in tokenizer.json -> the name of llama.cpp's repetition of it
    CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + LINES: "llama-bpe",
    CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + LINES: "qwen2",
}
ACCENTS = "accents that are characters of their own"
# Its repetitions that differ, and where: of Mistral's Tekken it knows neither accents nor capitals outside A-Z, and in
# builtin:tiny-mistral's words it takes contractions ('s) whole.
NEAR_SPLITS = {
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}"
    r"\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "tekken", f"{ACCENTS}, and capitals outside A-Z"
    ),
    r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+": ("smollm", "contractions"),
}  # fmt: skip
WHOLE_WORDS = ("llama-bpe", "tekken")  # take a word that is a token before any merge, as `ignore_merges` asks for
MERGED = {"llama-bpe": "dbrx"}  # llama.cpp's name for the same split with merges only
# tokens of Phi-3 that llama.cpp looks up: behind the first it keeps white space, and behind no other added token
PHI3_KEEPS, PHI3_STRIPS = frozenset(("<unk>", "<s>", "<|endoftext|>")), "</s>"
# what a tokenizer may do to text first: llama.cpp does not bring accents and letters together (NFC)
NORMALIZERS = {"gpt2": {"NFC"}, "llama": {"Prepend", "Replace"}}
NO_SCORE = -1000.0
SENTENCEPIECE_BPE = 2  # TrainerSpec.ModelType.BPE in sentencepiece_model.proto


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Values of `tokenizer.ggml.*`; the three lists are in the order of token ids."""

    model: str  # "gpt2": byte-level BPE, "llama": SentencePiece's BPE
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    add_bos: bool = False
    add_space_prefix: bool | None = None
    differs: str = ""  # the text, in words, that llama.cpp reads in other tokens
    strips: bool = False  # white space behind its special tokens goes, as in Phi-3's


def read_vocabulary(folder: Path, content: Mapping[str, Any], rows: int, bos: str | None) -> Vocabulary:
    """The vocabulary of a tokenizer, filled up to the `rows` of the embedding.

    `content` is tokenizer.json as transformers loaded it, which is what was trained with: for some models it replaces
    parts of the file. SentencePiece's scores come from the tokenizer.model in `folder`, or else from the merges.
    Raises InputError for a tokenizer that llama.cpp cannot repeat, or with more tokens than `rows`.
    """
    path = folder / "tokenizer.json"
    model = content["model"]
    if model.get("type") == "BPE" and "ByteLevel" in _kinds(content.get("pre_tokenizer")):
        pre, differs = _split(content["pre_tokenizer"], path)
        if "NFC" in _kinds(content.get("normalizer"), "normalizers"):
            differs = differs or ACCENTS
        if (pre in WHOLE_WORDS) != bool(model.get("ignore_merges")) and _unmade(content):
            pre, differs = MERGED.get(pre, pre), differs if pre in MERGED else differs or "words that no merge makes"
        pieces: dict[int, tuple[str, int, float]] = {i: (t, NORMAL, 0.0) for t, i in model["vocab"].items()}
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        settings: dict[str, Any] = {"model": "gpt2", "pre": pre, "merges": merges, "differs": differs}
    elif (folder / "tokenizer.model").exists():
        pieces = dict(enumerate(read_sentencepiece(folder / "tokenizer.model")))
        settings = {"model": "llama", "pre": "default", "add_space_prefix": True}
    elif model.get("type") == "BPE" and model.get("byte_fallback"):
        pieces = _scored(model, path)
        settings = {"model": "llama", "pre": "default", "add_space_prefix": True}
    else:
        raise InputError(
            f"{folder}: GGUF needs a byte-level BPE or a SentencePiece BPE tokenizer; this one is "
            f"{model.get('type', 'none')}; set export: null"
        )
    if odd := set(_kinds(content.get("normalizer"), "normalizers")) - NORMALIZERS[settings["model"]]:
        raise InputError(f"{path}: llama.cpp does not repeat what {min(odd)} does to text first; set export: null")
    for token in content["added_tokens"]:
        kind = CONTROL if token["special"] else USER_DEFINED
        known = pieces.get(token["id"])
        unknown = settings["model"] == "llama" and known is not None and known[1] == UNKNOWN
        pieces[token["id"]] = (token["content"], UNKNOWN if unknown else kind, known[2] if known else NO_SCORE)
    if pieces and max(pieces) >= rows:
        raise InputError(f"{folder}: the tokenizer has id {max(pieces)}, the embedding only {rows} rows")
    filled = [pieces.get(i, (f"[PAD{i}]", UNUSED, NO_SCORE)) for i in range(rows)]
    settings |= _habits(content, bos, settings["model"] == "llama")
    settings["strips"], spaces = _stripping(content["added_tokens"], {p[0] for p in filled})
    settings["differs"] = settings.get("differs") or spaces
    scores = [p[2] for p in filled] if settings["model"] == "llama" else []
    return Vocabulary(tokens=[p[0] for p in filled], types=[p[1] for p in filled], scores=scores, **settings)


def _kinds(step: Mapping[str, Any] | None, inside: str = "pretokenizers") -> list[str]:
    return [] if step is None else [s["type"] for s in step.get(inside, [step])]


def _split(step: Mapping[str, Any], path: Path) -> tuple[str, str]:
    """The name of llama.cpp's splitter for this pre-tokenizer, and what it splits differently."""
    steps: list[Mapping[str, Any]] = step.get("pretokenizers", [step])
    kinds, last = [s["type"] for s in steps], steps[-1]
    if kinds[-1] == "ByteLevel" and last.get("use_regex", True) and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"]:
            return "gpt-2", ""
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm", ""
    pattern = steps[0].get("pattern", {}).get("Regex", "") if kinds == ["Split", "ByteLevel"] else ""
    if pattern in SPLITS:
        return SPLITS[pattern], ""
    if pattern in NEAR_SPLITS:
        return NEAR_SPLITS[pattern]
    raise InputError(
        f"{path}: llama.cpp has no splitter for {pattern or ' + '.join(kinds)!r}, so a GGUF would be read in other "
        "tokens than were trained; set export: null, or convert the merged folder with a llama.cpp that has one"
    )


def _stripping(added: Sequence[Mapping[str, Any]], tokens: Collection[str]) -> tuple[bool, str]:
    """Whether white space behind added tokens goes as in Phi-3's, all that llama.cpp knows; what it reads otherwise."""
    behind = {token["content"] for token in added if token.get("rstrip")}
    before = any(token.get("lstrip") for token in added)
    strips = (
        bool(behind)
        and {*PHI3_KEEPS, PHI3_STRIPS} <= set(tokens)
        and behind | PHI3_KEEPS == {token["content"] for token in added} | PHI3_KEEPS
        and not behind & PHI3_KEEPS
    )
    return strips, "" if strips == bool(behind) and not before else "white space beside special tokens"


def _unmade(content: Mapping[str, Any]) -> bool:
    """Whether the merges of a BPE tokenizer make something else of the text of one of its tokens."""
    from tokenizers import Tokenizer

    model, added = content["model"], {token["content"] for token in content["added_tokens"]}
    plain = {**model, "ignore_merges": False}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "model": plain, "added_tokens": []}))
    words = [word for word in model["vocab"] if word not in added]
    return any(e.ids != [model["vocab"][w]] for w, e in zip(words, tokenizer.encode_batch(words), strict=True))


def _habits(content: Mapping[str, Any], bos: str | None, sentencepiece: bool) -> dict[str, bool]:
    """Whether the tokenizer puts its BOS in front by itself, and a space behind a control token: asked of itself."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(content))
    habits = {"add_bos": bos is not None and tokenizer.encode("x").tokens[:1] == [bos]}
    if sentencepiece and bos is not None:
        # chats begin with BOS; there llama.cpp puts a space in front or not, by this flag
        first = tokenizer.encode(bos + "x", add_special_tokens=False).tokens[1]
        habits["add_space_prefix"] = first.startswith("▁")
    return habits


def _scored(model: Mapping[str, Any], path: Path) -> dict[int, tuple[str, int, float]]:
    """SentencePiece's pieces from a converted tokenizer.json: a piece scores minus the rank of its first merge.

    SentencePiece joins any two neighbours whose union is a piece, best score first; the two agree only if every
    such pair is in the merges. Raises InputError if one is missing.
    """
    vocabulary: dict[str, int] = model["vocab"]
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    listed = set(pairs)
    for piece in ranks:
        for i in range(1, len(piece)):
            pair = (piece[:i], piece[i:])
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in listed:
                raise InputError(
                    f"{path}: was not converted from SentencePiece (no merge {' + '.join(pair)}), so llama.cpp would "
                    "split text differently; put the tokenizer.model into the folder, or set export: null"
                )
    lowest = -float(len(pairs))
    return {
        i: (
            piece,
            BYTE if _is_byte(piece) else UNKNOWN if piece == model.get("unk_token") else NORMAL,
            -float(ranks[piece]) if piece in ranks else 0.0 if len(piece) > 1 else lowest,
        )
        for piece, i in vocabulary.items()
    }


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def read_sentencepiece(path: Path) -> list[tuple[str, int, float]]:
    """(piece, type, score) of every piece in a SentencePiece BPE model, by id. Raises InputError for any other file."""
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    with reading(f"{path}: not a SentencePiece model; download it again"):
        model.ParseFromString(path.read_bytes())
    if not model.pieces or model.trainer_spec.model_type != SENTENCEPIECE_BPE:
        raise InputError(f"{path}: a SentencePiece model of BPE pieces is needed; this is another kind")
    return [(p.piece, p.type, p.score) for p in model.pieces]

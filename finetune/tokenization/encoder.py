"""Text to token ids with character offsets, where typed control strings stay text; and the choice of a pad token."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from finetune.errors import FinetuneError, GateRefused, InputError
from finetune.tokenization.chat import ControlStrings
from finetune.tokenization.chat_template import special_strings
from finetune.tokenization.label_mask import Offsets
from finetune.utils.limits import watched

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

    from finetune.tokenization.rendering import Rendered

PROOFS = 100  # rows on which the second copy of a tokenizer is compared with the first
Tokens = tuple[list[int], Offsets]
"""Token ids, and the characters each was made from."""
T = TypeVar("T")
# What tokenising may take: the slowest tokenizers make 100,000 characters a second, in 300 bytes each.
SECONDS, CHARACTERS_PER_SECOND = 20.0, 20_000
MEMORY_BYTES, BYTES_PER_CHARACTER = 1 << 30, 2000


def watched_batch(
    encode: Callable[[list[str]], Sequence[T]], texts: Sequence[str], names: Sequence[str] = ()
) -> list[T]:
    """Return `encode(texts)`, unless it takes far more time or memory than any tokenizer, or panics.

    A tokenizer is native code with a third party's patterns: on a text that its trial (models/base_limits) does not
    have it may match for hours. Raises InputError, which names the text as `names` does, or by its beginning.
    """
    size = sum(map(len, texts))
    try:
        return list(watched(
            lambda: encode(list(texts)),
            seconds=SECONDS + size / CHARACTERS_PER_SECOND,
            memory_bytes=MEMORY_BYTES + size * BYTES_PER_CHARACTER,
        ))  # fmt: skip
    except (TimeoutError, MemoryError, RuntimeError) as error:
        if len(texts) > 1 and not isinstance(error, MemoryError):  # one by one, to know which it is
            return [t for i, text in enumerate(texts) for t in watched_batch(encode, [text], names[i : i + 1])]
        known = [*names] or [repr(text[:80]) for text in texts]
        which = known[0] if len(texts) == 1 else f"one of {known[0]} to {known[-1]}"
        raise InputError(
            f"{which}: the tokenizer fails on its {size:,} characters: {error}; take the base's own tokenizer.json, or "
            "leave such rows out"
        ) from error


class Encoder:
    """The base's tokenizer without its post-processor, which would trim offsets and add tokens of its own.

    `encode` gives the ids of `tokenizer(text, add_special_tokens=False)`. Setting `split_special_tokens` for the rows
    with typed control strings would not do: a Unigram model still finds `</s>` in its vocabulary, and cutting the text
    at the control tokens loses the white-space rules of the first piece. So a second copy of the tokenizer knows its
    control tokens by private names only (see ControlStrings), and runs over the whole text as the first one does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, meant: Collection[str] = ()) -> None:
        """`meant`: special tokens that are tokens if a row holds their text (those of the recipe's tokens.add)."""
        from tokenizers import Tokenizer

        if not tokenizer.is_fast:
            raise InputError(
                "this base has no fast tokenizer (tokenizer.json), and a slow one gives no character offsets; "
                "convert it once with AutoTokenizer.from_pretrained(BASE, use_fast=True).save_pretrained(FOLDER)"
            )
        self._description = tokenizer.backend_tokenizer.to_str()
        self.controls = ControlStrings(s for s in special_strings(tokenizer) if s not in meant)
        self.special_ids = frozenset(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)
        self._plain: Tokenizer = Tokenizer.from_str(_bare(self._description))
        self._sealed: Tokenizer | None = None

    def encode(self, texts: Sequence[str], names: Sequence[str] = ()) -> list[Tokens]:
        """Ids and offsets of each text; every control string in it becomes a control token.

        Raises InputError if the tokenizer does not end on a text, by its name.
        """
        return _encoded(self._plain, texts, names)

    def encode_rendered(self, rows: Sequence[Rendered], names: Sequence[str] = ()) -> list[Tokens]:
        """Ids and offsets of each row, at the positions of its `text`; typed control strings stay text."""
        tokens = self.encode([r.text for r in rows], names)
        sealed = [i for i, row in enumerate(rows) if row.sealed is not None]
        if sealed:
            if self._sealed is None:
                self._sealed = self._sealed_copy([r.text for r in rows if r.sealed is None][:PROOFS])
            these = [names[i] for i in sealed] if names else ()
            encoded = _encoded(self._sealed, [rows[i].sealed or "" for i in sealed], these)
            for i, made in zip(sealed, encoded, strict=True):
                tokens[i] = made
        return tokens

    def typed_specials(self, row: Rendered) -> Mapping[str, int]:
        """How often the text of each special token was typed in a row, if it stays text."""
        if row.sealed is None:
            return {}
        written = {s: row.sealed.count(name) for s, name in self.controls.names.items()}
        typed = {s: row.text.count(s) - count for s, count in written.items()}
        return {s: count for s, count in typed.items() if count > 0}

    def special_id(self, string: str) -> int:
        """The id of a special token."""
        token_id = self._plain.token_to_id(string)
        return -1 if token_id is None else int(token_id)

    def _sealed_copy(self, texts: Sequence[str]) -> Tokenizer:
        """Return the copy after checking that it agrees with the tokenizer on `texts`, which hold no control string."""
        from tokenizers import Tokenizer

        copy: Tokenizer = Tokenizer.from_str(_renamed(_bare(self._description), self.controls))
        for string, name in self.controls.names.items():
            if copy.token_to_id(name) != self._plain.token_to_id(string):
                raise FinetuneError(f"the tokenizer gives {string!r} another id under a private name")
        for text, (ids, _) in zip(texts, self.encode(texts), strict=True):
            if copy.encode(self.controls.seal(text), add_special_tokens=False).ids != ids:
                raise FinetuneError(
                    "this base's tokenizer does not work without the names of its control tokens, so a control string "
                    f"in a row's text cannot be kept apart from a true one; it shows on {text[:80]!r}"
                )
        return copy


def choose_pad(
    tokenizer: PreTrainedTokenizerBase, template: str, label_ids: Collection[int], meant: Collection[str] = ()
) -> str:
    """A pad token that never is a label: the base's own if it serves no other purpose, else an unused special token.

    Of the recipe's own tokens (`meant`) only one with "pad" in its text is taken. Raises GateRefused if the base has
    none.
    """
    taken = {tokenizer.bos_token, tokenizer.eos_token}
    strings = [t.content for i, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special and i not in label_ids]
    free = [s for s in strings if s not in taken and s not in template and (s not in meant or "pad" in s.lower())]
    preferred = [tokenizer.pad_token, *(s for s in free if "pad" in s.lower()), tokenizer.unk_token, *free]
    for string in preferred:
        if string in free:
            return str(string)
    raise GateRefused(
        "the base has no unused special token to pad with: each is a label, the beginning or end of a text, or part of "
        "the template; add one: tokens: {add: [<pad>], special: true}"
    )


def _bare(description: str) -> str:
    content = json.loads(description)
    return json.dumps({**content, "post_processor": None, "truncation": None, "padding": None})


def _renamed(description: str, controls: ControlStrings) -> str:
    content = json.loads(description)
    names = controls.names
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model: dict[str, Any] = content["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return json.dumps(content)


def _encoded(tokenizer: Tokenizer, texts: Sequence[str], names: Sequence[str]) -> list[Tokens]:
    encodings = watched_batch(lambda batch: tokenizer.encode_batch(batch, add_special_tokens=False), texts, names)
    return [_tokens(e) for e in encodings]


def _tokens(encoding: Encoding) -> Tokens:
    ids = encoding.ids
    flat = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(ids))  # twice as fast as np.array
    return ids, flat.reshape(-1, 2)

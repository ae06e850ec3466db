"""Tokens that a recipe adds to its base (`tokens.add`): their ids, the tokenizer's files, and the embedding's rows.

A base may have more rows in its embedding than its tokenizer has entries (Qwen2.5-7B: 152,064 and 151,665). Those are
used first; beyond them embedding and head grow by a row a token. Every new row starts as the mean of the rows that the
tokenizer knew, and no other row changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetune.errors import InputError
from finetune.utils.files import read_json, write_bytes, write_json

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.recipe import Tokens


@dataclass(frozen=True, slots=True)
class NewTokens:
    """`texts` have the ids from `known` on; the mean is that of the rows 0 … `known` - 1.

    `stored`: rows of the embedding in the base's files; `rows`: those of the model that is trained and merged.
    """

    texts: tuple[str, ...]
    special: bool
    known: int
    stored: int
    rows: int

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids, in the recipe's order."""
        return tuple(range(self.known, self.known + len(self.texts)))

    def as_json(self) -> dict[str, Any]:
        """Return the value of `tokens` in base.json."""
        return {
            "add": list(self.texts), "special": self.special, "known": self.known, "stored": self.stored,
            "rows": self.rows,
        }  # fmt: skip

    def describe(self) -> str:
        """One line for a person."""
        spare = min(len(self.texts), max(0, self.stored - self.known))
        grown = f"the embedding grows from {self.stored:,} to {self.rows:,} rows" if self.rows > self.stored else ""
        used = f"{spare} of them in spare rows of the embedding" if spare else ""
        return (
            f"{len(self.texts)} new tokens, ids {self.ids[0]}-{self.ids[-1]}: {', '.join(filter(None, (used, grown)))}"
        )


def read_new_tokens(base: Path) -> NewTokens | None:
    """The tokens that were added to the base in the folder of a finished base stage; None if none were."""
    recorded = read_json(base / "base.json").get("tokens") if (base / "base.json").is_file() else None
    if recorded is None:
        return None
    return NewTokens(
        tuple(recorded["add"]), recorded["special"], recorded["known"], recorded["stored"], recorded["rows"]
    )


def meant(base: Path) -> frozenset[str]:
    """Special tokens that the recipe has added: unlike the base's own they are tokens if a row holds their text."""
    tokens = read_new_tokens(base)
    return frozenset(tokens.texts if tokens is not None and tokens.special else ())


# --- the tokenizer --------------------------------------------------------------------------------------------------


def present(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(place in `texts`, why) for each text that is one token of `tokenizer` already."""
    for number, text in enumerate(texts):
        token_id = tokenizer.token_to_id(text)
        if token_id is None:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            same = len(ids) == 1 and tokenizer.decode(ids, skip_special_tokens=False).strip() == text.strip()
            token_id = ids[0] if same else None
        if token_id is not None:
            yield number, f"{text!r} is a token of the base already (id {token_id}); leave it out"


def present_in_file(path: Path, texts: Sequence[str]) -> list[tuple[int, str]]:
    """`present` for a tokenizer.json, which is tried out first; nothing is known without one. Imports no torch."""
    from finetune.models.base_limits import check_tokenizer

    if not path.is_file():
        return []
    from tokenizers import Tokenizer

    check_tokenizer(path)
    return list(present(Tokenizer.from_file(str(path)), texts))


def add_to_tokenizer(
    folder: Path, tokens: Tokens, stored: int, load: Callable[[Path], PreTrainedTokenizerBase]
) -> NewTokens:
    """Write the tokens into the tokenizer files of `folder`, which `load` reads; `stored`: rows of the embedding.

    The files stay as they are but for the new entries, and are read again: every new text is one id, no old token has
    another. Raises InputError if one is there already, or if the tokenizer does not take them so.
    """
    before: Any = load(folder)
    if not before.is_fast:
        raise InputError("tokens.add: this base has no fast tokenizer (tokenizer.json), which new tokens need")
    if there := [why for _, why in present(before.backend_tokenizer, tokens.add)]:
        raise InputError("\n".join(f"tokens.add: {why}" for why in there))
    known = max(before.get_vocab().values()) + 1
    added = NewTokens(tuple(tokens.add), tokens.special, known, stored, max(stored, known + len(tokens.add)))
    path = folder / "tokenizer.json"
    content = read_json(path) if path.is_file() else json.loads(before.backend_tokenizer.to_str())
    content["added_tokens"] += [{"id": i, **_entry(t, added)} for i, t in zip(added.ids, added.texts, strict=True)]
    write_bytes(path, (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode())
    for name, field in (("tokenizer_config.json", "added_tokens_decoder"), ("added_tokens.json", None)):
        if not (folder / name).is_file():
            continue
        written = read_json(folder / name)
        if field is None:
            write_json(folder / name, {**written, **dict(zip(added.texts, added.ids, strict=True))})
        elif field in written:
            more = {str(i): _entry(t, added) for i, t in zip(added.ids, added.texts, strict=True)}
            write_json(folder / name, {**written, field: {**written[field], **more}})
    _prove(before, load(folder), added)
    return added


def _entry(text: str, tokens: NewTokens) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": text, **plain, "special": tokens.special}


def _prove(before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, tokens: NewTokens) -> None:
    """Raise InputError unless `after` is `before` with the new tokens, each one id in the midst of text."""
    wanted = dict(zip(tokens.texts, tokens.ids, strict=True))
    got = after.get_vocab()
    wrong = [t for t, i in {**before.get_vocab(), **wanted}.items() if got.get(t) != i]
    kinds = after.added_tokens_decoder
    wrong += [t for t, i in wanted.items() if i in kinds and kinds[i].special != tokens.special]
    for text, number in wanted.items():
        inside = after(f"one {text} two{text}", add_special_tokens=False)["input_ids"]
        wrong += [text] if inside.count(number) != 2 else []
    for text in [t.content for t in before.added_tokens_decoder.values()]:  # a new text that is a part of an old one
        old, new = (t(f"one {text} two", add_special_tokens=False)["input_ids"] for t in (before, after))
        if old != new:
            raise InputError(
                f"tokens.add: with them the base's own token {text!r} is split into other ids; choose other texts"
            )
    if wrong:
        raise InputError(f"tokens.add: the base's tokenizer does not take {wrong[0]!r} as one id of its own")


# --- the model ------------------------------------------------------------------------------------------------------


def with_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A config.json whose language model has an embedding of `rows` rows."""
    if isinstance(inner := config.get("text_config"), Mapping):
        outer = {"vocab_size": rows} if "vocab_size" in config else {}
        return {**config, **outer, "text_config": with_rows(inner, rows)}
    return {**config, "vocab_size": rows}


def token_modules(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The modules that have a row a token, by name: the embedding, and the head unless it is tied to it.

    `model` may carry a peft adapter. Raises InputError if it has another table of token embeddings.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(m): n for n, m in model.named_modules()}
    modules = {names[id(embedding)]: embedding}
    if head is not None and head.weight is not embedding.weight and not _tied(model, names[id(head)]):
        modules[names[id(head)]] = head
    return modules


def _tied(model: PreTrainedModel, head: str) -> bool:
    return f"{head}.weight" in (getattr(model, "all_tied_weights_keys", None) or {})


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the embedding. Raises InputError if the model has a second table of token embeddings."""
    from torch import nn

    embedding = model.get_input_embeddings()
    rows = len(cast("torch.Tensor", embedding.weight))
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module is not embedding and module.num_embeddings == rows:
            raise InputError(
                f"tokens.add: the base has a second table of token embeddings ({name}), which stays as it is"
            )
    return rows


def grow(model: PreTrainedModel, tokens: NewTokens) -> None:
    """Give the loaded base the rows of the new tokens, each the mean of the rows known before; the others stay bitwise.

    The mean is taken in fp32 and rounded once. The random generators are left alone.
    """
    import torch

    from finetune.utils.runtime import RandomState

    state = RandomState.now()
    if tokens.rows > tokens.stored:
        model.resize_token_embeddings(tokens.rows, mean_resizing=False)
    state.restore()
    ids = torch.tensor(tokens.ids)
    with torch.no_grad():
        for module in token_modules(model).values():
            for table in module.parameters():  # weight, and a head's bias
                table[ids.to(table.device)] = table[: tokens.known].mean(0, dtype=torch.float32).to(table.dtype)
    model.name_or_path = ""  # or peft compares vocabulary sizes, over the network, and saves whole embeddings

"""Row tokenizers for tests, and a reading of their labels that shares no code with them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from finetune.data.records import Example, Message
from finetune.tokenization.answers import Finder
from finetune.tokenization.audit import Tally
from finetune.tokenization.chat_template import JinjaRenderer, Template, special_strings, stop_strings, strip_markers
from finetune.tokenization.encoder import Encoder
from finetune.tokenization.row_tokenizer import RowTokenizer, Rules, TokenizedRow
from finetune.tokenization.template_profile import TemplateProfile


def template(
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    name: str = "mine",
    system: Any = "merge",
    reasoning: Any = "auto",
    stops: Collection[str] = (),
) -> Template:
    """A template that was not tried out on rows, as choose_template would return it."""
    profile = TemplateProfile(JinjaRenderer(text, tokenizer.special_tokens_map), None, system, reasoning)
    finder = Finder(special_strings(tokenizer), {*stop_strings(tokenizer, None), *stops})
    return Template(name, text, strip_markers(text), None, profile, finder)


def worker(
    tokenizer: PreTrainedTokenizerFast,
    chosen: Template | str,
    supervise: Any = "assistant",
    max_length: int = 100_000,
    overlong: Any = "truncate",
    **rules: Any,
) -> RowTokenizer:
    """A row tokenizer with this tokenizer's own BOS and EOS."""
    made = template(tokenizer, chosen) if isinstance(chosen, str) else chosen
    bos = tokenizer.bos_token_id
    facts: dict[str, Any] = {
        "bos": tokenizer.bos_token,
        "bos_id": bos,
        "adds_bos": tokenizer("a")["input_ids"][:1] == [bos],
        "eos": tokenizer.eos_token,
        "stop_ids": frozenset(tokenizer.get_vocab()[s] for s in made.finder.stops),
    }
    return RowTokenizer(made, Encoder(tokenizer), Rules(supervise, max_length, overlong, **{**facts, **rules}))


def one(rows: RowTokenizer, row: Example) -> tuple[TokenizedRow | None, Tally]:
    """The row's only training row, or None, and what was counted."""
    tally = Tally()
    made = rows.batch([row], tally)
    return (made[0] if made else None), tally


def row(*contents: str, system: str | None = None, name: str = "r:1", tools: str | None = None) -> Example:
    """A conversation: the user and the assistant in turn."""
    said = [Message(("user", "assistant")[i % 2], c) for i, c in enumerate(contents)]
    return Example(name, "r", tuple([Message("system", system)] * (system is not None) + said), tools=tools)


def learned(tokenizer: PreTrainedTokenizerFast, made: TokenizedRow | None) -> list[str]:
    """The text of each run of labelled ids, control tokens included."""
    assert made is not None
    runs: list[list[int]] = [[]]
    for token, label in zip(made.ids.tolist(), made.mask.tolist(), strict=True):
        if label:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [decode(tokenizer, run) for run in runs if run]


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of ids as it is."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text

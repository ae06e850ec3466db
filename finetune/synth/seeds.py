"""Seed rows of generation: prompts, with their answers if they have one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from finetune.data.formats import Decision, FormatError, decide, to_example, unique_labels
from finetune.data.records import Example, Reject
from finetune.data.sources import SAMPLE_ROWS, converted, first_rows, place_of, raw_rows
from finetune.errors import InputError
from finetune.eval.prompts import prompt_of, with_answer
from finetune.recipe import Source
from finetune.tokenization.chat import chat_of

SHOWN_ROWS = 3


@dataclass(frozen=True)
class Seed:
    """A prompt: the turns before the row's last answer, and that answer, empty if there is none."""

    id: str
    messages: tuple[dict[str, str], ...]
    answer: str = ""

    @property
    def instruction(self) -> str:
        """The last user turn."""
        return self.messages[-1]["content"]

    @property
    def system(self) -> tuple[dict[str, str], ...]:
        """The system turn, if there is one."""
        return self.messages[:1] if self.messages[0]["role"] == "system" else ()


def read_seeds(
    sources: Sequence[Source], scratch: Path, ignore: Collection[str] = (), *, single: bool
) -> Iterator[Seed | Reject]:
    """Yield the seeds in order, and a Reject for each row that does not fit.

    `single`: rows must have one user turn. Raises InputError for a source that as a whole cannot be read.
    """
    labels = unique_labels(source.label for source in sources)
    for label, source in zip(labels, sources, strict=True):
        raw = raw_rows(source, scratch, {})
        rows = ((file, r if r.row is None else replace(r, row=with_answer(r.row, source.columns))) for file, r in raw)
        head, sample = first_rows(rows, f"generate.seeds {label}", source)
        try:
            decision = decide(source.format, source.columns, sample, ignore, raw=source.raw)
        except FormatError as error:
            raise InputError(f"generate.seeds {label}: {error}{place_of(source)}") from None
        for row in converted(chain(head, rows), label, partial(_examples, decision, label)):
            yield _seed(row, single=single) if isinstance(row, Example) else row


def _examples(decision: Decision, label: str, row: dict[str, object], row_id: str) -> tuple[Example]:
    return (to_example(row, decision, row_id, label),)


def _seed(row: Example, *, single: bool) -> Seed | Reject:
    if row.text is not None:
        return Reject.of(row, "no_prompt", "a raw text has no prompt; take rows with an instruction")
    chat: list[dict[str, Any]] = chat_of(row.messages)
    asked = prompt_of(chat)
    if row.tools or any(set(m) != {"role", "content"} for m in asked):
        return Reject.of(row, "tools", "tool definitions, tool calls and named turns are not generated from")
    if not asked or asked[-1]["role"] != "user" or not asked[-1]["content"].strip():
        return Reject.of(row, "no_prompt", "there is no user turn before the last answer")
    if single and [m["role"] for m in asked if m["role"] != "system"] != ["user"]:
        return Reject.of(row, "several_turns", "this method starts from rows with one user turn")
    answer = chat[len(asked)]["content"] if len(chat) > len(asked) else ""
    return Seed(row.id, tuple(asked), answer or "")


def check_seeds(source: Source, ignore: Collection[str], method: str) -> None:
    """Read the first rows. Raises InputError if the source cannot be read, or none of them fits."""
    seeds = list(islice(read_seeds([source], Path(), ignore, single=method != "answer"), SAMPLE_ROWS))
    if not any(isinstance(seed, Seed) for seed in seeds):
        require_seeds(seeds, 1.0)


def require_seeds(rows: Sequence[Seed | Reject], allowed: float) -> list[Seed]:
    """Return the seeds. Raises InputError if none is left or a larger share than `allowed` does not fit."""
    seeds = [s for s in rows if isinstance(s, Seed)]
    refused = [s for s in rows if isinstance(s, Reject)]
    if not seeds or len(refused) > allowed * len(rows):
        first = " ".join(f"[{r.id}] {r.detail}." for r in refused[:SHOWN_ROWS])
        share = f", allowed are {allowed:.1%} (generate.max_refused_fraction)" if seeds else ""
        raise InputError(
            f"generate.seeds: {len(refused)} of {len(rows)} rows do not fit{share}. {first} Fix them, or set the "
            "source's format and columns"
        )
    return seeds

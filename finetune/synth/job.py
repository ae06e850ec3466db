"""One run of the stage generate: the rows it made, those it left out and why, and when it must stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, TypeVar

from finetune.data.records import REJECTED_CHARACTERS, Example, Message, Reject
from finetune.errors import GateRefused
from finetune.eval.answer_metrics import words
from finetune.recipe import Generate
from finetune.serve.client import Reply
from finetune.synth.asking import Asker, BudgetUsed
from finetune.synth.prompts import Prompts
from finetune.utils.files import canonical_json
from finetune.utils.format import clipped

LABEL = "generate"  # the source's name in row ids
CHUNK = 64  # rows asked for at a time; between two the budget and what came of it are looked at
HOPELESS = 32  # candidates left out, and no row made: the model or the prompts do not do
SHOWN, SHOWN_CHARACTERS = 3, 300
T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """A generated row: the prompt's turns, the answer, and where it comes from."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    answer: str
    parent: str
    operation: str
    round: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def instruction(self) -> str:
        """The last user turn."""
        return self.messages[-1]["content"]

    def example(self) -> Example:
        """The row as ingest takes it; parent, operation and round are columns beside the text."""
        turns = (*(Message(m["role"], m["content"]) for m in self.messages), Message("assistant", self.answer))
        lineage = {"parent": self.parent, "operation": self.operation, "round": self.round, **self.extra}
        return Example(self.id, LABEL, turns, extra=canonical_json(lineage))


@dataclass
class Job:
    """State that the methods of generation share: rows made, rejects and counts."""

    section: Generate
    prompts: Prompts
    asker: Asker
    seed: int
    made: list[Made] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    asked: Counter[int] = field(default_factory=Counter)  # round → rows tried

    def make(
        self,
        turns: Sequence[Mapping[str, str]],
        answer: str,
        parent: str,
        operation: str,
        *,
        round: int,
        **extra: float,
    ) -> Made:
        """Add a row; `extra` holds further figures of it."""
        number = f"{LABEL}:{len(self.made) + 1}"
        self.made.append(Made(number, tuple(turns), answer.strip(), parent, operation, round, extra))
        return self.made[-1]

    def reject(self, name: str, reason: str, detail: str, text: str) -> None:
        """Leave a candidate out; `name` states its row and step."""
        start = text[:REJECTED_CHARACTERS].encode("utf-8", "backslashreplace").decode()
        self.rejects.append(Reject(f"{LABEL}/{name}", LABEL, reason, detail, start))

    def unfinished(self, name: str, reply: Reply | None) -> bool:
        """Leave a candidate out whose response cannot be used as it is; True if so, or if there was no budget for it.

        That is a response which is empty, cut, ended by a filter or a tool call, or no Unicode text.
        """
        if reply is None:
            return True
        if reply.finish == "length":
            self.reject(name, "cut_off", f"the response reached {self.section.max_new_tokens} tokens", reply.text)
        elif reply.finish == "too_long":
            self.reject(name, "prompt_too_long", "the prompt leaves the model no room for an answer", "")
        elif reply.finish == "template":
            self.reject(name, "template", "the model's chat template refuses these turns", "")
        elif reply.finish not in ("stop", ""):
            detail = f"finish_reason is {clipped(reply.finish, SHOWN_CHARACTERS)}, not stop"
            self.reject(name, "not_finished", detail, reply.text)
        elif any("\ud800" <= c <= "\udfff" for c in reply.text):
            self.reject(name, "surrogate", "the response has a lone surrogate (U+D800–U+DFFF)", reply.text)
        elif not reply.text.strip():
            self.reject(name, "empty", "the response is empty", "")
        else:
            return False
        return True

    def chunks(self, items: Sequence[T], round_number: int) -> Iterator[list[T]]:
        """Yield `items` in chunks; after each one stop if the budget is used up, or nothing came of all so far."""
        left = iter(items)
        while chunk := list(islice(left, CHUNK if self.made else HOPELESS)):
            self.asked[round_number] += len(chunk)
            yield chunk
            self.check()

    def check(self) -> None:
        """Raise BudgetUsed, or GateRefused if HOPELESS candidates gave no row."""
        if self.asker.budget.used_up:
            raise BudgetUsed(self.asker.budget.used_up)
        if not self.made and len(self.rejects) >= HOPELESS:
            self.require_some()

    def require_some(self) -> None:
        """Raise GateRefused with the first responses if no row was made."""
        if self.made:
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons().items())
        first = "\n".join(
            f"  [{r.id}] {r.reason}: {r.detail}: {clipped(r.text, SHOWN_CHARACTERS)!r}" for r in self.rejects[:SHOWN]
        )
        raise GateRefused(
            f"generate: none of the first {len(self.rejects)} candidates can be used ({reasons or 'no response'}); the "
            f"first:\n{first}\nTry another model, other generate.prompts, or a larger generate.max_new_tokens"
        )

    def reasons(self) -> dict[str, int]:
        """Return how many candidates were left out for which reason."""
        return dict(sorted(Counter(r.reason for r in self.rejects).items()))

    def rounds(self) -> list[dict[str, Any]]:
        """Return for each round: rows tried and made, mean words, and the share of different word pairs among all.

        The last is distinct-2 (arXiv:1510.03055) of the instructions: 1 if no two words follow each other twice.
        """
        lines = []
        for number in sorted({*self.asked, *(m.round for m in self.made)}):
            here = [m for m in self.made if m.round == number]
            asked, answers = [words(m.instruction) for m in here], [words(m.answer) for m in here]
            pairs = [p for text in asked for p in pairwise(text)]
            mean = max(1, len(here))
            lines.append(
                {
                    "round": number,
                    "tried": self.asked[number],
                    "rows": len(here),
                    "instruction_words": round(sum(map(len, asked)) / mean, 1),
                    "answer_words": round(sum(map(len, answers)) / mean, 1),
                    "distinct_2": round(len(set(pairs)) / len(pairs), 4) if pairs else None,
                }
            )
        return lines

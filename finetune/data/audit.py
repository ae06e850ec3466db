"""What must hold of rendered rows before hours of training are spent on them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from finetune.data.chat import Chat, Span
from finetune.errors import GateRefused

EXAMPLES = 20  # row ids kept for each reason


@dataclass
class Tally:
    """What became of the rows of one split."""

    rows_in: int = 0
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    longest: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first row ids

    def keep(self, row_id: str, length: int, supervised: int, truncated: bool) -> None:
        """Count a row that is written."""
        self.rows_in += 1
        self.rows += 1
        self.tokens += length
        self.supervised += supervised
        self.longest = max(self.longest, length)
        if truncated:
            self.truncated += 1
            self._remember("truncated", row_id)

    def drop(self, row_id: str, reason: str) -> None:
        """Count a row that is left out."""
        self.rows_in += 1
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self._remember(reason, row_id)

    def as_json(self) -> dict[str, object]:
        """Every figure, for audit.json."""
        return {
            "rows_in": self.rows_in,
            "rows": self.rows,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "truncated": self.truncated,
            "longest": self.longest,
            "dropped": self.dropped,
            "examples": self.examples,
        }

    def _remember(self, reason: str, row_id: str) -> None:
        ids = self.examples.setdefault(reason, [])
        if len(ids) < EXAMPLES:
            ids.append(row_id)


def marking_problem(text: str, spans: Sequence[Span], chat: Chat) -> str | None:
    """What is wrong with the generation blocks of a rendered chat, or None.

    There must be one block an assistant turn, in order; it holds that turn's content, and beyond it at most one word
    (the terminator) and white space. So no word of a user or system turn is supervised. What a turn with other fields
    (tool calls, reasoning) adds to its block is not looked at.
    """
    answers = [turn for turn in chat if turn["role"] == "assistant"]
    if len(spans) != len(answers):
        return f"{len(spans)} generation blocks for {len(answers)} assistant turns"
    for number, ((start, end), turn) in enumerate(zip(spans, answers, strict=True), 1):
        content, block = str(turn["content"]).strip(), text[start:end]
        before, found, after = block.partition(content) if content else ("", "", block)
        if found != content:
            return f"assistant turn {number} is not in its generation block as it was written"
        if set(turn) <= {"role", "content"} and (before.strip() or len(after.split()) > 1):
            return f"the generation block of assistant turn {number} holds more than the answer and its terminator"
    return None


def check_start(row_id: str, ids: Sequence[int], bos: int | None) -> None:
    """Raise GateRefused for a row that begins with two BOS tokens: template and tokenizer each added one."""
    if bos is not None and list(ids[:2]) == [bos, bos]:
        raise GateRefused(f"row {row_id} begins with two BOS tokens; take one out of the template or the text")


def check_terminator(row_id: str, token: int, supervised: bool, special: Collection[int], shown: str) -> None:
    """Raise GateRefused unless a turn's last token is a supervised special token.

    Only such a token can stop generation; without it the model never learns to stop.
    """
    if token not in special:
        raise GateRefused(
            f"row {row_id}: the template ends an answer with {shown!r}, which is no special token of this base, so "
            "nothing would stop generation; take a template whose terminator it has (alpaca and mistral use its EOS)"
        )
    if not supervised:
        raise GateRefused(f"row {row_id}: the terminator {shown!r} carries no label, so the model would never stop")


def check_prompt(row_id: str, prompt: Sequence[int], full: Sequence[int], template: str) -> None:
    """Raise GateRefused unless the generation prompt's tokens begin the row's tokens."""
    shared = shared_length(prompt, full)
    if shared < len(prompt):
        raise GateRefused(
            f"row {row_id}: the prompt that inference uses parts from the trained text at token {shared} of "
            f"{len(prompt)}; "
            f"the generation prompt of template {template} does not fit how it writes an assistant turn"
        )


def shared_length(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items two sequences begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def check_pad(pad: int, labels: Iterable[int]) -> None:
    """Raise GateRefused where the pad token is a label: collators mask it, and a masked EOS never stops."""
    if pad in set(labels):
        raise GateRefused(f"the pad token (id {pad}) is also a label; choose another")


def check_shares(tallies: Sequence[Tally], max_truncated: float, max_dropped: float) -> None:
    """Raise GateRefused where too many rows were cut or left out, over all splits, or where none is left to train on.

    `tallies` begins with the training split's.
    """
    total = sum(t.rows_in for t in tallies)
    cut = sum(t.truncated for t in tallies)
    lost = {r: sum(t.dropped.get(r, 0) for t in tallies) for t in tallies for r in t.dropped}
    reasons = "; ".join(f"{count} × {reason} ({_named(tallies, reason)})" for reason, count in sorted(lost.items()))
    if sum(lost.values()) > max_dropped * total:
        raise GateRefused(
            f"{sum(lost.values())} of {total} rows would be dropped, more than render.max_dropped_fraction "
            f"{max_dropped}: {reasons}"
        )
    if cut > max_truncated * total:
        raise GateRefused(
            f"{cut} of {total} rows would be cut, more than render.max_truncated_fraction {max_truncated} "
            f"({_named(tallies, 'truncated')}); raise render.max_length_tokens, or filter long rows out"
        )
    if not tallies[0].rows:
        raise GateRefused(f"no training row is left to render{': ' + reasons if reasons else ''}")


def _named(tallies: Sequence[Tally], reason: str) -> str:
    ids = [i for t in tallies for i in t.examples.get(reason, [])]
    return ", ".join(ids[:3]) + (", …" if len(ids) > 3 else "")

"""Checks on rendered rows before training."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.errors import GateRefused
from finetune.tokenization.answers import Answer
from finetune.tokenization.chat import Chat, Span, answer_core, reasoning_of, text_of

EXAMPLES = 20  # row ids kept for each reason
SUMS = (  # the counts of a Tally that add up over its parts
    "rows_in", "rows", "tokens", "supervised", "truncated", "unterminated", "answers", "open_ends", "masked", "dropped",
)  # fmt: skip


@dataclass
class Tally:
    """Counts of the rows of one split."""

    rows_in: int = 0
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    unterminated: int = 0  # rows that hold part of a supervised turn, but not its end
    answers: int = 0  # assistant turns of the rows that are written
    open_ends: int = 0  # learned answers whose end the template writes otherwise than it asks for it
    masked: Counter[str] = field(default_factory=Counter)  # reason -> assistant turns without a label
    special_text: dict[str, list[int]] = field(default_factory=dict)  # special token -> rows with its text, with its id
    longest: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first row ids
    masked_turns: list[tuple[str, int, str]] = field(default_factory=list)  # until the caller has written them down
    left_out: dict[str, tuple[str, int | None]] = field(default_factory=dict)  # until the caller has written them down

    def keep(self, row_id: str, length: int, supervised: int, truncated: bool, unterminated: bool = False) -> None:
        """Count a row that is written; the caller counts `rows_in`, since a split text gives several."""
        self.rows += 1
        self.tokens += length
        self.supervised += supervised
        self.longest = max(self.longest, length)
        if truncated:
            self.truncated += 1
            self._remember("truncated", row_id)
        if unterminated:
            self.unterminated += 1
            self._remember("unterminated", row_id)

    def mask(self, row_id: str, turn: int, reason: str) -> None:
        """Count an assistant turn (1-based in its conversation) that carries no label."""
        self.masked[reason] += 1
        self.masked_turns.append((row_id, turn, reason))

    def note_special(self, string: str, has_id: bool) -> None:
        """Count a row whose messages hold the text of a special token; `has_id`: the typed text became the token."""
        rows = self.special_text.setdefault(string, [0, 0])
        rows[0] += 1
        rows[1] += has_id

    def drop(self, row_id: str, reason: str, length: int | None = None) -> None:
        """Count a row that is left out; `length` is its tokens, if they were counted."""
        self.rows_in += 1
        self.dropped[reason] += 1
        self.left_out[row_id] = (reason, length)
        self._remember(reason, row_id)

    def add(self, later: Tally) -> None:
        """Add the counts of the rows that come after these."""
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.longest = max(self.longest, later.longest)
        for string, (text, ids) in later.special_text.items():
            tally = self.special_text.setdefault(string, [0, 0])
            self.special_text[string] = [tally[0] + text, tally[1] + ids]
        for reason, names in later.examples.items():
            for name in names:
                self._remember(reason, name)
        self.masked_turns += later.masked_turns
        self.left_out |= later.left_out

    def as_json(self) -> dict[str, object]:
        """Every figure, for audit.json."""
        special = {s: {"rows_with_text": t, "rows_with_id": i} for s, (t, i) in self.special_text.items()}
        return {**{name: getattr(self, name) for name in (*SUMS, "longest", "examples")}, "special_text": special}

    def _remember(self, reason: str, row_id: str) -> None:
        ids = self.examples.setdefault(reason, [])
        if len(ids) < EXAMPLES:
            ids.append(row_id)


def lost_text(text: str, answers: Sequence[Answer], chat: Chat) -> str | None:
    """Return content of a message that is missing at its place in the rendered text, or None.

    Many templates pass over a role or a tool call that they do not know without a word. The words of each answer must
    stand in its range, with its reasoning (unless the range is masked) and with each call, by name and arguments. Each
    turn that is not the assistant's must stand between the answers beside it, so outside of every range (a system
    message may stand in any such place: Mistral's templates write it before the last question). Text may be as it was
    written, or escaped as in JSON.
    """
    spans = [(a.start, a.end) for a in answers]
    if len(spans) != sum(turn["role"] == "assistant" for turn in chat):
        return f"{len(spans)} of its answers are in the text"
    block, place = 0, 0
    for number, turn in enumerate(chat, 1):
        if turn["role"] == "assistant":
            if problem := _lost_answer(text, answers[block], turn):
                return f"the template does not write {problem} of turn {number}, an assistant's, as it was written"
            place, block = spans[block][1], block + 1
            continue
        content = text_of(turn["content"]).strip()
        if turn["role"] == "system":
            if not any(_find(text, content, a, b) >= 0 for a, b in _outside(spans, len(text))):
                return f"the template does not write the system message, turn {number}"
            continue
        end = spans[block][0] if block < len(spans) else len(text)
        place = _find(text, content, place, end)
        if place < 0:
            return f"the template does not write turn {number}, a {turn['role']}'s, as it was written"
        place += len(content)
    return None


def _lost_answer(text: str, answer: Answer, turn: dict[str, Any]) -> str | None:
    if text.find(answer_core(turn), answer.start, answer.end) < 0:
        return "the content"
    thought = reasoning_of(turn).strip()
    if thought and not answer.masked and _find(text, thought, answer.start, answer.end) < 0:
        return "the reasoning"
    return _lost_call(text[answer.start : answer.end], turn)


def _outside(spans: Sequence[Span], length: int) -> Iterator[Span]:
    start = 0
    for a, b in spans:
        yield start, a
        start = b
    yield start, length


def _find(text: str, content: str, start: int, end: int) -> int:
    """Return the position of `content` in text[start:end], or -1; unchanged, or escaped once or twice as in JSON."""
    at = text.find(content, start, end)
    if at >= 0:
        return at
    for ascii_only in (False, True):
        escaped = content
        for _ in range(2):
            escaped = json.dumps(escaped, ensure_ascii=ascii_only)[1:-1]
            at = text.find(escaped, start, end)
            if at >= 0:
                return at
    return -1


def _lost_call(block: str, turn: dict[str, Any]) -> str | None:
    """Which call of an assistant turn its block lacks."""
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else {"name": call}
        name = str(function.get("name", ""))
        if not name or _find(block, name, 0, len(block)) < 0:
            return f"the call of {name or 'a tool without a name'}"
        for leaf in _leaves(function.get("arguments")):
            if _find(block, leaf, 0, len(block)) < 0:
                return f"{leaf[:40]!r}, an argument of the call of {name},"
    return None


def _leaves(value: object) -> Iterator[str]:
    """Every key and every plain value of a call's arguments; a string that holds JSON is looked into."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict | list):
            yield from _leaves(parsed)
        else:
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def check_system(row_id: str, chat: Chat, template: str) -> None:
    """Raise GateRefused for a conversation that begins with a system message, for which the template has no place."""
    if chat and chat[0]["role"] == "system":
        raise GateRefused(
            f"row {row_id} has a system message, for which template {template} has no place; "
            "set render.system: merge to put it before the first user turn"
        )


def check_ids(row_id: str, ids: Sequence[int], wanted: Sequence[int], show: Callable[[int], str]) -> None:
    """Raise GateRefused unless a row's ids are those that the base's own apply_chat_template gives.

    `ids` are trained; `wanted` are the base's tokenizer's, made without the encoder that made `ids`; `show` gives the
    token of an id.
    """
    same = shared_length(ids, wanted)
    if same < len(ids) or same < len(wanted):
        ours, theirs = ([show(i) for i in tokens[same : same + 6]] for tokens in (ids, wanted))
        raise GateRefused(
            f"row {row_id}: its token ids differ from the base's own apply_chat_template at token {same}: "
            f"{ours}, the base gives {theirs}"
        )


def check_special_counts(
    row_id: str, ids: Sequence[int], wanted: Sequence[int], typed: Mapping[int, int], show: Callable[[int], str]
) -> None:
    """Raise GateRefused unless a row with typed strings of special tokens has each special id as often as the base's
    own apply_chat_template gives it, less the typed ones. `typed`: id of a special token -> typed occurrences.
    """
    for token, count in typed.items():
        mine, theirs = list(ids).count(token), list(wanted).count(token)
        if mine != theirs - count:
            raise GateRefused(
                f"row {row_id}: the special token {show(token)!r} (id {token}) is in its ids {mine} times; the "
                f"template writes it {theirs - count} times and the row's text contains it {count} times"
            )


def check_start(row_id: str, ids: Sequence[int], bos: int | None) -> None:
    """Raise GateRefused for a row that begins with two BOS tokens: template and tokenizer each added one."""
    if bos is not None and list(ids[:2]) == [bos, bos]:
        raise GateRefused(f"row {row_id} begins with two BOS tokens; take one out of the template or the text")


def check_terminator(row_id: str, token: int, supervised: bool, special: Collection[int], end: str) -> None:
    """Raise GateRefused unless a turn's last token is a supervised special token.

    Only such a token can stop generation; without it the model never learns to stop.
    """
    if token not in special:
        raise GateRefused(
            f"row {row_id}: the template ends an answer with {end!r}, which is no special token of this base, so "
            "nothing would stop generation; take a template whose terminator it has (alpaca and mistral use its EOS)"
        )
    if not supervised:
        raise GateRefused(f"row {row_id}: the terminator {end!r} carries no label, so the model would never stop")


def check_prompt(row_id: str, prompt: Sequence[int], full: Sequence[int], template: str) -> None:
    """Raise GateRefused unless the generation prompt's tokens begin the row's tokens."""
    shared = shared_length(prompt, full)
    if shared < len(prompt):
        raise GateRefused(
            f"row {row_id}: the prompt that inference uses differs from the trained text at token {shared} of "
            f"{len(prompt)}; "
            f"the generation prompt of template {template} does not fit how it writes an assistant turn"
        )


def shared_length(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items two sequences begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def check_pad(pad: int, labels: Iterable[int]) -> None:
    """Raise GateRefused if the pad token is a label: collators mask it, and a masked EOS never stops."""
    if pad in set(labels):
        raise GateRefused(f"the pad token (id {pad}) is also a label; choose another")


def check_shares(
    tallies: Sequence[Tally],
    max_truncated: float,
    max_dropped: float,
    max_unterminated: float = 1.0,
    first: str = "training",
) -> None:
    """Raise GateRefused if too many rows were cut, left out or lack an end, over all splits, or if none is left.

    `first` names the rows of the first of `tallies`: the training ones, or the held-out ones if no row is trained.
    """
    total = sum(t.rows_in for t in tallies)
    cut = sum(t.truncated for t in tallies)
    lost = {r: sum(t.dropped.get(r, 0) for t in tallies) for t in tallies for r in t.dropped}
    causes = [f"{count} × {reason} ({_named(tallies, reason)})" for reason, count in sorted(lost.items())]
    reasons = causes[0] if len(causes) == 1 else "".join(f"\n  {cause}" for cause in causes)
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
    endless = sum(t.unterminated for t in tallies)
    if endless > max_unterminated * total:
        raise GateRefused(
            f"{endless} of {total} rows hold an answer without its end, more than render.max_unterminated_fraction "
            f"{max_unterminated} ({_named(tallies, 'unterminated')}), so the model would learn not to stop; raise "
            "render.max_length_tokens, set render.overlong: drop, or end raw text with the base's EOS"
        )
    if not tallies[0].rows:
        raise GateRefused(f"no {first} row is left to render{': ' + reasons if reasons else ''}")


def _named(tallies: Sequence[Tally], reason: str) -> str:
    ids = [i for t in tallies for i in t.examples.get(reason, [])]
    return ", ".join(ids[:3]) + (", …" if len(ids) > 3 else "")

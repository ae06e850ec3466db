"""Rows to token ids and label masks, one batch at a time; every row is audited, none is written unseen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from finetune.data.records import Example
from finetune.errors import GateRefused, InputError
from finetune.tokenization.answers import Answer
from finetune.tokenization.audit import (
    Tally,
    check_prompt,
    check_start,
    check_system,
    check_terminator,
    lost_text,
)
from finetune.tokenization.chat import Span, chat_of
from finetune.tokenization.chat_template import Template, tools_of
from finetune.tokenization.label_mask import (
    Mask,
    Offsets,
    Supervise,
    fuses_with_prompt,
    last_tokens,
    token_mask,
)
from finetune.tokenization.rendering import Rendered, render_chat, render_prompt
from finetune.tokenization.template_sandbox import RenderingTooLong, limited
from finetune.utils.limits import memory

if TYPE_CHECKING:
    import pyarrow as pa

    from finetune.tokenization.encoder import Encoder


RENDER_BYTES = 1 << 30  # that rendering a batch of rows may add to this process
MOST_ENDLESS = 3  # rows on which a template may take too long (10 s each)


@dataclass(frozen=True, slots=True)
class Rules:
    """Rendering settings from the recipe and the base."""

    supervise: Supervise
    max_length: int  # tokens
    overlong: Literal["drop", "truncate", "split"]
    bos: str | None
    bos_id: int | None
    adds_bos: bool  # whether the tokenizer puts BOS before plain text
    eos: str | None
    stop_ids: frozenset[int] = frozenset()  # what ends generation by the base's own configuration


@dataclass(frozen=True, slots=True)
class _Row:
    """A rendered row and what of it carries labels."""

    row: Example
    text: Rendered
    answers: tuple[Answer, ...]  # those that are learned
    labels: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """One training row: int32 ids (T,), uint8 mask (T,)."""

    id: str
    ids: NDArray[np.int32]
    mask: Mask
    truncated: bool
    unterminated: bool = False  # part of a supervised turn is there, its end is not


@dataclass
class RowTokenizer:
    """Renders, encodes and masks rows, and remembers which terminators and labels it has seen."""

    template: Template
    encoder: Encoder
    rules: Rules
    terminators: set[int] = field(default_factory=set)
    labels: set[int] = field(default_factory=set)
    starts_with_bos: bool = False
    endless: int = 0  # rows on which the template took too long

    def batch(self, rows: Sequence[Example], tally: Tally) -> list[TokenizedRow]:
        """The rows that can be trained on; the others are counted in `tally` with their reason.

        Raises GateRefused (with the row's id) for two BOS tokens, or for a terminator that could not stop generation.
        """
        with memory(RENDER_BYTES):
            rendered = [prepared for row in rows if (prepared := self._rendered(row, tally)) is not None]
        encoded = self.encoder.encode_rendered(
            [prepared.text for prepared in rendered], [f"row {prepared.row.id}" for prepared in rendered]
        )
        done: list[TokenizedRow] = []
        for prepared, (ids, offsets) in zip(rendered, encoded, strict=True):
            reason, mask = self._masked(prepared, ids, offsets)
            if reason:
                tally.drop(prepared.row.id, reason, len(ids))
                continue
            self._count(prepared, ids, tally)
            done += self._cut(prepared, ids, offsets, mask, tally)
        if done:
            self.labels.update(np.unique(np.concatenate([kept.ids[kept.mask == 1] for kept in done])).tolist())
        self.starts_with_bos |= any(int(kept.ids[0]) == self.rules.bos_id for kept in done)
        return done

    def check_prompts(self, rows: Sequence[Example]) -> int:
        """Prove on `rows` that what inference feeds the model begins what was trained; returns how many were proved.

        Raises GateRefused if it does not. Rows that `batch` drops, and those whose earlier turns the template writes
        differently in a prompt, are skipped.
        """
        checked = 0
        for row in rows:
            rendered = self._rendered(row, Tally())
            if rendered is None or not rendered.text.answers:
                continue
            last = rendered.text.answers[-1]
            chat = (rendered.text.chat or [])[: last.index]
            try:
                prompt = render_prompt(self.template.profile, self.encoder.controls, chat, tools_of(row))
            except InputError:
                continue
            if len(prompt.text) != last.border:
                continue
            texts, names = (prompt, rendered.text), [f"row {row.id}"] * 2
            (start, _), (full, offsets) = self.encoder.encode_rendered(texts, names)
            if not fuses_with_prompt(offsets, [last.border]):
                check_prompt(row.id, start, full, self.template.name)
                checked += 1
        return checked

    def render(self, row: Example) -> Rendered:
        """A row's text. Raises TemplateRefused or InputError with the reason why it cannot be trained on."""
        if row.text is not None:
            return self._raw(row.text)
        chat, template = chat_of(row.messages), self.template
        if template.profile.system == "refuse" and not template.profile.takes_system:
            check_system(row.id, chat, template.name)
        rendered = render_chat(template.profile, template.finder, self.encoder.controls, chat, tools_of(row))
        if not rendered.answers:
            raise InputError("no assistant turn")
        if problem := lost_text(rendered.text, rendered.answers, rendered.chat or chat):
            raise InputError(problem)
        return rendered

    def _rendered(self, row: Example, tally: Tally) -> _Row | None:
        try:
            with limited(len(row.messages)):
                text = self.render(row)
        except RenderingTooLong:
            self.endless += 1
            if self.endless == MOST_ENDLESS:
                raise GateRefused(
                    f"the chat template does not finish in the allowed time on {self.endless} rows, the last of "
                    f"them {row.id}; set render.template to another, or leave such rows out by a rule of filter"
                ) from None
            tally.drop(
                row.id, f"the chat template does not finish in the allowed time on its {len(row.messages)} turns"
            )
            return None
        except MemoryError:
            raise InputError(
                f"row {row.id}: the chat template builds a text that outgrows {RENDER_BYTES >> 30} GB of memory; "
                "choose another by render.template, or leave the row out by a rule of filter"
            ) from None
        except InputError as error:
            tally.drop(row.id, str(error))
            return None
        whole = (0, len(text.text))
        if row.text is not None:
            return _Row(row, text, (), (whole,))
        learned = [m.learn for m in row.messages if m.role == "assistant"]
        answers = []
        for number, (answer, learn) in enumerate(zip(text.answers, learned, strict=True)):
            if self.rules.supervise == "last" and number < len(learned) - 1:
                continue
            reason = answer.masked or ("" if learn else "the row says that this turn is not learned")
            if reason:
                tally.mask(row.id, answer.index + 1, reason)
            else:
                answers.append(self._marked(text, answer))
        if self.rules.supervise == "all":
            masked = [(a.start, a.end) for a, learn in zip(text.answers, learned, strict=True) if not learn]
            labels = tuple(_without(whole, masked))
        else:
            labels = tuple(span for a in answers for span in _within((a.start, a.end), text.blocks))
        if not labels:
            tally.drop(row.id, "no turn of it is learned")
            return None
        return _Row(row, text, tuple(answers), labels)

    def _marked(self, text: Rendered, answer: Answer) -> Answer:
        """The answer up to the last control token in its generation block, if the template ends the block earlier."""
        parts = _within((answer.start, answer.end), text.blocks)
        if not parts or parts[-1][1] == answer.end:
            return answer
        end = self.template.finder.last_control(text.text, parts[-1][0], parts[-1][1])
        return replace(answer, end=end) if end > 0 else answer

    def _raw(self, text: str) -> Rendered:
        """Raw text is what its author wants the model to see: control strings in it are meant."""
        rules = self.rules
        if rules.adds_bos and rules.bos and not text.startswith(rules.bos):
            text = rules.bos + text
        if rules.eos:
            bare = text.rstrip()
            text = bare if bare.endswith(rules.eos) else text + rules.eos
        return Rendered(text)

    def _masked(self, prepared: _Row, ids: Sequence[int], offsets: Offsets) -> tuple[str, Mask]:
        """A reason to leave the row out (or an empty string), and the mask over all its tokens."""
        rules, raw = self.rules, prepared.row.text is not None
        check_start(prepared.row.id, ids, rules.bos_id)
        mask = token_mask(offsets, prepared.labels)
        if len(ids) > rules.max_length and rules.overlong == "drop":
            return "longer than render.max_length_tokens", mask
        if not mask[: rules.max_length].any():
            return "no supervised token within render.max_length_tokens", mask
        if fuses_with_prompt(offsets, [a.border for a in prepared.answers if a.border]):
            return "the answer's first token fuses with the end of the prompt", mask
        for index in self._ends(prepared, offsets):
            if index is not None and (index < rules.max_length or (raw and rules.overlong == "split")):
                start, end = offsets[index]
                end_text = prepared.text.text[start:end]
                stops = self.encoder.special_ids | rules.stop_ids
                check_terminator(prepared.row.id, ids[index], bool(mask[index]), stops, end_text)
                self.terminators.add(int(ids[index]))
        return "", mask

    def _ends(self, prepared: _Row, offsets: Offsets) -> list[int | None]:
        """The index of the token that ends each learned answer (of a raw text: its EOS)."""
        if prepared.row.text is not None:
            return last_tokens(offsets, [(0, len(prepared.text.text))]) if self.rules.eos else []
        return last_tokens(offsets, [(a.start, a.end) for a in prepared.answers if a.ends])

    def _cut(
        self, prepared: _Row, ids: Sequence[int], offsets: Offsets, mask: Mask, tally: Tally
    ) -> Iterator[TokenizedRow]:
        """The row within the length limit: one row, or for raw text under `overlong: split` as many as it fills."""
        most, split = self.rules.max_length, prepared.row.text is not None and self.rules.overlong == "split"
        tally.rows_in += 1
        for part, start in enumerate(range(0, len(ids) if split else 1, most)):
            end = min(len(ids), start + most)
            cut = mask[start:end].copy()
            cut[:1] = 0  # no token of this row predicts its first
            truncated = not split and end < len(ids)
            unterminated = not split and self._unterminated(prepared, offsets)
            name = prepared.row.id if not part else f"{prepared.row.id}#{part + 1}"
            if not cut.any():
                continue
            tally.keep(name, end - start, int(cut.sum()), truncated, unterminated)
            yield TokenizedRow(name, np.array(ids[start:end], np.int32), cut, truncated, unterminated)

    def _unterminated(self, prepared: _Row, offsets: Offsets) -> bool:
        """Return whether a supervised turn begins within the kept tokens and ends after them, or has no end at all."""
        if prepared.row.text is not None and not self.rules.eos:
            return True
        if len(offsets) <= self.rules.max_length:
            return False
        kept = int(offsets[self.rules.max_length - 1, 1])  # characters
        spans = prepared.labels if prepared.row.text is not None else [(a.start, a.end) for a in prepared.answers]
        ends = last_tokens(offsets, spans)
        return any(
            a < kept and (i is None or i >= self.rules.max_length) for (a, _), i in zip(spans, ends, strict=True)
        )

    def _count(self, prepared: _Row, ids: Sequence[int], tally: Tally) -> None:
        """Count the row's answers, and the special tokens whose text its messages hold."""
        tally.answers += len(prepared.text.answers)
        tally.open_ends += sum(not answer.ends for answer in prepared.answers)
        if prepared.text.sealed is None:
            return
        for string, typed in self.encoder.typed_specials(prepared.text).items():
            token = self.encoder.special_id(string)
            tally.note_special(string, list(ids).count(token) > prepared.text.text.count(string) - typed)


def _within(span: Span, blocks: Sequence[Span]) -> list[Span]:
    """The parts of `span` that are in `blocks`; all of it without blocks."""
    if not blocks:
        return [span]
    parts = [(max(span[0], a), min(span[1], b)) for a, b in blocks]
    return [(a, b) for a, b in parts if a < b]


def _without(span: Span, holes: Sequence[Span]) -> Iterator[Span]:
    start = span[0]
    for a, b in [*holes, (span[1], span[1])]:
        if start < a:
            yield start, a
        start = b


def table(rows: Sequence[TokenizedRow]) -> pa.Table:
    """Rows as the columns of render/train.parquet."""
    import pyarrow as pa

    lengths = np.array([len(r.ids) for r in rows], np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    ids = np.concatenate([np.zeros(0, np.int32), *(r.ids for r in rows)])
    mask = np.concatenate([np.zeros(0, np.uint8), *(r.mask for r in rows)])
    return pa.table(
        {
            "id": pa.array([r.id for r in rows], pa.string()),
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
            "mask": pa.ListArray.from_arrays(offsets, pa.array(mask, pa.uint8())),
            "length": pa.array(lengths, pa.int32()),
            "supervised": pa.array([int(r.mask.sum()) for r in rows], pa.int32()),
            "truncated": pa.array([r.truncated for r in rows], pa.bool_()),
        }
    )

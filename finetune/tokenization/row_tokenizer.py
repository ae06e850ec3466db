"""Rows to token ids and label masks, one batch at a time; every row is audited, none is written unseen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.data.records import Example
from finetune.errors import InputError
from finetune.tokenization.audit import (
    Tally,
    check_prompt,
    check_same,
    check_start,
    check_system,
    check_terminator,
    lost_turn,
    marking_problem,
)
from finetune.tokenization.chat import (
    Chat,
    ControlStrings,
    Rendered,
    Renderer,
    Span,
    TemplateRefused,
    chat_of,
    merge_system,
    prompt_of,
    render_row,
)
from finetune.tokenization.label_mask import (
    Mask,
    Offsets,
    Supervise,
    fuses_with_prompt,
    last_tokens,
    supervised_spans,
    token_mask,
)

if TYPE_CHECKING:
    import pyarrow as pa


class Encoder(Protocol):
    """Text to ids; see tokenization/encoder.py."""

    controls: ControlStrings
    special_ids: frozenset[int]

    def encode_rendered(self, rows: Sequence[Rendered]) -> list[tuple[list[int], Offsets]]:
        """Ids and offsets of each row; typed control strings stay text."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the recipe and the base decide about rendering."""

    template: str  # its name, for messages
    supervise: Supervise
    max_length: int  # tokens
    overlong: Literal["drop", "truncate"]
    system: Literal["template", "merge", "refuse"]  # who takes a leading system message
    bos: str | None
    bos_id: int | None
    adds_bos: bool  # whether the tokenizer puts BOS before plain text
    eos: str | None


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

    render: Renderer
    encoder: Encoder
    rules: Rules
    own: Renderer | None = None  # what inference uses, where every row is to be proved to be written as it does
    proved: int = 0  # rows that were
    gap: int = 0  # characters between the generation prompt's end and the generation block, 0 for our templates
    terminators: set[int] = field(default_factory=set)
    labels: set[int] = field(default_factory=set)
    starts_with_bos: bool = False

    def batch(self, rows: Sequence[Example], tally: Tally) -> list[TokenizedRow]:
        """The rows that can be trained on; the others are counted in `tally` with their reason.

        Raises GateRefused (with the row's id) for two BOS tokens, a terminator that could not stop generation, or a
        system message under `system: refuse`.
        """
        rendered = self._rendered(rows, tally)
        encoded = self.encoder.encode_rendered([text for _, text in rendered])
        done = []
        for (row, text), (ids, offsets) in zip(rendered, encoded, strict=True):
            reason, mask = self._masked(row, text, ids, offsets)
            if reason:
                tally.drop(row.id, reason, len(ids))
                continue
            length = min(len(ids), self.rules.max_length)
            kept = TokenizedRow(
                row.id,
                np.array(ids[:length], np.int32),
                mask[:length],
                length < len(ids),
                self._unterminated(row, text, offsets),
            )
            tally.keep(row.id, length, int(kept.mask.sum()), kept.truncated, kept.unterminated)
            done.append(kept)
        if done:
            self.labels.update(np.unique(np.concatenate([kept.ids[kept.mask == 1] for kept in done])).tolist())
        self.starts_with_bos |= any(int(kept.ids[0]) == self.rules.bos_id for kept in done)
        return done

    def check_prompts(self, rows: Sequence[Example]) -> int:
        """Prove on `rows` that what inference feeds the model begins what was trained; returns how many were proved.

        Raises GateRefused where it does not. Rows that `batch` drops are passed over.
        """
        checked = 0
        for row in rows:
            try:
                chat = self._chat(row)
                prompt = prompt_of(chat)
                if prompt is None:
                    continue
                texts = [
                    render_row(self.render, self.encoder.controls, prompt, generation_prompt=True),
                    render_row(self.render, self.encoder.controls, chat),
                ]
            except InputError:
                continue
            (start, _), (full, offsets) = self.encoder.encode_rendered(texts)
            if texts[1].spans and not fuses_with_prompt(offsets, self._borders(texts[1])):
                check_prompt(row.id, start, full, self.rules.template)
                checked += 1
        return checked

    def measure_gap(self, rows: Sequence[Example]) -> int:
        """Characters between generation prompt and generation block in the first of `rows` that shows it."""
        for row in rows:
            try:
                chat = self._chat(row)
                prompt = prompt_of(chat)
                spans = self.render(chat)[1]
                if prompt and spans:
                    return max(0, spans[-1][0] - len(self.render(prompt, True)[0]))
            except TemplateRefused:
                continue
        return 0

    def _chat(self, row: Example) -> Chat:
        chat = chat_of(row.messages)
        if chat and chat[0]["role"] == "system" and self.rules.system != "template":
            if self.rules.system == "refuse":
                check_system(row.id, chat, self.rules.template)
            return merge_system(chat)
        return chat

    def _rendered(self, rows: Sequence[Example], tally: Tally) -> list[tuple[Example, Rendered]]:
        """The rows with their texts; both templates write all of them at once, and each by itself where one cannot."""
        chats: dict[int, Chat] = {}
        for n, row in enumerate(rows):
            try:
                chats |= {n: self._chat(row)} if row.text is None else {}
            except InputError as error:
                tally.drop(row.id, str(error))
        together = list(chats.values())
        trained = self.render.many(together) or repeat(None)
        inferred = (self.own.many(together) if self.own else None) or repeat(None)
        found = []
        written = zip(together, trained, inferred, strict=False)
        for n, row in enumerate(rows):
            if row.text is not None:
                found.append((row, self._raw(row.text)))
            elif n in chats and (text := self._of_chat(row, *next(written), tally)) is not None:
                found.append((row, text))
        return found

    def _of_chat(
        self,
        row: Example,
        chat: Chat,
        trained: tuple[str, list[Span]] | None,
        inferred: tuple[str, list[Span]] | None,
        tally: Tally,
    ) -> Rendered | None:
        try:
            rendered = render_row(self.render, self.encoder.controls, chat, plain=trained)
        except InputError as error:
            tally.drop(row.id, str(error))
            return None
        if not rendered.spans:
            tally.drop(row.id, "no assistant turn")
            return None
        problem = marking_problem(rendered.text, rendered.spans, chat) or lost_turn(rendered.text, rendered.spans, chat)
        if problem:
            tally.drop(row.id, problem)
            return None
        if self.own is not None:
            check_same(row.id, rendered.text, (inferred or self.own(chat))[0], self.rules.template)
            self.proved += 1
        return rendered

    def _raw(self, text: str) -> Rendered:
        """Raw text is what its author wants the model to see: control strings in it are meant."""
        rules = self.rules
        if rules.adds_bos and rules.bos and not text.startswith(rules.bos):
            text = rules.bos + text
        if rules.eos:
            bare = text.rstrip()
            text = bare if bare.endswith(rules.eos) else text + rules.eos
        return Rendered(text, ((0, len(text)),))

    def _borders(self, text: Rendered) -> list[int]:
        return [start - self.gap for start, _ in text.spans if start > self.gap]

    def _masked(self, row: Example, text: Rendered, ids: Sequence[int], offsets: Offsets) -> tuple[str, Mask]:
        """A reason to leave the row out (or an empty string), and the mask over all its tokens."""
        rules = self.rules
        check_start(row.id, ids, rules.bos_id)
        spans = supervised_spans(text.spans, rules.supervise, len(text.text))
        mask = token_mask(offsets, spans)
        if len(ids) > rules.max_length and rules.overlong == "drop":
            return "longer than render.max_length_tokens", mask
        if not mask[: rules.max_length].any():
            return "no supervised token within render.max_length_tokens", mask
        if row.text is None and fuses_with_prompt(offsets, self._borders(text)):
            return "the answer's first token fuses with the end of the prompt", mask
        for index in last_tokens(offsets, text.spans if rules.supervise != "last" else text.spans[-1:]):
            if index is not None and index < rules.max_length and (row.text is None or rules.eos):
                start, end = offsets[index]
                shown = text.text[start:end]
                check_terminator(row.id, ids[index], bool(mask[index]), self.encoder.special_ids, shown)
                self.terminators.add(int(ids[index]))
        return "", mask

    def _unterminated(self, row: Example, text: Rendered, offsets: Offsets) -> bool:
        """Whether a supervised turn begins within the kept tokens and ends behind them, or has no end at all."""
        if row.text is not None and not self.rules.eos:
            return True
        if len(offsets) <= self.rules.max_length:
            return False
        kept = int(offsets[self.rules.max_length - 1, 1])  # characters
        spans = text.spans[-1:] if self.rules.supervise == "last" else text.spans
        ends = last_tokens(offsets, spans)
        return any(
            a < kept and (i is None or i >= self.rules.max_length) for (a, _), i in zip(spans, ends, strict=True)
        )


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

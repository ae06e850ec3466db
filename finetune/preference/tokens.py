"""Convert pairs to token ids and label masks; both answers follow the same prompt. Each pair is checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from finetune.data.records import Example
from finetune.errors import GateRefused, InputError
from finetune.filters.basic import Drop
from finetune.preference.records import SIDES, Pair
from finetune.tokenization.audit import Tally, check_prompt, shared_length
from finetune.tokenization.chat import chat_of
from finetune.tokenization.chat_template import tools_of
from finetune.tokenization.rendering import Rendered, render_prompt
from finetune.tokenization.row_tokenizer import RowTokenizer, TokenizedRow

UNLIMITED = 1 << 30  # tokens: pairs are dropped by their length as a whole, never cut
Ids = NDArray[np.int32]
Mask = NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A pair under the template: int32 ids and int8 masks (1: supervised); `answers` are (ids, mask) of each side."""

    pair: Pair
    prompt: Ids
    answers: tuple[tuple[Ids, Mask], ...]

    @property
    def longest(self) -> int:
        """Tokens of the prompt with the longer answer."""
        return len(self.prompt) + max(len(ids) for ids, _ in self.answers)

    @property
    def tokens(self) -> int:
        """Tokens that are computed: the prompt with each answer."""
        return sum(len(self.prompt) + len(ids) for ids, _ in self.answers)

    def supervised(self, side: int) -> int:
        """Supervised tokens of one answer."""
        return int(self.answers[side][1].sum())


def tokenize(
    pairs: Sequence[Pair], tokenizer: RowTokenizer, most: int, decode: Callable[[Sequence[int]], str]
) -> Iterator[TokenizedPair | Drop]:
    """Each pair as tokens, or with the reason why it is left out; in order.

    Args:
        pairs: a batch; both sides of all are rendered and encoded together.
        tokenizer: renders and encodes; its rules must not cut (max_length UNLIMITED).
        most: tokens of a prompt with its longer answer, at most.
        decode: ids to text, special tokens left out.

    Raises GateRefused (with the row's id) if the prompt's ids do not begin those of a side, or labels are not on the
    answer and its terminator.
    """
    rows = [pair.example(side) for pair in pairs for side in range(len(pair.answers))]
    tally = Tally()
    tokenized = {row.id: row for row in tokenizer.batch(rows, tally)}
    prompts = _prompts(pairs, tokenizer)
    stops = tokenizer.encoder.special_ids | tokenizer.rules.stop_ids
    for pair in pairs:
        sides = [pair.example(side).id for side in range(len(pair.answers))]
        lost = next((side for side in sides if side not in tokenized), None)
        prompt = prompts[pair.id]
        if lost is not None:
            reason = tally.left_out[lost][0]
            yield Drop("template", f"{lost}: {reason}")
        elif isinstance(prompt, Drop):
            yield prompt
        else:
            yield _checked(pair, prompt, [tokenized[side] for side in sides], tokenizer, stops, most, decode)


def _prompts(pairs: Sequence[Pair], tokenizer: RowTokenizer) -> Mapping[str, list[int] | Drop]:
    rendered: dict[str, Rendered] = {}
    dropped: dict[str, list[int] | Drop] = {}
    for pair in pairs:
        row = Example(pair.id, pair.source, pair.prompt, tools=pair.tools)
        try:
            profile, controls = tokenizer.template.profile, tokenizer.encoder.controls
            rendered[pair.id] = render_prompt(profile, controls, chat_of(pair.prompt), tools_of(row))
        except InputError as error:
            dropped[pair.id] = Drop("template", str(error))
    encoded = tokenizer.encoder.encode_rendered(
        [*rendered.values()], [f"the prompt of pair {name}" for name in rendered]
    )
    return dropped | {name: ids for name, (ids, _) in zip(rendered, encoded, strict=True)}


def _checked(
    pair: Pair,
    prompt: list[int],
    rows: Sequence[TokenizedRow],
    tokenizer: RowTokenizer,
    stops: Collection[int],
    most: int,
    decode: Callable[[Sequence[int]], str],
) -> TokenizedPair | Drop:
    for side, row in enumerate(rows):
        if shared_length(prompt, row.ids.tolist()) < len(prompt) and not _begins(pair, side, tokenizer):
            what = f"{row.id}: the template writes the prompt differently when this answer follows"
            return Drop("template", what)
        check_prompt(row.id, prompt, row.ids.tolist(), tokenizer.template.name)
        check_labels(row.id, row.ids.tolist(), row.mask.tolist(), len(prompt), stops, decode)
    start = len(prompt)
    answers = tuple((row.ids[start:], row.mask[start:].astype(np.int8)) for row in rows)
    made = TokenizedPair(pair, np.array(prompt, np.int32), answers)
    if made.longest > most:
        detail = f"{made.longest} tokens of prompt and answer, at most {most} (preference.max_length_tokens)"
        return Drop("too_long", detail, made.longest, most)
    if len(answers) == 2 and np.array_equal(answers[0][0], answers[1][0]):
        return Drop("no_difference", "both answers have the same token ids under the template")
    return made


def _begins(pair: Pair, side: int, tokenizer: RowTokenizer) -> bool:
    """Whether the prompt's text begins the text of a side."""
    row = pair.example(side)
    prompt = render_prompt(tokenizer.template.profile, tokenizer.encoder.controls, chat_of(pair.prompt), tools_of(row))
    return tokenizer.render(row).text.startswith(prompt.text)


def check_labels(
    name: str,
    ids: Sequence[int],
    mask: Sequence[int],
    prompt: int,
    stops: Collection[int],
    decode: Callable[[Sequence[int]], str],
) -> None:
    """Raise GateRefused unless labels are on the answer and its terminator, and only there.

    Args:
        name: the row and its side.
        ids: prompt and answer.
        mask: as long as `ids`; 1 is supervised.
        prompt: tokens of the prompt.
        stops: ids that can end an answer.
        decode: ids to text, special tokens left out.
    """
    if len(mask) != len(ids):
        raise GateRefused(f"pairs: row {name}: {len(ids)} ids and a mask of {len(mask)}")
    if any(mask[:prompt]):
        raise GateRefused(f"pairs: row {name}: {sum(mask[:prompt])} tokens of its prompt carry a label")
    labels = [i for i in range(prompt, len(ids)) if mask[i]]
    if not labels:
        raise GateRefused(f"pairs: row {name}: no token of its answer carries a label")
    trailing = decode(ids[labels[-1] + 1 :])
    if ids[labels[-1]] not in stops or trailing.strip():
        end = f"{trailing.strip()[:40]!r} after them" if trailing.strip() else f"the last is {ids[labels[-1]]}"
        raise GateRefused(
            f"pairs: row {name}: its labels do not end with the answer's terminator ({end}), so the model would learn "
            "not to stop"
        )


def pair_table(pairs: Sequence[TokenizedPair], method: str) -> pa.Table:
    """Pairs as the columns of train.parquet and eval.parquet (docs/preference.md)."""
    names = SIDES[method]
    ids, masks = pa.list_(pa.int32()), pa.list_(pa.int8())
    columns: dict[str, Any] = {
        "pair_id": pa.array([p.pair.id for p in pairs], pa.string()),
        "source": pa.array([p.pair.source for p in pairs], pa.string()),
        "prompt_ids": pa.array([p.prompt for p in pairs], ids),
    }
    columns |= {f"{n}_ids": pa.array([p.answers[i][0] for p in pairs], ids) for i, n in enumerate(names)}
    columns |= {f"{n}_mask": pa.array([p.answers[i][1] for p in pairs], masks) for i, n in enumerate(names)}
    if method == "kto":
        columns["label"] = pa.array([p.pair.label for p in pairs], pa.bool_())
    return pa.table(columns)


def length_bias(pairs: Sequence[tuple[int, int]]) -> float | None:
    """Share of the pairs (supervised tokens of chosen, of rejected) with a longer chosen answer, of those whose answers
    differ in length; None if none do.
    """
    longer, shorter = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return longer / (longer + shorter) if longer + shorter else None


def check_length_bias(share: float | None, most: float | None, ids: Sequence[str]) -> None:
    """Raise GateRefused if in more than `most` of the pairs the chosen answer is the longer one."""
    if most is not None and share is not None and share > most:
        raise GateRefused(
            f"pairs: in {share:.1%} of the pairs the chosen answer is the longer one (as in {', '.join(ids[:3])}), "
            f"more than preference.max_length_bias {most:g}; the model would learn to write long answers. Balance the "
            "data, or raise the limit"
        )

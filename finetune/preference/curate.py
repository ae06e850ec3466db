"""Leave pairs out before rendering, with a reason each: rules, contradictions, repeats, held-out prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from finetune.context import Context
from finetune.data.records import Example, Message, Reject
from finetune.data.text import field_text, text_key
from finetune.dedup.holdout import Names, choose, count_leaks
from finetune.dedup.index import FlatIndex, exact_search
from finetune.dedup.jaccard import Jaccard, word_sets
from finetune.dedup.measures import Cosine, Measure, Vectors
from finetune.dedup.select import groups, repeats_of, select
from finetune.errors import FinetuneError
from finetune.filters.basic import Drop, Verdict
from finetune.filters.overlap import Against, find_overlaps
from finetune.preference.records import Pair, Repeats, context_text, question, said
from finetune.recipe import Jaccard as JaccardSection
from finetune.recipe import Split

PROMPT_JACCARD = JaccardSection()  # by words two prompts are near-duplicates from here on, without dedup.jaccard
MOST_PROMPTS = 32  # of a held-out conversation's answers whose prompts are compared: the first ones and the last
TELLING_WORDS = 8  # an answer of fewer words may be that of many prompts
WORDS = Names(
    "pairs",
    "preference.eval_fraction",
    "preference.max_eval_pairs",
    "or name held-out pairs of your own under preference.eval_data",
)


@dataclass
class Curation:
    """Pairs, and the reason for each one that is left out.

    `pairs` are those to train on, then `held` ones of the user's own; `vectors` (parts of all pairs, None without an
    embedding): prompt, then the answers.
    """

    pairs: Sequence[Pair]
    own_held: int = 0  # the last ones of `pairs`, which are held out as they are
    left_out: dict[int, Reject] = field(default_factory=dict)
    unread: Sequence[Reject] = ()  # rows that were left out before they became pairs

    @property
    def trainable(self) -> list[int]:
        """Numbers of the pairs to train on that are not left out."""
        return [i for i in range(len(self.pairs) - self.own_held) if i not in self.left_out]

    @property
    def held(self) -> list[int]:
        """Numbers of the user's own held-out pairs that are not left out."""
        return [i for i in range(len(self.pairs) - self.own_held, len(self.pairs)) if i not in self.left_out]

    def drop(self, number: int, reason: str, detail: str, value: float | None = None) -> None:
        """Leave a pair out; the first reason stays."""
        self.leave_out(number, Drop(reason, detail, value))

    def leave_out(self, number: int, verdict: Drop) -> None:
        """Leave a pair out by a rule's verdict; the first one stays."""
        if number not in self.left_out:
            pair = self.pairs[number]
            self.left_out[number] = pair.reject(verdict.reason, verdict.detail, verdict.value, verdict.limit)

    def reasons(self) -> str:
        """How many pairs are left out for each reason, a line each, with the first row and its detail."""
        rejects = [*self.unread, *(reject for _, reject in sorted(self.left_out.items()))]
        counts = Counter(reject.reason for reject in rejects)
        first = {reject.reason: reject for reject in reversed(rejects)}
        return "".join(f"\n  {n} × {why} ({first[why].id}: {first[why].detail})" for why, n in sorted(counts.items()))


def apply_rules(curation: Curation, judge: Callable[[Example], Verdict]) -> None:
    """Leave out pairs whose wanted answer the recipe's filter leaves out; an unwanted answer may be bad."""
    for number, pair in enumerate(curation.pairs):
        if pair.label is False:
            continue
        row = Example(pair.id, pair.source, (*pair.prompt, *pair.answers[0]), None, pair.extra, pair.tools)
        if (verdict := judge(row)) is not None:
            curation.leave_out(number, verdict)


def drop_contradictions(curation: Curation) -> int:
    """Leave out pairs that contradict another pair on the same side of the split; return the number of them.

    Two pairs with the same prompt contradict each other if one prefers A over B and the other B over A; for KTO, if
    the same answer has different labels. Texts are compared as for exact duplicates: NFKC, case folded, white
    space collapsed.
    """
    before = len(curation.left_out)
    for numbers in (curation.trainable, curation.held):
        own = {number: _claim(curation.pairs[number]) for number in numbers}
        first = {claim: number for number, claim in reversed(own.items())}
        for number, (prompt, answers, label) in own.items():
            opposite = (prompt, answers[::-1], None if label is None else not label)
            if opposite not in first or opposite == own[number]:
                continue
            what = "prefers the other answer to" if label is None else "gives this answer the other label for"
            detail = f"{curation.pairs[first[opposite]].id} {what} the same prompt"
            curation.drop(number, "contradiction", detail)
    return len(curation.left_out) - before


def _claim(pair: Pair) -> tuple[bytes, tuple[bytes, ...], bool | None]:
    return text_key(context_text(pair)), tuple(text_key(said(a)) for a in pair.answers), pair.label


@dataclass(frozen=True)
class Parts:
    """Unit vectors of each pair's prompt and answers, and of the prompts of SFT rows that are held out."""

    prompts: Vectors
    answers: tuple[Vectors, ...]
    held_rows: Vectors

    def of_pairs(self) -> Vectors:
        """(N, d · parts): a cosine is the mean of the cosines of prompt, chosen and rejected, so that a long prompt
        does not hide that two answers differ, and A over B is not B over A.
        """
        whole = np.concatenate([self.prompts, *self.answers], axis=1)
        lengths = np.linalg.norm(whole.astype(np.float64), axis=1, keepdims=True)
        return (whole / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def embed_parts(
    pairs: Sequence[Pair], held_rows: Sequence[str], alike: Repeats, ctx: Context, made_by: Mapping[str, object] | None
) -> Parts | None:
    """Return the vectors of all parts, or None without an embedding.

    They are computed in one call, because LSA learns from its texts.
    """
    if alike.embedding is None or not pairs:
        return None
    from finetune.dedup.embed import embed

    count, sides = len(pairs), len(pairs[0].answers)
    texts = [question(p.prompt) for p in pairs]
    texts += [said(p.answers[side]) for side in range(sides) for p in pairs]
    vectors = embed([*texts, *held_rows], alike.embedding, ctx, alike.folder, made_by)
    answers = tuple(vectors[count * (1 + side) : count * (2 + side)] for side in range(sides))
    return Parts(vectors[:count], answers, vectors[count * (1 + sides) :])


def drop_repeats(curation: Curation, alike: Repeats, parts: Parts | None, ctx: Context) -> None:
    """Leave out pairs that repeat a kept one by exact text, words or vectors; the longest of several stays.

    Which pair stays depends on the texts alone, not on their order. Pairs of different labels never repeat each other.
    """
    pairs, whole = curation.pairs, alike.by == "pair"
    texts, keys = [], []
    for pair in pairs:
        answers = [said(a) for a in pair.answers]
        texts.append("\n".join([question(pair.prompt), *(answers if whole else [])]))
        parts_of = [context_text(pair), *answers] if whole else [question(pair.prompt)]
        keys.append(b"".join(text_key(part) or b"-" for part in parts_of))
    order = sorted(curation.trainable, key=lambda i: (-sum(len(said(a)) for a in pairs[i].answers), keys[i], texts[i]))
    measures: list[Measure] = []
    if alike.minhash is not None:
        measures.append(Jaccard(word_sets(texts, alike.minhash.ngram), alike.minhash.threshold))
    if parts is not None:
        vectors = parts.of_pairs() if whole else parts.prompts
        measures.append(Cosine(vectors, alike.threshold, exact_search(ctx.device, len(pairs))))
    for label in {pair.label for pair in pairs}:
        chosen = [i for i in order if pairs[i].label == label]
        for repeat in select(chosen, keys if alike.exact else None, measures, check=ctx.stop.check):
            what = "the prompt of " if not whole else ""
            how = "the same text" if repeat.method == "exact" else f"{repeat.method}, {repeat.score:.3f}"
            detail = f"repeats {what}{pairs[repeat.kept].id} ({how})"
            curation.drop(repeat.dropped, "duplicate" if whole else "prompt_repeated", detail, repeat.score)


@dataclass(frozen=True)
class HeldRows:
    """SFT rows that are held out: the prompt of each answer with its row's id, and the keys of telling answers."""

    ids: list[str]
    prompts: list[str]
    answers: Mapping[bytes, str]


def held_prompts(rows: Iterable[Example]) -> HeldRows:
    """Parts of held-out SFT rows that pairs are compared with."""
    ids, prompts = [], []
    answers: dict[bytes, str] = {}
    for row in rows:
        asked: list[str] = []
        row_prompts: list[str] = []
        for message in row.messages:
            if message.role == "assistant":
                row_prompts.append("\n".join(asked))
                _note_answer(answers, row.id, (message,))
            elif message.role == "user":
                asked.append(message.content)
        if row.text is not None:
            row_prompts.append(row.text)
        unique = list(dict.fromkeys(row_prompts))
        unique = unique if len(unique) <= MOST_PROMPTS else [*unique[: MOST_PROMPTS - 1], unique[-1]]
        prompts += unique
        ids += [row.id] * len(unique)
    return HeldRows(ids, prompts, answers)


def _note_answer(answers: dict[bytes, str], name: str, answer: tuple[Message, ...]) -> None:
    text = field_text(Example("", "", answer), "output")
    if len(text.split()) >= TELLING_WORDS:
        answers.setdefault(text_key(text), name)


def drop_held_out(
    curation: Curation,
    alike: Repeats,
    parts: Parts | None,
    held: HeldRows,
    ctx: Context,
) -> None:
    """Leave out pairs to train on whose prompt (nearly) is that of a held-out row or pair, or whose wanted answer is a
    held-out row's.

    Prompts are compared by exact text, by their words (Jaccard of 5-grams, dedup.jaccard or 0.8) and by vectors if
    there are some.
    """
    ids, prompts, answers = held.ids, held.prompts, held.answers
    count, ours = len(curation.pairs), np.array(curation.trainable, np.int64)
    names = [*(p.id for p in curation.pairs), *ids]
    texts = [*(question(p.prompt) for p in curation.pairs), *prompts]
    others = np.array([*curation.held, *range(count, count + len(ids))], np.int64)
    for number in ours.tolist():
        pair = curation.pairs[number]
        if pair.label is not False and (held_id := answers.get(text_key(said(pair.answers[0])))) is not None:
            curation.drop(number, "held_out", f"its answer is that of {held_id}, which is held out for evaluation")
    if not len(others) or not len(ours):
        return
    minhash = alike.minhash or PROMPT_JACCARD
    measures: list[Measure] = [Jaccard(word_sets(texts, minhash.ngram), minhash.threshold)]
    if parts is not None:
        vectors = np.concatenate([parts.prompts, parts.held_rows])
        measures.append(Cosine(vectors, alike.group_threshold, exact_search(ctx.device, len(texts))))
    for repeat in repeats_of(ours, others, [text_key(t) for t in texts], measures):
        how = "the same text" if repeat.method == "exact" else f"{repeat.method}, {repeat.score:.3f}"
        detail = f"its prompt is that of {names[repeat.kept]}, which is held out for evaluation ({how})"
        curation.drop(repeat.dropped, "held_out", detail, repeat.score)


def drop_contaminated(curation: Curation, against: Against, ctx: Context) -> None:
    """Leave out pairs, held-out ones of `data` included, that share words or their question with evaluation data.

    Both answers count: an unwanted one is trained on too. Raises InputError for evaluation data that cannot be read.
    """
    numbers = {curation.pairs[i].id: i for i in curation.trainable}
    pairs = (curation.pairs[i] for i in numbers.values())
    rows = (Example(p.id, p.source, (*p.prompt, *(m for a in p.answers for m in a))) for p in pairs)
    for name, match in find_overlaps(against, rows, ctx).matches.items():
        how = f"the words {match.words!r}" if match.score is None else f"its question, {match.score:.3f}"
        detail = f"shares {how} with {match.evaluation_id} of the evaluation data"
        curation.drop(numbers[name], "contaminated", detail, match.score)


def hold_out(
    curation: Curation, parts: Parts | None, alike: Repeats, fraction: float, most: int, seed: int, ctx: Context
) -> tuple[list[int], list[int], int]:
    """Numbers of the pairs to train on and of those held out, by whole groups of near-duplicate prompts; the groups.

    Raises GateRefused if one side would be empty.
    """
    numbers = curation.trainable
    keys = [text_key(question(curation.pairs[i].prompt)) for i in numbers]
    vectors: NDArray[np.float32] | None = None if parts is None else parts.prompts[numbers]
    group = groups(vectors, [keys], alike.group_threshold, FlatIndex, check=ctx.stop.check).tolist()
    names = [key or curation.pairs[i].id.encode() for i, key in zip(numbers, keys, strict=True)]
    section = Split(eval_fraction=fraction, max_eval_rows=most, group_threshold=alike.group_threshold)
    chosen = choose(group, names, section, seed, WORDS)
    train = [k for k in range(len(numbers)) if group[k] not in chosen]
    held = [k for k in range(len(numbers)) if group[k] in chosen]
    if leaks := count_leaks(vectors, [keys], train, held, alike.group_threshold):
        raise FinetuneError(
            f"pairs: {leaks} pairs to train on have a near-duplicate prompt among the held-out ones although groups "
            "were kept whole; this is a fault of the program, please report it with the recipe"
        )
    return [numbers[k] for k in train], [numbers[k] for k in held], len(set(group))

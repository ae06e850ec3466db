"""How near answers come to their references, row by row, and base beside adapter with a paired bootstrap.

Every score of a row is from 0 (worst) to 1. Measures that do not apply to a row (its reference is no JSON, or calls no
tool) leave the row out. BLEU is of the whole corpus: the n-gram counts of the rows are summed before it is computed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.eval.metrics import paired_interval
from finetune.utils.files import canonical_json

NEEDS = {
    "rouge_l": ("rouge_score", "rouge-score"),
    "bleu": ("sacrebleu", "sacrebleu"),
    "chrf": ("sacrebleu", "sacrebleu"),
}
# A word, or one character of a script that is written without spaces (kana, Han, Thai).
WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f]|[^\W\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]+"
)
SAMPLES = 1000  # of the bootstrap of BLEU, which is computed again for each
Score = Callable[[str, str], float | None]  # (answer, reference)


def missing(names: Sequence[str]) -> list[str]:
    """A sentence for each package that a measure of `names` needs and that is not installed."""
    lacks: dict[str, list[str]] = {}
    for name in names:
        module, package = NEEDS.get(name, ("", ""))
        if module and importlib.util.find_spec(module) is None:
            lacks.setdefault(package, []).append(name)
    return [
        f"{', '.join(found)} needs {package}, which is not installed (pip install '.[metrics]', or drop it)"
        for package, found in lacks.items()
    ]


def words(text: str) -> list[str]:
    """The words of a text, case folded; every character by itself where a script has no spaces."""
    return WORD.findall(unicodedata.normalize("NFC", text).casefold())


def exact_match(answer: str, reference: str) -> float:
    """1 where both are the same text, white space at the edges and its kind aside (NFC)."""
    return float(_squeezed(answer) == _squeezed(reference))


def _squeezed(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, as multisets (SQuAD, arXiv:1606.05250); 1 for two empty."""
    found, wanted = Counter(words(answer)), Counter(words(reference))
    if not found or not wanted:
        return float(found == wanted)
    common = (found & wanted).total()
    return 2 * common / (found.total() + wanted.total())


def json_valid(answer: str, reference: str) -> float | None:
    """1 where the answer is an object or a list in JSON; None where the reference is none."""
    return None if _structure(reference) is None else float(_structure(answer) is not None)


def _structure(text: str) -> Any:  # noqa: ANN401 - JSON
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None


def tool_call_match(answer: str, reference: str) -> float | None:
    """1 where the answer calls the reference's tools with equal arguments, in any order; None where it calls none."""
    wanted = tool_calls(reference)
    return float(tool_calls(answer) == wanted) if wanted else None


def tool_calls(text: str) -> Counter[str]:
    """The calls in a text: JSON objects with a name and arguments, whatever a template writes around them."""
    found: Counter[str] = Counter()
    decoder, position = json.JSONDecoder(), 0
    while (position := text.find("{", position)) >= 0:
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position += 1
            continue
        found += _calls_in(value)
    return found


def _calls_in(value: Any) -> Counter[str]:  # noqa: ANN401 - JSON
    if isinstance(value, list):
        return sum((_calls_in(v) for v in value), Counter())
    if not isinstance(value, dict):
        return Counter()
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(value.get("name"), str) and arguments is not None:
        if isinstance(arguments, str) and (parsed := _structure(arguments)) is not None:
            arguments = parsed
        return Counter([canonical_json([value["name"], arguments])])
    return sum((_calls_in(v) for v in value.values()), Counter())


def _rouge_l() -> Score:
    from rouge_score.rouge_scorer import RougeScorer

    class Words:
        """rouge-score's own tokenizer drops every letter outside ASCII."""

        def tokenize(self, text: str) -> list[str]:
            return words(text)

    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    return lambda answer, reference: float(scorer.score(reference, answer)["rougeL"].fmeasure)


def _chrf() -> Score:
    from sacrebleu.metrics.chrf import CHRF

    chrf = CHRF()
    return lambda answer, reference: float(chrf.sentence_score(answer, [reference]).score) / 100


def _scorer(name: str) -> Score:
    made: dict[str, Callable[[], Score]] = {"rouge_l": _rouge_l, "chrf": _chrf}
    plain: dict[str, Score] = {
        "exact_match": exact_match, "f1": f1, "json_valid": json_valid, "tool_call_match": tool_call_match,
    }  # fmt: skip
    return made[name]() if name in made else plain[name]


def compare(
    names: Sequence[str], references: Sequence[str], base: Sequence[str], adapter: Sequence[str], seed: int
) -> tuple[dict[str, Any], list[dict[str, tuple[float | None, float | None]]]]:
    """Score two models' answers to the same rows.

    Returns:
        name → {"base", "adapter", "difference", "interval", "rows", "better", "worse"}: means over the rows that the
        measure applies to (BLEU: of the corpus), adapter less base with its 95 % paired bootstrap interval (null for
        fewer than 2 rows), and in how many rows the adapter is better and worse; and per row name → (base, adapter).
    """
    rows: list[dict[str, tuple[float | None, float | None]]] = [{} for _ in references]
    found: dict[str, Any] = {}
    for name in names:
        if name == "bleu":
            pairs, figures = _bleu(references, base, adapter, seed)
        else:
            score = _scorer(name)
            scored = zip(references, base, adapter, strict=True)
            pairs = [(score(b, reference), score(a, reference)) for reference, b, a in scored]
            figures = _means(pairs, seed)
        better = sum(b is not None and a is not None and a > b for b, a in pairs)
        worse = sum(b is not None and a is not None and a < b for b, a in pairs)
        found[name] = {**figures, "better": better, "worse": worse}
        for row, pair in zip(rows, pairs, strict=True):
            row[name] = pair
    return found, rows


def _means(pairs: Sequence[tuple[float | None, float | None]], seed: int) -> dict[str, Any]:
    kept = np.array([p for p in pairs if None not in p], dtype=np.float64).reshape(-1, 2)
    if not len(kept):
        return {"base": None, "adapter": None, "difference": None, "interval": None, "rows": 0}
    base, adapter = kept.T
    interval = None
    if len(kept) > 1:
        apart = paired_interval(adapter, base, np.ones(len(kept)), seed)
        interval = [apart.low, apart.high]
    first, second = float(base.mean()), float(adapter.mean())
    return {"base": first, "adapter": second, "difference": second - first, "interval": interval, "rows": len(kept)}


def _bleu(
    references: Sequence[str], base: Sequence[str], adapter: Sequence[str], seed: int
) -> tuple[list[tuple[float | None, float | None]], dict[str, Any]]:
    """Corpus BLEU (sacrebleu, tokenizer 13a) from the rows' summed counts; per row, with the effective order."""
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(effective_order=True)
    scored = [
        [bleu.sentence_score(a, [r]) for a, r in zip(answers, references, strict=True)] for answers in (base, adapter)
    ]
    counts = [
        np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in side], dtype=np.float64).reshape(-1, 10)
        for side in scored
    ]

    def corpus(summed: NDArray[np.float64]) -> float:
        whole = [int(v) for v in summed]
        return float(BLEU.compute_bleu(whole[:4], whole[4:8], whole[8], whole[9], smooth_method="exp").score) / 100

    first, second = (corpus(side.sum(0)) for side in counts)
    interval = None
    if len(references) > 1:
        drawn = np.random.default_rng(seed).multinomial(
            len(references), np.full(len(references), 1 / len(references)), size=SAMPLES
        )
        apart = [corpus(n @ counts[1]) - corpus(n @ counts[0]) for n in drawn]
        interval = [float(v) for v in np.quantile(apart, [0.025, 0.975])]
    pairs: list[tuple[float | None, float | None]] = [
        (float(b.score) / 100, float(a.score) / 100) for b, a in zip(*scored, strict=True)
    ]
    return pairs, {
        "base": first, "adapter": second, "difference": second - first, "interval": interval, "rows": len(references),
    }  # fmt: skip


def verdict(figures: dict[str, Any]) -> str:
    """`better`, `worse`, `not told apart` (the interval includes 0), or `no row`."""
    if not figures["rows"]:
        return "no row"
    low, high = figures["interval"] or (0.0, 0.0)
    return "better" if low > 0 else "worse" if high < 0 else "not told apart"


def words_of(name: str, figures: dict[str, Any]) -> str:
    """One line: `f1 0.21 → 0.48 (better, 95 %: 0.19 to 0.35), 20 rows better, 3 worse of 32`."""
    if not figures["rows"]:
        return f"{name}: no reference that it applies to"
    ends = figures["interval"]
    interval = f", 95 %: {ends[0]:+.3g} to {ends[1]:+.3g}" if ends else ""
    moved = f"{figures['better']} rows better, {figures['worse']} worse of {figures['rows']}"
    return f"{name} {figures['base']:.3g} → {figures['adapter']:.3g} ({verdict(figures)}{interval}), {moved}"

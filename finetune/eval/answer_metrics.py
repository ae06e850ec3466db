"""Score answers against their references per row, and compare base and adapter with a paired bootstrap.

Every score of a row is from 0 (worst) to 1. Metrics that do not apply to a row (its reference is not JSON, or calls no
tool) skip the row. BLEU is computed on the whole corpus: the n-gram counts of the rows are summed first.
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
# A word, or one character of a script without spaces (kana, Han, Thai).
WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f]|[^\W\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]+"
)
SAMPLES = 1000  # bootstrap samples of BLEU, which is recomputed for each
Score = Callable[[str, str], float | None]  # (answer, reference)


def missing(names: Sequence[str]) -> list[str]:
    """Return a message for each missing package that a metric of `names` needs."""
    lacks: dict[str, list[str]] = {}
    for name in names:
        module, package = NEEDS.get(name, ("", ""))
        if module and importlib.util.find_spec(module) is None:
            lacks.setdefault(package, []).append(name)
    return [
        f"{', '.join(metrics)} needs {package}, which is not installed (pip install '.[metrics]', or remove the metric)"
        for package, metrics in lacks.items()
    ]


def words(text: str) -> list[str]:
    """Return the case-folded words of a text; single characters for scripts without spaces."""
    return WORD.findall(unicodedata.normalize("NFC", text).casefold())


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if both texts are equal after NFC and whitespace normalisation, else 0."""
    return float(_squeezed(answer) == _squeezed(reference))


def _squeezed(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def f1(answer: str, reference: str) -> float:
    """Return the F1 score of the words as multisets (SQuAD, arXiv:1606.05250); 1 if both are empty."""
    answered, wanted = Counter(words(answer)), Counter(words(reference))
    if not answered or not wanted:
        return float(answered == wanted)
    common = (answered & wanted).total()
    return 2 * common / (answered.total() + wanted.total())


def json_valid(answer: str, reference: str) -> float | None:
    """Return 1 if the answer is a JSON object or list, else 0; None if the reference is not."""
    return None if _structure(reference) is None else float(_structure(answer) is not None)


def _structure(text: str) -> dict[str, Any] | list[Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None


def tool_call_match(answer: str, reference: str) -> float | None:
    """Return 1 if the answer makes the reference's tool calls in any order, else 0; None if there are none."""
    wanted = tool_calls(reference)
    return float(tool_calls(answer) == wanted) if wanted else None


def tool_calls(text: str) -> Counter[str]:
    """Return the tool calls in a text: JSON objects with a name and arguments, regardless of the template's markup."""
    calls: Counter[str] = Counter()
    decoder, position = json.JSONDecoder(), 0
    while (position := text.find("{", position)) >= 0:
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position += 1
            continue
        calls += _calls_in(value)
    return calls


def _calls_in(value: object) -> Counter[str]:
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
        """Tokenizer for rouge-score, whose own tokenizer drops every letter outside ASCII."""

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
        metric applies to (BLEU: of the corpus), adapter minus base with its 95 % paired bootstrap interval (null for
        fewer than 2 rows), and the number of rows in which the adapter is better and worse; and per row name →
        (base, adapter).
    """
    rows: list[dict[str, tuple[float | None, float | None]]] = [{} for _ in references]
    compared: dict[str, Any] = {}
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
        compared[name] = {**figures, "better": better, "worse": worse}
        for row, pair in zip(rows, pairs, strict=True):
            row[name] = pair
    return compared, rows


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
    """Return corpus BLEU (sacrebleu, tokenizer 13a) from the rows' summed counts; per row, with effective order."""
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
    """Return `better`, `worse`, `no clear difference` (the interval includes 0), or `no row`."""
    if not figures["rows"]:
        return "no row"
    low, high = figures["interval"] or (0.0, 0.0)
    return "better" if low > 0 else "worse" if high < 0 else "no clear difference"


def words_of(name: str, figures: dict[str, Any]) -> str:
    """Return one line: `f1 0.21 → 0.48 (better, 95 %: 0.19 to 0.35), 20 rows better, 3 worse of 32`."""
    if not figures["rows"]:
        return f"{name}: it applies to no reference"
    ends = figures["interval"]
    interval = f", 95 %: {ends[0]:+.3g} to {ends[1]:+.3g}" if ends else ""
    moved = f"{figures['better']} rows better, {figures['worse']} worse of {figures['rows']}"
    return f"{name} {figures['base']:.3g} → {figures['adapter']:.3g} ({verdict(figures)}{interval}), {moved}"

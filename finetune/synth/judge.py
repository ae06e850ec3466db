"""Pairwise verdicts of a language model on two answers, each pair in both orders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.eval.metrics import ratio_interval
from finetune.synth.asking import Ask, Asker, ask_user, stream
from finetune.synth.prompts import Prompts

VERDICT = re.compile(r"verdict[^\w\n.,;]*(?:[:=\-–—]|\n)", re.IGNORECASE)
REST = re.compile(r"[\W_]*(?:answer[\W_]*)?(1|2|tie)(?:[^\w\n]|_)*(?:\n|\Z)", re.IGNORECASE)  # of the line
ALONE = re.compile(r"\W*(1|2|tie)\W*", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """A question and two answers."""

    question: str
    first: str
    second: str


@dataclass(frozen=True)
class Verdict:
    """Score of the pair's second answer: 1 better, 0.5 tie, 0 worse; None for a reply without a verdict.

    `forward`: shown in the order first, second; `backward`: the other way round.
    """

    forward: float | None
    backward: float | None

    @property
    def score(self) -> float | None:
        """The mean of both orders; None unless both have a verdict."""
        return None if self.forward is None or self.backward is None else (self.forward + self.backward) / 2


def read_verdict(text: str) -> float | None:
    """Return the score of the answer shown second: 1, 0.5 (tie) or 0; None if the reply has no verdict.

    The last `Verdict:` counts, with nothing on its line after `1`, `2`, `tie` or `answer 1`; or a reply that is nothing
    but one of the first three.
    """
    ends = [m.end() for m in VERDICT.finditer(text)]
    match = REST.match(text, ends[-1]) if ends else ALONE.fullmatch(text)
    return {"1": 0.0, "2": 1.0}.get(match[1], 0.5) if match else None


def compare(asker: Asker, prompts: Prompts, pairs: Sequence[Pair], limit: int, label: str) -> list[Verdict]:
    """Return the verdict on each pair. Equal answers tie without being asked about."""
    asks: list[Ask] = []
    asked = [i for i, pair in enumerate(pairs) if pair.first.strip() != pair.second.strip()]
    for i in asked:
        for one, two in ((pairs[i].first, pairs[i].second), (pairs[i].second, pairs[i].first)):
            text = prompts.render("judge", {"question": pairs[i].question, "first": one, "second": two})
            asks.append(ask_user(text, limit, seed=stream("judge")))
    replies = asker.ask_all(asks, label)
    scores = [None if reply is None else read_verdict(reply.text) for reply in replies]
    verdicts = [Verdict(0.5, 0.5)] * len(pairs)
    for k, i in enumerate(asked):
        back = scores[2 * k + 1]
        verdicts[i] = Verdict(scores[2 * k], None if back is None else 1 - back)
    return verdicts


def figures(verdicts: Sequence[Verdict], seed: int) -> dict[str, Any]:
    """Return wins, ties and losses of the second answers, the win rate, and the agreement of the two orders.

    A row's score is the mean of its two orders, so that a preference for a place cancels out; above 0.5 it is a win.
    `win_rate` is the mean score (a tie counts half) and its 95 % bootstrap interval over rows;
    `order_agreement` the share of rows with the same verdict in both orders; `first_shown` the share of verdicts for
    the answer shown first among those that are not a tie.
    """
    scored = [v for v in verdicts if v.score is not None]
    scores = np.array([v.score for v in scored], dtype=np.float64)
    decided = [s for v in scored for s in (v.forward, 1 - (v.backward or 0.0)) if s != 0.5]
    summary: dict[str, Any] = {"rows": len(scored), "unreadable": len(verdicts) - len(scored)}
    if not len(scored):
        return summary | {"win_rate": None, "win_rate_interval": None, "order_agreement": None}
    interval = ratio_interval(scores, np.ones(len(scores)), seed)
    return summary | {
        "wins": int((scores > 0.5).sum()),
        "ties": int((scores == 0.5).sum()),
        "losses": int((scores < 0.5).sum()),
        "win_rate": interval.value,
        "win_rate_interval": [interval.low, interval.high] if len(scores) > 1 else None,
        "order_agreement": float(np.mean([v.forward == v.backward for v in scored])),
        "first_shown": decided.count(0.0) / len(decided) if decided else None,
    }


def words_of(f: Mapping[str, Any]) -> str:
    """Return the judge's figures in one sentence."""
    if f.get("win_rate") is None:
        return f"judge {f['model']}: none of its {f['unreadable']} replies holds a verdict"
    ends = f["win_rate_interval"]
    interval = f" (95 %: {ends[0]:.1%} to {ends[1]:.1%})" if ends else ""
    apart = "" if ends and (ends[0] > 0.5 or ends[1] < 0.5) else "; it does not distinguish the two"
    lost = f"; {f['unreadable']} rows without a verdict" if f["unreadable"] else ""
    return (
        f"judge {f['model']}: the adapter wins {f['win_rate']:.1%}{interval} against the base on {f['rows']} rows: "
        f"{f['wins']} better, {f['ties']} tied, {f['losses']} worse; the two orders agree on "
        f"{f['order_agreement']:.0%}{apart}{lost}"
    )

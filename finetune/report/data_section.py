"""The report's data section: rows from the sources to the packed batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.errors import FinetuneError
from finetune.recipe import Recipe
from finetune.report.row_lookup import (
    largest_groups,
    question_and_answer,
    raw_lengths,
    rendered_lengths,
    rows_by_id,
    sources_of,
)
from finetune.report.stage_view import Stages, rows_before
from finetune.utils import svg
from finetune.utils.files import read_json
from finetune.utils.format import clipped, number

GROUPS = 10
SHOWN_OF_A_GROUP = 4
LONGEST_TEXT = 700
BINS = 48
FUNNEL = ("ingest", "filter", "dedup", "decontaminate", "sample", "split", "render")
WORDS = {  # what a reason in the metrics means
    "exact": "the same text as a kept row",
    "minhash": "nearly the words of a kept row",
    "embedding": "nearly a kept row",
    "tokens": "too many tokens",
}
LEAKED = {
    "words": "words in common with the evaluation data",
    "embedding": "nearly an evaluation question",
    "repeats": "repeat a row of eval_data",
}


def data_section(stages: Stages, recipe: Recipe | None) -> dict[str, Any]:
    """Return all data facts for the template; missing ones are None or empty."""
    return {
        "funnel": funnel(stages),
        "lengths": lengths(stages, recipe),
        "sources": sources(stages),
        "groups": groups(stages),
        "groups_absent": stages["dedup"].absence if not stages["dedup"].file("pairs.parquet") else "",
        "template": template(stages),
        "template_absent": stages["render"].absence,
    }


def funnel(stages: Stages) -> list[dict[str, Any]]:
    """Return a line for each stage with metrics: rows kept, rows dropped with reasons, and the bar."""
    counts = {}
    for name in FUNNEL:
        if metrics := stages[name].metrics:
            kept, lost, why = _kept_and_lost(name, metrics)
            if kept is not None:
                counts[name] = (kept, lost, why)
    whole = max((kept + lost for kept, lost, _ in counts.values()), default=0)
    return [
        {
            "stage": name,
            "kept": kept,
            "lost": lost,
            "why": why,
            "bar": svg.bar(f"{name}: {kept:,} rows kept, {lost:,} left out", kept, lost, whole),
        }
        for name, (kept, lost, why) in counts.items()
    ]


def _kept_and_lost(name: str, m: Mapping[str, Any]) -> tuple[int | None, int, str]:
    """Return rows after the stage, rows dropped, and a phrase."""
    match name:
        case "ingest":
            lost = sum(m.get("refused", {}).values())
            return m.get("rows_out"), lost, _reasons(m.get("refused", {}))
        case "filter":
            return m.get("rows_out"), sum(m.get("rejected", {}).values()), _reasons(m.get("rejected", {}))
        case "dedup":
            dropped = {k: m[k] for k in ("exact", "minhash", "embedding") if m.get(k)}
            return m.get("rows_out"), sum(dropped.values()), _reasons(dropped)
        case "decontaminate":
            dropped = {k: m[k] for k in ("words", "embedding") if m.get(k)}
            if repeats := sum((m.get("repeat_eval_data") or {}).values()):
                dropped["repeats"] = repeats
            return m.get("rows_out"), int(m.get("dropped", 0)), _reasons(dropped, LEAKED)
        case "sample":
            kept, before = m.get("rows_out"), m.get("rows_in", 0)
            more = (kept or 0) - before
            words = f"{more:,} copies added by the sources' weights" if more > 0 else "not chosen: " if more < 0 else ""
            words += _rule(m.get("kept_by", {})) if more < 0 else ""
            return kept, max(-more, 0), words
        case "split":
            kept = m.get("train_rows", 0) + m.get("eval_rows", 0)
            words = f"{m.get('train_rows', 0):,} to train on, {m.get('eval_rows', 0):,} held out; "
            return kept, 0, f"{words}{m.get('leaks', 0):,} near-duplicates between the two"
        case _:
            kept = m.get("rows", 0) + m.get("eval_rows", 0)
            return kept, int(m.get("dropped", 0)), _reasons(m.get("dropped_because", {}))


def _rule(kept_by: Mapping[str, Any]) -> str:
    """Return the rule by which rows were selected."""
    fewest, lowest = kept_by.get("fewest_tokens"), kept_by.get("lowest")
    least = (
        f", of {fewest:,g} tokens and more" if fewest else f", of {lowest:,g} and more" if lowest is not None else ""
    )
    rules = [
        f"{name.replace('_', ' ')} {kept_by[name]:,}" for name in ("top_k", "random", "diverse") if name in kept_by
    ]
    return (
        " and ".join([*rules, *(["the sources' shares"] if kept_by.get("weight") or kept_by.get("rows") else [])])
        + least
    )


def _reasons(counts: Mapping[str, int], words: Mapping[str, str] = WORDS) -> str:
    named = [(words.get(reason, reason.replace("_", " ")), count) for reason, count in counts.items()]
    if len(named) == 1:
        return named[0][0]  # the stage's own count stands before it
    return ", ".join(f"{count:,} {words}" for words, count in sorted(named, key=lambda pair: (-pair[1], pair[0])))


def lengths(stages: Stages, recipe: Recipe | None) -> dict[str, Any]:
    """Return two histograms over the same axis with captions; None if the rows are missing."""
    before, step = _raw(stages)
    files = [f for f in (stages["render"].file("train.parquet"), stages["render"].file("eval.parquet")) if f]
    after = rendered_lengths(files) if files and stages["render"].manifest is not None else []
    if not before and not after:
        return {"before": None, "after": None}
    limit_before = recipe.filter.max_length_tokens if recipe and recipe.filter else None
    limit_after = recipe.render.max_length_tokens if recipe else None
    widest = max(_at(before, 0.99), *after, *([limit_before or 0] if before else []), 1)
    width = float(max(1, -(-widest // BINS)))
    captions = {"before": "As read: the tokens of the texts alone, without a template", "after": "As trained on"}
    if step > 1:
        captions["before"] += f"; every {step}th row counted"
    figure: dict[str, Any] = {}
    for name, values, limit in (("before", before, limit_before), ("after", after, limit_after)):
        counts = [0] * (int(widest // width) + 1)
        over = 0
        for value in values:
            place = int(value // width)
            over += place >= len(counts)
            counts[min(place, len(counts) - 1)] += 1
        label = f"{captions[name]}: histogram of {len(values)} rows, at most {max(values, default=0)} tokens"
        plot = svg.histogram(label, counts, width, "tokens in a row", "rows", limit=limit)
        more = f"; {over:,} longer than the axis are in the last bar" if over else ""
        median = f"median {_at(values, 0.5):,}, longest {max(values, default=0):,} tokens"
        figure[name] = {"plot": plot, "caption": f"{captions[name]}; {median}{more}."} if values else None
    return figure


def _raw(stages: Stages) -> tuple[list[int], int]:
    rows, tokenizer = rows_before(stages, "filter"), stages["base"].file("tokenizer.json")
    return raw_lengths(rows, tokenizer) if rows and tokenizer else ([], 1)


def _at(values: Sequence[int], share: float) -> int:
    return sorted(values)[int(share * (len(values) - 1))] if values else 0


def sources(stages: Stages) -> dict[str, Any] | None:
    """Return per source: name, format, rows read, rows refused, and rows left after the last stage."""
    read = stages["ingest"].metrics.get("sources")
    if not read:
        return None
    split = stages["split"]
    files = [f for f in (split.file("train.parquet"), split.file("eval.parquet")) if f and split.manifest is not None]
    columns = ["to train on", "held out"]
    if len(files) != 2:
        last = rows_before(stages, "split")
        files, columns = ([last], ["left now"]) if last else ([], [])
    left = sources_of(files)
    formats = stages["ingest"].metrics.get("formats", {})
    rows = [
        (label, formats.get(label, ""), [number(v) for v in (counts["rows"], counts["refused"])]
         + [number(c[label]) for c in left])
        for label, counts in read.items()
    ]  # fmt: skip
    return {"columns": ["rows read", "refused", *columns], "rows": rows}


def groups(stages: Stages) -> list[dict[str, Any]]:
    """Return the largest duplicate groups, with the texts of the kept row and of its farthest dropped rows."""
    pairs = stages["dedup"].file("pairs.parquet")
    if pairs is None or stages["dedup"].manifest is None:
        return []
    largest = largest_groups(pairs, GROUPS)
    before = rows_before(stages, "dedup")
    wanted = {group[0].kept_id for group in largest} | {d.id for group in largest for d in group[:SHOWN_OF_A_GROUP]}
    texts = rows_by_id(before, wanted) if before else {}

    def text(row_id: str) -> tuple[str, str]:
        if row_id not in texts:
            return "(the rows that dedup read are no longer there)", ""
        asked, answer = question_and_answer(texts[row_id])
        return clipped(asked, LONGEST_TEXT), clipped(answer, LONGEST_TEXT)

    return [
        {
            "kept": group[0].kept_id,
            "text": text(group[0].kept_id),
            "size": len(group),
            "exact": sum(d.method == "exact" for d in group),
            "lowest": f"{group[0].score:.3f}",
            "rows": [(d.id, d.method, f"{d.score:.3f}", text(d.id)) for d in group[:SHOWN_OF_A_GROUP]],
        }
        for group in largest
    ]


def template(stages: Stages) -> dict[str, Any]:
    """Return template.json of the trained template; empty if it is not there."""
    path = stages["render"].file("template/template.json")
    if path is None:
        return {}
    try:
        facts: dict[str, Any] = read_json(path)
    except ValueError:
        raise FinetuneError(f"{path}: is not JSON any more; `finetune show --verify` says what else changed") from None
    return facts

"""Rows written by a language model from seeds: self-instruct, evol-instruct, or answers to prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from finetune.context import Context
from finetune.data.records import Reject, reject_writer, write_rows
from finetune.data.sources import source_fingerprint
from finetune.errors import GateRefused
from finetune.metrics import GenerateMetrics, Headline
from finetune.recipe import Generate, Recipe, Section
from finetune.synth.asking import Budget, BudgetUsed, identity, open_asker
from finetune.synth.prompts import Prompts, digests
from finetune.utils.files import canonical_json, replace_bytes, write_json
from finetune.utils.format import clipped

if TYPE_CHECKING:
    from finetune.synth.job import Job, Made
    from finetune.synth.seeds import Seed

SHOWN_LINES, SHOWN_CHARACTERS = 5, 700
SO_FAR = "rows-so-far.jsonl"


class Spec(Section):
    """The section without its limits and speed, the seed, and (no part of the key) the section as it was written."""

    seed: int
    generate: Generate
    ignore: tuple[str, ...] = ()
    asked: Generate = Field(exclude=True)


def spec(recipe: Recipe) -> Spec | None:
    """Off without a generate section."""
    if recipe.generate is None:
        return None
    ignore = tuple(sorted(set(recipe.ingest.ignore)))
    return Spec(seed=recipe.seed, generate=recipe.generate.unlimited, ignore=ignore, asked=recipe.generate)


def also(spec: Spec) -> tuple[str, ...]:
    """The base, if the built-in one writes."""
    local = spec.generate.model.local
    return ("base",) if local is not None and local.kind == "builtin" else ()


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """Return digests of the seeds and the prompts, and the identity of the model."""
    section = spec.asked
    judged = section.best == "judge" and section.samples > 1
    prefix = section.method.split("_")[0] + "_"  # of the prompts of this method
    prompts = digests(section.prompts_path).items()
    return {
        "seeds": [source_fingerprint(source) for source in section.seeds],
        "prompts": {n: d for n, d in prompts if n.startswith(prefix) or (judged and n == "judge")},
        "model": identity(section.model),
    }


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> GenerateMetrics:
    """Write rows.parquet (each row with parent, operation and round), rejects.parquet and lineage.json.

    Raises InputError for seeds that do not fit and a model that cannot be asked; GateRefused if nothing usable comes,
    or generate.max_requests or max_tokens is used up: the rows so far are then in rows-so-far.jsonl.
    """
    from finetune.synth.answers import answer_seeds
    from finetune.synth.evolve import evolve
    from finetune.synth.job import Job
    from finetune.synth.seeds import read_seeds, require_seeds
    from finetune.synth.self_instruct import write_tasks

    section = spec.asked
    read = read_seeds(section.seeds, ctx.scratch, spec.ignore, single=section.method != "answer")
    seed_rows = list(ctx.track(read, "reading seeds"))
    seeds = require_seeds(seed_rows, section.max_refused_fraction)
    budget = Budget(section.max_requests, section.max_tokens)
    method = {"answer": answer_seeds, "evol_instruct": evolve, "self_instruct": write_tasks}[section.method]
    with open_asker(section.model, inputs.get("base", Path()), budget, ctx, "generate.model.endpoint") as asker:
        job = Job(section, Prompts(section.prompts_path), asker, spec.seed)
        try:
            method(job, seeds)
        except BudgetUsed as error:
            raise _budget_used(str(error), job, out) from None
        job.require_some()
        speed, answered_by, kept = asker.tokens_per_second, dict(sorted(asker.answered_by.items())), asker.kept
    rows = write_rows(out / "rows.parquet", (made.example() for made in job.made))
    refused = [r for r in seed_rows if isinstance(r, Reject)]
    with reject_writer(out / "rejects.parquet") as reject:
        for row in (*refused, *job.rejects):
            reject(row)
    write_json(out / "lineage.json", _lineage(job.made, seeds))
    wanted = section.rows
    if wanted is not None and rows < wanted:
        ctx.say(f"generate: {rows:,} of {wanted:,} rows; more seeds or generate.rounds give more")
    if others := [name for name in answered_by if name != section.model.name]:
        ctx.say(f"generate: {section.model.name} was asked, and the server names {', '.join(others)}")
    if kept:
        ctx.say(f"generate: {kept:,} of {budget.requests:,} responses were kept from before")
    ctx.say(f"generate: {rows:,} rows, {budget.requests:,} requests" + (f", {speed:,.0f} tokens/s" if speed else ""))
    tried = sum(job.asked.values())
    metrics: GenerateMetrics = {
        "model": section.model.label,
        "method": section.method,
        "seeds": len(seeds),
        "seeds_refused": len(refused),
        "candidates": tried,
        "rows_out": rows,
        "rejected": job.reasons(),
        "rounds": job.rounds(),
        "operations": dict(sorted(Counter(row.operation for row in job.made).items())),
        "requests": budget.requests,
        "prompt_tokens": budget.prompt_tokens,
        "tokens": budget.tokens,
    }
    return {**metrics, "answered_by": answered_by} if answered_by else metrics


def headline(m: GenerateMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    return Headline(f"{m['method']} by {m['model']}, {m['requests']:,} requests", m["candidates"], m["rows_out"])


def _budget_used(limit: str, job: Job, out: Path) -> GateRefused:
    lines = [
        {"id": m.id, "messages": [*m.messages, {"role": "assistant", "content": m.answer}], "parent": m.parent,
         "operation": m.operation, "round": m.round}
        for m in job.made
    ]  # fmt: skip
    path = out / SO_FAR
    replace_bytes(path, "".join(canonical_json(line) + "\n" for line in lines).encode("utf-8", "backslashreplace"))
    b = job.asker.budget
    return GateRefused(
        f"generate.{limit} is used up after {b.requests:,} requests and {b.prompt_tokens + b.tokens:,} tokens; the "
        f"{len(lines):,} rows so far are in {path}. Every response is kept: raise it and run again to go on, or take "
        "those rows as a local source"
    )


def _lineage(made: Sequence[Made], seeds: Sequence[Seed]) -> list[list[dict[str, Any]]]:
    """Return the longest lines of descent, each from its seed to the last row, with clipped texts."""
    rows = {m.id: m for m in made}
    texts = {seed.id: seed.instruction for seed in seeds}
    parents = {m.parent for m in made}
    lines = []
    for last in made:
        if last.id in parents:
            continue
        line: list[dict[str, Any]] = []
        at: Made | None = last
        while at is not None:
            clipped_texts = {
                "text": clipped(at.instruction, SHOWN_CHARACTERS),
                "answer": clipped(at.answer, SHOWN_CHARACTERS),
            }
            line.append({"id": at.id, "operation": at.operation, "round": at.round, **clipped_texts})
            parent, at = at.parent, rows.get(at.parent)
        seed = texts.get(parent, "")
        start = {"id": parent, "operation": "seed", "round": 0, "text": clipped(seed, SHOWN_CHARACTERS), "answer": ""}
        lines.append([start, *reversed(line)])
    return sorted(lines, key=lambda line: (-len(line), str(line[-1]["id"])))[:SHOWN_LINES]

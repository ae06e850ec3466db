"""Preference data for DPO or KTO: read, curate, hold out, render both answers behind one prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from finetune.context import Context
from finetune.data.formats import unique_labels
from finetune.data.records import read_rows, reject_writer
from finetune.data.sources import source_fingerprint
from finetune.dedup.embedding_names import model_fingerprint
from finetune.errors import GateRefused
from finetune.filters import custom
from finetune.filters.overlap import Against
from finetune.filters.registry import rules_of
from finetune.metrics import Headline, PairsMetrics
from finetune.preference.records import GROUP_THRESHOLD, Pair, Rendering, Repeats
from finetune.recipe import Filter, Recipe, Section, Source
from finetune.recipe.filters import Own
from finetune.utils.files import write_json

if TYPE_CHECKING:
    from finetune.preference.curate import Curation
    from finetune.preference.read import Reading
    from finetune.preference.tokens import TokenizedPair
    from finetune.preference.writer import PairWriter

SHOWN_ROWS = 3
Made = Mapping[str, Sequence["TokenizedPair"]]  # "train" and "eval"


class Spec(Section):
    """The sources, what is left out, and how the rest is rendered; nothing of the training."""

    seed: int
    method: Literal["dpo", "kto"]
    data: list[Source]
    eval_data: tuple[Source, ...] = ()
    eval_fraction: float = 0.05
    max_eval_pairs: int = 1000
    max_length_tokens: int
    max_dropped_fraction: float
    max_length_bias: float | None = None
    max_refused_fraction: float
    ignore: tuple[str, ...] = ()
    rules: Filter | None = None
    repeats: Repeats
    rendering: Rendering
    against: Against | None = None
    both_labels_held_out: bool = False  # preference.min_accuracy is measured on them, and this is the last cheap moment


def spec(recipe: Recipe) -> Spec | None:
    """Off without a preference section."""
    section, render, dedup = recipe.preference, recipe.render, recipe.dedup
    if section is None:
        return None
    repeats = Repeats(drop=False)
    if dedup is not None:
        repeats = Repeats(
            exact=dedup.exact,
            minhash=dedup.jaccard,
            embedding=dedup.embedding,
            threshold=dedup.threshold,
            folder=dedup.embedding_folder,
        )
    threshold = recipe.split.group_threshold if recipe.split else GROUP_THRESHOLD
    return Spec(
        seed=recipe.seed,
        method=section.method,
        data=section.data,
        eval_data=tuple(section.eval_data or ()),
        eval_fraction=section.eval_fraction,
        max_eval_pairs=section.max_eval_pairs,
        max_length_tokens=section.max_length_tokens or render.max_length_tokens,
        max_dropped_fraction=section.max_dropped_fraction,
        max_length_bias=section.max_length_bias,
        max_refused_fraction=recipe.ingest.max_refused_fraction,
        ignore=tuple(sorted(set(recipe.ingest.ignore))),
        rules=recipe.filter,
        repeats=repeats.model_copy(update={"group_threshold": threshold, "by": section.repeats}),
        rendering=Rendering(
            template=render.template,
            system=render.system,
            reasoning=render.reasoning,
            template_file=render.template_file,
        ),
        against=Against.of(recipe),
        both_labels_held_out=section.method == "kto" and section.min_accuracy is not None,
    )


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """Return digests of the sources, custom rules, template and embedding model."""
    from finetune.tokenization.chat_template import fingerprint_of

    outside: dict[str, object] = {"sources": [source_fingerprint(source) for source in spec.data]}
    if spec.eval_data:
        outside["eval_sources"] = [source_fingerprint(source) for source in spec.eval_data]
    if own := {r.function: custom.digest(r) for r in (spec.rules.rules if spec.rules else ()) if isinstance(r, Own)}:
        outside["own_rules"] = own
    outside |= fingerprint_of(spec.rendering.template, spec.rendering.template_file)
    if (made_by := _made_by(spec.repeats)) is not None:
        outside["model"] = made_by
    if spec.against is not None:
        outside["against"] = spec.against.fingerprint()
    return outside


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> PairsMetrics:
    """Write train.parquet and eval.parquet (docs/preference.md), rejects.parquet, texts.parquet, audit.json, template/.

    Raises InputError (exit 2) for a source that cannot be read or rows that are not pairs; GateRefused (exit 3) if
    too many pairs are left out, none is left, all have one label, or training on them would ruin the model.
    """
    from finetune.models.loading import load_tokenizer
    from finetune.preference.curate import Curation
    from finetune.preference.read import Reading
    from finetune.preference.writer import PairWriter, write_texts

    reading = Reading(unique_labels(s.label for s in (*spec.data, *spec.eval_data)), spec.method, spec.ignore)
    own, held = reading.read(spec.data, ctx), reading.read(spec.eval_data, ctx)
    reading.check(spec.max_refused_fraction)
    _check_both_labels(own, spec)
    curation = Curation([*own, *held], len(held), unread=reading.rejects)
    train, evaluated, figures = _curate(spec, curation, inputs.get("split"), ctx)
    chosen = [curation.pairs[i] for i in (*train, *evaluated)]
    writer = PairWriter.proved_on(chosen, load_tokenizer(inputs["base"]), inputs["base"], spec.rendering)
    made = {
        name: writer.write(curation, numbers, out / f"{name}.parquet", spec.method, spec.max_length_tokens, ctx)
        for name, numbers in (("train", train), ("eval", evaluated))
    }
    with reject_writer(out / "rejects.parquet") as reject:
        for row in (*reading.rejects, *(curation.left_out[i] for i in sorted(curation.left_out))):
            reject(row)
    _check_left(spec, curation, made)
    write_texts(out / "texts.parquet", made["train"], made["eval"])
    name, equal = writer.template.name, writer.ids.equal
    ctx.say(f"pairs: template {name}; {equal} sampled answers have the ids of apply_chat_template")
    for line in writer.ids.notes():
        ctx.say(f"pairs: {line}")
    return {**_written(spec, curation, reading, writer, made, out), **figures}


def headline(m: PairsMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    lost = sum(m["refused"].values()) + m["dropped"]
    bias = f", chosen longer in {m['length_bias']:.0%}" if m["length_bias"] is not None else ""
    figure = f"{lost:,} left out, {m['contradictions']:,} contradict{bias}"
    return Headline(figure, m["rows_in"], m["rows"], m["eval_rows"])


def _check_both_labels(pairs: Sequence[Pair], spec: Spec) -> None:
    labels = {pair.label for pair in pairs}
    if spec.method == "kto" and len(labels) == 1:
        (only,) = labels
        ids = ", ".join(pair.id for pair in pairs[:SHOWN_ROWS])
        raise GateRefused(
            f"pairs: all {len(pairs)} answers have the label {str(only).lower()} ({ids}, …); kto needs wanted and "
            "unwanted ones: is columns.label the right column?"
        )


def _curate(
    spec: Spec, curation: Curation, split: Path | None, ctx: Context
) -> tuple[list[int], list[int], PairsMetrics]:
    """Leave pairs out and choose which are held out: the numbers of both splits, and figures."""
    from finetune.preference import curate

    if spec.rules is not None:
        curate.apply_rules(curation, rules_of(spec.rules))
    figures: PairsMetrics = {"contradictions": curate.drop_contradictions(curation)}
    alike = spec.repeats
    file = split / "eval.parquet" if split is not None else None
    held_rows = curate.held_prompts(read_rows(file) if file is not None and file.is_file() else ())
    parts = curate.embed_parts(curation.pairs, held_rows.prompts, alike, ctx, _made_by(spec.repeats))
    if spec.repeats.drop:
        curate.drop_repeats(curation, alike, parts, ctx)
    curate.drop_held_out(curation, alike, parts, held_rows, ctx)
    if spec.against is not None:
        curate.drop_contaminated(curation, spec.against, ctx)
    _require_some(curation, curation.trainable, "to train on")
    _check_share(spec, curation)
    if curation.own_held:
        _require_some(curation, curation.held, "of preference.eval_data")
        return curation.trainable, curation.held, figures
    train, held, groups = curate.hold_out(
        curation, parts, alike, spec.eval_fraction, spec.max_eval_pairs, spec.seed, ctx
    )
    return train, held, {**figures, "groups": groups, "leaks": 0}


def _require_some(curation: Curation, left: Sequence[int], which: str) -> None:
    if not left:
        total = len(curation.pairs) + len(curation.unread)
        raise GateRefused(f"pairs: no pair {which} is left of {total} rows:{curation.reasons()}")


def _made_by(repeats: Repeats) -> Mapping[str, object] | None:
    return None if repeats.embedding is None else model_fingerprint(repeats.embedding, repeats.folder)


def _check_share(spec: Spec, curation: Curation) -> None:
    lost, total = len(curation.left_out), len(curation.pairs)
    if lost > spec.max_dropped_fraction * total:
        raise GateRefused(
            f"pairs: {lost} of {total} are left out, more than preference.max_dropped_fraction "
            f"{spec.max_dropped_fraction:g}:{curation.reasons()}"
        )


def _check_left(spec: Spec, curation: Curation, made: Made) -> None:
    """Raise GateRefused if too many pairs were left out, a split is empty, one label is left, or length decides."""
    from finetune.preference.tokens import check_length_bias

    train = made["train"]
    _check_share(spec, curation)
    for name, words in (("train", "to train on"), ("eval", "held out")):
        if not made[name]:
            raise GateRefused(f"pairs: no pair {words} is left:{curation.reasons()}")
    if spec.method == "kto" and len({p.pair.label for p in train}) == 1:
        raise GateRefused(f"pairs: all answers that are left to train on have one label:{curation.reasons()}")
    if spec.both_labels_held_out and len({p.pair.label for p in made["eval"]}) == 1:
        raise GateRefused(
            "pairs: the held-out answers all have one label, so that preference.min_accuracy cannot be measured; raise "
            "preference.eval_fraction, give preference.eval_data answers of both labels, or set "
            "preference.min_accuracy: null"
        )
    longer = [p.pair.id for p in train if len(p.answers) == 2 and p.supervised(0) > p.supervised(1)]
    check_length_bias(_bias(train), spec.max_length_bias, longer)


def _written(
    spec: Spec, curation: Curation, reading: Reading, writer: PairWriter, made: Made, out: Path
) -> PairsMetrics:
    """Write the template and audit.json; returns the stage's figures."""
    from finetune.tokenization.audit import check_pad
    from finetune.tokenization.chat_template import write_template
    from finetune.tokenization.encoder import choose_pad

    row_tokenizer, template, tokenizer, train = writer.worker, writer.template, writer.tokenizer, made["train"]
    pad = choose_pad(tokenizer, template.text, row_tokenizer.labels)
    check_pad(tokenizer.get_vocab()[pad], row_tokenizer.labels)
    terminators = sorted(row_tokenizer.terminators)
    write_template(out / "template", template, terminators, pad, row_tokenizer.starts_with_bos)
    because = Counter(r.reason for r in curation.left_out.values()) + reading.curated
    dropped, refused = dict(sorted(because.items())), dict(sorted(reading.refused.items()))
    audit = {
        "splits": {name: _split_figures(pairs) for name, pairs in made.items()},
        "dropped": dropped,
        "refused": refused,
        "template": template.name,
        "prompts_proved": writer.proved,
        "ids_equal": writer.ids.equal,
        "ids_not_compared": writer.ids.other,
        "terminators": terminators,
        "label_ids": len(row_tokenizer.labels),
    }
    write_json(out / "audit.json", audit)
    lengths = {
        f"{side}_tokens": round(sum(p.supervised(i) for p in train) / len(train), 2)
        for i, side in enumerate(train[0].pair.sides)
    }
    labels = Counter(str(p.pair.label).lower() for p in train) if spec.method == "kto" else Counter[str]()
    metrics: PairsMetrics = {
        "rows_in": reading.rows,
        "rows": len(train),
        "eval_rows": len(made["eval"]),
        "refused": refused,
        "dropped": because.total(),
        "dropped_because": dropped,
        "sources": reading.rows_of,
        "formats": reading.formats,
        "notes": reading.notes,
        "length_bias": _bias(train),
        "tokens": sum(p.tokens for p in train),
        "longest": max(p.longest for p in train),
        "template": template.name,
        "terminator": ", ".join(tokenizer.convert_ids_to_tokens(terminators)),
        **cast("PairsMetrics", lengths),
    }
    return {**metrics, "labels": dict(sorted(labels.items()))} if labels else metrics


def _bias(pairs: Sequence[TokenizedPair]) -> float | None:
    from finetune.preference.tokens import length_bias

    return length_bias([(p.supervised(0), p.supervised(1)) for p in pairs if len(p.answers) == 2])


def _split_figures(pairs: Sequence[TokenizedPair]) -> dict[str, object]:
    return {
        "pairs": len(pairs),
        "tokens": sum(p.tokens for p in pairs),
        "supervised": sum(p.supervised(i) for p in pairs for i in range(len(p.answers))),
        "longest": max((p.longest for p in pairs), default=0),
        "length_bias": _bias(pairs),
    }

"""From messages to token ids and a label mask: choose and prove the template, render, audit, write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.context import Context
from finetune.data.records import Example, Reject, RowRange, read_rows, reject_writer, row_ranges
from finetune.errors import FinetuneError
from finetune.metrics import Headline, RenderMetrics
from finetune.recipe import Recipe, Render
from finetune.utils.files import canonical_json, read_json, write_json

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

    from finetune.tokenization.audit import Tally
    from finetune.tokenization.chat_template import Template
    from finetune.tokenization.id_check import IdCheck
    from finetune.tokenization.row_tokenizer import RowTokenizer, Rules

SAMPLE = 200  # rows that a template is tried on, and whose ids are compared with the base's own
PART_ROWS = 4096  # rendered by one worker at a time: whole batches
BATCH = 512  # rows rendered and tokenised together: enough to keep the tokenizer's threads busy


def spec(recipe: Recipe) -> Render:
    """The recipe's render section."""
    return recipe.render


def fingerprint(spec: Render) -> dict[str, object]:
    """The text of every template that can decide the outcome, so that editing one renders again."""
    from finetune.tokenization.chat_template import fingerprint_of

    return fingerprint_of(spec.template, spec.template_file)


def run(spec: Render, inputs: Mapping[str, Path], out: Path, ctx: Context) -> RenderMetrics:
    """Render both splits; a row that is left out is in rejects.parquet with its reason.

    Without training rows (`train: null` beside `eval_data`) the template is proved on the held-out ones.
    Raises GateRefused (with row ids) if training on the result would ruin the model.
    """
    from finetune.models.loading import load_tokenizer
    from finetune.models.new_tokens import meant
    from finetune.tokenization.audit import Tally, check_pad, check_shares
    from finetune.tokenization.chat import verification_sample
    from finetune.tokenization.chat_template import write_template
    from finetune.tokenization.encoder import choose_pad
    from finetune.tokenization.id_check import IdCheck
    from finetune.tokenization.inspection import first_row_text

    folder = inputs["split"]
    train = folder / "train.parquet" if (folder / "train.parquet").exists() else folder / "rows.parquet"
    held_out = folder / "eval.parquet"
    only_held_out = next(read_rows(train), None) is None and held_out.exists()
    tokenizer = load_tokenizer(inputs["base"])
    asked = SAMPLE if spec.prove_rows == "all" else spec.prove_rows
    proof = read_rows(held_out if only_held_out else train)
    sample = verification_sample(ctx.track(proof, "choose rows to prove the template on"), asked)
    row_tokenizer = _row_tokenizer(spec, inputs["base"], sample)
    template, own_special = row_tokenizer.template, meant(inputs["base"])
    check = IdCheck(tokenizer, template, own_special)
    for row in sample:
        check.compare(row, row_tokenizer)
    proved = row_tokenizer.check_prompts(sample)
    with reject_writer(out / "rejects.parquet") as reject:
        build = _Renderer(spec, inputs["base"], sample, row_tokenizer)
        tallies = {
            "train": _write(row_tokenizer, build, train, out / "train.parquet", ctx, reject),
            "eval": _write(row_tokenizer, build, held_out, out / "eval.parquet", ctx, reject),
        }
    check_shares(
        [tallies["eval"]] if only_held_out else list(tallies.values()),
        spec.max_truncated_fraction,
        spec.max_dropped_fraction,
        spec.max_unterminated_fraction,
        "held-out" if only_held_out else "training",
    )
    ctx.say(f"render: template {template.name}; {check.equal} sampled rows have the ids of the base's own template")
    total = Tally()
    for tally in tallies.values():
        total.add(tally)
    for line in (*check.notes(), *_notes(total), *_unseen(out, inputs["base"]), *_too_long(out, inputs["base"])):
        ctx.say(f"render: {line}")
    part = "eval" if only_held_out else "train"
    ctx.say(first_row_text(tokenizer, out / f"{part}.parquet"))
    pad = choose_pad(tokenizer, template.text, row_tokenizer.labels, own_special)
    check_pad(tokenizer.get_vocab()[pad], row_tokenizer.labels)
    terminators = sorted(row_tokenizer.terminators)
    write_template(out / "template", template, terminators, pad, row_tokenizer.starts_with_bos, sorted(own_special))
    _write_audit(out / "audit.json", tallies, row_tokenizer, proved, check)
    done = tallies[part]
    return {
        "supervised_fraction": done.supervised / done.tokens,
        "truncated": total.truncated,
        "unterminated": total.unterminated,
        "dropped": total.dropped.total(),
        "dropped_because": dict(total.dropped),
        "masked_turns": total.masked.total(),
        "special_text": {s: rows for s, (rows, _) in sorted(total.special_text.items())},
        "rows": tallies["train"].rows,
        "tokens": done.tokens,
        "longest": done.longest,
        "eval_rows": tallies["eval"].rows,
        "template": template.name,
        "terminator": ", ".join(tokenizer.convert_ids_to_tokens(terminators)),
    }


def headline(m: RenderMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    dropped = f", {m['dropped']:,} dropped" if m["dropped"] else ""
    figure = f"{m['supervised_fraction']:.1%} supervised, {m['truncated']:,} truncated{dropped}"
    return Headline(figure, None, m["rows"], m["eval_rows"])


def _row_tokenizer(spec: Render, base: Path, sample: Sequence[Example]) -> RowTokenizer:
    """The rows' tokenizer with the template that is proved on `sample`."""
    from finetune.models.loading import load_tokenizer
    from finetune.models.new_tokens import meant
    from finetune.tokenization.chat_template import choose_template
    from finetune.tokenization.encoder import Encoder
    from finetune.tokenization.row_tokenizer import RowTokenizer

    tokenizer = load_tokenizer(base)
    template = choose_template(spec.template, spec.template_file, tokenizer, sample, spec.system, spec.reasoning, base)
    return RowTokenizer(template, Encoder(tokenizer, meant(base)), _rules(spec, tokenizer, template))


@dataclass
class _Rendered:
    """A rendered range of rows: tables as they are written, what was left out, counts, and what the worker has seen."""

    tables: list[pa.Table]
    rejects: list[Reject]
    tally: Tally
    terminators: set[int]
    labels: set[int]
    starts_with_bos: bool


@dataclass(frozen=True)
class _Renderer:
    """Builds the function that renders a range of rows; other processes make a tokenizer of their own."""

    spec: Render
    base: Path
    sample: Sequence[Example]
    here: RowTokenizer | None = None

    def __call__(self) -> Callable[[RowRange], _Rendered]:
        return partial(_rendered, self.here or _row_tokenizer(self.spec, self.base, self.sample))

    def __reduce__(self) -> tuple[object, ...]:
        return _Renderer, (self.spec, self.base, self.sample)


def _rendered(row_tokenizer: RowTokenizer, part: RowRange) -> _Rendered:
    from finetune.tokenization.audit import Tally
    from finetune.tokenization.row_tokenizer import table

    tally, rejects, tables = Tally(), [], []
    rows = part.read()
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        tables.append(table(row_tokenizer.batch(batch, tally)))
        rejects += [_reject(r, *tally.left_out.pop(r.id), row_tokenizer.rules) for r in batch if r.id in tally.left_out]
    return _Rendered(
        tables, rejects, tally, row_tokenizer.terminators, row_tokenizer.labels, row_tokenizer.starts_with_bos
    )


def _rules(spec: Render, tokenizer: PreTrainedTokenizerBase, template: Template) -> Rules:
    from finetune.tokenization.row_tokenizer import Rules

    bos_id = tokenizer.bos_token_id
    return Rules(
        supervise=spec.supervise,
        max_length=spec.max_length_tokens,
        overlong=spec.overlong,
        bos=tokenizer.bos_token,
        bos_id=bos_id,
        adds_bos=bos_id is not None and tokenizer("a")["input_ids"][:1] == [bos_id],
        eos=tokenizer.eos_token,
        stop_ids=frozenset(tokenizer.get_vocab()[s] for s in template.finder.stops),
    )


def _notes(total: Tally) -> Iterator[str]:
    """Return warnings on the written rows: turns without labels, typed special tokens."""
    for reason, count in sorted(total.masked.items()):
        yield f"{count:,} of {total.answers:,} assistant turns carry no label: {reason}"
    if total.open_ends:
        yield (
            f"the end of {total.open_ends:,} of {total.answers:,} assistant turns carries no label: the template ends "
            "these earlier turns otherwise than it asks for them"
        )
    for string, (rows, ids) in sorted(total.special_text.items()):
        yield (
            f"{rows:,} rows hold the text {string!r}, a special token of this base; typed text is encoded as text: "
            f"{ids:,} of these rows hold it as a token"
        )


def _unseen(out: Path, base: Path) -> Iterator[str]:
    """New tokens that no training row holds: their embedding stays where it begins."""
    import numpy as np
    import pyarrow.parquet as pq

    from finetune.models.new_tokens import read_new_tokens

    if (tokens := read_new_tokens(base)) is None:
        return
    seen: set[int] = set()
    for batch in pq.ParquetFile(out / "train.parquet").iter_batches(columns=["input_ids"]):
        seen.update(np.unique(batch.column(0).flatten().to_numpy()).tolist())
    if lost := [text for text, number in zip(tokens.texts, tokens.ids, strict=True) if number not in seen]:
        yield f"WARNING: {len(lost)} of {len(tokens.ids)} new tokens are in no training row, such as {lost[0]!r}"


def _too_long(out: Path, base: Path) -> Iterator[str]:
    """Rows that are longer than the sequences the base was made for."""
    import numpy as np
    import pyarrow.parquet as pq

    from finetune.models.architecture import positions

    pinned, config = (read_json(p) if p.is_file() else {} for p in (base / "base.json", base / "config.json"))
    known = pinned["positions"] if "positions" in pinned else positions(config)
    lengths = [pq.read_table(out / f"{n}.parquet", columns=["length"])["length"].to_numpy() for n in ("train", "eval")]
    every = np.concatenate(lengths)
    if known and (count := int((every > known).sum())):
        yield (
            f"WARNING: {count:,} of {len(every):,} rows are longer than the {known:,} positions that the base knows "
            f"(max_position_embeddings; the longest has {every.max():,} tokens): lower render.max_length_tokens, or "
            "set model.rope_scaling"
        )


def _write(
    row_tokenizer: RowTokenizer,
    build: _Renderer,
    source: Path,
    target: Path,
    ctx: Context,
    reject: Callable[[Reject], None] = lambda _: None,
) -> Tally:
    """Render one split to Parquet, a range of rows at a time; an absent split gives an empty file.

    What the workers saw of terminators and labels is added to `worker`, which the proofs were made with.
    """
    import pyarrow.parquet as pq

    from finetune.tokenization.audit import Tally
    from finetune.tokenization.row_tokenizer import table

    tally = Tally()
    with pq.ParquetWriter(target, table([]).schema, compression="zstd") as writer:
        parts = row_ranges(source, PART_ROWS) if source.exists() else []
        rows = parts[-1].stop if parts else 0
        for done in ctx.track(ctx.engine.map(build, parts, rows), f"render {target.stem}", len(parts)):
            for each in done.tables:
                writer.write_table(each)
            tally.add(done.tally)
            _note_masked(target.with_name("masked.jsonl"), tally)
            row_tokenizer.terminators |= done.terminators
            row_tokenizer.labels |= done.labels
            row_tokenizer.starts_with_bos |= done.starts_with_bos
            for row in done.rejects:
                reject(row)
    written = pq.read_table(target, columns=["length", "supervised"])  # count the rows on disk
    figures = [written.num_rows, *(sum(c.to_pylist()) for c in written.columns)]
    if figures != [tally.rows, tally.tokens, tally.supervised]:
        raise FinetuneError(
            f"{target.name} holds rows, tokens, labels {figures}, not what was counted; is the disk full?"
        )
    return tally


def _note_masked(path: Path, tally: Tally) -> None:
    """Append the assistant turns without a label: {"id", "turn", "reason"}; no file without any."""
    if tally.masked_turns:
        with path.open("a", encoding="utf-8") as file:
            for row_id, turn, reason in tally.masked_turns:
                file.write(canonical_json({"id": row_id, "turn": turn, "reason": reason}) + "\n")
        tally.masked_turns.clear()


def _reject(row: Example, reason: str, length: int | None, rules: Rules) -> Reject:
    """A row that was left out; its tokens and their limit if it was counted."""
    counted = "" if length is None else f", {length} tokens of at most {rules.max_length}"
    detail = f"{counted.removeprefix(', ')}: {reason}" if counted else reason
    limit = None if length is None else rules.max_length
    return Reject.of(row, reason, detail, length, limit)


def _write_audit(
    path: Path, tallies: Mapping[str, Tally], row_tokenizer: RowTokenizer, proved: int, check: IdCheck
) -> None:
    content = {
        "splits": {name: tally.as_json() for name, tally in tallies.items()},
        "template": row_tokenizer.template.name,
        "system": "template" if row_tokenizer.template.profile.takes_system else row_tokenizer.template.profile.system,
        "supervise": row_tokenizer.rules.supervise,
        "reasoning": row_tokenizer.template.profile.reasoning,
        "prompts_proved": proved,
        "ids_equal": check.equal,
        "ids_not_compared": check.other,
        "terminators": sorted(row_tokenizer.terminators),
        "label_ids": len(row_tokenizer.labels),
    }
    write_json(path, content)

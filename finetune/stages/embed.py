"""One vector a row, kept while only a threshold changes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from finetune.context import Context
from finetune.data.records import read_rows, write_table
from finetune.dedup.embedding_names import model_fingerprint
from finetune.dedup.embedding_timing import keep_rate
from finetune.metrics import EmbedMetrics, Headline
from finetune.recipe import Recipe, Section
from finetune.utils.files import write_json


class Spec(Section):
    """Text and model of the embedding; no threshold."""

    embedding: str
    field: Literal["instruction", "output", "both"]
    folder: Annotated[Path | None, Field(exclude=True)] = None
    varied_answers: Annotated[bool, Field(exclude=True)] = False  # refuse labels before they are embedded


def spec(recipe: Recipe) -> Spec | None:
    """Off without near-duplicate removal by vectors."""
    dedup = recipe.dedup
    if dedup is None or dedup.embedding is None:
        return None
    varied = dedup.field == "output" and dedup.max_dropped_fraction < 1
    return Spec(embedding=dedup.embedding, field=dedup.field, folder=dedup.embedding_folder, varied_answers=varied)


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """The digests of a folder's files, or the current commit of a Hub model; LSA depends on the rows alone."""
    return model_fingerprint(spec.embedding, spec.folder)


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> EmbedMetrics:
    """Write vectors.npy (N, d) float32, row i for the i-th row of filter, ids.parquet in that order, embedding.json.

    Raises GateRefused if answers are to be compared alone and are labels.
    """
    import numpy as np

    from finetune.data.text import field_text
    from finetune.dedup.answers import AnswerCheck, answer_key
    from finetune.dedup.embed import embed_counted

    ids, texts = [], []
    answers = AnswerCheck()
    for row in ctx.track(read_rows(inputs["filter"] / "rows.parquet"), "read rows"):
        ids.append(row.id)
        texts.append(field_text(row, spec.field))
        if spec.varied_answers:
            answers.add([answer_key(row)])
    answers.require_varied()
    start = time.monotonic()
    vectors, made = embed_counted(texts, spec.embedding, ctx, spec.folder, made_by=fingerprint(spec))
    seconds = time.monotonic() - start
    keep_rate(ctx.scratch, spec.embedding, made, seconds)
    with (out / "vectors.npy").open("wb") as file:
        np.save(file, vectors, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    import pyarrow as pa

    write_table(out / "ids.parquet", {"id": ids}, {"id": pa.string()})
    dimension = int(vectors.shape[1])
    write_json(out / "embedding.json", {"embedding": spec.embedding, "field": spec.field, "dimension": dimension})
    return {
        "rows": len(ids),
        "embedded": made,  # without copies, and what an earlier run kept
        "rows_per_second": round(made / max(seconds, 1e-9), 1) if made else None,
        "model": spec.embedding,
        "dimension": dimension,
    }


def headline(m: EmbedMetrics) -> Headline:
    """Return the row of this stage in a table of stages."""
    speed = "–" if m["rows_per_second"] is None else f"{m['rows_per_second']:,.0f}"
    return Headline(f"{m['model']}, {speed} rows/s", m["rows"], m["rows"])

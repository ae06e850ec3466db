"""One vector a row, kept while only a threshold changes."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from finetune.context import Context, Metrics
from finetune.recipe import Recipe, Section
from finetune.records import read_rows, write_json, write_table

LSA = "lsa"
HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


class Spec(Section):
    """What is embedded, and by what; no threshold."""

    embedding: str
    field: Literal["instruction", "output", "both"]
    folder: Annotated[Path | None, Field(exclude=True)] = None


def spec(recipe: Recipe) -> Spec | None:
    """Off without near-duplicate removal. A name that cannot be a Hub name, or that begins like a path, is a folder."""
    dedup = recipe.dedup
    if dedup is None or dedup.embedding is None:
        return None
    name = dedup.embedding
    if name.startswith(("/", "./", "../", "~")) or not HUB_NAME.fullmatch(name):
        folder = Path(name).expanduser().absolute()
        return Spec(embedding=f"folder:{folder.name}", field=dedup.field, folder=folder)
    return Spec(embedding=name, field=dedup.field)


def fingerprint(spec: Spec) -> Mapping[str, object]:
    """The digests of a folder's files, or the commit a Hub name stands for now; LSA is made of the rows alone."""
    if spec.folder is not None:
        return {"files": _digests(spec.folder)}
    if spec.embedding == LSA:
        return {}
    from finetune.backends.hub import resolve_revision

    return {"revision": resolve_revision(spec.embedding, None, repo_type="model", scratch=None)}


def run(spec: Spec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Metrics:
    """Write vectors.npy (N, d) float32, row i for the i-th row of filter, ids.parquet in that order, embedding.json."""
    import numpy as np

    from finetune.backends.embeddings import embed
    from finetune.data.near_duplicates import field_text

    ids, texts = [], []
    for row in ctx.track(read_rows(inputs["filter"] / "rows.parquet"), "read rows"):
        ids.append(row.id)
        texts.append(field_text(row, spec.field))
    start = time.monotonic()
    vectors = embed(texts, spec.embedding, ctx, spec.folder)
    seconds = time.monotonic() - start
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
        "rows_per_second": round(len(ids) / max(seconds, 1e-9), 1),
        "model": spec.embedding,
        "dimension": dimension,
    }


def _digests(folder: Path) -> dict[str, str]:
    """xxh3-128 of every file but hidden ones, by relative path."""
    from finetune.digests import file_digest
    from finetune.errors import InputError

    if not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(
            f"dedup.embedding: {folder} holds no sentence-transformers model (no modules.json or config.json); "
            "give the folder of one, a Hub name such as thenlper/gte-large, or lsa"
        )
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            digests[name.as_posix()] = file_digest(path)
    return digests

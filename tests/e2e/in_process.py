"""The pipeline up to pack in this process, on a shared small base: what strange data does to a whole run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from finetune.context import Context
from finetune.data.records import Example, read_rows
from finetune.errors import FinetuneError
from finetune.pipeline import runner
from finetune.pipeline.runs import Run
from finetune.pipeline.store import Store
from finetune.recipe.load import parse_recipe

RECIPE = """\
schema: 1
name: strange
model: {base}
data: {data}
ingest: {{max_refused_fraction: 1}}
dedup: {{embedding: null, max_dropped_fraction: 1}}
split: null
render: {{max_length_tokens: 128, max_dropped_fraction: 1, max_truncated_fraction: 1}}
"""


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished run: the folder and the figures of every stage that was not off."""

    folders: dict[str, Path]
    metrics: dict[str, dict[str, Any]]

    def table(self, stage: str, name: str) -> list[dict[str, Any]]:
        """The rows of a Parquet file that a stage left."""
        return pq.read_table(self.folders[stage] / name).to_pylist()

    def rows(self, stage: str, name: str = "rows.parquet") -> list[Example]:
        """The rows of a stage as Examples."""
        return list(read_rows(self.folders[stage] / name))


@dataclasses.dataclass(frozen=True)
class Laboratory:
    """A folder for data files and results, and the base that every run shares."""

    folder: Path
    base: Path

    def put(self, name: str, content: bytes | str | Iterable[object]) -> Path:
        """A file of these bytes, this text, or these values as JSON lines."""
        if not isinstance(content, bytes | str):
            content = "".join(json.dumps(value) + "\n" for value in content)
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def run(self, *paths: Path, source: dict[str, Any] | None = None, sets: Iterable[str] = ()) -> Done:
        """Run as far as pack. A stage that fails must have left nothing that looks finished."""
        data = [{"source": "local", "path": str(path), **(source or {})} for path in paths]
        text = RECIPE.format(base=self.base, data=json.dumps(data))
        recipe = parse_recipe(text, self.folder / "strange.yaml", list(sets))
        store = Store(self.folder / "artifacts", self.folder / "scratch")
        ctx = Context(store.scratch, recipe.runtime, recipe.tracking, device="cpu")
        record = Run(store.artifacts, recipe.name, text, (), "0" * 8, write=False)
        try:
            steps = runner.run(recipe, store, ctx, record, until="pack")
        except FinetuneError:
            failed = [r for r in record.stages.values() if r.status in ("failed", "refused")]
            assert all(r.folder is not None and store.find(r.folder) is None for r in failed)
            raise
        built = [step for step in steps if step.manifest is not None and step.folder is not None]
        for step in built:
            assert store.verify(step.folder, step.manifest) == []
        return Done({s.stage.name: s.folder for s in built}, {s.stage.name: s.manifest.metrics for s in built})

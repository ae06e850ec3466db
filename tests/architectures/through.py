"""A recipe run from base to export on a tiny random model of any family, in this process."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from finetune.context import Context
from finetune.gguf.support import problem
from finetune.pipeline import runner
from finetune.pipeline.runs import Run
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.recipe.load import parse_recipe
from finetune.tiny import model as tiny_model
from finetune.utils.files import read_json
from tests.e2e.conftest import rows
from tests.helpers import families

RECIPE = """\
schema: 1
name: family
model: {base}
data: [{{source: local, path: rows.jsonl, take: 60}}]
filter: null
dedup: null
split: {{eval_fraction: 0.1}}
render: {{max_length_tokens: 96}}
pack: {{length_tokens: 256}}
lora: {{r: 4, alpha: 8}}
quantization: {quantization}
train: {{learning_rate: 5e-3, max_steps: 2, batch_rows: 2, warmup_fraction: 0}}
evaluate: null
certify: {{tokens: 150, base: original, min_agreement: 0.01, max_perplexity_ratio: 10}}
export: {export}
"""


@dataclasses.dataclass(frozen=True)
class Through:
    """Where each stage's output is, what it measured, what was said, and the seconds it took."""

    family: str
    folders: dict[str, Path]
    metrics: dict[str, dict[str, Any]]
    said: list[str]
    seconds: float
    recipe: Recipe


class Laboratory:
    """A folder with the rows and the tokenizer that every family shares; stages that do not read the base run once."""

    def __init__(self, folder: Path) -> None:
        data = rows()
        (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in data))
        texts = [f"[INST] {r['instruction']} [/INST] {r['output']}" for r in data]
        self.folder, self.tokenizer = folder, tiny_model.train_tokenizer(texts, 400)
        self.store = Store(folder / "artifacts", folder / "scratch")

    def base(self, family: str) -> Path:
        """Where the tiny model of `family` is."""
        return self.folder / family.replace(" ", "-")

    def run(self, family: str, until: str = "export", quantization: str = "{type: nf4}") -> Through:
        """Run `family` to the stage `until`; GGUF files are written where they can be."""
        started = time.monotonic()
        base = families.save(family, self.base(family), vocabulary=len(self.tokenizer))
        self.tokenizer.save_pretrained(base)
        written = problem(read_json(base / "config.json")) is None
        text = RECIPE.format(
            base=json.dumps(str(base)), quantization=quantization, export="{gguf: [f32]}" if written else "null"
        )
        recipe = parse_recipe(text, self.folder / "family.yaml", [])
        said: list[str] = []
        ctx = Context(self.store.scratch, recipe.runtime, recipe.tracking, device="cpu", say=said.append)
        record = Run(self.store.artifacts, recipe.name, text, (), "0" * 8, write=False)
        steps = runner.run(recipe, self.store, ctx, record, until=until)
        built = [s for s in steps if s.manifest is not None and s.folder is not None]
        return Through(
            family=family,
            folders={s.stage.name: s.folder for s in built if s.folder},
            metrics={s.stage.name: dict(s.manifest.metrics) for s in built if s.manifest},
            said=said,
            seconds=time.monotonic() - started,
            recipe=recipe,
        )

"""A run as it lies on disk, made by hand: whatever texts and statuses a test wants a report of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.records import Example, Message, write_rows, write_table
from finetune.pipeline.store import Manifest, Store
from finetune.utils.files import canonical_json, write_json

RECIPE = "schema: 1\nname: made\nmodel: builtin:tiny-mistral\ndata:\n  - {source: local, path: rows.jsonl}\n"
ENVIRONMENT = {
    "versions": {"torch": "2.13.0"}, "python": "3.11.7", "machine": "x86_64", "system": "Linux", "cpu_count": 2,
    "git_commit": "c6e5a26", "git_dirty": True,
}  # fmt: skip
CONFIG = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
    "num_hidden_layers": 2, "vocab_size": 400, "model_type": "mistral", "architectures": ["MistralForCausalLM"],
}  # fmt: skip
RUN = "20260102T030405Z-01234567"


class MadeRun:
    """One run under `root`; `done` finishes a stage with the files that were written into `folder(stage)`."""

    def __init__(self, root: Path, recipe_text: str = RECIPE) -> None:
        self.store = Store(root / "artifacts", root / "scratch")
        self.recipe_text = recipe_text
        self.stages: dict[str, dict[str, Any]] = {}

    def key(self, stage: str) -> str:
        return f"{stage:0<16}"

    def folder(self, stage: str) -> Path:
        folder = self.store.folder(stage, self.key(stage), large=stage in ("merge", "export"))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def done(self, stage: str, **metrics: Any) -> None:
        manifest = Manifest(
            stage=stage, version=1, key=self.key(stage), spec={}, fingerprint={}, inputs={},
            files=self.store.read_files(self.folder(stage), {}), digest="0", metrics=metrics, seconds=1.5,
            peak_memory_bytes=10**9, environment=ENVIRONMENT,
        )  # fmt: skip
        self.store.commit(self.folder(stage), manifest)
        self.note(stage, "done", metrics)

    def note(self, stage: str, status: str, metrics: Mapping[str, Any] | None = None, message: str = "") -> None:
        seconds = 1.5 if status == "done" else None
        record = {"status": status, "path": None, "key": self.key(stage), "seconds": seconds, "metrics": metrics or {}}
        self.stages[stage] = record | ({"message": message} if message else {})

    def save(self, sets: Sequence[str] = ()) -> Path:
        folder = self.store.artifacts / "runs" / "made" / RUN
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(self.recipe_text, encoding="utf-8")
        value = {"recipe": "made", "run": RUN, "sets": list(sets), "stages": self.stages}
        (folder / "run.json").write_text(json.dumps(value), encoding="utf-8")
        (folder.parent / "latest").write_text(RUN + "\n")
        return folder


def example(row_id: str, asked: str, answer: str, source: str = "rows") -> Example:
    return Example(row_id, source, (Message("user", asked), Message("assistant", answer)))


def made_run(root: Path, text: str = "A plain text.", label: str = "rows", recipe_text: str = RECIPE) -> MadeRun:
    """Every stage up to certify finished; every text is `text` and the only source is called `label`."""
    run = MadeRun(root, recipe_text)
    write_json(run.folder("base") / "config.json", CONFIG)
    run.done("base", parameters=1000, revision=None)
    rows = [example(f"rows:{i}{text}", f"{text} {i}?", text, label) for i in range(12)]
    write_rows(run.folder("ingest") / "rows.parquet", rows)
    run.done(
        "ingest", rows_out=12, sources={label: {"rows": 12, "refused": 1}}, refused={text: 1}, formats={label: text}
    )
    run.note("filter", "off")
    run.note("embed", "off")
    write_rows(run.folder("dedup") / "rows.parquet", rows[:8])
    kept = rows[0].id
    pairs = {
        "dropped_id": [r.id for r in rows[8:]], "kept_id": [kept] * 4, "method": ["exact", "exact", "embedding", text],
        "score": [1.0, 1.0, 0.9, 0.8],
    }  # fmt: skip
    write_table(run.folder("dedup") / "pairs.parquet", pairs)
    run.done("dedup", rows_in=12, rows_out=8, exact=2, embedding=2)
    write_rows(run.folder("split") / "train.parquet", rows[:6])
    write_rows(run.folder("split") / "eval.parquet", rows[6:8])
    run.done("split", rows_in=8, train_rows=6, eval_rows=2, leaks=0)
    render = run.folder("render")
    write_table(render / "train.parquet", {"id": [r.id for r in rows[:6]], "length": [20, 30, 40, 50, 60, 70]})
    write_table(render / "eval.parquet", {"id": [r.id for r in rows[6:8]], "length": [20, 30]})
    (render / "template").mkdir(exist_ok=True)
    write_json(
        render / "template" / "template.json", {"name": text, "sha256": text, "terminators": [2], "pad_token": text}
    )
    run.done(
        "render", rows=6, eval_rows=2, tokens=270, longest=70, supervised_fraction=0.5, truncated=0, dropped=1,
        dropped_because={text: 1}, terminator=text,
    )  # fmt: skip
    run.note("pack", "off")
    steps = [
        {"step": i, "loss": 4 / i, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 100.0 * i, "tokens": i}
        for i in range(1, 31)
    ]
    (run.folder("train") / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    run.done(
        "train", loss=0.25, first_loss=4.0, tokens_per_second=1234.5, peak_memory_bytes=2_000_000_000, device=text,
        micro_batch_rows=1, note=text,
    )  # fmt: skip
    sample = {
        "id": text, "prompt": text, "reference": text, "adapter": {"text": text, "finish": "stop"},
        "base": {"text": text, "finish": "length"},
    }  # fmt: skip
    (run.folder("evaluate") / "samples.jsonl").write_text(
        (canonical_json(sample) + "\n") * 6, encoding="utf-8", errors="surrogatepass"
    )
    run.done(
        "evaluate", rows=2, tokens=100, perplexity_base=73.7, perplexity_adapter=25.8, nll_true=3.2, nll_shuffled=3.8,
        nll_difference_interval=[0.4, 0.7], generations=6, stop_rate=1.0, stop_rate_base=0.0,
    )  # fmt: skip
    figures = {
        "perplexity": 26.4, "perplexity_interval": [20.9, 32.0], "perplexity_ratio": 1.001, "mean_kl": 1e-5,
        "agreement": 0.998,
    }  # fmt: skip
    certificate = {
        "base": text, "perplexity_trained": 26.3, "perplexity_trained_interval": [20.8, 31.9], "rows": 2,
        "candidates": {text: figures}, "dequantized_minus_original": None, "words": text,
    }  # fmt: skip
    write_json(run.folder("certify") / "certificate.json", certificate)
    run.done(
        "certify", base=text, perplexity_trained=26.3, perplexity_merged=26.4, mean_kl=1e-5, agreement=0.998, rows=2
    )
    run.done("merge", base=text, dtype=text, tensors=3, changed_tensors=2, bytes=10**6, files=1, peak_anon_bytes=10**5)
    run.done(
        "export", bytes={text: 10**6}, reload_difference={text: 0.0}, tokenizer_exact=False,
        perplexity={"merged": 3.0, text: 3.5}, agreement={text: 0.97}, perplexity_rows=7, not_loaded=text,
        mean_kl={text: 0.01}, bits_per_weight={"merged": 16.0, text: 4.5},
    )  # fmt: skip
    return run

"""A finished run to publish: real tokenizers and configurations, weights of a word."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.context import Context
from finetune.data.records import Example, Message, write_rows
from finetune.publish.facts import Facts, with_sets
from finetune.publish.publish import publish
from finetune.recipe import Recipe
from tests.helpers.base_templates import CHATML
from tests.helpers.tiny_tokenizers import build

BASE = "mistralai/Mistral-7B"
PAD = "<|finetune_right_pad_id|>"
SHA = "0123456789abcdef0123456789abcdef01234567"
STAGES = ("base", "render", "train", "merge", "certify", "split")


def recipe(**changes: Any) -> Recipe:
    """A recipe; `data` and `export` are its own fields, the others those of `publish`."""
    raw = {"name": "tiny", "model": BASE, "data": [{"source": "pydoc"}]}
    own = {name: changes.pop(name) for name in ("data", "export") if name in changes}
    return Recipe.model_validate({**raw, **own, "publish": {"repo": "me/tiny", **changes}})


def finish_stages(made: Path) -> Path:
    """Write every stage that a publisher reads under `made`."""
    from transformers import AutoConfig

    tokenizer = build("byte_level", CHATML)
    tokenizer.pad_token = PAD
    for folder in ("train/adapter", "merge"):
        tokenizer.save_pretrained(made / folder)
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    template = {"name": "chatml", "sha256": "00", "terminators": sorted(ends), "pad_token": PAD, "bos": False}
    config = AutoConfig.for_model("mistral", vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2)
    lora = {"base_model_name_or_path": BASE, "revision": SHA, "r": 8, "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    texts = {
        "base/base.json": json.dumps({"id": BASE, "kind": "hub", "revision": SHA, "parameters": 7}),
        "render/template/template.json": json.dumps(template),
        "render/template/inference.jinja": CHATML,
        "train/adapter/adapter_config.json": json.dumps(lora),
        "train/adapter/adapter_model.safetensors": "adapter weights",
        "train/adapter/template/template.json": json.dumps(template),
        "train/metrics.jsonl": "".join(json.dumps({"step": n, "loss": 2 / n}) + "\n" for n in (1, 2, 3)),
        "train/manifest.json": "{}",
        "merge/config.json": config.to_json_string(),
        "merge/generation_config.json": json.dumps({"eos_token_id": ends}),
        "merge/model.safetensors": "merged weights",
        "merge/manifest.json": "{}",
        "merge/lease.1.json": "{}",
        "merge/README.md": "an older card",
        "certify/certificate.json": json.dumps({"base": "original", "agreement": 0.99}),
    }
    for name, text in texts.items():
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (made / "split").mkdir()
    asked, tool = Message("user", "Why?"), Message("assistant", "", '{"tool_calls":[]}')
    example = Example("rows.jsonl:1", "rows.jsonl", (asked, Message("assistant", "So.")), extra='{"email":"a@b.c"}')
    write_rows(made / "split/train.parquet", [example, replace(example, id="rows.jsonl:3", messages=(asked, tool))])
    write_rows(made / "split/eval.parquet", [replace(example, id="rows.jsonl:2")])
    return made


class Act:
    """A publish with everything but what a test changes."""

    def __init__(self, tmp_path: Path, folders: dict[str, Path]) -> None:
        self.run_folder, self.folders, self.said = tmp_path / "run", folders, list[str]()
        self.run_folder.mkdir()
        self.sets: list[str] = []
        start = recipe()
        self.scratch = tmp_path / "scratch"
        self.ctx = Context(self.scratch, start.runtime, start.tracking, say=self.said.append)

    def __call__(self, recipe: Recipe, repo: str | None = None, dry_run: bool = False) -> dict[str, Any]:
        metrics: dict[str, dict[str, object]] = {"train": {"loss": 1.5}, "evaluate": {}}
        facts = Facts(recipe, with_sets("name: tiny\n", self.sets), metrics)
        return publish(facts, self.run_folder, self.folders, repo, dry_run, self.ctx)

    def licence_lines(self) -> list[str]:
        """What was said of licences."""
        return [line for line in self.said if line.startswith("licence")]

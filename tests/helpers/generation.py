"""A stage generate with seeds in a folder, and a loopback server that answers as a capable model would."""

from __future__ import annotations

import json
import re

import pyarrow.parquet as pq
import pytest

from finetune.context import Context
from finetune.data.records import read_rows
from finetune.recipe import Runtime, Tracking
from finetune.recipe.load import parse_recipe
from finetune.stages import generate
from tests.helpers.chat_server import chat_server

pytest.importorskip("openai")
TASKS = [f"Explain why {a} is {b} in winter" for a in ("snow", "ice", "fog", "rain") for b in ("cold", "white", "wet")]
HARDER = "and give {} reasons with a source each"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    monkeypatch.setattr("finetune.synth.asking.GARBLED_SECONDS", 0.01)
    monkeypatch.delenv("FINETUNE_API_KEY", raising=False)


def model_that_can(body):
    """Answers as a capable model would: every kind of our prompts, told apart by their own words."""
    text = body["messages"][-1]["content"]
    if "ask for the same" in text:
        first, second = re.findall(r"(?s)instruction:\n(.*?)\n\n", text)
        return "Equal" if first == second else "Not equal"
    if "#New Instruction#" in text:
        return re.search(r"(?s)#Given Instruction#\n(.*?)\n\n#New", text)[1] + " " + HARDER.format(len(text) % 97)
    if "Continue it with" in text:
        shown = len(text) + int(re.findall(r"(\d+)\.", text)[-1]) + body["seed"]
        subjects = ("glass", "bridges", "chess", "tides", "maps", "bread", "clocks", "whales", "tax", "music")
        verbs = ("Describe how one makes", "List five uses of", "Is there any history in", "Write verse about")
        return "\n".join(f"{i}. {v} {subjects[(shown + i) % 10]} {shown * i}" for i, v in enumerate(verbs, 9))
    if "a classification task" in text:
        return "Yes" if "Is there" in text else "No"
    if "Class label: …" in text:
        return "Class label: old\nInput: a long text of 1850"
    if "Output: …" in text:
        return "Input: none\nOutput: First take sand, then heat it."
    if "Two assistants" in text:
        one, two = re.findall(r"(?s)\[Answer \d\]\n(.*?)\n\[End", text)
        return f"Longer is better here. Verdict: {'tie' if len(one) == len(two) else 1 if len(one) > len(two) else 2}"
    return f"Because of {text[8:30]}; seen {len(text) % 7} times."


class Work:
    """A folder with seeds; `run` runs the stage on a recipe of them."""

    def __init__(self, folder):
        self.folder, self.lines, self.runs = folder, [], 0
        self.seeds([{"instruction": task} for task in TASKS])

    def seeds(self, rows):
        (self.folder / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(self, url, section="method: answer", model="", more=""):
        text = (
            "schema: 1\nname: a\nmodel: builtin:tiny-mistral\ngenerate:\n"
            "  seeds: [{source: local, path: seeds.jsonl}]\n"
            f"  model: {{endpoint: '{url}', name: m{model}}}\n"
            + "".join(f"  {line}\n" for line in section.split("\n"))
            + more
        )
        (self.folder / "recipe.yaml").write_text(text)
        return parse_recipe(text, self.folder / "recipe.yaml")

    def context(self, **more):
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        return Context(scratch, Runtime(), Tracking(), say=self.lines.append, **more)

    def run(self, *args, **kwargs):
        self.runs += 1
        self.out = self.folder / f"out{self.runs}"
        self.out.mkdir()
        spec = generate.spec(self.recipe(*args, **kwargs))
        return generate.run(spec, {}, self.out, self.context())

    def rows(self):
        return list(read_rows(self.out / "rows.parquet"))

    def rejects(self):
        return pq.read_table(self.out / "rejects.parquet").to_pylist()


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


@pytest.fixture
def server():
    with chat_server(model_that_can) as running:
        yield running

"""A whole run in seconds: a small random Mistral in a folder, three hundred rows, the real libraries."""

import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NOUNS = "tree river stone cloud bird house lamp road boat wheel clock garden market window letter bridge".split()
VERBS = "sees finds paints moves follows opens carries builds breaks repairs".split()
RECIPE = """\
schema: 1
name: small
model: ./base
data:
  - {source: local, path: rows.jsonl}
filter: {max_length_tokens: 100}
dedup: {embedding: lsa, field: output, threshold: 0.98}
split: {eval_fraction: 0.1}
render: {max_length_tokens: 128}
lora: {r: 4, alpha: 8, dropout: 0.1}
train: {learning_rate: 5e-3, max_steps: 12, batch_rows: 2, warmup_fraction: 0.2}
evaluate: {max_rows: 12, generations: 2}
certify: {tokens: 300, min_agreement: 0.1, max_perplexity_ratio: 2}
runtime: {save_steps: 4}
"""
EVERY_STAGE = (
    RECIPE
    + """\
generate:
  method: evol_instruct
  model: {local: ./writer}
  seeds: [{source: local, path: rows.jsonl, take: 8}]
  rows: 6
  rounds: 2
  max_new_tokens: 48
  temperature: 1.0
decontaminate: {against: [{source: local, path: evaluation.jsonl}]}
sample: {random: 160}
export: {gguf: [q8_0], perplexity_rows: 4}
preference:
  data:
    - {source: local, path: pairs.jsonl}
  batch_pairs: 8
  learning_rate: 5e-3
  max_length_tokens: 128
  min_accuracy: null
  max_perplexity_ratio: null
"""
)


def rows():
    """Conversations, with exact and near duplicates among them."""
    chance = random.Random(0)
    found = []
    for i in range(260):
        a, b, verb = chance.choice(NOUNS), chance.choice(NOUNS), chance.choice(VERBS)
        answer = (
            f"The {a} number {i} {verb} the {b}, and then the {chance.choice(NOUNS)} {chance.choice(VERBS)} it again."
        )
        found.append({"instruction": f"What does the {a} number {i} do?", "input": "", "output": answer})
    return found + found[:20] + [{**r, "output": r["output"].upper()} for r in found[20:40]]


def pairs():
    """Preference data: the right answer against one about other things."""
    chance = random.Random(1)
    found = []
    for i in range(60):
        a, b, c, verb = (*chance.sample(NOUNS, 3), chance.choice(VERBS))
        prompt = f"{a.title()} {i * 7} meets {b} {i * 11}: who {verb} the {c}?"
        found.append(
            {"prompt": prompt, "chosen": f"The {a} {verb} the {c} number {i}.", "rejected": f"No {b} {i * 3}."}
        )
    return found


@dataclasses.dataclass(frozen=True)
class Workspace:
    """A recipe's folder, with commands that run in it as a person would."""

    folder: Path

    @property
    def recipe(self):
        return self.folder / "small.yaml"

    def command(self, *arguments):
        roots = ["--artifacts", str(self.folder / "artifacts"), "--scratch", str(self.folder / "scratch")]
        extra = roots if arguments[0] in ("run", "show", "plan", "inspect", "publish", "clean") else []
        return [sys.executable, "-m", "finetune", *map(str, arguments), *extra]

    def environment(self, **more):
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        return {**os.environ, **settings, "XDG_CACHE_HOME": str(self.folder / "cache"), **more}

    def start(self, *arguments, **more):
        """A process like that of `run`, with the methods of `subprocess.Popen`."""
        if not more:
            from tests.e2e.forked import Begun

            return Begun(self.command(*arguments), self.folder, XDG_CACHE_HOME=str(self.folder / "cache"))
        return subprocess.Popen(
            self.command(*arguments), env=self.environment(**more), cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def run(self, *arguments, status=0, typed="", folder=None, **more):
        """Run a command with `typed` on stdin: in a forked process with the libraries imported.

        With `more` variables, which those read when they are imported, it is a process of its own. What a test sets by
        monkeypatch does not reach the command.
        """
        command, folder = self.command(*arguments), folder or self.folder
        if more:
            done = subprocess.run(
                command, env=self.environment(**more), cwd=folder, capture_output=True, text=True, check=False,
                input=typed,
            )  # fmt: skip
        else:
            from tests.e2e.forked import shared

            done = shared().run(command, folder, typed, XDG_CACHE_HOME=str(self.folder / "cache"))
        assert done.returncode == status, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def show(self, name="small"):
        return json.loads(self.run("show", name, "--json").stdout)

    def keys(self):
        return {name: s.get("key") for name, s in self.show()["stages"].items()}


def save_writer(folder, model, tokenizer):
    """Turn the base into a model that writes: some seven random tokens, whatever it is asked, and then the end."""
    import torch

    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "embed_tokens" in name:
                tensor.fill_(1.0)
            elif "layers." in name and "norm" not in name:
                tensor.zero_()
        odds = math.log(len(tokenizer) / 7) / model.config.hidden_size
        model.lm_head.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
        model.lm_head.weight[tokenizer.eos_token_id] = odds  # the hidden state is all ones
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_workspace(folder, recipe=RECIPE):
    from finetune.tiny import model as tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    data = rows()
    texts = [f"[INST] {r['instruction']} [/INST] {r['output']}" for r in data]
    tokenizer = tiny_model.train_tokenizer(texts, 400)
    size = tiny_model.Size(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocabulary=len(tokenizer))
    model = tiny_model.new_model(size, seed=0)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    save_writer(folder / "writer", model, tokenizer)
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in data))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs()))
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in data[40:45]))
    (folder / "small.yaml").write_text(recipe)
    return Workspace(folder)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """A workspace nobody runs in."""
    return make_workspace(tmp_path_factory.mktemp("pristine"))


@pytest.fixture(scope="session")
def pristine_whole(tmp_path_factory):
    """The same, with a recipe that turns no stage off."""
    return make_workspace(tmp_path_factory.mktemp("pristine_whole"), EVERY_STAGE)


@pytest.fixture(scope="session")
def whole(pristine_whole, tmp_path_factory):
    """A workspace whose recipe turns no stage off and has run to the end. Copy it before changing anything in it."""
    workspace = Workspace(shutil.copytree(pristine_whole.folder, tmp_path_factory.mktemp("whole") / "work"))
    workspace.run("run", "small.yaml")
    return workspace


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A workspace whose recipe has run to the end, uninterrupted. Copy it before changing anything in it."""
    workspace = make_workspace(tmp_path_factory.mktemp("finished") / "work")
    workspace.run("run", "small.yaml")
    return workspace

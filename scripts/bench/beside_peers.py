"""One job by finetune, TRL's command line, Soup and LLaMA-Factory: tokens/s of training, seconds to the merged model.

    python scripts/bench/beside_peers.py BASE --install        # peers into environments of their own, once
    python scripts/bench/beside_peers.py BASE [--rows 400] [--rounds 2] [--template mistral] [--envs FOLDER]

BASE is a model folder with a chat template. The job: the same rows of Python's documentation, one epoch, LoRA r 16 on
all linear layers, rows packed to 512 tokens, 8 rows a step, on the CPU. The tools take turns, each in a process of its
own. Tokens are those of the rendered rows, the same number for every tool; the time of training is each trainer's own
(`train_runtime`); peak memory is that of the largest process. Our run also proves, evaluates and certifies; it is
stopped at the merged model, as theirs are. finetune trains on NF4, the peers on unquantised weights.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from finetune.data.pydoc_rows import rows as documentation

PEERS = {"trl": "trl[peft]==1.16.0", "soup": "soup-cli[train]==0.77.0", "llamafactory": "llamafactory==0.9.5"}
LENGTH, BATCH, RANK, RATE = 512, 8, 16, 1e-3
RECIPE = """\
schema: 1
name: peers
model: {base}
data: [{{source: local, path: rows.jsonl}}]
filter: null
dedup: null
split: {{eval_fraction: 0.02}}
render: {{max_length_tokens: {length}}}
pack: {{length_tokens: {length}}}
lora: {{r: {rank}, alpha: {rank}}}
train: {{learning_rate: {rate}, epochs: 1, batch_rows: {batch}}}
"""
SOUP = """\
base: {base}
task: sft
data: {{train: rows.jsonl, format: chatml, val_split: 0.0, max_length: {length}}}
training:
  epochs: 1
  lr: {rate}
  batch_size: {batch}
  gradient_accumulation_steps: 1
  packing: true
  quantization: none
  logging_steps: 1
  lora: {{r: {rank}, alpha: {rank}, dropout: 0.0, target_modules: all-linear}}
output: out
"""
FACTORY = """\
model_name_or_path: {base}
stage: sft
do_train: true
finetuning_type: lora
lora_rank: {rank}
lora_target: all
dataset: rows
dataset_dir: .
template: {template}
cutoff_len: {length}
packing: true
neat_packing: true
output_dir: out
per_device_train_batch_size: {batch}
learning_rate: {rate}
num_train_epochs: 1
logging_steps: 1
use_cpu: true
report_to: none
"""
DATASET_INFO = {
    "rows": {
        "file_name": "rows.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
}


def main() -> None:
    """Install the peers, or run every tool in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "finetune" / "peers")
    parser.add_argument("--work", type=Path, default=Path("/tmp/beside_peers"))
    parser.add_argument("--template", default="mistral", help="LLaMA-Factory's name of BASE's chat template")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tools", default="finetune,trl,soup,llamafactory")
    parser.add_argument(
        "--set", action="append", default=[], help="a field of our recipe, for example train.precision=bf16"
    )
    given = parser.parse_args()
    if given.install:
        for name, package in PEERS.items():
            install(given.envs / name, package)
        return
    base = given.base.resolve()
    tools = {
        "finetune": lambda folder: finetune(folder, base, given.set),
        "trl": lambda folder: trl(folder, base, given.envs),
        "soup": lambda folder: soup(folder, base, given.envs),
        "llamafactory": lambda folder: llamafactory(folder, base, given.envs, given.template),
    }
    chosen = {name: tools[name] for name in given.tools.split(",")}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    tokens = 0
    for number in range(given.rounds):
        for name, tool in chosen.items():
            folder = given.work / f"{name}-{number}"
            tokens = write_rows(folder, base, given.rows)
            found[name].append(measured(tool, folder))
            print(name, json.dumps(found[name][-1]), file=sys.stderr, flush=True)
    print(f"{given.rows} rows, {tokens} tokens, {given.rounds} rounds; medians\n")
    print("| tool | tokens/s | ours over it | seconds to the merged model | it over ours | peak GB |")
    print("|---|---|---|---|---|---|")
    middle = {n: {k: statistics.median(r[k] for r in rounds) for k in rounds[0]} for n, rounds in found.items()}
    ours = middle.get("finetune", next(iter(middle.values())))
    for name, row in middle.items():
        speed = tokens / row["training"]
        print(
            f"| {name} | {speed:,.0f} | {row['training'] / ours['training']:.2f} | {row['wall']:.1f} "
            f"| {row['wall'] / ours['wall']:.2f} | {row['peak'] / 1e9:.2f} |"
        )


def install(folder: Path, package: str) -> None:
    """Install one peer into an environment of its own, with this machine's build of torch."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    torch = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__.partition('+')[0])"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", "-q", f"torch=={torch}", package], check=True)
    # PyPI's builds belong to torch's CUDA build: beside a CPU build their import fails, and transformers' too
    subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision"], check=True)
    for library in folder.glob("lib/python*/site-packages/torchaudio/lib/*.so"):  # imports without them
        library.unlink()


def write_rows(folder: Path, base: Path, count: int) -> int:
    """Write rows.jsonl (messages) into a new folder; return the tokens of all rows by the base's own template."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True)  # an old one would be a run that is done already
    tokenizer = AutoTokenizer.from_pretrained(base)
    chats = [row["messages"] for row in documentation()]
    chats = [c for c in chats if not c[-1]["content"][:1].isspace()]  # fuses with a template's last line break
    fitting = (c for c in chats if len(tokenizer.apply_chat_template(c, return_dict=False)) <= LENGTH)
    kept = list(islice(fitting, count))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in kept), encoding="utf-8")
    return sum(len(tokenizer.apply_chat_template(c, return_dict=False)) for c in kept)


def measured(tool: Callable[[Path], float], folder: Path) -> dict[str, float]:
    """Return `training` and `wall` seconds and `peak` bytes of one tool's run in a child process."""
    read, write = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            training = tool(folder)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
            os.write(write, json.dumps({"training": training, "peak": peak}).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise SystemExit(f"{folder.name} failed: {folder / 'log.txt'}")
    return {**json.loads(text), "wall": time.monotonic() - started}


def ran(folder: Path, *commands: list[str]) -> str:
    """Run commands in `folder` without network and GPU; return what they printed."""
    quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled", "SOUP_NO_AUDIT_LOG": "1"}
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        for command in commands:
            subprocess.run(command, cwd=folder, env=os.environ | quiet, stdout=log, stderr=log, check=True)
    return (folder / "log.txt").read_text(encoding="utf-8")


def train_runtime(log: str) -> float:
    """Return the seconds of training that transformers' Trainer reported."""
    found = re.findall(r"""['"]?train_runtime['"]?\s*[:=]\s*['"]?([\d.]+)(?![\d:])""", log)  # not 0:00:04
    if not found:
        raise SystemExit("no train_runtime in the log")
    return float(found[-1])


def finetune(folder: Path, base: Path, sets: list[str]) -> float:
    """Run our recipe until `merge`."""
    text = RECIPE.format(base=base, length=LENGTH, rank=RANK, rate=RATE, batch=BATCH)
    (folder / "peers.yaml").write_text(text, encoding="utf-8")
    edits = [part for edit in sets for part in ("--set", edit)]
    roots = ["--artifacts", "a", "--scratch", "s", "--until", "merge"]
    ran(folder, [sys.executable, "-m", "finetune", "run", "peers.yaml", *roots, *edits])
    last = next((folder / "a" / "train").glob("*/metrics.jsonl")).read_text(encoding="utf-8").splitlines()[-1]
    return float(json.loads(last)["seconds"])


def trl(folder: Path, base: Path, envs: Path) -> float:
    """`trl sft`, and peft's merge_and_unload."""
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    binaries = envs / "trl" / "bin"
    train = [
        str(binaries / "trl"), "sft", "--model_name_or_path", str(base), "--dataset_name", "data", "--use_peft",
        "--lora_r", str(RANK), "--lora_alpha", str(RANK), "--lora_target_modules", "all-linear", "--packing",
        "--max_length", str(LENGTH), "--per_device_train_batch_size", str(BATCH), "--num_train_epochs", "1",
        "--learning_rate", str(RATE), "--output_dir", "out", "--use_cpu", "--report_to", "none", "--bf16", "False",
        "--gradient_checkpointing", "False",
    ]  # fmt: skip
    merge = (
        "from peft import AutoPeftModelForCausalLM as M; "
        "M.from_pretrained('out').merge_and_unload().save_pretrained('merged')"
    )
    return train_runtime(ran(folder, train, [str(binaries / "python"), "-c", merge]))


def soup(folder: Path, base: Path, envs: Path) -> float:
    """`soup train` and `soup merge`."""
    text = SOUP.format(base=base, length=LENGTH, rank=RANK, rate=RATE, batch=BATCH)
    (folder / "soup.yaml").write_text(text, encoding="utf-8")
    command = str(envs / "soup" / "bin" / "soup")
    train = [command, "--no-telemetry", "train", "--config", "soup.yaml", "--yes"]
    merge = [command, "--no-telemetry", "merge", "--adapter", "out", "--base", str(base), "--output", "merged"]
    return train_runtime(ran(folder, train, merge))


def llamafactory(folder: Path, base: Path, envs: Path, template: str) -> float:
    """`llamafactory-cli train` and `export`."""
    (folder / "dataset_info.json").write_text(json.dumps(DATASET_INFO), encoding="utf-8")
    text = FACTORY.format(base=base, length=LENGTH, rank=RANK, rate=RATE, batch=BATCH, template=template)
    (folder / "train.yaml").write_text(text, encoding="utf-8")
    merge = {
        "model_name_or_path": str(base), "adapter_name_or_path": "out", "template": template,
        "finetuning_type": "lora", "export_dir": "merged", "export_device": "cpu",
    }  # fmt: skip
    (folder / "merge.yaml").write_text("".join(f"{k}: {v}\n" for k, v in merge.items()), encoding="utf-8")
    command = str(envs / "llamafactory" / "bin" / "llamafactory-cli")
    return train_runtime(ran(folder, [command, "train", "train.yaml"], [command, "export", "merge.yaml"]))


if __name__ == "__main__":
    main()

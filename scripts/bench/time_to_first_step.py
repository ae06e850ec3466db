"""Seconds until the base is on the device: quantised on the fly, against read from the 4-bit copy.

    python scripts/bench/time_to_first_step.py [--layers 22] [--hidden 2048] [--scratch DIR] [--repeat 3] [--cold]

Builds a checkpoint of that shape with random bf16 weights (the defaults make 1.1 billion parameters, 2.2 GB), then
loads it in one process a measurement: `quantise` from the 16-bit files, `copy` from the 4-bit copy, with the files in
the page cache; with --cold also without, which writes to /proc/sys/vm/drop_caches and slows whatever else runs here.
Prints one JSON line a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path, layers: int, hidden: int) -> None:
    """A Mistral of that shape in `folder`, with a base.json; kept if it is there."""
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig

    from finetune.utils.files import write_json

    if (folder / "base.json").exists():
        return
    config = MistralConfig(
        vocab_size=32_000, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 512), tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    pinned = {"id": "builtin:tiny-mistral", "revision": None, "weights": {}, "parameters": parameters}
    write_json(folder / "base.json", pinned)


def load(folder: Path, scratch: Path, keep: str) -> None:
    """One measurement, in this process: seconds of `load_base`, and of one forward after it."""
    import torch

    from finetune.context import Context
    from finetune.models import loading
    from finetune.models.device import pick_device
    from finetune.recipe import Model, Quantization, Runtime, Tracking

    device = pick_device("auto")
    runtime = Runtime.model_validate({"keep_quantized": keep})
    ctx = Context(scratch=scratch, runtime=runtime, tracking=Tracking())
    start = time.monotonic()
    model = loading.load_base(Model.model_validate("builtin:tiny-mistral"), folder, ctx, Quantization(), "bf16", device)
    loaded = time.monotonic() - start
    with torch.no_grad():
        model(input_ids=torch.arange(5, 69)[None].to(model.device))
    if device == "cuda":
        torch.cuda.synchronize()
    print(json.dumps({"load_seconds": round(loaded, 2), "with_a_forward": round(time.monotonic() - start, 2)}))


def drop_page_cache() -> bool:
    """Whether the kernel was made to forget the files."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def main() -> None:
    """Build, make the copy once, then measure both ways in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path("scratch/bench"))
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--one", metavar="never|always", help="measure in this process (used by the script itself)")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    folder = options.scratch / f"random-{options.layers}x{options.hidden}"
    if options.one:
        load(folder, options.scratch, options.one)
        return
    build(folder, options.layers, options.hidden)
    command = [sys.executable, __file__, "--layers", str(options.layers), "--hidden", str(options.hidden)]
    command += ["--scratch", str(options.scratch), "--one"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.run([*command, "always"], env=environment, capture_output=True, text=True, check=True)
    print(json.dumps({"way": "quantise and write the copy", **json.loads(first.stdout)}), flush=True)
    for cold in (False, True) if options.cold else (False,):
        for number in range(options.repeat):
            for way, keep in (("quantise", "never"), ("copy", "always")):
                if cold and not drop_page_cache():
                    return
                done = subprocess.run([*command, keep], env=environment, capture_output=True, text=True, check=True)
                line = {"way": way, "page_cache": "cold" if cold else "warm", "number": number}
                print(json.dumps({**line, **json.loads(done.stdout)}), flush=True)


if __name__ == "__main__":
    main()

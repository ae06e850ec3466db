"""What the guards on untrusted input cost a run that needs none: limits on rendering and reading rows, links, escapes.

    .venv/bin/python scripts/bench/guards.py [--rows N] [--rounds 15] [--out guards.json]

`render` and `read` take the work of these stages on N made-up rows, with the guards and with each replaced by nothing,
in turn within a round; the ratio is the median of the rounds' ratios of processor time. `run` is one run of a small
random base from its first stage to `--until` in this process, with a clock around every call of a guard: their seconds
over the run's.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import random_model

from finetune.cli.main import main as finetune
from finetune.data import readers
from finetune.data.records import Example, Message
from finetune.models import base_limits
from finetune.recipe import Render
from finetune.stages import render as stage
from finetune.tiny import model as tiny_model
from finetune.tokenization import encoder, row_tokenizer, template_sandbox
from finetune.tokenization.audit import Tally
from finetune.tokenization.chat_template import choose_template
from finetune.utils import format as text_format
from finetune.utils import limits, links

WORDS = "tree river stone cloud bird house lamp road boat wheel clock garden market window letter bridge".split()
RECIPE = """\
schema: 1
name: guards
model: ./base
data: [{source: local, path: rows.jsonl}]
dedup: {embedding: lsa}
decontaminate: null
render: {max_length_tokens: 2048}
lora: {r: 4}
train: {max_steps: 20, batch_rows: 1}
evaluate: {max_rows: 12, generations: 2}
certify: {min_agreement: 0.1, max_perplexity_ratio: 2}
"""
CALLS = (  # module, name: the guards that a run calls, outermost first
    (base_limits, "check_tokenizer"), (base_limits, "check_config"), (template_sandbox, "check_template"),
    (links, "require_inside"), (links, "require_plain"), (links, "require_model"), (links, "way_out"),
    (limits, "memory_is_short"), (text_format, "visible"),
)  # fmt: skip


def text(number: int, words: int) -> str:
    """Some words, the same for the same number."""
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] + str((number + i) % 97) for i in range(words))


def unguarded() -> contextlib.ExitStack:
    """Replace the guards on rows by nothing."""
    stack = contextlib.ExitStack()
    free = contextlib.nullcontext
    for module, name, nothing in (
        (row_tokenizer, "limited", lambda turns: free()), (row_tokenizer, "memory", lambda size: free()),
        (encoder, "watched", lambda work, **most: work()), (readers, "memory", lambda size: free()),
    ):  # fmt: skip
        stack.enter_context(mock.patch.object(module, name, nothing))
    return stack


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call, of all threads: what a busy machine disturbs least."""
    gc.collect()
    start = time.process_time()
    work()
    return time.process_time() - start


def ratio(work: Callable[[], object], rounds: int) -> dict[str, float]:
    """The time with guards over that without, and the seconds with them."""
    found = []
    for number in range(rounds + 1):
        times = {}
        for guarded in (True, False) if number % 2 else (False, True):
            with contextlib.nullcontext() if guarded else unguarded():
                times[guarded] = seconds(work)
        found += [(times[True] / times[False], times[True])] if number else []  # the first round warms up
    each = sorted(r for r, _ in found)
    return {"ratio": statistics.median(each), "least": each[0], "most": each[-1], "seconds": min(s for _, s in found)}


@contextlib.contextmanager
def clocked(spent: dict[str, list[float]]) -> Iterator[None]:
    """Count the calls of every guard, and their seconds without those of a guard inside."""
    inside: list[float] = []

    def around(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:  # noqa: ANN401
            inside.append(0.0)
            start = time.perf_counter()
            try:
                return work(*given, **named)
            finally:
                taken = time.perf_counter() - start
                own = taken - inside.pop()
                if inside:
                    inside[-1] += taken
                spent.setdefault(name, []).append(own)

        return call

    with contextlib.ExitStack() as stack:
        for module, name in CALLS:
            real = getattr(module, name)
            for other in [m for n, m in sys.modules.items() if n.startswith("finetune") and vars(m).get(name) is real]:
                stack.enter_context(mock.patch.object(other, name, around(name, real)))
        yield


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--until", default="certify")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [
            Example(f"r:{i}", "r", (Message("user", text(i, 20)), Message("assistant", text(i + 5, 80 + i % 60))))
            for i in range(asked.rows)
        ]
        written = "".join(
            json.dumps({"prompt": r.messages[0].content, "completion": r.messages[1].content}) + "\n" for r in rows
        )
        (folder / "rows.jsonl").write_text(written)
        tokenizer = tiny_model.train_tokenizer([m.content for r in rows[:500] for m in r.messages], 2000)
        spec = Render(template="mistral-v3")
        template = choose_template(spec.template, None, tokenizer, rows[:200], spec.system)
        worker = row_tokenizer.RowTokenizer(
            template, encoder.Encoder(tokenizer), stage._rules(spec, tokenizer, template)
        )
        batches = [rows[i : i + stage.BATCH] for i in range(0, len(rows), stage.BATCH)]
        result["render"] = ratio(lambda: [worker.batch(batch, Tally()) for batch in batches], asked.rounds)
        read = readers.local_rows
        result["read"] = ratio(lambda: [len(list(read(folder / "rows.jsonl"))) for _ in range(20)], asked.rounds)
        random_model.make(folder, "tiny")
        (folder / "base" / "base.json").unlink()
        tokenizer.save_pretrained(folder / "base")
        (folder / "rows.jsonl").write_text("".join(written.splitlines(keepends=True)[:400]))
        (folder / "guards.yaml").write_text(RECIPE)
        roots = ["--artifacts", str(folder / "artifacts"), "--scratch", str(folder / "scratch")]
        sys.argv = ["finetune", "run", str(folder / "guards.yaml"), "--until", asked.until, *roots]
        spent: dict[str, list[float]] = {}
        start = time.perf_counter()
        with clocked(spent), contextlib.suppress(SystemExit):
            finetune()
        result["run"] = {"seconds": time.perf_counter() - start}
    guards = {n: {"calls": len(each), "seconds": sum(each)} for n, each in sorted(spent.items())}
    result["run"] |= {"guards": guards, "share": sum(g["seconds"] for g in guards.values()) / result["run"]["seconds"]}
    print(json.dumps(result, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

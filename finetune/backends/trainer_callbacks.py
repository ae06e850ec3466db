"""What watches a training: progress, metrics.jsonl, the watchdog, the COMPLETE marker and the stop signal."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from finetune.backends.sft import mark_complete
from finetune.backends.tracking import Tracker, open_tracker
from finetune.context import Bar, Context
from finetune.environment import peak_memory_bytes
from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from trl import SFTTrainer

MOST_OVERFLOWS = 20  # in a row
KEPT = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate", "mean_token_accuracy": "accuracy"}


class Follower(TrainerCallback):
    """One callback on every rank; only rank 0 writes and shows."""

    def __init__(self, ctx: Context, metrics_file: Path, checkpoints: Path, steps: int, *, fp16: bool) -> None:
        self.ctx, self.metrics_file, self.checkpoints, self.steps = ctx, metrics_file, checkpoints, steps
        self.fp16 = fp16
        self._overflows = 0
        self.resumed_from = 0
        self.tokens = 0
        self._tokens_before = 0
        self._started = self._last = time.monotonic()
        self._bar: Bar | None = None
        self._file: TextIO | None = None
        self._tracker: Tracker | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ANN401
        """Open the log. Lines after the checkpoint that is resumed from were undone, and go."""
        self._started = self._last = time.monotonic()
        if self.ctx.rank != 0:
            return
        kept = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
                try:
                    kept += [line] if json.loads(line)["step"] <= state.global_step else []
                except (ValueError, KeyError):
                    break  # torn by a kill: everything from here on is written again
        if kept:
            self.tokens = self._tokens_before = json.loads(kept[-1]).get("tokens", 0)
        self._file = self.metrics_file.open("w", encoding="utf-8")
        self._file.writelines(line + "\n" for line in kept)
        self._bar = self.ctx.bar("training", self.steps)
        self._bar.advance(state.global_step)
        self._tracker = open_tracker(self.ctx)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,  # noqa: ANN401
    ) -> None:
        """The watchdog, then one line of metrics.jsonl."""
        if not logs or "loss" not in logs:
            return
        self._watch(logs, state.global_step)
        self._note(logs, state)

    def _watch(self, logs: dict[str, Any], step: int) -> None:
        """Refuse to go on once the loss or the gradient is no number.

        Under fp16 a gradient that overflows is how the GradScaler finds its scale: that step is skipped and the scale
        halved, so only many of them in a row mean that the run is lost.
        """
        for name in ("loss", "grad_norm"):
            bad = name in logs and not math.isfinite(float(logs[name]))
            if name == "grad_norm":
                self._overflows = self._overflows + 1 if bad else 0
                bad = self._overflows > (MOST_OVERFLOWS if self.fp16 else 0)
            if bad:
                raise FinetuneError(
                    f"{name} became {logs[name]} at step {step}; the last good checkpoint is kept. Lower "
                    "train.learning_rate, or look at the rows of that step"
                )

    def _note(self, logs: dict[str, Any], state: TrainerState) -> None:
        now = time.monotonic()
        new_tokens = int(logs.get("num_tokens", 0)) + self._tokens_before - self.tokens
        self.tokens += new_tokens
        line = {short: float(logs[name]) for name, short in KEPT.items() if name in logs}
        line |= {"step": state.global_step, "epoch": state.epoch, "tokens": self.tokens}
        line["tokens_per_second"] = round(new_tokens / max(now - self._last, 1e-9), 1)
        line["seconds"] = round(now - self._started, 3)
        self._last = now
        if self._file:
            self._file.write(json.dumps(line, sort_keys=True) + "\n")
            self._file.flush()
        if self._tracker:
            self._tracker.log(line, state.global_step)
        if self._bar:
            self._bar.advance(1, f"loss {line['loss']:.3f}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ANN401
        """A signal: save what there is, then stop."""
        if self.ctx.stop.signal_number:
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ANN401
        """Every rank has written its part before the marker says so."""
        if self.ctx.world > 1:
            import torch.distributed

            torch.distributed.barrier()
        if self.ctx.rank == 0:
            mark_complete(self.checkpoints / f"checkpoint-{state.global_step}")

    def tokens_per_second(self) -> float:
        """Tokens of this process's own steps (none of an earlier, interrupted one) over the time they took."""
        return round((self.tokens - self._tokens_before) / max(self._last - self._started, 1e-9), 1)

    def peak_memory(self, device: str) -> int:
        """The GPU allocator's peak, or the process's resident peak without one."""
        if device != "cuda":
            return peak_memory_bytes()
        import torch

        return int(torch.cuda.max_memory_allocated())

    def close(self) -> None:
        """Close the log, the tracker and the bar."""
        if self._bar:
            self._bar.close()
        if self._file:
            self._file.close()
        if self._tracker:
            self._tracker.close()


def replace_printers(trainer: SFTTrainer, follower: Follower) -> None:
    """Our own lines instead of transformers' dictionaries on the screen."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(follower)

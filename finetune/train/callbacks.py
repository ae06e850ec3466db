"""Trainer callback: progress, metrics.jsonl, the watchdog, the COMPLETE marker and the stop signal."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, TextIO, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from finetune.context import Context
from finetune.errors import FinetuneError
from finetune.train import distributed
from finetune.train.checkpoint import COMPLETE, last_checkpoint, mark_complete
from finetune.train.divergence import Alarm, MicroBatch, Recorder, Watchdog, name_rows
from finetune.train.sanity_checks import Movement
from finetune.train.tracking import Tracker, add_integrations, open_tracker
from finetune.train.validation import HeldOut
from finetune.utils.progress import Bar
from finetune.utils.runtime import RandomState, peak_memory_bytes

if TYPE_CHECKING:
    import torch
    from accelerate.optimizer import AcceleratedOptimizer
    from peft import PeftModel
    from torch.optim.lr_scheduler import LRScheduler
    from trl import SFTTrainer

KEPT = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate", "mean_token_accuracy": "accuracy"}
KEPT |= {  # TRL's names in preference training -> ours
    "rewards/margins": "margin", "rewards/accuracies": "pairs_right", "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected", "logps/chosen": "logp_chosen", "logps/rejected": "logp_rejected", "kl": "kl",
}  # fmt: skip


class Follower(TrainerCallback):
    """One callback on every rank; only rank 0 writes files and prints."""

    def __init__(self, ctx: Context, metrics_file: Path, checkpoints: Path, steps: int, *, fp16: bool) -> None:
        self.ctx, self.metrics_file, self.checkpoints, self.steps = ctx, metrics_file, checkpoints, steps
        self.documents: Path | None = None  # file with the ids of the rows of a batch
        self.recorder: Recorder | None = None
        self.show_data: Callable[[Tracker], None] | None = None  # sends rows to a tracker, if the recipe asks for it
        self.held_out: HeldOut | None = None
        self._watchdog = Watchdog(fp16=fp16)
        self._batches: list[MicroBatch] = []  # of the current step, or of the one that has just ended
        self._movement: Movement | None = None
        self._learning_rate = 0.0
        self.resumed_from = 0
        self.tokens = 0
        self._tokens_before = 0
        self._started = self._last = time.monotonic()
        self._seconds_before = 0.0  # of earlier processes of this training
        self._bar: Bar | None = None
        self._file: TextIO | None = None
        self._tracker: Tracker | None = None
        self.made_by: dict[str, object] = {}  # how the batch is split; written to the COMPLETE marker
        self._random: RandomState | None = None  # after the last whole step of this process

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **_: object,
    ) -> None:
        """Open the log; remove lines after the checkpoint that training resumes from."""
        self._started = self._last = time.monotonic()
        self._movement = Movement(model) if model is not None else None
        for entry in state.log_history:  # a resumed run judges a loss like an uninterrupted one
            if "loss" in entry:
                self._watchdog.look(int(entry["step"]), entry["loss"], entry.get("grad_norm"))
        if self.ctx.rank != 0:
            return
        kept = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
                try:
                    kept += [line] if json.loads(line)["step"] <= state.global_step else []
                except (ValueError, KeyError):
                    break  # truncated by a kill: everything from here on is written again
        if kept:
            newest = json.loads(kept[-1])
            self.tokens = self._tokens_before = newest.get("tokens", 0)
            self._seconds_before = newest.get("seconds", 0.0)
        self._file = self.metrics_file.open("w", encoding="utf-8")
        self._file.writelines(line + "\n" for line in kept)
        self._bar = self.ctx.bar("training", self.steps)
        self._bar.advance(state.global_step)
        self._tracker = open_tracker(self.ctx, self.checkpoints, state.global_step)
        if self._tracker and self.show_data and not state.global_step:
            self.show_data(self._tracker)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        """The watchdog, then one line of metrics.jsonl."""
        self.ctx.stop.require_own()
        if not logs or "loss" not in logs:
            return
        alarm = self._watchdog.look(state.global_step, float(logs["loss"]), _number(logs.get("grad_norm")))
        if alarm and (self.ctx.runtime.watchdog or not alarm.optional):
            raise FinetuneError(self._last_words(alarm))
        self._note(logs, state, self.peak_memory(args.device.type))

    def _last_words(self, alarm: Alarm) -> str:
        """Return the reason to stop. Checkpoints whose weights already gave a high loss lose their marker, so that no
        run resumes from them.
        """
        if alarm.diverged and self.ctx.rank == 0:
            for marker in self.checkpoints.glob(f"checkpoint-*/{COMPLETE}"):
                if int(marker.parent.name.rpartition("-")[2]) >= alarm.since - 1:
                    marker.unlink()
        good = last_checkpoint(self.checkpoints, remove_incomplete=False)
        kept = f"the last good checkpoint is {good.name}" if good else "there was no good checkpoint yet"
        rows = name_rows([n for b in self._batches for n in b.rows], self.documents)
        return ". ".join(part for part in (f"{alarm.reason}; {kept}", rows, alarm.advice) if part)

    def _note(self, logs: dict[str, Any], state: TrainerState, peak_memory: int) -> None:
        now = time.monotonic()
        new_tokens = int(logs.get("num_tokens", 0)) + self._tokens_before - self.tokens
        self.tokens += new_tokens
        # JSON has no infinity, and under fp16 the first gradients are often infinite
        line = {s: float(logs[n]) for n, s in KEPT.items() if n in logs and math.isfinite(float(logs[n]))}
        line |= {"step": state.global_step, "epoch": state.epoch, "tokens": self.tokens}
        line["tokens_per_second"] = round(new_tokens / max(now - self._last, 1e-9), 1)
        line["seconds"] = round(self._seconds_before + now - self._started, 3)
        per_step = (now - self._started) / max(1, state.global_step - self.resumed_from)
        line["eta_seconds"] = round(per_step * (self.steps - state.global_step), 1)
        line["peak_memory_bytes"] = peak_memory  # so far
        if self.held_out and self.held_out.seen.step == state.global_step and self.held_out.seen.loss is not None:
            line["held_out_loss"] = self.held_out.seen.loss
        if self._batches:
            line["non_pad"] = round(sum(b.tokens for b in self._batches) / sum(b.cells for b in self._batches), 4)
        self._last = now
        if self._file:
            self._file.write(json.dumps(line, sort_keys=True) + "\n")
            self._file.flush()
        if self._tracker:
            self._tracker.log(line, state.global_step)
        if self._bar:
            self._bar.advance(1, f"loss {line.get('loss', math.nan):.3f}, {line['tokens_per_second']:,.0f} tokens/s")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Forget the rows of the previous step."""
        self._batches = []

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **parts: object,
    ) -> None:
        """Record the learning rate of the next update."""
        self._learning_rate = float(cast("LRScheduler", parts["lr_scheduler"]).get_last_lr()[0])

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **parts: object,
    ) -> None:
        """Check after the third update that nearly every element of the adapter has moved."""
        if self._movement:
            optimizer = cast("AcceleratedOptimizer", parts["optimizer"])
            model = cast("PeftModel", parts["model"])
            self._movement.updated(model, self._learning_rate, skipped=bool(optimizer.step_was_skipped))

    def _taken(self) -> None:
        """Record one more micro-batch of this step."""
        if self.recorder:
            self._batches.append(self.recorder.take())

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **parts: object,
    ) -> None:
        """A signal: save what there is, then stop. Ranks hear of it at different moments, and stop at the same step."""
        self.ctx.stop.require_own()
        self._taken()
        if self.held_out and self.held_out.look(cast("PeftModel", parts["model"]), state.global_step):
            control.should_save = True
            control.should_training_stop = True
        if self.ctx.world > 1:
            self.ctx.stop.signal_number = distributed.highest(self.ctx.stop.signal_number, args.device)
        if self.ctx.stop.signal_number:
            control.should_save = True
            control.should_training_stop = True
        self._random = RandomState.now()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """On a signal between two micro-batches abandon the step, which may take minutes. The checkpoint is that of the
        last complete step, with its random state, so that training resumes to the same bits.
        """
        self._taken()
        if not self.ctx.stop.signal_number or self.ctx.world > 1:  # several ranks stop together, at the end of a step
            return
        control.should_training_stop = True
        marked = self.checkpoints / f"checkpoint-{state.global_step}" / COMPLETE
        if self._random is not None and not marked.exists():
            self._random.restore()
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Write the marker after every rank has written its part."""
        if self.ctx.world > 1:
            import torch.distributed

            torch.distributed.barrier()
        self.ctx.stop.require_own()
        if self.ctx.rank == 0:
            if self.held_out:
                self.held_out.save(self.checkpoints / f"checkpoint-{state.global_step}")
            mark_complete(self.checkpoints / f"checkpoint-{state.global_step}", self.made_by)
        if self.ctx.world > 1:  # the first rank that exits starts the launcher's timeout: write the marker before
            torch.distributed.barrier()

    def tokens_per_second(self) -> float:
        """Return the tokens per second of this process's steps, without those of an interrupted one."""
        return round((self.tokens - self._tokens_before) / max(self._last - self._started, 1e-9), 1)

    def peak_memory(self, device: str) -> int:
        """Return the GPU allocator's peak, or the process's resident peak without a GPU, in bytes."""
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


def _number(value: SupportsFloat | None) -> float | None:
    return None if value is None else float(value)


def replace_printers(trainer: SFTTrainer, follower: Follower) -> None:
    """Print our lines instead of transformers' dictionaries; add the trackers of the recipe."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(follower)
    add_integrations(trainer, follower.ctx, follower.checkpoints)

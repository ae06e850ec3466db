"""Experiment tracking: Weights & Biases (offline without a key), TensorBoard and transformers' integrations, each only
if configured.

Nothing here prompts on a terminal, and no failure here stops a training.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets as random_ids
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from finetune.context import Context
from finetune.errors import InputError
from finetune.utils.files import read_json, write_json
from finetune.utils.secrets import redact

if TYPE_CHECKING:
    import wandb
    from datasets import Dataset
    from torch.utils.tensorboard import SummaryWriter
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

PLAIN = re.compile(r"\w[\w.+-]{0,200}")
IDENTITY = "tracking.json"  # next to the checkpoints: the curves continue with them
REACH_SECONDS = 3.0
WANDB_URL = "https://api.wandb.ai"


@dataclass(frozen=True)
class Identity:
    """The W&B run's id, and the original name of the curves."""

    wandb_id: str
    name: str


class Tracker:
    """Sends the same metrics to every configured tracker."""

    def __init__(
        self,
        wandb_run: wandb.Run | None,
        board: SummaryWriter | None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._wandb, self._board, self._say = wandb_run, board, say

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log one point of every curve."""
        with self._outlived() as run:
            if run:
                run.log(dict(figures), step=step)
        if self._board:
            for name, value in figures.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"train/{name}", value, step)

    def send_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send a table of training rows to W&B."""
        with self._outlived() as run:
            if run and rows:
                import wandb

                columns: list[str | int] = [*rows[0]]
                table = wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
                run.log({"rows": table}, step=0)

    def send_data(self, files: Sequence[Path]) -> None:
        """Send the files to W&B as one artifact, without copying them first."""
        with self._outlived() as run:
            if run:
                import wandb

                artifact = wandb.Artifact("training-data", type="dataset")
                for file in files:
                    artifact.add_file(str(file), policy="immutable")
                run.log_artifact(artifact)

    def close(self) -> None:
        """Flush and close."""
        with self._outlived() as run:
            if run:
                run.finish()
        if self._board:
            self._board.close()

    @contextlib.contextmanager
    def _outlived(self) -> Iterator[Any]:
        """Yield the W&B run, or None. It is a separate process, which may be killed: the training continues without
        it.
        """
        try:
            yield self._wandb
        except Exception as error:  # from W&B, a socket or asyncio: none may stop a training
            self._wandb = None
            _give_up_wandb(error, self._say)


def open_tracker(ctx: Context, beside: Path | None = None, step: int = 0) -> Tracker | None:
    """Open the recipe's trackers, or return None. Curves recorded in the folder `beside` are continued; points after
    `step` are discarded.

    Raises InputError if a configured tracker is not installed.
    """
    if not (ctx.tracking.wandb or ctx.tracking.tensorboard):
        return None
    identity = identify(ctx.run_name, beside)
    folder = ctx.scratch / "tracking" / identity.name
    folder.mkdir(parents=True, exist_ok=True)
    return Tracker(
        _open_wandb(ctx, folder, identity) if ctx.tracking.wandb else None,
        _open_board(folder, step) if ctx.tracking.tensorboard else None,
        ctx.say,
    )


def identify(name: str, beside: Path | None) -> Identity:
    """Return the record in `beside`, or write a new one there."""
    record = beside / IDENTITY if beside else None
    if record and record.is_file():
        try:
            kept = Identity(**read_json(record))
            if all(isinstance(text, str) and PLAIN.fullmatch(text) for text in (kept.wandb_id, kept.name)):
                return kept
        except (ValueError, TypeError):
            pass  # truncated by a kill, or edited: the name becomes a folder's
    made = Identity(random_ids.token_hex(8), name)
    if record:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {"wandb_id": made.wandb_id, "name": made.name})
    return made


def wandb_mode(environment: Mapping[str, str], has_key: bool) -> tuple[str, str]:
    """Return `online`, `offline` or `disabled`, and the reason. Online needs a key and a reachable server: otherwise
    W&B would prompt on the terminal or wait.
    """
    asked = environment.get("WANDB_MODE", "")
    if asked in ("disabled", "offline"):
        return asked, f"WANDB_MODE={asked}"
    if not has_key:
        return "offline", "there is no key: set WANDB_API_KEY or run `wandb login`"
    url = environment.get("WANDB_BASE_URL") or WANDB_URL
    if not _reachable(url):
        return "offline", f"{urlsplit(url).hostname} does not answer; `wandb sync` sends it later"
    return "online", "there is a key"


def _reachable(url: str) -> bool:
    parts = urlsplit(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=REACH_SECONDS):
            return True
    except OSError:
        return False


def has_wandb_key() -> bool:
    """Return whether a key is set or stored by `wandb login`. Raises InputError if W&B is not installed."""
    try:
        import wandb
    except ImportError:
        raise InputError("tracking.wandb: wandb is not installed (pip install wandb)") from None
    return bool(wandb.login(prompt=False, verify=False))


def _open_wandb(ctx: Context, folder: Path, identity: Identity) -> wandb.Run | None:
    has_key = has_wandb_key()
    import wandb

    mode, why = wandb_mode(os.environ, has_key)
    ctx.say(f"tracking: W&B {mode}, {why} (project {ctx.tracking.wandb_project}, files in {folder})")
    settings: dict[str, Any] = {
        "project": ctx.tracking.wandb_project,
        "name": identity.name,
        "id": identity.wandb_id,
        "dir": str(folder),
        "config": json.loads(redact(json.dumps(dict(ctx.environment), default=str))),
    }
    try:
        if mode == "online":
            try:
                return wandb.init(**settings, mode="online", resume="allow", settings=_quiet_settings())
            except wandb.Error as error:  # an invalid key, a project without access
                ctx.say(f"tracking: W&B refused ({_words(error)}); recorded offline, `wandb sync` sends it")
                mode = "offline"
        return wandb.init(**settings, mode=mode, settings=_quiet_settings())  # type: ignore[arg-type]
    except Exception as error:  # its process died, or its folder cannot be written
        _give_up_wandb(error, ctx.say)
        return None


def _words(error: Exception) -> str:
    return redact(next(iter(str(error).splitlines()), "")) or type(error).__name__


def _give_up_wandb(error: Exception, say: Callable[[str], None]) -> None:
    import wandb

    say(f"tracking: W&B failed ({_words(error)}); the training continues without it; metrics.jsonl has all metrics")
    with contextlib.suppress(Exception):  # finishing fails too, but then it is not tried again when Python exits
        wandb.teardown()


def _quiet_settings() -> wandb.Settings:
    import wandb

    return wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)


def _open_board(folder: Path, step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("tracking.tensorboard: tensorboard is not installed (pip install tensorboard)") from None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


class Integration:
    """A callback of transformers that reports to a tracker; on its first error it is dropped and the training goes on.

    Not a subclass of TrainerCallback: every event must reach `__getattr__`.
    """

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self._callback: Any = integration(name)

    def __getattr__(self, event: str) -> Callable[..., None]:
        if not event.startswith("on_"):
            raise AttributeError(event)

        def call(*arguments: object, **named: object) -> None:
            if self._callback is None:
                return
            try:
                getattr(self._callback, event)(*arguments, **named)
            except Exception as error:  # of the tracker's client, its server or its login
                self._callback = None
                self._say(
                    f"tracking: {self._name} failed ({_words(error)}); the training continues without it; "
                    "metrics.jsonl has all metrics"
                )

        return call


def integration(name: str) -> TrainerCallback:
    """Return a new callback of transformers' integration `name`. Raises InputError with what it lacks."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    try:
        return INTEGRATION_TO_CALLBACK[name]()
    except Exception as error:  # each integration has its own: RuntimeError, ImportError, ValueError
        raise InputError(f"tracking.report_to: {name}: {_words(error)}") from None


def add_integrations(trainer: Trainer, ctx: Context, beside: Path) -> None:
    """Add the callbacks of tracking.report_to to `trainer`, as a run of the name recorded in `beside`."""
    if not ctx.tracking.report_to or ctx.rank != 0:
        return
    trainer.args.run_name, trainer.args.project = identify(ctx.run_name, beside).name, ctx.tracking.wandb_project
    for name in dict.fromkeys(ctx.tracking.report_to):
        own_class = type(f"Integration_{name}", (Integration,), {})  # transformers warns of two of one class
        added = own_class(name, ctx.say)
        added.on_init_end(trainer.args, trainer.state, trainer.control)  # an event of the past by now
        trainer.add_callback(added)


def show_data(
    tracker: Tracker,
    ctx: Context,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    documents: Path | None,
) -> None:
    """Send the training data that the recipe requests. `documents` has the row ids and is next to packed rows."""
    from finetune.train.divergence import row_names

    rows = []
    for number in range(min(ctx.tracking.wandb_rows, len(dataset))):
        ids, labels = dataset[number]["input_ids"], dataset[number]["labels"]
        learned = [token for token, label in zip(ids, labels, strict=True) if label != -100]
        name = ", ".join(row_names([number], documents))
        rows.append(
            {"id": name, "tokens": len(ids), "text": tokenizer.decode(ids), "learned": tokenizer.decode(learned)}
        )
    tracker.send_rows(rows)
    if ctx.tracking.wandb_data and documents:
        packed = documents.with_name("packed.parquet")
        tracker.send_data([documents, *([packed] if packed.is_file() else [])])

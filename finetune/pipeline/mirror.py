"""`run --mirror OWNER/NAME`: copy results to a private Hub repository, from which a new machine can continue.

Fetched before the run: the stages of the recipe's newest run there, and an unfinished training's newest checkpoint.
Sent during the run by a thread: every finished stage and the newest COMPLETE checkpoint, in atomic commits. Files in
scratch are never sent. A network failure prints one line and is retried.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from finetune.context import Context
from finetune.errors import FinetuneError, InputError
from finetune.hub.repo_folder import ABOUT, README, HubFolder, Remote
from finetune.pipeline.leases import is_being_built
from finetune.pipeline.runs import Run
from finetune.pipeline.stage_list import STAGES
from finetune.pipeline.store import BUILDING, MANIFEST, Manifest, Store
from finetune.utils import links
from finetune.utils.files import read_json, replace_bytes, write_json

POLL_SECONDS, AFTER_FAILURE_SECONDS = 1.0, 60.0
STAGE_SECONDS = 10.0  # stages that finish within this time are sent together
CHECKPOINT_SECONDS = 600.0  # between two checkpoints sent: gigabytes that the repository's history keeps
FINISH_SECONDS = 900.0  # for the rest at the end of the run
ANNOUNCED_BYTES = 50_000_000  # larger downloads are announced
SMALL = tuple(stage.name for stage in STAGES if not stage.large)
CHECKPOINT = re.compile(r"checkpoints/checkpoint-(\d+)/(.+)")
LOG = "metrics.jsonl"
Content = Path | bytes
FAULTS = (FinetuneError, OSError, ValueError, TypeError)  # from an unexpected repository or a full disk


@contextmanager
def mirrored(repo_id: str, store: Store, run: Run, ctx: Context, *, fresh: bool) -> Iterator[None]:
    """Fetch the recipe's files from `repo_id`; send new files during the block and at its end.

    Raises InputError for a repository that is public, or that this account may not write to.
    """
    mirror = Mirror(repo_id, store, run, ctx)
    mirror.pull(fresh=fresh)
    mirror.start()
    try:
        yield
    finally:
        mirror.finish()


@dataclass
class Mirror:
    """Synchronisation of one run with the repository."""

    repo_id: str
    store: Store
    run: Run
    ctx: Context
    _end: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _there: dict[str, Remote] | None = None  # files of the repository, once listed
    _sent: set[str] = field(default_factory=set)  # stage folders that are complete there
    _in_step: bool = False  # all fetched: a checkpoint with a lower number may replace a higher one
    _failing: bool = False
    _checkpoint_at: float | None = None
    _pushed_at: float | None = None
    _pulled: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the name."""
        self._hub = HubFolder(self.repo_id, self._wait)

    def _wait(self, seconds: float) -> None:
        """Wait between attempts; the wait ends with the run, except in the last push, unless all earlier ones
        failed.
        """
        if self._end.is_set():
            time.sleep(0.0 if self._failing else seconds)
        else:
            self._end.wait(seconds)

    def pull(self, *, fresh: bool = False) -> None:
        """Fetch the missing stages of the recipe's newest run there; `fresh` skips checkpoints.

        Every file is compared with the Hub's listing, and a stage's files with its manifest. Incomplete folders are
        skipped. Raises InputError as `mirrored` does.
        """
        try:
            self._hub.open()
            there = self._there = self._hub.listed()
        except InputError:
            raise
        except FinetuneError as error:
            self._fail(f"{error}; continuing without its files")
            return
        try:
            self.store.artifacts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FinetuneError(f"{self.store.artifacts}: cannot be written: {error.strerror}") from None
        problems: list[Exception] = []
        with tempfile.TemporaryDirectory(prefix=f"incoming-{os.getpid()}-", dir=self.store.artifacts) as place:
            incoming, stages = Path(place), {}
            try:
                stages = self._pull_run(there, incoming)
            except FAULTS as error:
                problems.append(error)
            for name in [n for n in SMALL if n in stages]:
                try:
                    self._pull_stage(name, stages[name], there, incoming, fresh=fresh)
                except FAULTS as error:
                    problems.append(error)
        self._in_step = not problems
        if self._pulled:
            self.ctx.say(f"from {self.repo_id}: {', '.join(self._pulled)}")
        for problem in problems:
            self.ctx.say(f"{problem}; it is left out")

    def _pull_run(self, there: Mapping[str, Remote], incoming: Path) -> dict[str, str]:
        """Fetch the newest run's folder, unless it exists. Return stage → key from its record."""
        parent = f"runs/{self.run.recipe}"
        if f"{parent}/latest" not in there:
            return {}
        self._fetch([f"{parent}/latest"], there, incoming)
        name = (incoming / parent / "latest").read_text(encoding="utf-8").strip()
        names = [n for n in there if n.startswith(f"{parent}/{name}/") and n.count("/") == 3 and _is_plain(n)]
        if not re.fullmatch(r"[\w-]+", name) or f"{parent}/{name}/run.json" not in names:
            return {}
        self._fetch(names, there, incoming)
        try:
            stages = read_json(incoming / parent / name / "run.json")["stages"]
            keys = {stage: str(value.get("key")) for stage, value in stages.items() if value["status"] != "off"}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FinetuneError(f"{self.repo_id}: {parent}/{name}/run.json is not the record of a run") from None
        folder, latest = self.store.artifacts / parent / name, self.store.artifacts / parent / "latest"
        links.require_inside(folder / "run.json", self.store.artifacts)
        if not (folder / "run.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(names, key=lambda n: n.endswith("/run.json")):
                (incoming / file).replace(folder / Path(file).name)
        links.require_inside(latest, self.store.artifacts)
        if not latest.exists() or latest.read_text(encoding="utf-8").strip() < name:
            replace_bytes(latest, f"{name}\n".encode())
        return {stage: key for stage, key in keys.items() if re.fullmatch(r"[0-9a-f]{32}", key)}

    def _pull_stage(self, name: str, key: str, there: Mapping[str, Remote], incoming: Path, *, fresh: bool) -> None:
        folder = self.store.folder(name, key)
        links.require_inside(folder, self.store.artifacts)
        if self.store.find(folder) is not None or is_being_built(folder):
            return
        prefix = f"{name}/{folder.name}"
        inside = {n.removeprefix(f"{prefix}/") for n in there if n.startswith(f"{prefix}/") and _is_plain(n)}
        if MANIFEST in inside:
            manifest = self._manifest(prefix, there, incoming)
            if (manifest.stage, manifest.key) != (name, key) or not set(manifest.files) <= inside:
                raise FinetuneError(f"{self.repo_id}: {prefix} is not the whole of stage {name}")
            wanted, last = sorted(manifest.files), MANIFEST
        elif BUILDING in inside and not fresh and (newest := _newest(inside)) > _newest(_names(folder)):
            wanted = sorted(n for n in inside - {BUILDING} if not (m := CHECKPOINT.match(n)) or int(m[1]) == newest)
            last, manifest = BUILDING, None
        else:
            return
        what = name if manifest else f"{name} checkpoint-{newest}"
        if (size := sum(there[f"{prefix}/{n}"].size for n in wanted)) > ANNOUNCED_BYTES:
            self.ctx.say(f"{self.repo_id}: fetching {what}, {size / 1e6:,.0f} MB")
        self._fetch([f"{prefix}/{n}" for n in [*wanted, last]], there, incoming)
        if manifest and (wrong := self.store.verify(incoming / prefix, manifest)):
            raise FinetuneError(f"{self.repo_id}: {prefix} is not what was committed: {'; '.join(wrong[:3])}")
        if last == BUILDING:  # it must not look like a build of this launch
            write_json(incoming / prefix / BUILDING, read_json(incoming / prefix / BUILDING) | {"launch": ""})
        self._place(incoming / prefix, folder, [*wanted, last])
        self._pulled.append(what)

    def _manifest(self, prefix: str, there: Mapping[str, Remote], incoming: Path) -> Manifest:
        self._fetch([f"{prefix}/{MANIFEST}"], there, incoming)
        try:
            return Manifest.model_validate_json((incoming / prefix / MANIFEST).read_bytes())
        except (ValidationError, ValueError):
            raise FinetuneError(f"{self.repo_id}: {prefix}/{MANIFEST} is not a manifest") from None

    def _fetch(self, names: Sequence[str], there: Mapping[str, Remote], incoming: Path) -> None:
        self._hub.fetch({n: there[n] for n in names if not (incoming / n).exists()}, incoming)

    def _place(self, source: Path, folder: Path, names: Sequence[str]) -> None:
        """Move files into a stage's folder, the last name last: without that file the folder is an aborted build."""
        with self.store.lease(folder, self.ctx.say, self.ctx.stop.check):
            self.store.clear(folder)
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with (source / name).open("rb") as file:  # a manifest must not list bytes lost in a power cut
                    os.fsync(file.fileno())
                (source / name).replace(folder / name)

    def start(self) -> None:
        """Start sending."""
        self._thread = threading.Thread(target=self._work, daemon=True, name="mirror")
        self._thread.start()

    def finish(self) -> None:
        """Send the rest and report a failure. A second signal ends the wait."""
        self._end.set()
        self.ctx.stop.hold()
        if self._thread is None:
            return
        deadline = time.monotonic() + FINISH_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(0.2)
        if self._thread.is_alive() or self._failing:
            self.ctx.say(f"{self.repo_id} lacks the newest of this run; the same command sends it")

    def _work(self) -> None:
        pause = POLL_SECONDS
        while True:
            last = self._end.wait(pause)
            self.push(last=last)
            if last:
                return
            pause = AFTER_FAILURE_SECONDS if self._failing else POLL_SECONDS

    def push(self, *, last: bool = False) -> bool:
        """Send new files in one commit. Return whether there were any; never raises."""
        try:
            if self._there is None:
                self._hub.open()
                self._there = self._hub.listed()
            files, gone, described = self._changes(self._there, last=last)
            if files or gone:
                self._send(files, gone, described)
            self._failing = False
            return bool(files or gone)
        except FileNotFoundError:
            return False  # training has just removed a checkpoint: a newer one or the adapter follows
        except Exception as error:  # no failure here may affect the run
            self._there = None  # a commit whose answer was lost may exist: list again before the next
            self._fail(f"{error}; the run continues, and this is retried")
            return False

    def _send(self, files: Mapping[str, Content], gone: Sequence[str], described: Sequence[str]) -> None:
        try:
            self._hub.send(files, gone, f"{self.run.recipe}: {', '.join(described)}")
        except FinetuneError:
            for file in files.values():
                if isinstance(file, Path):
                    file.stat()
            raise
        self._pushed_at = time.monotonic()
        if any("checkpoint" in word for word in described):
            self._checkpoint_at = self._pushed_at
        self.ctx.say(f"{self.repo_id} has {', '.join(described)}")
        self._there = self._hub.listed()

    def _fail(self, line: str) -> None:
        if not self._failing:
            self.ctx.say(f"mirror: {line}")
        self._failing = True

    def _changes(self, there: dict[str, Remote], *, last: bool) -> tuple[dict[str, Content], list[str], list[str]]:
        """Return files to add, files to delete, and a description of both."""
        files: dict[str, Content] = {}
        gone: list[str] = []
        described: list[str] = []
        for record in list(self.run.stages.values()):
            if record.name not in SMALL or record.folder is None or not record.key or record.status == "off":
                continue
            prefix = f"{record.name}/{record.folder.name}"
            contents = self._finished(prefix, record.folder, there)
            if contents is None:
                contents = self._unfinished(prefix, record.folder, there, last=last)
            if contents:
                files |= {f"{prefix}/{n}": c for n, c in contents.items()}
                gone += [
                    n for n in there if n.startswith(f"{prefix}/") and n.removeprefix(f"{prefix}/") not in contents
                ]
                newest = 0 if MANIFEST in contents else _newest(set(contents))
                described.append(f"{record.name} checkpoint-{newest}" if newest else record.name)
        if not last and not any("checkpoint" in s for s in described) and _lately(self._pushed_at, STAGE_SECONDS):
            return {}, [], []
        if files or last:
            record_files = {n: c for n, c in self._record().items() if n not in there or not there[n].equals(c)}
            described += [] if described or not record_files else ["the record"]
            files |= record_files
        if files and ABOUT not in there:
            files[ABOUT] = README
        return files, gone, described

    def _finished(self, prefix: str, folder: Path, there: Mapping[str, Remote]) -> dict[str, Content] | None:
        """Return a finished stage's files, none if they are already there; None for an unfinished stage."""
        if prefix in self._sent:
            return {}
        manifest = self.store.find(folder)
        if manifest is None:
            return None
        remote = there.get(f"{prefix}/{MANIFEST}")
        if remote and remote.equals(folder / MANIFEST):
            self._sent.add(prefix)
            return {}
        return {n: folder / n for n in [*manifest.files, MANIFEST]}

    def _unfinished(
        self, prefix: str, folder: Path, there: Mapping[str, Remote], *, last: bool
    ) -> dict[str, Content] | None:
        """Return the files to resume a training from its newest complete checkpoint; None if it was sent, or one
        recently.
        """
        names = _names(folder)
        newest = _newest(names)
        inside = {n.removeprefix(f"{prefix}/") for n in there if n.startswith(f"{prefix}/")}
        has = _newest(inside)
        if not newest or MANIFEST in inside or newest == has or (newest < has and not self._in_step):
            return None
        if not last and _lately(self._checkpoint_at, CHECKPOINT_SECONDS):
            return None
        wanted = [n for n in names if (m := CHECKPOINT.match(n)) and int(m[1]) == newest]
        records = (BUILDING, LOG, "checkpoints/tracking.json", "checkpoints/precision.json")
        small = {n: (folder / n).read_bytes() for n in records if n in names}
        if LOG in small:  # it grows: send complete lines only
            small[LOG] = small[LOG][: small[LOG].rfind(b"\n") + 1]
        return {n: folder / n for n in wanted} | small

    def _record(self) -> dict[str, Content]:
        """Return the current files of the run's folder."""
        folder = self.run.folder
        if not (folder / "run.json").is_file():
            return {}
        parent = f"runs/{self.run.recipe}"
        files = [p for p in folder.iterdir() if p.is_file() and not p.is_symlink() and _is_plain(p.name)]
        contents: dict[str, Content] = {f"{parent}/{folder.name}/{p.name}": p.read_bytes() for p in files}
        return contents | {f"{parent}/latest": f"{folder.name}\n".encode()}


def _is_plain(name: str) -> bool:
    """Return whether a path of the repository is safe to fetch: inside its folder and not a lease."""
    parts = name.split("/")
    plain = all(re.fullmatch(r"[\w+=@,-][\w+=@,. -]*", part) for part in parts)
    return plain and not parts[-1].startswith("lease.")


def _lately(moment: float | None, seconds: float) -> bool:
    return moment is not None and time.monotonic() - moment < seconds


def _names(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    paths = (p for p in folder.rglob("*") if p.is_file() and links.way_out(p, folder) is None)
    return {p.relative_to(folder).as_posix() for p in paths}


def _newest(names: set[str]) -> int:
    """Return the number of the newest checkpoint with a marker, or 0."""
    matches = [CHECKPOINT.fullmatch(n) for n in names]
    return max((int(m[1]) for m in matches if m and m[2] == "COMPLETE"), default=0)

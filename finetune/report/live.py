"""report.html of a run in progress: states of the stages, curves of the training; replaced by the report at its end."""

from __future__ import annotations

import datetime
import threading
import time
from typing import Any

from finetune.pipeline.runs import Run, StageRecord
from finetune.pipeline.stage_list import STAGE_NAMES, STAGES, headline_of, spec_of, stage_folder
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.report.stage_view import StageView
from finetune.utils.files import replace_bytes

EVERY_SECONDS = 30.0
RELOAD_SECONDS = 15
TRAINING = ("align", "train")  # the later one first


class Live:
    """Writes the page of `record`: when a stage begins or ends, and at steps every EVERY_SECONDS.

    No failure here stops a run: a page that cannot be written is left out.
    """

    def __init__(self, record: Run, recipe: Recipe, store: Store, until: str | None) -> None:
        self._record, self._recipe, self._store = record, recipe, store
        self._last_stage = STAGE_NAMES.index(until) if until else len(STAGE_NAMES)
        self._position = ""
        self._written = time.monotonic()
        self._predicted: dict[str, int] | None = None
        self._lock = threading.Lock()
        self._ended = False

    def heard(self, line: str) -> None:
        """Take a line or the position of a bar; called at every step, so that most calls do nothing."""
        self._position = line
        if time.monotonic() - self._written >= EVERY_SECONDS:
            self.write()

    def end(self) -> None:
        """Write no further page that reloads; wait for one that another thread (the mirror's) is writing."""
        with self._lock:
            self._ended = True

    def write(self, *, reload: bool = True) -> None:
        """Write the page if the run's folder exists; without `reload` it is the last one, also after `end`."""
        if not self._record.begun or not self._lock.acquire(blocking=not reload):
            return
        try:
            if self._ended and reload:
                return
            self._ended = self._ended or not reload
            from finetune.report.html import render_page  # a run that builds nothing needs no jinja
            from finetune.report.page import REPORT

            self._written = time.monotonic()
            page = render_page("live.jinja", self._facts(reload))
            replace_bytes(self._record.folder / REPORT, page)
        except Exception:  # noqa: S110 - the page is a convenience; the run's own error or record is what counts
            pass
        finally:
            self._lock.release()

    def _facts(self, reload: bool) -> dict[str, Any]:
        from finetune.report import model_sections
        from finetune.report.data_section import funnel
        from finetune.report.page import predicted_memory

        stages = self._views()
        current = next((v for v in reversed(stages.values()) if v.status == "partial"), None)
        training = next((stages[n] for n in TRAINING if stages[n].file("metrics.jsonl")), stages["train"])
        if training.status == "partial" and self._predicted is None:
            self._predicted = predicted_memory(self._recipe, stages)
        steps = model_sections.read_lines(training.file("metrics.jsonl"))
        now = datetime.datetime.now(datetime.UTC)
        return {
            "recipe": self._record.recipe,
            "run": self._record.name,
            "model": self._recipe.model.id,
            "written": now.strftime("%Y-%m-%d %H:%M:%S UTC"),
            "reload": RELOAD_SECONDS if reload else None,
            "every": round(EVERY_SECONDS),
            "current": current.name if current else "",
            "position": self._position if current else "",
            "steps": steps if current is training else [],
            "predicted": self._predicted,
            "funnel": funnel(stages),
            "training": training.name,
            "plots": model_sections.curves(steps, self._predicted) if len(steps) > 1 else [],
            "stages": [(view, headline_of(view.name, view.metrics)) for view in stages.values()],
        }

    def _views(self) -> dict[str, StageView]:
        views = {}
        for number_, stage in enumerate(STAGES):
            record = self._record.stages.get(stage.name)
            if record is None:
                off = spec_of(stage, self._recipe) is None or number_ > self._last_stage
                record = StageRecord(stage.name, "off" if off else "missing")
            folder = record.folder or stage_folder(self._store, stage.name, record.as_json())
            manifest = self._store.find(folder) if folder and record.status == "done" else None
            views[stage.name] = StageView(**vars(record) | {"folder": folder}, manifest=manifest)
        return views

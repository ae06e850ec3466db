"""Benchmarks of lm-evaluation-harness (the extra `harness`) for base and adapter on the same documents.

One model is in memory: the base is the same weights with the adapter disabled. Tasks come with the harness or from the
recipe's task folder; a task there may name its data relative to that folder.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.context import Context
from finetune.errors import FinetuneError, InputError
from finetune.eval.metrics import paired_interval
from finetune.utils.files import file_digest
from finetune.utils.format import six
from finetune.utils.progress import Bar
from finetune.utils.quiet import quiet

if TYPE_CHECKING:
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

PACKAGE = "lm_eval"
INSTALL = "evaluate.tasks: lm-evaluation-harness is not installed (pip install lm-eval, or pip install '.[harness]')"
ROW_TOKENS = 512  # assumed tokens per row of a batch: document lengths are not known beforehand
BOOTSTRAP = 1000  # draws for the standard error of a metric that is not a mean


def digests(folder: Path | None) -> dict[str, str]:
    """Return relative path → xxh3-128 of the files of a task folder. Raises InputError if it is not a folder."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise InputError(f"evaluate.task_folder: {folder} is not a folder")
    files = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return {p.relative_to(folder).as_posix(): file_digest(p) for p in sorted(files)}


def check(names: Sequence[str], folder: Path | None) -> None:
    """Raise InputError if the harness is not installed, or a name is not a task, group or tag."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise InputError(INSTALL)
    _manager(names, folder)


def version() -> str:
    """Return the harness's version, on which the definition of its tasks depends."""
    return importlib.metadata.version(PACKAGE)


def load(names: Sequence[str], folder: Path | None, seed: int) -> dict[str, Any]:
    """Load the tasks with their documents, which may be downloaded now, in the harness's own form.

    Raises InputError for an unknown name, FinetuneError if a task's definition or data cannot be read.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise InputError(INSTALL)
    from datasets.exceptions import DatasetsError

    random.seed(seed)  # some tasks shuffle their documents as they are read
    with quiet(PACKAGE):
        manager = _manager(names, folder)
        try:
            with contextlib.chdir(folder or "."):  # data_files of a task are relative to it
                loaded = manager.load(list(names))
        except (DatasetsError, OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
            first = str(error).strip().splitlines()
            reason = first[0] if first else type(error).__name__
            raise FinetuneError(f"evaluate.tasks: {', '.join(names)} cannot be loaded: {reason}") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return dict(loaded)


def _manager(names: Sequence[str], folder: Path | None) -> TaskManager:
    """Return a TaskManager; the harness's 14,000 tasks are indexed only if a name is not in the folder."""
    from lm_eval.tasks import TaskManager

    include = str(folder.absolute()) if folder else None
    own: list[str] = []
    with quiet(PACKAGE):
        if include:
            manager = TaskManager(include_path=include, include_defaults=False)
            own = list(manager.all_tasks)
            if set(names) <= set(own):
                return manager
        manager = TaskManager(include_path=include)
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            there = f"; evaluate.task_folder has {', '.join(own[:10]) or 'none that can be read'}" if folder else ""
            hint = f"; similar: {', '.join(near)}" if near else ""
            raise InputError(f"evaluate.tasks: lm-evaluation-harness {version()} has no task {name!r}{hint}{there}")
    return manager


def score(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Mapping[str, Any],
    limit: int | None,
    batch_tokens: int,
    seed: int,
    ctx: Context,
) -> dict[str, Any]:
    """Return version, rows, shots and metrics, with and without the adapter, of each task or group.

    A metric is {"base", "base_stderr", "adapter", "adapter_stderr", "higher_is_better", "difference_interval"}: the
    standard errors are the harness's (null if it has none), the last is the 95 % interval of adapter - base over the
    same documents (paired bootstrap; null for a group, and for metrics that are not a mean over documents). `tokenizer`
    is modified (it gets a pad token), so it must not be used elsewhere. `limit` documents of each task, or all.
    """
    rows = max(1, batch_tokens // ROW_TOKENS)
    adapter = _run(model, tokenizer, benchmarks, limit, rows, seed, ctx, "tasks (adapter)")
    with model.disable_adapter():
        base = _run(model, tokenizer, benchmarks, limit, rows, seed, ctx, "tasks (base)")
    return {name: _compared(name, base, adapter) for name in _reported_tasks(adapter)}


def _run(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Mapping[str, Any],
    limit: int | None,
    rows: int,
    seed: int,
    ctx: Context,
    label: str,
) -> dict[str, Any]:
    """Evaluate the model with lm-evaluation-harness."""
    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate

    for task in benchmarks["tasks"].values():
        task.set_fewshot_seed(seed)  # both models see the same examples
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    bar = ctx.bar(label, None)
    try:
        with quiet(PACKAGE):
            results = evaluate(
                lm=_watched(model, tokenizer, rows, ctx, bar),
                task_dict=dict(benchmarks),
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=True,
            )
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise FinetuneError(f"evaluate.tasks: lm-evaluation-harness failed: {error}") from error
    finally:
        bar.close()
    return dict(results)


def _watched(model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: int, ctx: Context, bar: Bar) -> HFLM:
    """Wrap the model for the harness; it stops between two batches if a signal was received."""
    from lm_eval.models.huggingface import HFLM

    class Watched(HFLM):
        """HFLM with our progress bar instead of the harness's."""

        def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
            return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, *inputs: torch.Tensor, **options: object) -> torch.Tensor:
            ctx.stop.check()
            bar.advance()
            return super()._model_call(*inputs, **options)

        def _model_generate(self, *inputs: object, **options: object) -> torch.Tensor:
            ctx.stop.check()
            bar.advance()
            return super()._model_generate(*inputs, **options)

    return Watched(pretrained=model, tokenizer=tokenizer, batch_size=rows)


def _reported_tasks(results: Mapping[str, Any]) -> list[str]:
    """Return tasks and groups that have metrics, without the tasks of a group that aggregates them."""
    inside: set[str] = set()
    todo = list(results.get("groups", {}))
    while todo:
        children = results["group_subtasks"].get(todo.pop(), [])
        inside.update(children)
        todo += children
    return sorted(n for n, values in results["results"].items() if n not in inside and _figures(values))


def _figures(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics among a task's values, with the harness's keys: "acc,none"."""
    keys = [k for k in values if "," in k and not k.split(",")[0].endswith("_stderr")]
    return {k: float(values[k]) for k in keys if isinstance(values[k], (int, float))}


def _compared(name: str, base: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {}
    before, after = base["results"][name], adapter["results"][name]
    for key, value in sorted(_figures(after).items()):
        metric, _, filtered = key.partition(",")
        metrics[metric if filtered == "none" else f"{metric} ({filtered})"] = {
            "base": _six(before[key]),
            "base_stderr": _six(before.get(f"{metric}_stderr,{filtered}")),
            "adapter": _six(value),
            "adapter_stderr": _six(after.get(f"{metric}_stderr,{filtered}")),
            "higher_is_better": adapter["higher_is_better"].get(name, {}).get(metric),
            "difference_interval": _difference(name, metric, filtered, base, adapter),
        }
    counted = adapter["n-samples"].get(name)
    stated = adapter["versions"].get(name)
    return {
        "version": None if stated is None else str(stated),
        "rows": int(counted["effective"] if counted else after.get("sample_len", 0)),
        "shots": adapter["n-shot"].get(name),
        "metrics": metrics,
    }


def _difference(
    name: str, metric: str, filtered: str, base: Mapping[str, Any], adapter: Mapping[str, Any]
) -> list[float | None] | None:
    """Return the ends of the paired interval of adapter - base."""
    import numpy as np

    pair = []
    for results in (adapter, base):
        samples = [s for s in results["samples"].get(name, []) if s["filter"] == filtered and metric in s]
        values = [s[metric] for s in sorted(samples, key=lambda s: s["doc_id"])]
        if len(values) < 2 or not all(isinstance(v, (bool, int, float, np.number)) for v in values):
            return None
        pair.append(np.array(values, dtype=np.float64))
        if not np.isclose(pair[-1].mean(), results["results"][name][f"{metric},{filtered}"]):
            return None  # the metric is not a mean over documents, so resampling its mean is not valid
    interval = paired_interval(pair[0], pair[1], np.ones(len(pair[0])))
    return [_six(interval.low), _six(interval.high)]


def _six(value: object) -> float | None:
    """Round to six significant digits; None if not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return six(value)

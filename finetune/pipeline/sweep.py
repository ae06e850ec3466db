"""Runs of one recipe over a grid of settings: points, their runs, the metric of each.

Every point is an ordinary `finetune run` in a process of its own, so the store shares the stages that the grid does not
change, and a sweep that was killed continues: a point whose metric is in the store is not run again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, InputError, how_it_ended
from finetune.pipeline import run_view, runner
from finetune.pipeline.recipe_names import load_recipe
from finetune.pipeline.stage_list import spec_of, stage_named
from finetune.pipeline.store import Store
from finetune.recipe import Recipe
from finetune.recipe.load import LoadedRecipe, parse_value

MOST_POINTS = 1000
KEYLESS = ("runtime", "tracking", "publish")  # sections that enter no stage's key: one result serves all their values
NO_NUMBER = "no such number"


@dataclass(frozen=True)
class Point:
    """One combination of values. `recipe` has its own name, under which the run is recorded."""

    values: Mapping[str, str]  # field → value as JSON text
    recipe: Recipe
    sets: tuple[str, ...]  # --set options that make it of the swept recipe, with those that the user gave

    @property
    def label(self) -> str:
        """Return `train.learning_rate=0.0001 lora.r=8`."""
        return " ".join(f"{field}={value}" for field, value in self.values.items())


@dataclass(frozen=True)
class Result:
    """Result of a point in the store. `seconds` are those of the stages that no other point uses."""

    point: Point
    status: str  # done, same as POINT (one result serves both), no such number, not run, or how the run ended
    value: float | None = None
    interval: tuple[float, float] | None = None  # 95 %
    seconds: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """A recipe, its grid and the metric to compare."""

    source: str  # the recipe as the user named it
    loaded: LoadedRecipe
    points: tuple[Point, ...]
    metric: str  # STAGE.NAME
    highest: bool  # whether the best value is the highest

    @property
    def stage(self) -> str:
        """Return the stage that has the metric; runs end after it."""
        return self.metric.partition(".")[0]

    @property
    def name(self) -> str:
        """Return a file name for results: the recipe's name and a digest of points and metric."""
        return f"{self.loaded.recipe.name}-{_digest([self.metric, *(p.recipe.name for p in self.points)])}"

    def best(self, results: Sequence[Result]) -> Result | None:
        """Return the result with the best value; the first of equal ones."""
        known = [r for r in results if r.value is not None]
        return (max if self.highest else min)(known, key=lambda r: r.value or 0.0, default=None)


def read_grid(options: Sequence[str]) -> dict[str, list[str]]:
    """Return field → values, as JSON text, from `FIELD=[VALUE, …]`. Raises InputError."""
    grid: dict[str, list[str]] = {}
    for option in options:
        field, equals, text = (part.strip() for part in option.partition("="))
        values = parse_value(text, f"--grid {field}") if equals else None
        if not field or not isinstance(values, list) or not values:
            raise InputError(f"--grid {option}: write FIELD=[VALUE, …], as in train.learning_rate='[1e-4, 2e-4]'")
        if field in grid:
            raise InputError(f"--grid {field}: given twice; write all values in one list")
        if field == "name" or field.partition(".")[0] in KEYLESS:
            why = "a run's name is no setting" if field == "name" else "changes no result, so it cannot be compared"
            raise InputError(f"--grid {field}: {why}")
        grid[field] = [json.dumps(value, ensure_ascii=False) for value in values]
        if repeated := [value for value, count in Counter(grid[field]).items() if count > 1]:
            raise InputError(f"--grid {field}: {repeated[0]} is in the list twice")
    if (count := math.prod(map(len, grid.values()))) > MOST_POINTS:
        raise InputError(f"--grid: {count:,} runs; at most {MOST_POINTS:,}")
    return grid


def plan_sweep(
    name: str, options: Sequence[str], metric: str, sets: Sequence[str], artifacts: Path, *, highest: bool
) -> Sweep:
    """Return the sweep: one validated recipe for each combination of the `--grid` values.

    Raises InputError with the errors of all combinations.
    """
    grid = read_grid(options)
    loaded = load_recipe(name, sets, artifacts)
    stage, dot, figure = metric.partition(".")
    if not dot or not figure:
        raise InputError(f"--metric {metric}: write STAGE.NAME, as in evaluate.perplexity_adapter")
    points, problems = [], []
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        own = tuple(f"{field}={value}" for field, value in values.items())
        named = f"{loaded.recipe.name[:60]}-sweep-{_digest([*sets, *sorted(own)])}"
        try:
            recipe = load_recipe(name, [*sets, *own, f"name={named}"], artifacts).recipe
            if spec_of(stage_named(stage), recipe) is None:
                raise InputError(f"--metric {metric}: the recipe turns {stage} off")
            points.append(Point(values, recipe, (*sets, *own)))
        except InputError as error:
            problems += [line for line in str(error).splitlines() if line not in problems]
    if problems:
        raise InputError("\n".join(problems))
    return Sweep(name, loaded, tuple(points), metric, highest)


def run_points(
    sweep: Sweep,
    store: Store,
    say: Callable[[str], None],
    start: Callable[[Sequence[str]], int],
    options: Sequence[str] = (),
) -> Iterator[list[Result]]:
    """Run the points that have no metric yet, one after the other; yield the results before the first and after each.

    `start` runs `finetune ARGUMENTS` and returns the exit status; `options` are added to them. A point that fails or is
    refused does not stop the others. Raises InputError if a run refuses its input, or if the stage of no finished point
    has such a metric, FinetuneError at the end if a point has no value.
    """
    ended: dict[str, str] = {}
    yield (results := read_results(sweep, store, ended))
    for number, point in enumerate(sweep.points, 1):
        where = f"sweep {number}/{len(sweep.points)}: {point.label} ({point.recipe.name})"
        if results[number - 1].value is not None or results[number - 1].status == NO_NUMBER:
            say(f"{where}: is there already")
            continue
        say(where)
        sets = [f"--set={text}" for text in (*point.sets, f"name={point.recipe.name}")]
        roots = ["--artifacts", str(store.artifacts), "--scratch", str(store.scratch)]
        status = start(["run", sweep.source, "--until", sweep.stage, *roots, *sets, *options])
        if status == InputError.exit_status:
            raise InputError(f"{where}: the run was refused (see above); the other points were not run")
        if status:
            ended[point.recipe.name] = _how(store, point, status)
        yield (results := read_results(sweep, store, ended))
    if lost := [f"{r.point.label} ({r.status})" for r in results if r.value is None]:
        raise FinetuneError(f"{len(lost)} of {len(results)} runs have no {sweep.metric}: {'; '.join(lost)}")


def _how(store: Store, point: Point, status: int) -> str:
    try:
        return run_view.status_of(run_view.read(store, point.recipe.name))
    except InputError:  # it ended before its first stage
        return how_it_ended(status)


def read_results(sweep: Sweep, store: Store, ended: Mapping[str, str] | None = None) -> list[Result]:
    """Return the result of every point, from the manifests in the store. `ended`: how runs failed, by recipe name.

    Raises InputError with the numbers that the stage has if the metric is one of them in no finished point.
    """
    steps = [[s for s in runner.plan(point.recipe, store) if s.manifest] for point in sweep.points]
    uses = Counter(step.folder for of_point in steps for step in of_point)
    results: list[Result] = []
    first: dict[Path | None, Point] = {}
    there: set[str] = set()
    figure = sweep.metric.partition(".")[2]
    for point, of_point in zip(sweep.points, steps, strict=True):
        seconds = sum(s.manifest.seconds for s in of_point if s.manifest and uses[s.folder] == 1)
        step = next((s for s in of_point if s.stage.name == sweep.stage), None)
        if step is None or step.manifest is None:
            results.append(Result(point, (ended or {}).get(point.recipe.name, "not run"), seconds=seconds))
            continue
        metrics, same = step.manifest.metrics, first.setdefault(step.folder, point)
        numbers = dict(_numbers(metrics))
        there |= numbers.keys()
        value = numbers.get(figure)
        status = NO_NUMBER if value is None else "done" if same is point else f"same as {same.label}"
        results.append(Result(point, status, value, _interval(metrics, figure), seconds))
    if first and figure not in there:
        raise InputError(
            f"--metric {sweep.metric}: {sweep.stage} has no such number; it has {', '.join(sorted(there))}. Finished "
            "runs are kept: the same command with another --metric reads them"
        )
    return results


def _interval(metrics: Mapping[str, Any], figure: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a number, if the stage recorded one."""
    ends = metrics.get(f"{figure}_interval")
    known = isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
    return (float(ends[0]), float(ends[1])) if known and ends else None


def _numbers(metrics: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, float | None]]:
    """Yield name and value; None for a value that is null or not finite, as of a training that diverged."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{at}{name}.")
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            yield f"{at}{name}", float(value) if value is not None and math.isfinite(value) else None


def as_json(sweep: Sweep, results: Sequence[Result]) -> dict[str, Any]:
    """Return the results for `--json` and for the file in artifacts/sweeps."""
    best = sweep.best(results)
    return {
        "recipe": sweep.loaded.recipe.name,
        "metric": sweep.metric,
        "best": best.point.recipe.name if best else None,
        "runs": [
            {
                "name": r.point.recipe.name,
                "values": {field: json.loads(value) for field, value in r.point.values.items()},
                "status": r.status,
                "value": r.value,
                "interval": r.interval,
                "seconds": round(r.seconds, 3),
            }
            for r in results
        ],
    }


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]

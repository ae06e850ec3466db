"""Run partitions by Ray Data, and stateful workers as actors, on a Ray cluster (https://docs.ray.io)."""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import secrets
import signal
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from finetune.engine.kept import code_versions
from finetune.engine.local import Here
from finetune.errors import FinetuneError, InputError
from finetune.utils.files import hash_file
from finetune.utils.format import clipped
from finetune.utils.runtime import usable_cpus
from finetune.utils.upstream import silence_ray

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")
R = TypeVar("R")
SORTED_ROWS = 1 << 20  # keys of a block: 16 MB
ACTORS_FROM_ROWS = 20_000  # fewer are compared in seconds, which is the time to start an actor
CONNECT_SECONDS = 10.0
CHECK_SECONDS = 60.0  # for a node to import the package and answer
RETRIES = 10  # of a partition whose worker or node was lost
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


class RayEngine:
    """Engine of a Ray cluster; made by `started`."""

    def __init__(self, workers: int, memory: int) -> None:
        """Use `workers` processors; no node has more than `memory` bytes for tasks."""
        self._workers, self._memory = workers, memory
        self._calls = 0

    def map(
        self, build: Callable[[], Callable[[T], R]], parts: Sequence[T], rows: int, part_bytes: int = 0
    ) -> Iterator[R]:
        """As `Engine.map`. Ray Data repeats the partitions of a lost process or node on the others."""
        import ray

        if not parts:
            return
        self._calls += 1
        memory = min(part_bytes, self._memory) or None
        options: Callable[[], dict[str, Any]] = partial(dict, max_retries=RETRIES)
        with _one_sentence("the state of the workers"):
            work = partial(_work, self._calls, ray.put(build))
            data = ray.data.from_items([{"part": pickle.dumps(part)} for part in parts], override_num_blocks=len(parts))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray 2.60 wants to remove this argument, and has no other for max_retries
            done = iter(data.map(work, num_cpus=1, memory=memory, ray_remote_args_fn=options).iter_rows())
        for number in range(1, len(parts) + 1):
            with _one_sentence(f"partition {number} of {len(parts)}"):
                result = pickle.loads(next(done)["result"])  # noqa: S301 - a worker made it
            if isinstance(result, _Raised):
                raise result.error
            yield result

    def group(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """As `Engine.group`."""
        import numpy as np

        kind, counts, before = np.empty(len(keys), np.int32), np.zeros(len(keys), np.int64), -1
        last: object = None
        for some, places in self._sorted(keys):
            new = np.r_[some[0] != last, some[1:] != some[:-1]]
            kind[places] = numbers = before + np.cumsum(new)
            counts[numbers[0] : numbers[-1] + 1] += np.bincount(numbers - numbers[0])
            before, last = int(numbers[-1]), some[-1]
        return kind, counts[: before + 1]

    def sort(self, keys: NDArray[Any]) -> NDArray[np.int64]:
        """As `Engine.sort`."""
        import numpy as np

        return np.concatenate([np.zeros(0, np.int64), *(places for _, places in self._sorted(keys))])

    def _sorted(self, keys: NDArray[Any]) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Yield the keys in ascending order with their places, a block at a time."""
        import numpy as np
        import pyarrow as pa
        import ray

        starts = range(0, len(keys), SORTED_ROWS)
        blocks = [pa.table({"key": keys[k : k + SORTED_ROWS],
                            "place": np.arange(k, min(k + SORTED_ROWS, len(keys)))}) for k in starts]  # fmt: skip
        if not blocks:
            return
        with _one_sentence("the sort of keys"):
            for batch in ray.data.from_arrow(blocks).sort(["key", "place"]).iter_batches(batch_size=None):
                if len(batch["key"]):
                    yield batch["key"], batch["place"]

    def workers(self, build: Callable[[], Any], rows: int) -> Here | _Actors:
        """As `Engine.workers`: actors, one for each processor; one in this process for less than ACTORS_FROM_ROWS."""
        return _Actors(build, self._workers) if rows >= ACTORS_FROM_ROWS else Here(build)

    def close(self) -> None:
        """As `Engine.close`: the cluster's own matter."""


class _Actors:
    """Stateful workers as actors. Ray starts a lost one again, on another node if need be, and repeats its call.

    They reserve no processor: one that its node took with it would be waited for without end.
    """

    def __init__(self, build: Callable[[], Any], count: int) -> None:
        import ray

        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": RETRIES, "max_task_retries": RETRIES}
        kind: Any = ray.remote(scheduling_strategy="SPREAD", **options)(_Actor)
        self._actors = [kind.remote(build) for _ in range(count)]

    def __len__(self) -> int:
        return len(self._actors)

    def call(self, method: str, each: Sequence[Any], shared: object = None) -> list[Any]:
        """As `Workers.call`."""
        import ray

        with _one_sentence(f"{method} of the workers"):
            sent = ray.put(shared)
            asked = [
                None if own is None else one.call.remote(method, own, sent)
                for one, own in zip(self._actors, each, strict=True)
            ]
            return [None if reference is None else ray.get(reference) for reference in asked]


class _Actor:
    """A stateful worker in a process of its own."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._made = build()

    def call(self, method: str, own: object, shared: object) -> object:
        return getattr(self._made, method)(own, shared)


_state: dict[int, Callable[[Any], Any]] = {}  # of a worker process: the number of a map -> its function


def _work(call: int, build: Any, row: Mapping[str, bytes]) -> dict[str, bytes]:  # noqa: ANN401 - a reference
    """Return the function's result, or the FinetuneError that it raised; the function is built once per process."""
    import ray

    try:
        if call not in _state:
            _state.clear()
            _state[call] = ray.get(build)()
        result = _state[call](pickle.loads(row["part"]))  # noqa: S301 - the driver made it
    except FinetuneError as error:
        result = _Raised(error)
    return {"result": pickle.dumps(result, protocol=5)}


class _Raised:
    """An expected error, returned as a value: Ray would wrap a raised one in its own, with the worker's traceback."""

    def __init__(self, error: FinetuneError) -> None:
        self.error = error


@contextmanager
def _one_sentence(which: str) -> Iterator[None]:
    """Convert Ray's errors to FinetuneError or InputError; an error of the stage's function is raised unchanged."""
    from ray import exceptions

    try:
        yield
    except exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ImportError):
            raise InputError(
                f"--engine ray: a worker cannot import what {which} needs: {_line(cause)}; install the same packages "
                "on every node (constraints.txt)"
            ) from None
        if isinstance(cause, Exception) and not isinstance(cause, exceptions.RayError):
            raise cause from error  # which has the worker's traceback
        fault = cause if isinstance(cause, exceptions.RayError) else error
        if isinstance(fault, exceptions.WorkerCrashedError | exceptions.OutOfMemoryError | exceptions.NodeDiedError):
            raise FinetuneError(
                f"a worker process ended unexpectedly (out of memory?) {RETRIES + 1} times at {which}: {_line(fault)}; "
                "run again, with --engine local --set runtime.workers=1 if it repeats"
            ) from None
        if isinstance(fault, exceptions.ObjectStoreFullError | exceptions.OutOfDiskError):
            raise FinetuneError(
                f"Ray's object store and the disk it spills to are full at {which}; free space in Ray's temporary "
                "folder (/tmp/ray), or start the nodes with a larger --object-store-memory, and run again"
            ) from None
        raise FinetuneError(f"the Ray cluster lost {which}: {_line(fault)}; run again") from None


def _line(error: BaseException) -> str:
    """Return the beginning of an error as one line; its type, if it is empty."""
    return clipped(" ".join(str(error).split()), 300) or type(error).__name__


@contextmanager
def started(
    address: str | None,
    folders: Sequence[Path],
    say: Callable[[str], None],
    files: Sequence[Path] = (),
    workers: int | Literal["auto"] = "auto",
) -> Iterator[RayEngine]:
    """Context manager that yields the engine of the Ray cluster at `address` (HOST:PORT).

    Without an address it starts a cluster on this machine with `workers` processes (auto: one for each processor) and
    stops it at the end.

    Raises:
        InputError: Ray is not installed, there is no cluster, it has no processors, or a node has other versions,
            does not share `folders`, or does not have the same `files`.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError("--engine ray needs Ray, which is not installed: pip install 'finetune-recipes[ray]'")
    if address:
        _check_address(address)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # Ray's default is without end
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # sends nothing to Ray's makers
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "CRITICAL")  # its lines on the screen
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of the other workers, after the first one's error
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a call without a cluster fails, it starts none
    import ray

    silence_ray()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        try:
            context = ray.init(
                address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=None,
                num_cpus=None if address else usable_cpus() if workers == "auto" else workers,
                namespace="finetune",
                runtime_env={"env_vars": ENVIRONMENT},
            )
        except Exception as error:  # Ray raises Exception itself, if a process of its own does not start in 30 s
            where = f"no Ray cluster could be joined at {address}" if address else "Ray could not start on this machine"
            raise InputError(f"--engine ray: {where}: {_line(error)}") from None
        if handler is not signal.getsignal(signal.SIGTERM):  # Ray's own would end the process without saving
            signal.signal(signal.SIGTERM, handler)
        shown = f"http://{context.dashboard_url}" if context.dashboard_url else "none (pip install 'ray[default]')"
        say(f"Ray's dashboard: {shown}")
        workers = _processors(ray.cluster_resources())
        _check_nodes(folders, files)
        _quiet_data()
        memory = max(int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"])
        yield RayEngine(workers, memory)
    finally:
        ray.shutdown()


def _quiet_data() -> None:
    """Let Ray Data keep the order of partitions, raise the errors of their functions, and print nothing."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = -1  # a partition may take longer than half an hour


def _processors(resources: Mapping[str, float]) -> int:
    """Return the cluster's processors. A partition needs a whole one, and would otherwise wait for ever."""
    if (processors := int(resources.get("CPU", 0))) < 1:
        raise InputError("--engine ray: the cluster has no processors: start a node with `ray start --num-cpus N`")
    return processors


def _check_address(address: str) -> None:
    """Raise InputError if no server listens at `address`: Ray would retry for minutes and print its own log lines."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise InputError(f"--ray-address: found {address!r}; write HOST:PORT, as `ray start --head` prints it")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError, ValueError) as error:  # ValueError: a host that is no name, a port of 5000 digits
        raise InputError(
            f"--ray-address: nothing answers at {address} ({error}); start the cluster with `ray start --head --port "
            f"{port}` on {host}"
        ) from None


def _check_nodes(folders: Sequence[Path], files: Sequence[Path] = ()) -> None:
    """Ask every node for its versions, for `files`, and for a new file in each of `folders`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = ray.remote(num_cpus=0, max_retries=2)(_node_facts)
    nodes = [(node["NodeID"], node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"]]
    with ExitStack() as written:
        probes = [written.enter_context(_probe(folder)) for folder in folders]
        paths = [str(path.absolute()) for path in (*probes, *files)]
        here = _node_facts(paths)
        waiting = [
            asked.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(paths)
            for node, _ in nodes
        ]
        for reference, (_, host) in zip(waiting, nodes, strict=True):
            try:
                there = ray.get(reference, timeout=CHECK_SECONDS)
            except ray.exceptions.GetTimeoutError:
                raise InputError(
                    f"--engine ray: node {host} did not answer within {CHECK_SECONDS:.0f} s; look at it with "
                    "`ray status`, or remove it from the cluster"
                ) from None
            except ray.exceptions.RayError as error:
                words = str(error).strip().splitlines()[-1:] or [type(error).__name__]
                raise InputError(f"--engine ray: node {host} cannot run this package: {words[0]}") from None
            _require_equal(host, here, there)


@contextmanager
def _probe(folder: Path) -> Iterator[Path]:
    """Context manager: a file with a random name and content in `folder`."""
    name = secrets.token_hex(16)
    path = folder / f".shared-{name}"
    try:
        try:
            path.write_text(secrets.token_hex(16), encoding="ascii")
        except OSError as error:
            raise InputError(f"--engine ray: {folder} cannot be written: {error.strerror}") from None
        yield path
    finally:
        path.unlink(missing_ok=True)


Facts = tuple[Mapping[str, object], Mapping[str, object]]
"""Versions of packages; digests of files, None for one that cannot be read."""


def _require_equal(host: str, here: Facts, there: Facts) -> None:
    """Raise InputError if the node `host` has other versions or files."""
    for name, version in here[0].items():
        if there[0].get(name) != version:
            raise InputError(
                f"--engine ray: node {host} has {name} {there[0].get(name)}, this machine {version}; install the "
                "same versions on every node (constraints.txt)"
            )
    for path, digest in here[1].items():
        if there[1].get(path) == digest:
            continue
        if Path(path).name.startswith(".shared-"):
            raise InputError(
                f"--engine ray: node {host} does not see the same {Path(path).parent}; --artifacts and --scratch must "
                "be on a folder that every node shares"
            )
        raise InputError(f"--engine ray: {path} is missing or different on node {host}; copy it there")


def _node_facts(paths: Sequence[str]) -> Facts:
    digests: dict[str, object] = {}
    for path in paths:
        try:
            digests[path] = hash_file(Path(path))
        except OSError:
            digests[path] = None
    return code_versions(), digests

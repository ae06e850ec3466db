"""Run partitions on a Ray cluster (https://docs.ray.io): one task per partition, retried if its worker is lost."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from finetune.engine.kept import code_versions
from finetune.errors import FinetuneError, InputError
from finetune.utils.files import hash_file
from finetune.utils.format import clipped
from finetune.utils.runtime import usable_cpus
from finetune.utils.upstream import silence_ray

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 2  # partitions per processor that are computed before they are taken
CONNECT_SECONDS = 10.0
CHECK_SECONDS = 60.0  # for a node to import the package and answer
RETRIES = 10  # of a partition whose worker or node was lost
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


class RayEngine:
    """Engine of a Ray cluster; made by `started`."""

    def __init__(self, workers: int) -> None:
        """Keep AHEAD × `workers` partitions in the cluster."""
        self._workers = workers
        self._calls = 0

    def map(self, build: Callable[[], Callable[[T], R]], parts: Sequence[T], rows: int) -> Iterator[R]:
        """As `Engine.map`. Ray repeats the partitions of a lost process or node on the others; results are in order.

        Tasks, not actors: a lost actor would wait for a processor that its node took with it.
        """
        import ray

        self._calls += 1
        task: Any = ray.remote(num_cpus=1, max_retries=RETRIES)(_work)
        with _one_sentence("the state of the workers"):
            built = ray.put(build)
        waiting: deque[tuple[Any, str]] = deque()
        try:
            for number, part in enumerate(parts, 1):
                which = f"partition {number} of {len(parts)}"
                with _one_sentence(which):
                    waiting.append((task.remote(self._calls, built, part), which))
                if len(waiting) > AHEAD * self._workers:
                    yield _taken(*waiting.popleft())
            while waiting:
                yield _taken(*waiting.popleft())
        finally:
            if ray.is_initialized():  # an abandoned map may end after its cluster, and would start another
                for one, _ in waiting:
                    ray.cancel(one, force=True)


_state: dict[int, Callable[[Any], Any]] = {}  # of a worker process: the number of a map -> its function


def _work(call: int, build: Callable[[], Any], part: Any) -> Any:  # noqa: ANN401 - what the stage's function takes
    """Return the function's result, or the FinetuneError that it raised; the function is built once per process."""
    try:
        if call not in _state:
            _state.clear()
            _state[call] = build()
        return _state[call](part)
    except FinetuneError as error:
        return _Raised(error)


class _Raised:
    """An expected error, returned as a value: Ray would wrap a raised one in its own, with the worker's traceback."""

    def __init__(self, error: FinetuneError) -> None:
        self.error = error


def _taken(reference: Any, which: str) -> Any:  # noqa: ANN401 - what the function returned
    from ray import get

    with _one_sentence(which):
        result = get(reference)
    if isinstance(result, _Raised):
        raise result.error
    return result


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
        yield RayEngine(workers)
    finally:
        ray.shutdown()


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

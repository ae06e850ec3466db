"""Run partitions on a Ray cluster (https://docs.ray.io): one task a partition, repeated if its worker is lost."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from finetune.errors import FinetuneError, InputError

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 2  # partitions per processor that are computed before they are taken
CONNECT_SECONDS = 10.0
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
        task: Any = ray.remote(num_cpus=1, max_retries=-1)(_work)
        built = ray.put(build)
        waiting: deque[Any] = deque()
        try:
            for part in parts:
                waiting.append(task.remote(self._calls, built, part))
                if len(waiting) > AHEAD * self._workers:
                    yield _taken(waiting.popleft())
            while waiting:
                yield _taken(waiting.popleft())
        finally:
            for one in waiting:
                ray.cancel(one, force=True)


_state: dict[int, Callable[[Any], Any]] = {}  # of a worker process: the number of a map -> its function


def _work(call: int, build: Callable[[], Any], part: Any) -> Any:  # noqa: ANN401 - what the stage's function takes
    """Return the function's result, or the error for a person that it raised; the function is built once a process."""
    try:
        if call not in _state:
            _state.clear()
            _state[call] = build()
        return _state[call](part)
    except FinetuneError as error:
        return _Raised(error)


class _Raised:
    """An expected error; Ray would wrap it in one of its own, with a traceback of the worker."""

    def __init__(self, error: FinetuneError) -> None:
        self.error = error


def _taken(reference: Any) -> Any:  # noqa: ANN401
    import ray

    try:
        found = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except ray.exceptions.RayError as error:
        raise FinetuneError(f"the Ray cluster lost a partition for good: {str(error).splitlines()[0]}") from None
    if isinstance(found, _Raised):
        raise found.error
    return found


@contextmanager
def started(address: str | None, folders: Sequence[Path], say: Callable[[str], None]) -> Iterator[RayEngine]:
    """Within this block the engine of the cluster at `address` (HOST:PORT); without one, of a cluster of this machine
    that is stopped at the end.

    Raises:
        InputError: Ray is not installed, no cluster is there, a node has other versions, or does not see `folders`.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError("--engine ray needs Ray, which is not installed: pip install 'finetune-recipes[ray]'")
    if address:
        _check_address(address)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    try:
        context = ray.init(
            address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=None,
            namespace="finetune",
            runtime_env={"env_vars": ENVIRONMENT},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"no Ray cluster could be joined at {address}" if address else "Ray could not start on this machine"
        raise InputError(f"--engine ray: {where}: {str(error).splitlines()[0]}") from None
    try:
        if context.dashboard_url:
            say(f"Ray's dashboard: http://{context.dashboard_url}")
        _check_nodes(folders)
        yield RayEngine(max(1, int(ray.cluster_resources().get("CPU", 1))))
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse an address where nothing listens: Ray would try it again for minutes, with log lines of its own."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--ray-address: found {address!r}; write HOST:PORT, as `ray start --head` prints it")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--ray-address: nothing answers at {address} ({error}); start the cluster with `ray start --head --port "
            f"{port}` on {host}"
        ) from None


def _check_nodes(folders: Sequence[Path]) -> None:
    """Ask every node for its versions and whether it sees the folders."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = _versions()
    asked = ray.remote(num_cpus=0, max_retries=2)(_node_facts)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    paths = [str(folder.absolute()) for folder in folders]
    waiting = [
        asked.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(paths)
        for node in nodes
    ]
    for reference in waiting:
        try:
            host, versions, absent = ray.get(reference)
        except ray.exceptions.RayError as error:
            words = str(error).strip().splitlines()[-1]
            raise InputError(f"--engine ray: a node cannot run this package; install it there: {words}") from None
        for name, version in here.items():
            if versions.get(name) != version:
                raise InputError(
                    f"--engine ray: node {host} has {name} {versions.get(name)}, this machine {version}; install the "
                    "same versions on every node (constraints.txt)"
                )
        if absent:
            raise InputError(
                f"--engine ray: node {host} does not see {absent[0]}; --artifacts and --scratch must be on a folder "
                "that every node shares"
            )


def _versions() -> Mapping[str, object]:
    from finetune.utils.runtime import describe_environment

    facts = describe_environment()
    versions = facts["versions"]
    found = dict(versions) if isinstance(versions, Mapping) else {}
    return {**found, "python": ".".join(map(str, sys.version_info[:2]))}


def _node_facts(paths: Sequence[str]) -> tuple[str, Mapping[str, object], list[str]]:
    return socket.gethostname(), _versions(), [path for path in paths if not Path(path).is_dir()]

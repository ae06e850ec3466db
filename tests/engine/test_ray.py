"""A Ray cluster gives the bytes of one process; workers, actors and nodes may be lost."""

import importlib.util
import os
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from finetune.cli import run as cli_run
from finetune.engine import ray as engine
from finetune.engine.local import Local
from finetune.errors import FinetuneError, InputError
from finetune.pipeline.store import Store
from tests.dedup.test_large import corpus
from tests.engine.test_local import squares
from tests.stages.rows import context, recipe

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed")


def test_without_ray_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install .*\[ray\]"), engine.started(None, [], print):
        pass


@needs_ray
@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:1", "head", "head:x", ":6379", "127.0.0.1:99999", "a..b:6379", f"{'a' * 70}:1", "host:²", "a\0:1",
     f"127.0.0.1:{'1' * 5000}"],
)  # fmt: skip
def test_an_address_without_a_cluster_is_refused_at_once(address):
    with pytest.raises(InputError, match="--ray-address"), engine.started(address, [], print):
        pass


@pytest.mark.parametrize(("name", "address", "words"), [("dask", None, "allowed: local, ray"), ("local", "a:1", "add")])
def test_other_engines_are_refused(name, address, words):
    with pytest.raises(InputError, match=words):
        cli_run._check_engine(name, address)


def test_a_cluster_without_processors_is_refused():
    assert engine._processors({"CPU": 3.0, "memory": 1.0}) == 3
    for resources in ({}, {"CPU": 0.0}, {"CPU": 0.5}):
        with pytest.raises(InputError, match="no processors"):
            engine._processors(resources)


def test_a_node_needs_the_same_package_files_and_folders(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("one")
    with engine._probe(tmp_path) as probe:
        here = engine._node_facts([str(probe), str(template)])
        engine._require_equal("node", here, engine._node_facts([str(probe), str(template)]))
        versions, files = here
        for there, words in (
            (({**versions, "finetune": "0.1.0 (files 1)"}, files), "has finetune 0.1.0 .files 1"),
            (({**versions, "python": "3.1"}, files), "has python 3.1"),
            ((versions, {**files, str(template): "1"}), "chat.jinja is missing or different"),
            ((versions, {**files, str(probe): None}), f"does not see the same {tmp_path};"),
        ):
            with pytest.raises(InputError, match=words):
                engine._require_equal("node", here, there)
    assert [p.name for p in tmp_path.iterdir()] == ["chat.jinja"]


def test_only_rank_0_starts_a_cluster_and_both_roots_are_there_before(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(engine, "started", lambda address, folders, *more: seen.extend(folders) or nullcontext(1))
    store = Store(tmp_path / "artifacts", tmp_path / "scratch")
    ctx = context(tmp_path)
    with cli_run._engine("ray", "a:1", replace(ctx, rank=1, world=2), store, recipe()) as found:
        assert found is ctx.engine and not seen
    with cli_run._engine("ray", "a:1", replace(ctx, world=2), store, recipe()):
        assert len(seen) == 2 and all(folder.is_dir() for folder in seen)


@needs_ray
def test_faults_of_ray_are_one_sentence_and_errors_of_the_work_are_themselves():
    from ray import exceptions

    def in_task(cause):
        return exceptions.RayTaskError("work", "Traceback …", cause)

    full, crashed = exceptions.OutOfDiskError("full"), exceptions.WorkerCrashedError()
    for error, kind, words in (
        (in_task(ModuleNotFoundError("No module named 'plugin'")), InputError, "cannot import .* named 'plugin'"),
        (full, FinetuneError, "object store and the disk it spills to are full at partition 3"),
        (in_task(full), FinetuneError, "object store and the disk it spills to are full at partition 3"),
        (exceptions.ObjectStoreFullError("full"), FinetuneError, "--object-store-memory"),
        (crashed, FinetuneError, "ended unexpectedly .* at partition 3"),
        (exceptions.NodeDiedError("gone\nmore"), FinetuneError, "gone more"),
        (exceptions.RaySystemError("broken"), FinetuneError, "the Ray cluster lost partition 3: .*broken"),
        (in_task(MemoryError("here")), MemoryError, "here"),
        (in_task(OSError(28, "No space left")), OSError, "No space left"),
    ):
        with pytest.raises(kind, match=words) as caught, engine._one_sentence("partition 3"):
            raise error
        if isinstance(caught.value, FinetuneError):
            assert type(caught.value) is kind and "\n" not in str(caught.value)


def killed(part):
    os.kill(os.getpid(), signal.SIGKILL)


def always_killed():
    return killed


def lacking():
    """Build a worker that needs a package which is not there."""
    import a_package_that_nobody_has  # noqa: F401


def large(part):
    """48 MB, of which one fits into the store of the test."""
    import numpy as np

    return np.full(12_000_000, part, np.float32)


def made_large():
    return large


def dying(folder):
    """Build a worker that is killed at part 3, once."""

    def function(part):
        mark = Path(folder) / f"died-{part}"
        if part == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return part * 10, os.getpid()

    return function


@needs_ray
@pytest.mark.slow
def test_results_come_in_order_with_errors_and_a_killed_worker_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "RETRIES", 2)
    parts, said, before = [1, 2, 3, 4, 5, 6, 9], [], signal.getsignal(signal.SIGTERM)
    with engine.started(None, [tmp_path], said.append, workers=2) as cluster:
        assert cluster._workers == 2 and signal.getsignal(signal.SIGTERM) is before
        with pytest.raises(InputError, match=r"a worker cannot import .* No module named 'a_package"):
            list(cluster.map(lacking, [0], 1))
        assert list(cluster.map(partial(squares, 1), parts, 7)) == list(Local(1).map(partial(squares, 1), parts, 7))
        with pytest.raises(InputError, match="row 7 is wrong"):
            list(cluster.map(partial(squares, 0), [1, 7, 2], 3))
        abandoned = cluster.map(partial(squares, 0), [1] * 9, 9)
        assert next(abandoned) == 1
        done = list(cluster.map(partial(dying, str(tmp_path)), range(8), 8))
        with pytest.raises(FinetuneError, match=r"ended unexpectedly .* 3 times at partition 1 of 1"):
            list(cluster.map(always_killed, [0], 1))
    assert [value for value, _ in done] == [10 * part for part in range(8)]
    import ray

    abandoned.close()  # as an interrupted stage's is, after its cluster
    assert not ray.is_initialized()
    assert len(said) == 1 and said[0].startswith("Ray's dashboard: ") and signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "died-3").exists() and len({pid for _, pid in done}) >= 2


class Numbers:
    """A state that a lost process takes with it."""

    def __init__(self):
        self.held = []

    def add(self, own, shared):
        self.held.append(own + shared)
        return os.getpid()

    def all(self, own, shared):
        return self.held

    def fail(self, own, shared):
        raise InputError("row 3 is wrong")


@needs_ray
@pytest.mark.slow
def test_keys_and_stateful_workers_on_ray(tmp_path, monkeypatch, capfd):
    from finetune.dedup.index import FlatIndex
    from finetune.dedup.jaccard import Jaccard, word_sets
    from finetune.dedup.large import cell_measure
    from finetune.dedup.measures import Cosine
    from finetune.dedup.select import select

    monkeypatch.setattr(engine, "SORTED_ROWS", 300)
    monkeypatch.setattr(engine, "ACTORS_FROM_ROWS", 0)
    keys = np.random.default_rng(0).integers(0, 2**64, 400, np.uint64)[np.arange(1000) % 400]
    vectors = corpus(800)
    words = [f"{i % 50} red sea {i % 7} is blue {i % 3}" for i in range(800)]
    both = [Jaccard(word_sets(words, 2), 0.9), Cosine(vectors, 0.9, FlatIndex)]
    with engine.started(None, [tmp_path], lambda line: None, workers=2) as cluster:
        for ours, theirs in zip(cluster.group(keys), Local().group(keys), strict=True):
            assert np.array_equal(ours, theirs) and ours.dtype == theirs.dtype
        ranks = -np.array([1.0, np.inf, 1.0, -np.inf] * 200)
        assert np.array_equal(cluster.sort(ranks), Local().sort(ranks)) and not len(cluster.sort(ranks[:0]))
        for measures in (both, [cell_measure(vectors, 0.9)]):
            whole, killed = select(range(800), None, measures, 50), []

            def check(killed=killed):
                killed.append(1)
                if len(killed) == 9:
                    for pid in pids_of("_Actor"):
                        os.kill(pid, signal.SIGKILL)

            assert select(range(800), None, measures, 50, check, cluster) == whole and 9 < len(killed) and whole
        state = cluster.workers(Numbers, 1)
        pids = state.call("add", [1, 2], 10)
        assert state.call("all", [0, None]) == [[11], None] and len(set(pids)) == len(state) == 2
        os.kill(pids[0], signal.SIGKILL)
        assert state.call("all", [0, 0]) == [[], [12]]
        with pytest.raises(InputError, match="row 3 is wrong"):
            state.call("fail", [0, 0])
    assert "".join(capfd.readouterr()) == ""


def pids_of(name):
    """Processes of this machine's Ray that run an actor of the class `name`, by their titles."""
    for process in psutil.process_iter(["cmdline"]):
        if f"ray::{name}" in " ".join(process.info["cmdline"] or ()):
            yield process.pid


@needs_ray
@pytest.mark.slow
def test_a_node_that_dies_takes_no_row_with_it(tmp_path):
    """Two nodes; the second is removed while its worker computes."""
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80_000_000})
    try:
        second = nodes.add_node(num_cpus=1)
        with engine.started(nodes.address, [tmp_path], lambda line: None) as started:
            assert started._workers == 2
            found = []
            for number, value in enumerate(started.map(partial(slow, 0.3), range(10), 10)):
                found.append(value)
                if number == 1:
                    nodes.remove_node(second, allow_graceful=False)
            assert found == list(range(10))
            state = started.workers(Numbers, 10**6)
            assert len(state.call("add", [1, 2], 0)) == 2
            third = nodes.add_node(num_cpus=1)
            spread = started.workers(Numbers, 10**6)
            spread.call("add", [1, 2], 0)
            nodes.remove_node(third, allow_graceful=False)
            assert all(held in ([], [1], [2]) for one in (state, spread) for held in one.call("all", [0, 0]))
            for number, value in enumerate(started.map(made_large, range(5), 5)):  # 240 MB in a store of 80: it spills
                assert len(value) == 12_000_000 and value[0] == value[-1] == number
            with pytest.raises(InputError, match="cannot be written"):
                engine._check_nodes([tmp_path / "elsewhere"])
    finally:
        ray.shutdown()
        nodes.shutdown()


def slow(seconds):
    """Build a worker that takes its time."""

    def function(part):
        time.sleep(seconds)
        return part

    return function

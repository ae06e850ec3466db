"""Several processes that really run, over gloo: `--processes N`, and `accelerate launch` with our configurations."""

import importlib.util
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e import launches
from tests.e2e.conftest import Workspace
from tests.e2e.launches import NO_DROPOUT, TRAIN

MORE_ROWS = ("--set", "train.batch_rows=4")


@pytest.fixture
def fresh(pristine, tmp_path):
    """Makes workspaces by name."""

    def make(name):
        shutil.copytree(pristine.folder, tmp_path / name)
        return Workspace(tmp_path / name)

    return make


@pytest.fixture(scope="module")
def packed(pristine, tmp_path_factory):
    """A workspace whose data stages are done."""
    folder = tmp_path_factory.mktemp("packed") / "work"
    shutil.copytree(pristine.folder, folder)
    work = Workspace(folder)
    work.run("run", "small.yaml", "--until", "pack")
    return work


@pytest.fixture
def curated(packed, tmp_path):
    """One's own copy of it."""
    shutil.copytree(packed.folder, tmp_path / "work")
    return Workspace(tmp_path / "work")


@pytest.fixture(scope="module")
def by_two(packed, tmp_path_factory):
    """What two processes train when nothing interrupts them."""
    folder = tmp_path_factory.mktemp("by_two") / "work"
    shutil.copytree(packed.folder, folder)
    work = Workspace(folder)
    launches.finish(work, launches.ours(work, 2, *TRAIN))
    return launches.adapter(work).read_bytes()


@pytest.fixture(scope="module")
def by_one(packed, tmp_path_factory):
    """What one process trains with the larger batch."""
    folder = tmp_path_factory.mktemp("by_one") / "work"
    shutil.copytree(packed.folder, folder)
    work = Workspace(folder)
    work.run("run", "small.yaml", *NO_DROPOUT, *MORE_ROWS)
    return work


def losses(work):
    file = launches.adapter(work).parent.parent / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()]


def assert_same_training(works, processes, atol):
    shown = [w.show()["stages"]["train"] for w in works]
    assert [s["metrics"]["processes"] for s in shown] == processes
    assert len({s["key"] for s in shown}) == 1
    assert len({s["metrics"]["tokens"] for s in shown}) == 1  # the same rows, in the same order
    first, *others = [load_file(str(launches.adapter(w))) for w in works]
    for other in others:
        for name in first:
            np.testing.assert_allclose(first[name], other[name], atol=atol)
    for work in works[1:]:
        np.testing.assert_allclose(losses(works[0]), losses(work), rtol=1e-4)


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(fresh):
    one, two = fresh("one"), fresh("two")
    one.run("run", "small.yaml", *NO_DROPOUT)
    text = launches.finish(two, launches.ours(two, 2, *NO_DROPOUT))
    assert text.count("train …") == 1 and text.count("ingest …") == 1  # one process builds and speaks
    assert_same_training([one, two], [1, 2], atol=1e-5)


@pytest.mark.slow
def test_four_processes_train_the_adapter_of_one_and_one_process_does_the_rest(by_one, curated):
    text = launches.finish(curated, launches.accelerate(curated, 4, *NO_DROPOUT[:2], *MORE_ROWS))
    assert_same_training([by_one, curated], [1, 4], atol=1e-4)
    assert text.count("merge …") == 1 and curated.show()["stages"]["merge"]["status"] == "done"


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="no DeepSpeed: pip install -e '.[deepspeed]'")
def test_two_processes_under_zero2_train_the_adapter_of_one(fresh):
    """With AdamW in 32 bits: an 8-bit state is rounded in blocks, and ZeRO's blocks run across matrices."""
    one, two = fresh("one"), fresh("two")
    plain = (*NO_DROPOUT, "--set", "train.optimizer=adamw")
    one.run("run", "small.yaml", *plain)
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))  # it compiles an operator, minutes long, once
    command = launches.accelerate(two, 2, *plain, config="deepspeed_zero2")
    launches.finish(two, command, seconds=500, DS_ACCELERATOR="cpu", XDG_CACHE_HOME=cache)
    assert_same_training([one, two], [1, 2], atol=1e-5)


# Python imports this at its start: rank 1 fails as it looks at its third step, and the other waits for its gradients.
FAILS = """
import os, pathlib
if os.environ.get("RANK") == "1":
    from finetune.train import divergence as watchdog
    look = watchdog.Watchdog.look
    def fails(self, step, *rest):
        if step == 3:
            pathlib.Path("raised").touch()
            raise ValueError("this rank went wrong")
        return look(self, step, *rest)
    watchdog.Watchdog.look = fails
"""


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_launch_soon_and_only_its_traceback_is_shown(curated):
    (curated.folder / "sitecustomize.py").write_text(FAILS)
    path = os.pathsep.join([str(curated.folder), curated.environment()["PYTHONPATH"]])
    process = launches.begin(curated, launches.ours(curated, 2, *TRAIN), PYTHONPATH=path)
    (text,) = launches.outputs([process])
    ended = time.time()
    assert process.returncode == 1 and "ValueError: this rank went wrong" in text, text
    assert text.count("Traceback (most recent call last)") == 1, text
    assert ended - (curated.folder / "raised").stat().st_mtime < 15, text


# Rank 1's device has no room for two rows at once.
FULL = """
import os
if os.environ.get("RANK") == "1":
    import torch
    from finetune.train import oom as out_of_memory
    halving = out_of_memory.halving
    def full(attempt, base, micro, *rest, **more):
        def fails(rows):
            if rows > 1:
                raise torch.OutOfMemoryError("no room")
            return attempt(rows)
        return halving(fails, base, micro, *rest, **more)
    out_of_memory.halving = full
"""


@pytest.mark.slow
def test_a_rank_whose_device_is_full_has_all_begin_again_with_a_smaller_micro_batch(curated):
    (curated.folder / "sitecustomize.py").write_text(FULL)
    path = os.pathsep.join([str(curated.folder), curated.environment()["PYTHONPATH"]])
    sets = ["pack=null", "train.batch_rows=4", "train.max_steps=4", "runtime.micro_batch_rows=2"]
    command = launches.ours(curated, 2, "--until", "train", *(w for s in sets for w in ("--set", s)))
    text = launches.finish(curated, command, PYTHONPATH=path)
    assert "process 2: train: the device ran out of memory with 2 rows a micro-batch; going on with 1" in text
    assert "Traceback" not in text and text.count("4 steps of 4 rows (1 a micro-batch x 2 x 2 processes)") == 1, text
    trained = curated.show()["stages"]["train"]
    assert trained["status"] == "done" and trained["metrics"]["micro_batch_rows"] == 1


def killed(work, rank, moment):
    """What a launch of two says of whose processes one is killed, once `moment(launch)` has come."""
    process = launches.begin(work, launches.ours(work, 2))
    said = moment(process)
    launches.kill(launches.rank_of(process, rank))
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "Traceback" not in text, text
    assert f"process {rank + 1} of 2 was killed by SIGKILL (out of memory?); run the same command to resume" in text
    return f"{said}{text}"


def saying(line):
    return lambda process: "".join(itertools.takewhile(lambda said: said != f"{line}\n", process.stdout))


@pytest.mark.slow
def test_ranks_that_are_killed_end_the_launch_and_the_next_one_goes_on(fresh, by_two):
    """Where the other one waits, where both train, and where the other has nothing left to do."""
    work = fresh("work")

    def having(step):
        return lambda process: launches.wait_until(lambda: launches.complete(work)[-1:] == [step], process) or ""

    killed(work, 0, saying("base …"))
    text = killed(work, 1, having(4))
    # the other finds out by itself, or is told before it could
    assert "another process of this training has exited" in text or "stopped by signal 15" in text
    assert work.show()["stages"]["train"]["status"] in ("failed", "partial")
    assert not list(work.folder.glob("artifacts/train/*/manifest.json"))
    assert "goes on from checkpoint-4" in killed(work, 0, saying("evaluate …"))
    assert launches.adapter(work).read_bytes() == by_two
    assert not list(work.folder.glob("artifacts/evaluate/*/manifest.json"))
    launches.finish(work, launches.ours(work, 2))
    assert work.show()["stages"]["merge"]["status"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "how"),
    [(signal.SIGINT, launches.ours), (signal.SIGTERM, launches.accelerate)],
    ids=["ours", "accelerate"],
)
def test_a_signal_to_the_launcher_saves_one_checkpoint_and_ends_every_rank(number, how, curated, by_two):
    process = launches.begin(curated, how(curated, 2, *TRAIN, "--set", "runtime.save_steps=100"))
    launches.wait_until(lambda: launches.steps_taken(curated), process)
    ranks = [launches.rank_of(process, r) for r in (0, 1)]
    process.send_signal(number)
    text = process.communicate(timeout=60)[0]
    assert not launches.alive(ranks)
    assert process.returncode == (128 + number if how is launches.ours else 1)
    assert text.count("saving and stopping") == 1
    assert len(launches.complete(curated)) == 1 and launches.complete(curated)[0] < 12
    assert curated.show()["stages"]["train"]["status"] == "partial"
    if how is launches.ours:  # what ends in one state goes on in one way, whatever launches it
        launches.finish(curated, how(curated, 2, *TRAIN))
        assert launches.adapter(curated).read_bytes() == by_two


@pytest.mark.slow
def test_two_launches_at_once_train_once(curated, by_two):
    both = [launches.begin(curated, launches.ours(curated, 2, *TRAIN)) for _ in range(2)]
    texts = [p.communicate(timeout=300)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], texts
    begun = [line for text in texts for line in text.splitlines() if line == "train …"]
    assert len(begun) == 1, texts  # the waiting one repeats the builder's words behind its own
    assert launches.adapter(curated).read_bytes() == by_two


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_no_rank_behind(curated):
    process = launches.begin(curated, launches.ours(curated, 2, *TRAIN, "--set", "runtime.save_steps=100"))
    launches.wait_until(lambda: launches.steps_taken(curated), process)
    ranks = [launches.rank_of(process, r) for r in (0, 1)]
    process.kill()
    process.communicate(timeout=60)  # its pipe closes with the last rank
    assert not launches.alive(ranks)
    assert launches.complete(curated)


@pytest.mark.slow
def test_a_batch_that_does_not_divide_names_the_numbers_that_do(curated):
    text = launches.finish(curated, launches.ours(curated, 2, *TRAIN, "--set", "train.batch_rows=15"), status=2)
    assert text.strip() == (
        "train.batch_rows 15 cannot be shared by 2 processes; use 1, 3, 5, 15 processes, or a batch_rows that 2 divides"
    )


@pytest.mark.slow
def test_a_wrong_recipe_is_told_once(curated):
    mistake = ("--set", "train.batch_row=2")
    text = launches.finish(curated, launches.ours(curated, 2, *mistake), status=2)
    assert text.count("did you mean batch_rows?") == 1 and len(text.splitlines()) == 1
    text = launches.finish(curated, launches.accelerate(curated, 2, *mistake), status=1)  # torch's launcher says 1
    assert text.count("did you mean batch_rows?") == 1


@pytest.mark.slow
def test_a_training_goes_on_with_its_batch_under_another_sharing(by_one, curated):
    """(processes, micro-batch) before the kill and after it: the recipe's batch is shared out otherwise."""
    before, after = (2, 1), (1, 2)

    def command(shape):
        micro = f"runtime.micro_batch_rows={shape[1]}"
        return launches.ours(curated, shape[0], *NO_DROPOUT, *MORE_ROWS, "--set", micro)

    process = launches.begin(curated, command(before))
    launches.wait_until(lambda: 4 in launches.complete(curated), process)
    process.kill()
    process.communicate(timeout=60)
    text = launches.finish(curated, command(after))
    assert "goes on from checkpoint-" in text and "the batch stays 4 rows" in text
    (first,) = curated.show()["stages"]["train"]["metrics"]["shared_before"]
    assert (first["processes"], first["micro_batch_rows"], first["batch_rows"]) == (*before, 4)
    for word, was, now in zip(("processes", "micro_batch_rows"), before, after, strict=True):
        assert f"{word} was {was}, is {now}" in text
    assert_same_training([by_one, curated], [1, after[0]], atol=1e-4)

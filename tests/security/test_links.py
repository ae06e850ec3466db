"""No link out of artifacts or scratch is followed: nothing outside them is deleted, written or read."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from finetune.errors import FinetuneError, InputError
from finetune.pipeline.leases import acquire
from finetune.pipeline.runs import Run, latest_run, read_run
from finetune.utils import links
from tests.report.made_run import RUN, MadeRun
from tests.security.conftest import Command, listing, roots


def never() -> None:
    """Nothing stops this build."""


@pytest.mark.parametrize("place", ["train/linked", "dedup/linked"])
def test_clean_drops_a_link_in_the_store_and_leaves_what_it_names(
    place: str, made: MadeRun, foreign: Path, finetune: Command
) -> None:
    before = listing(foreign)
    link = made.store.artifacts / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(foreign)
    ended = finetune("clean", "--yes", *roots(made), status=0)
    assert f"{link} (a link; what it names stays)" in ended.out
    assert not link.is_symlink() and listing(foreign) == before


@pytest.mark.parametrize("place", ["runs", "runs/made", "runs/other", f"runs/made/{RUN}", "train", "dedup"])
def test_clean_refuses_where_a_folder_of_the_store_is_a_link_out_of_it(
    place: str, made: MadeRun, foreign: Path, finetune: Command
) -> None:
    """What its runs use is not known then, so nothing at all may go."""
    link = made.store.artifacts / place
    if link.exists():
        shutil.rmtree(link)
    link.symlink_to(foreign)
    outside, inside = listing(foreign), listing(made.store.artifacts)
    ended = finetune("clean", "--yes", *roots(made), status=2)
    assert str(link) in ended.err and "link" in ended.err
    assert listing(foreign) == outside and listing(made.store.artifacts) == inside


def test_a_root_that_is_a_link_itself_is_a_persons_choice(made: MadeRun, tmp_path: Path, finetune: Command) -> None:
    (tmp_path / "drive").symlink_to(made.store.artifacts)
    unused = made.store.artifacts / "train" / "0000" / "old"
    unused.parent.mkdir(parents=True)
    unused.write_text("x")
    words = ["--artifacts", tmp_path / "drive", "--scratch", made.store.scratch]
    finetune("show", "made", *words, status=0)
    finetune("clean", "--yes", *words, status=0)
    assert not unused.exists()


def test_two_cleans_at_once_both_end(made: MadeRun) -> None:
    from finetune.cli.runs import remove, unused

    for number in range(40):
        folder = made.store.artifacts / "dedup" / f"old{number}"
        (folder / "deep").mkdir(parents=True)
        for name in ("manifest.json", "deep/a", "deep/b"):
            (folder / name).write_text("x")
    items, failed = unused(made.store, 1), list[BaseException]()

    def clean() -> None:
        try:
            remove(made.store, items)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=clean) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and unused(made.store, 1) == []


@pytest.mark.parametrize("name", ["..", "../../foreign/inner", "/etc", "x/../../..", ""])
def test_a_run_is_not_read_from_another_folder(name: str, made: MadeRun, foreign: Path) -> None:
    parent = made.store.artifacts / "runs" / "made"
    (parent / "latest").write_text(name)
    assert latest_run(parent) is None
    if name:
        with pytest.raises(InputError):
            read_run(made.store.artifacts, "made", name)
    assert read_run(made.store.artifacts, "made", None)["folder"].parent == parent  # the newest that is there
    with pytest.raises(InputError):
        read_run(made.store.artifacts, name or "..", None)


def test_a_record_whose_key_leads_out_of_the_store_is_refused(made: MadeRun, foreign: Path, finetune: Command) -> None:
    made.stages["train"] |= {"key": "../../foreign"}
    made.save()
    assert "run.json" in finetune("show", "made", *roots(made), status=2).err


@pytest.mark.parametrize("place", ["runs/made", f"runs/made/{RUN}", f"runs/made/{RUN}/run.json"])
def test_show_and_report_read_no_run_through_a_link(
    place: str, made: MadeRun, tmp_path: Path, finetune: Command
) -> None:
    source = made.store.artifacts / place
    source.rename(tmp_path / "elsewhere")
    source.symlink_to(tmp_path / "elsewhere")
    before = listing(tmp_path / "elsewhere") if source.is_dir() else {}
    for words in (["show"], ["report"]):
        assert "link" in finetune(*words, "made", *roots(made), status=2).err
    assert not before or listing(tmp_path / "elsewhere") == before


@pytest.mark.parametrize("name", ["report.html", "receipt.json"])
def test_nothing_is_written_through_a_link_in_a_runs_folder(
    name: str, made: MadeRun, foreign: Path, finetune: Command
) -> None:
    (made.store.artifacts / "runs/made" / RUN / name).symlink_to(foreign / "manifest.json")
    assert "link" in finetune("report", "made", *roots(made), status=2).err
    assert (foreign / "manifest.json").read_text() == "precious"


def test_a_run_is_not_begun_below_a_link(tmp_path: Path, foreign: Path) -> None:
    (tmp_path / "artifacts" / "runs").mkdir(parents=True)
    (tmp_path / "artifacts" / "runs" / "made").symlink_to(foreign)
    before = listing(foreign)
    with pytest.raises(InputError, match="link"):
        Run(tmp_path / "artifacts", "made", "", (), "0" * 8, write=True).begin()
    assert listing(foreign) == before


def test_a_stage_that_is_a_link_is_not_found_and_not_built(made: MadeRun, foreign: Path) -> None:
    folder = made.folder("dedup")
    assert made.store.find(folder) is not None
    shutil.move(folder, foreign / "moved")
    folder.symlink_to(foreign / "moved")
    before = listing(foreign)
    assert made.store.find(folder) is None
    with pytest.raises(InputError, match="is a link"), made.store.lease(folder, str, never):
        pass
    assert listing(foreign) == before


def test_a_file_of_a_stage_that_is_a_link_out_of_it_is_not_read(made: MadeRun, foreign: Path) -> None:
    folder = made.folder("dedup")
    file = next(p for p in sorted(folder.iterdir()) if p.name != "manifest.json")
    shutil.move(file, foreign / file.name)
    file.symlink_to(foreign / file.name)
    assert made.store.find(folder) is None


@pytest.mark.parametrize("kind", ["link", "folder link", "dangling", "pipe"])
def test_a_build_that_goes_on_in_a_folder_with_a_link_out_of_it_is_refused(
    kind: str, made: MadeRun, foreign: Path
) -> None:
    """As a checkpoints folder that leads elsewhere: a trainer would write there, and delete there."""
    folder = made.store.folder("train", "0" * 16)
    folder.mkdir(parents=True)
    entry = folder / "checkpoints"
    if kind == "pipe":
        os.mkfifo(entry)
    else:
        entry.symlink_to({"link": foreign / "manifest.json", "folder link": foreign}.get(kind, foreign / "none"))
    with pytest.raises(InputError, match="checkpoints is"), made.store.lease(folder, str, never):
        pass
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoints"]


def test_fresh_clears_a_link_and_not_what_it_names(made: MadeRun, foreign: Path) -> None:
    folder, before = made.folder("dedup"), listing(foreign)
    (folder / "linked").symlink_to(foreign)
    made.store.clear(folder)
    assert list(folder.iterdir()) == [] and listing(foreign) == before


def test_a_checkpoint_that_is_a_link_is_dropped_and_its_target_stays(tmp_path: Path, foreign: Path) -> None:
    from finetune.train.checkpoint import last_checkpoint

    before = listing(foreign)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-3").symlink_to(foreign)
    assert last_checkpoint(tmp_path / "checkpoints", remove_incomplete=True) is None
    assert not list((tmp_path / "checkpoints").iterdir()) and listing(foreign) == before


def test_kept_embeddings_and_4_bit_copies_stay_within_scratch(tmp_path: Path, foreign: Path) -> None:
    from finetune.dedup import embedding_cache
    from finetune.models import quantized_cache

    scratch, before = tmp_path / "scratch", listing(foreign)
    (scratch / "embeddings").mkdir(parents=True)
    (scratch / "embeddings" / "model").symlink_to(foreign)
    cache = embedding_cache.EmbeddingCache(scratch, {}, str)
    embedding_cache.MAX_SHARDS, kept = 0, embedding_cache.MAX_SHARDS
    try:
        cache._bound()
    finally:
        embedding_cache.MAX_SHARDS = kept
    (scratch / "quantized").mkdir()
    (scratch / "quantized" / "copy").symlink_to(foreign)
    assert quantized_cache.unneeded(scratch, []) == [scratch / "quantized" / "copy"]
    links.remove(scratch / "quantized" / "copy", scratch)
    assert listing(foreign) == before
    (scratch / "quantized").rmdir()
    (scratch / "quantized").symlink_to(foreign)
    with pytest.raises(InputError, match="link"):
        quantized_cache.unneeded(scratch, [])


def test_a_pipe_in_place_of_a_lease_record_or_manifest_is_not_waited_for(made: MadeRun, finetune: Command) -> None:
    folder = made.folder("dedup")
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    assert made.store.find(folder) is None
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "lease.000001.json")
    with pytest.raises(InputError, match="pipe"), made.store.lease(folder, str, never):
        pass
    record = made.store.artifacts / "runs/made" / RUN / "run.json"
    record.unlink()
    os.mkfifo(record)
    assert finetune("show", "made", *roots(made)).status == 2


def test_a_lease_goes_on_as_before(made: MadeRun) -> None:
    """The silent side: a plain folder, also one with links that stay in it."""
    folder = made.folder("dedup")
    (folder / "again").symlink_to("manifest.json")
    with made.store.lease(folder, str, never):
        pass
    assert made.store.find(folder) is not None
    acquire(folder, str, never).release()


def test_a_disk_that_refuses_a_deletion_is_one_sentence(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.cli.runs import Unused, remove

    def refuse(*words: object) -> None:
        raise PermissionError(13, "Permission denied", "here")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(FinetuneError, match="here: cannot be deleted: Permission denied"):
        remove(made.store, [Unused(made.folder("dedup"), 1)])


def test_the_mirror_sends_and_places_nothing_through_a_link(made: MadeRun, foreign: Path, tmp_path: Path) -> None:
    from finetune.pipeline.mirror import Mirror, _names
    from tests.stages.finished import context

    folder = made.store.artifacts / "train" / "partial"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "own").write_text("x")
    (folder / "checkpoints" / "checkpoint-1").symlink_to(foreign)
    (folder / "secret").symlink_to(foreign / "manifest.json")
    assert _names(folder) == {"own"}
    run = Run(made.store.artifacts, "made", "", (), "0" * 8, write=False)
    run.folder = made.store.artifacts / "runs" / "made" / RUN
    (run.folder / "secret.json").symlink_to(foreign / "manifest.json")
    mirror = Mirror("me/x", made.store, run, context(tmp_path))
    assert not any("secret" in name for name in mirror._record())
    key = "ab" * 16
    made.store.folder("dedup", key).symlink_to(foreign)
    before = listing(foreign)
    with pytest.raises(InputError, match="link"):
        mirror._pull_stage("dedup", key, {}, tmp_path / "incoming", fresh=False)
    assert listing(foreign) == before

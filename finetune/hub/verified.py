"""Verify downloaded files against the hashes that the Hub lists; each file is read once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError
from finetune.hub.client import announced as announced_hash
from finetune.hub.client import hub_digest
from finetune.utils.files import canonical_json, read_json, replace_bytes

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

BLOB = {64: "sha256", 40: "git_sha1"}  # length of a blob's name in the Hub's cache → kind of hash


def require_announced(
    snapshot: Path,
    repo_id: str,
    listed: Iterable[RepoFile] | None,
    say: Callable[[str], None],
    *,
    weights: bool = True,
) -> None:
    """Compare the hash of every file of a snapshot with the one that the Hub lists.

    If `weights` is False, safetensors files are skipped.

    `snapshot` is `…/models--OWNER--NAME/snapshots/COMMIT`. `listed` is the Hub's listing of that commit, if known;
    without it the blobs' names are used, which are the ETags received with the files. Compared files (size and mtime)
    are recorded next to the snapshots, so a later call reads no file again.

    Raises FinetuneError for a file whose bytes differ; it is removed, so that the next run downloads it again.
    """
    record = _record(snapshot)
    kept = _kept(record)
    announced: dict[str, list[Any]] = kept["announced"]
    if listed is not None:
        announced = {f.path: list(announced_hash(f)) for f in listed}
    seen: dict[str, list[int]] = dict(kept["seen"])
    for path in sorted(p for p in snapshot.rglob("*") if p.is_file()):
        name, stat = path.relative_to(snapshot).as_posix(), path.stat()
        state = [stat.st_size, stat.st_mtime_ns]
        known = seen.get(name) == state and kept["announced"].get(name) == announced.get(name)
        if known or (not weights and name.endswith(".safetensors")):
            continue
        seen[name] = state
        kind, expected = announced.get(name) or _by_blob(path)
        if not expected:
            say(f"{repo_id}: no hash of {name} is known; it is used unverified")
            continue
        if (digest := hub_digest(path, stat.st_size, kind)) != expected:
            with suppress(OSError):
                blob = path.resolve()
                path.unlink(missing_ok=True)
                if blob.is_relative_to(snapshot.parent.parent.resolve()):
                    blob.unlink(missing_ok=True)
            raise FinetuneError(
                f"{repo_id}: {name} differs from the Hub's announcement: {kind} {digest[:16]}…, announced "
                f"{expected[:16]}…; it was removed: run the same command again, and if that fails too, check the "
                "mirror or proxy in between"
            )
    if {"announced": announced, "seen": seen} != kept:
        with suppress(OSError):  # the next run then reads the files again
            replace_bytes(record, canonical_json({"announced": announced, "seen": seen}).encode())


def announced_weights(snapshot: Path) -> dict[str, str]:
    """Return safetensors file → the sha256 that the Hub listed for it when the snapshot was fetched."""
    announced = _kept(_record(snapshot))["announced"]
    return {n: str(d) for n, (kind, d) in sorted(announced.items()) if kind == "sha256" and n.endswith(".safetensors")}


def is_recorded(snapshot: Path) -> bool:
    """Return whether the files of a snapshot were compared before."""
    return _record(snapshot).is_file()


def _record(snapshot: Path) -> Path:
    return snapshot.parent.parent / f"verified-{snapshot.name}.json"


def _by_blob(path: Path) -> tuple[str, str]:
    """Return (kind, hash) from the name of the blob that a snapshot's file links to; empty if it is not a hash."""
    name = path.resolve().name if path.is_symlink() else ""
    return (BLOB[len(name)], name) if len(name) in BLOB and re.fullmatch("[0-9a-f]+", name) else ("", "")


def _kept(record: Path) -> dict[str, dict[str, Any]]:
    try:
        value = read_json(record)
        parts = {part: dict(value[part]) for part in ("announced", "seen")}
    except (OSError, ValueError, KeyError, TypeError):
        return {"announced": {}, "seen": {}}
    pairs = all(isinstance(v, list) and len(v) == 2 for part in parts.values() for v in part.values())
    return parts if pairs else {"announced": {}, "seen": {}}

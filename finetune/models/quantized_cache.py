"""A 4-bit copy of a large base in scratch: a restart reads 4 GB that are ready, not 14.5 GB to quantise again.

A cache and no stage: what it holds is bitwise what quantising on the fly gives, and it can go at any time. A copy is
written under a name of its own and moved into place when its manifest is written, last.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.context import Context
from finetune.utils import links
from finetune.utils.files import canonical_json, hash_file, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune import recipe

FOLDER = "quantized"
MANIFEST = "manifest.json"
LARGE_BYTES = 2_000_000_000  # of the base in 16 bits: smaller ones are quantised in no time
SHARD_BYTES = "1GB"  # RAM that writing a copy takes, beside the model
SPARE_BYTES = 1_000_000_000
_PACKAGES = ("bitsandbytes", "torch", "transformers")


def wanted(choice: str, parameters: int) -> bool:
    """Return whether a base with this number of parameters gets a copy."""
    return choice == "always" or (choice == "auto" and 2 * parameters >= LARGE_BYTES)


def identity(base: Path) -> dict[str, Any]:
    """Return the identity of the base pinned in a base stage's folder."""
    pinned = read_json(base / "base.json")
    return {name: pinned.get(name) for name in ("id", "revision", "weights")}


def locate(scratch: Path, base: Path, quantization: recipe.Quantization, dtype: str) -> tuple[Path, dict[str, Any]]:
    """Folder of the copy, which may not exist, and its source: base, settings, dtype and library versions."""
    about = {
        "base": identity(base),
        "quantization": quantization.model_dump(mode="json"),
        "dtype": dtype,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    return scratch / FOLDER / hashlib.sha256(canonical_json(about).encode()).hexdigest()[:16], about


def find(folder: Path, about: dict[str, Any], ctx: Context) -> bool:
    """Whether `folder` holds a whole copy; every byte is read, and one that is not as it was written is removed."""
    if not folder.is_dir():
        return False
    links.require_inside(folder, folder.parent.parent)
    wrong = _fault(folder, about)
    if wrong is None:
        return True
    ctx.say(f"base: the 4-bit copy in {folder} is stale ({wrong}); rebuilding")
    if ctx.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return False


def _fault(folder: Path, about: dict[str, Any]) -> str | None:
    try:
        manifest = read_json(folder / MANIFEST)
        if manifest["about"] != about:
            return "it is a copy of something else"
        for name, (size, digest) in sorted(manifest["files"].items()):
            path = folder / name
            if path.stat().st_size != size or hash_file(path) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    return None


def write(model: PreTrainedModel, folder: Path, about: dict[str, Any], needed: int, ctx: Context) -> None:
    """Write a copy of the quantised `model` (about `needed` bytes) to `folder`.

    A disk without room for it is not an error: the copy only saves time.
    """
    from safetensors import SafetensorError

    links.require_inside(folder, folder.parent.parent)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder.parent)
    free = shutil.disk_usage(folder.parent).free
    if free < needed + SPARE_BYTES:
        ctx.say(
            f"base: no 4-bit copy is kept: {free / 1e9:.1f} GB free in {folder.parent}, it takes {needed / 1e9:.1f}"
        )
        return
    unfinished = folder.with_name(f"{folder.name}-{os.getpid()}")
    try:
        model.save_pretrained(str(unfinished), max_shard_size=SHARD_BYTES)
        files = {p.name: [p.stat().st_size, hash_file(p)] for p in sorted(unfinished.iterdir())}
        for name in files:
            with (unfinished / name).open("rb") as file:
                os.fsync(file.fileno())
        write_json(unfinished / MANIFEST, {"about": about, "files": files})
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:  # a full disk, or another run was first
        ctx.say(f"base: no 4-bit copy is kept: {error}")
        shutil.rmtree(unfinished, ignore_errors=True)
        return
    ctx.say(f"base: a 4-bit copy is kept in {folder}, for the next start")


def remove_unfinished(root: Path) -> None:
    """Drop what a process that is gone had begun to write."""
    for folder in root.glob("*-*"):
        process = folder.name.rpartition("-")[2]
        if process.isdigit() and int(process) != os.getpid() and not _alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def exists(scratch: Path, base: Path) -> bool:
    """Whether there is a copy of the base pinned in the folder `base`, of whatever settings."""
    return any(_copied(folder) == identity(base) for folder in (scratch / FOLDER).glob("*"))


def _copied(folder: Path) -> object:
    """Return the base that a folder is a copy of; None for one without a manifest."""
    try:
        return read_json(folder / MANIFEST)["about"]["base"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def unneeded(scratch: Path, bases: Sequence[Path]) -> list[Path]:
    """Return the copies of other bases than those pinned in the folders `bases`, and unfinished copies."""
    kept = [identity(base) for base in bases]
    folders = []
    links.require_inside(scratch / FOLDER, scratch)
    for folder in sorted(p for p in (scratch / FOLDER).glob("*") if p.is_dir()):
        process = folder.name.rpartition("-")[2] if "-" in folder.name else ""
        if process.isdigit() and _alive(int(process)):
            continue
        folders += [] if not folder.is_symlink() and _copied(folder) in kept else [folder]
    return folders


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

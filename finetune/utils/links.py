"""Untrusted folders: no link that leaves them is followed, no pipe or device is opened."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune.errors import InputError

MOST_ENTRIES = 200_000  # in one folder that is scanned
MOST_BYTES = 128 << 20  # of a file that is read whole: settings, records; the largest tokenizer.json has 35 MB
SPECIAL = "a pipe, a socket or a device, not a regular file"


def way_out(path: Path, root: Path) -> Path | None:
    """Return the first link between `root` and `path` that leads out of `root`, else None. `root` may be a link.

    Returns `path` itself if it is not below `root` or contains `..`.
    """
    try:
        parts = path.relative_to(root).parts
    except ValueError:
        return path
    if ".." in parts:
        return path
    at, real = root, ""
    for part in parts:
        at = at / part
        if at.is_symlink():
            real = real or os.path.realpath(root)
            if not _inside(os.path.realpath(at), real):
                return at
    return None


def require_inside(path: Path, root: Path) -> None:
    """Raise InputError if a link between `root` and `path` leads out of `root`."""
    if (link := way_out(path, root)) is not None:
        what = f"is a link to {os.path.realpath(link)}, outside" if link.is_symlink() else "is not below"
        raise InputError(
            f"{link} {what} {root}; nothing is read, written or deleted through it: remove it, or put the folder "
            "itself there"
        )


def require_plain(folder: Path, root: Path, what: str = "", beside: Sequence[Path] = ()) -> None:
    """Raise InputError unless `folder` holds only regular files, folders, and links to them below `root`.

    A link may also lead below one of the folders `beside`. Nothing is opened. `what` begins the message.
    """
    require_inside(folder, root)
    allowed = [os.path.realpath(root), *(str(Path(os.path.realpath(p.parent), p.name)) for p in beside)]
    for count, entry in enumerate(_walk(folder)):
        fault = _fault(entry, allowed)
        if count >= MOST_ENTRIES:
            raise InputError(f"{what}{folder} holds more than {MOST_ENTRIES:,} files; is it the right folder?")
        if fault is not None:
            raise InputError(f"{what}{entry.path} is {fault}; it is not opened: remove it, or put a copy there")


def require_model(folder: Path, what: str) -> None:
    """Raise InputError if the folder of a base, adapter or encoder holds a link that leads elsewhere.

    A folder from a third party can contain a link to any file of this machine. A snapshot in the Hub's cache consists
    of links to `models--OWNER--NAME/blobs`; these are allowed. Hidden folders are not read by any library.
    """
    real = Path(os.path.realpath(folder))
    beside = [real.parent.parent / "blobs"] if real.parent.name == "snapshots" else []
    require_plain(real, real, f"{what}: ", beside)


def _fault(entry: os.DirEntry[str], allowed: Sequence[str]) -> str | None:
    if not entry.is_symlink():
        regular = entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
        return None if regular else SPECIAL
    target = os.path.realpath(entry.path)
    if not any(_inside(target, place) for place in allowed):
        return f"a link to {target}, outside its folder"
    try:
        mode = Path(target).stat().st_mode
    except OSError:
        return f"a link to {target}, which is not there"
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else SPECIAL


def _walk(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """Yield every entry below `folder`, sorted; no link to a folder and no hidden folder is entered.

    A folder that cannot be read yields nothing.
    """
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda e: e.name)
    except OSError:
        return
    for entry in entries:
        yield entry
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from _walk(entry.path)


def remove(path: Path, root: Path) -> None:
    """Delete a file, a link (never its target) or a folder with its contents; a missing path is not an error.

    Raises InputError if a link between `root` and `path` leads out of `root`, OSError if the disk refuses.
    """
    require_inside(path.parent, root)
    while os.path.lexists(path):
        try:
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
            else:
                shutil.rmtree(path)  # does not follow links
        except FileNotFoundError:
            continue  # another process deletes it at the same time


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; none if there is no such folder.

    Raises OSError if it cannot be read. `Path.glob` takes that for an empty folder; what is deleted because nothing
    names it must not depend on it.
    """
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - names
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_regular(path: Path, most: int | None = None) -> bytes:
    """The bytes of a regular file: the first `most`, or all of a file of up to MOST_BYTES.

    Raises OSError for a larger one, and for anything else, also for a pipe, which would be waited for.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, SPECIAL, str(path))
    with path.open("rb") as file:
        if most is None and os.fstat(file.fileno()).st_size > MOST_BYTES:
            raise OSError(errno.EFBIG, f"more than {MOST_BYTES >> 20} MB; is it the right file?", str(path))
        return file.read() if most is None else file.read(most)


def _inside(target: str, root: str) -> bool:
    return target == root or target.startswith(root.rstrip(os.sep) + os.sep)

"""The xxh3-128 of a file, remembered for large ones, so that a base model is not read again at every run."""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from finetune.utils.links import read_regular

CHUNK_BYTES = 1 << 22
REMEMBERED_FROM_BYTES = 8 << 20  # reading a smaller file takes no longer than looking it up
SETTLED_SECONDS = 2.0  # a file changed this recently may change again within one tick of its timestamp
MOST_ENTRIES = 2000


def file_digest(path: Path) -> str:
    """The xxh3-128 of the file's bytes, 32 hexadecimal digits.

    A large file's digest is kept under (path, size, mtime_ns) in `$XDG_CACHE_HOME/finetune/digests.json`. A cache that
    cannot be read or written only costs time. Raises OSError where the file itself cannot be read.
    """
    path = path.resolve()
    stat = path.stat()
    if stat.st_size < REMEMBERED_FROM_BYTES:
        return hash_file(path)
    cache, key = cache_file(), f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
    known = _read(cache)
    if key in known:
        return known[key]
    digest = hash_file(path)
    after = path.stat()
    unchanged = (after.st_size, after.st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    if unchanged and time.time() - stat.st_mtime > SETTLED_SECONDS:
        _write(cache, {**_read(cache), key: digest})
    return digest


def cache_file() -> Path:
    """Where digests are remembered."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(home) if Path(home).is_absolute() else Path("~/.cache").expanduser()
    return root / "finetune" / "digests.json"


def hash_file(path: Path) -> str:
    """The xxh3-128 of the file's bytes, read now. Raises OSError."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _read(cache: Path) -> dict[str, str]:
    try:
        value = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = value.items() if isinstance(value, dict) else ()
    return {k: v for k, v in entries if isinstance(v, str) and len(v) == 32}


def _write(cache: Path, entries: dict[str, str]) -> None:
    """Replace the cache in one step; the newest entries stay."""
    newest = dict(list(entries.items())[-MOST_ENTRIES:])
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=cache.parent, prefix=".digests-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(newest, file)
            Path(name).replace(cache)
        except OSError:
            Path(name).unlink(missing_ok=True)
    except OSError:
        return


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`; symbolic links are neither counted nor followed."""
    total = 0
    for path in [folder] if folder.is_symlink() or not folder.is_dir() else folder.iterdir():
        if path.is_symlink():
            continue
        if path.is_dir():
            total += tree_bytes(path)
        else:
            with suppress(OSError):  # removed meanwhile
                total += path.stat().st_size
    return total


_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))  # made once, for every row


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces, so that equal values are equal bytes."""
    return _CANONICAL.encode(value)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON with sorted keys, synced to disk."""
    write_bytes(path, (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write and fsync, so that a manifest written later never names bytes a power cut lost."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file whose readers see the old bytes or the new ones, never half of them."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        write_bytes(part, content)
        part.replace(path)
    except OSError:
        with suppress(OSError):  # on a full disk half a file would lie there for good, and take room
            part.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:  # noqa: ANN401 - JSON
    """The JSON value in `path`. Raises OSError where it is no regular file, ValueError where it is no JSON."""
    try:
        return json.loads(read_regular(path).decode())
    except RecursionError:
        raise ValueError(f"{path}: JSON nested too deeply") from None

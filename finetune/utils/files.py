"""File digests (xxh3-128, cached for large files), canonical JSON, and atomic, synced writes."""

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
    """Return the xxh3-128 of the file's bytes, 32 hexadecimal digits.

    A large file's digest is kept under (path, size, mtime_ns) in `$XDG_CACHE_HOME/finetune/digests.json`. A cache that
    cannot be read or written only costs time. Raises OSError if the file itself cannot be read.
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
    """Return the path of the digest cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(home) if Path(home).is_absolute() else Path("~/.cache").expanduser()
    return root / "finetune" / "digests.json"


def hash_file(path: Path) -> str:
    """Return the xxh3-128 of the file's bytes without using the cache. Raises OSError."""
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
    """Replace the cache atomically; the newest entries are kept."""
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
    """Return the bytes of all files below `folder`; symbolic links are neither counted nor followed."""
    total = 0
    for path in [folder] if folder.is_symlink() or not folder.is_dir() else folder.iterdir():
        if path.is_symlink():
            continue
        if path.is_dir():
            total += tree_bytes(path)
        else:
            with suppress(OSError):  # removed by another process
                total += path.stat().st_size
    return total


_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))  # one encoder for all rows


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and no spaces: equal values give equal bytes."""
    return _CANONICAL.encode(value)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON with sorted keys, synced to disk."""
    write_bytes(path, (json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write and fsync, so that a manifest written later never names bytes that a power cut lost."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically: a reader sees the old bytes or the new ones, never a mixture."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        write_bytes(part, content)
        part.replace(path)
    except OSError:
        with suppress(OSError):  # on a full disk a partial file would stay and take space
            part.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:  # noqa: ANN401 - JSON, as json.loads is typed
    """Return the JSON value in `path`. Raises OSError as `read_regular` does, ValueError if it is not JSON."""
    try:
        return json.loads(read_regular(path).decode())
    except RecursionError:
        raise ValueError(f"{path}: JSON nested too deeply") from None

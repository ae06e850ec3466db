"""Cache of vectors by the digest of their text, in scratch: after a change of the filter only new rows are embedded.

`scratch/embeddings/KEY/*.parquet`, with one KEY per model version. A shard is written once under a unique name and
moved into place by a rename, so processes never write the same file; a text in two shards has the same vector. All of
it can be recomputed: unreadable shards are removed, and the oldest ones above MAX_BYTES.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.utils import links
from finetune.utils.files import canonical_json
from finetune.utils.format import first_line

DIGEST_BYTES = 16
MAX_BYTES = 8 << 30  # of all models together: five million vectors of 384 numbers
MAX_SHARDS = 2000
ABANDONED_SECONDS = 86_400


class EmbeddingCache:
    """The cached vectors of one model."""

    def __init__(self, scratch: Path, made_by: Mapping[str, object], say: Callable[[str], None]) -> None:
        """Open the cache for `made_by`: all that changes a vector (the model's digest or revision, the precision).

        `say` receives a line for shards that could not be read or written.
        """
        name = hashlib.blake2b(canonical_json(dict(made_by)).encode(), digest_size=DIGEST_BYTES).hexdigest()
        self._root = scratch / "embeddings"
        self._folder = self._root / name
        links.require_inside(self._folder, scratch)
        self._say = say

    def find(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the positions in `texts` (ascending) that have a vector, and those vectors (M, d); each text once."""
        places = {text_digest(text): i for i, text in enumerate(texts)}
        rows: list[int] = []
        cached: list[NDArray[np.float32]] = []
        for shard in sorted(self._folder.glob("*.parquet")):
            read = self._read(shard)
            if read is None or (cached and read[1].shape[1] != cached[0].shape[1]):
                continue
            digests, vectors = read
            here = [(k, places.pop(d)) for k, d in enumerate(digests) if d in places]
            if here:
                cached.append(vectors[[k for k, _ in here]])
                rows += [place for _, place in here]
        if not rows:
            return np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
        order = np.argsort(rows)
        return np.array(rows, np.int64)[order], np.concatenate(cached)[order]

    def keep(self, texts: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Add a shard with the vectors (N, d) of `texts`. A failed write only costs the next run time."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        digests = pa.array([text_digest(text) for text in texts], pa.binary(DIGEST_BYTES))
        wide = np.ascontiguousarray(vectors, np.float32)
        packed = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(4 * wide.shape[1]), len(wide), [None, pa.py_buffer(wide.data)]
        )
        temporary = self._folder / f".{uuid.uuid4().hex}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            table = pa.table({"digest": digests, "vector": packed})
            pq.write_table(table, temporary, compression="none", use_dictionary=False, write_page_checksum=True)
            temporary.replace(temporary.with_name(f"{temporary.name[1:]}.parquet"))
        except OSError as error:
            self._say(f"embeddings cannot be cached for the next run: {error.strerror or error}")
            with suppress(OSError):
                temporary.unlink()
            return
        self._bound()

    def _read(self, shard: Path) -> tuple[list[bytes], NDArray[np.float32]] | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(shard, page_checksum_verification=True).combine_chunks()
            kept = table.column("vector").combine_chunks()
            vectors = np.frombuffer(kept.buffers()[1], np.float32, offset=0).reshape(len(table), -1)
            if not np.isfinite(vectors).all():
                raise ValueError("a vector is not finite")
            os.utime(shard)  # marks the shard as recently used
            return table.column("digest").to_pylist(), vectors
        except FileNotFoundError:
            return None  # removed by another process as the oldest
        except (pa.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
            why = first_line(error)
            self._say(f"cached embeddings in {shard} cannot be read and are recomputed: {why}")
            shard.unlink(missing_ok=True)
            return None

    def _bound(self) -> None:
        """Remove the least recently used shards, of any model, until the cache is within its limits."""
        shards = []
        own = [p for p in self._root.glob("*") if links.way_out(p, self._root) is None]
        for left in (p for folder in own for p in folder.glob(".*")):  # left by a process that was killed while writing
            with suppress(OSError):
                if left.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                    left.unlink()
        for path in (p for folder in own for p in folder.glob("*.parquet")):
            try:
                stat = path.stat()
            except OSError:
                continue  # removed meanwhile
            shards.append((stat.st_mtime_ns, stat.st_size, path))
        total, count = sum(size for _, size, _ in shards), len(shards)
        for _, size, path in sorted(shards):
            if total <= MAX_BYTES and count <= MAX_SHARDS:
                return
            path.unlink(missing_ok=True)
            total, count = total - size, count - 1


def text_digest(text: str) -> bytes:
    """Return a 16-byte digest of the unnormalised text, because a model may see more than the exact-duplicate key."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()

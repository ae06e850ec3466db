"""Best-fit packing by TRL, with the two things it lacks: row ids that survive, and a proof of what came out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from finetune.errors import FinetuneError, GateRefused
from finetune.utils.quiet import no_bars


@dataclass(frozen=True, slots=True)
class Packed:
    """Bins. `table`: input_ids, labels and seq_lengths (list<int32>), a row a bin.

    `documents`: for each bin the indices of the input rows it holds, in order.
    """

    table: pa.Table
    documents: list[list[int]]


def packed_schema() -> pa.Schema:
    """Return the columns of packed rows."""
    return pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "labels", "seq_lengths")])


def pack(input_ids: pa.ListArray, mask: pa.ListArray, length: int, first: int = 0) -> Packed:
    """Lay whole documents into bins of at most `length` tokens (best fit, longest first: arXiv:2404.10830).

    `input_ids` list<int32> and `mask` list<uint8> have equal offsets, a document a row; `first` is the number of the
    first one, for messages. TRL packs inside `map` batches
    of 1,000 rows by default, which wastes about 6 % more; here one batch holds every row.
    Raises GateRefused for a document that is longer than a bin or a bin without a label, FinetuneError if a token or
    a document was lost.
    """
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    sizes = np.diff(input_ids.offsets.to_numpy())
    if len(sizes) and int(sizes.max()) > length:
        raise GateRefused(f"a row of {int(sizes.max())} tokens does not fit pack.length_tokens {length}: raise it")
    flat = input_ids.flatten().to_numpy()
    labels = np.where(mask.flatten().to_numpy() == 1, flat, -100).astype(np.int32)
    # every token carries its row's number through the packing: ids of rows would not survive it
    numbers = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
    columns = {"input_ids": flat.astype(np.int32), "labels": labels, "row": numbers}
    rows = pa.table({name: pa.ListArray.from_arrays(offsets, pa.array(v)) for name, v in columns.items()})
    with no_bars("datasets"):
        done = pack_dataset(
            Dataset(rows),
            seq_length=length,
            strategy="bfd",
            map_kwargs={"batch_size": len(sizes), "keep_in_memory": True, "load_from_cache_file": False},
        )
    packed = done.with_format("arrow")[:].combine_chunks()
    return _proved(packed, flat, labels, sizes, length, first)


def lower_bound(sizes: NDArray[np.int64], length: int) -> int:
    """How many bins of `length` tokens documents of `sizes` (int, (n,), each in 1..length) need at the very least.

    The bound L2 of Martello and Toth (Discrete Applied Mathematics 28, 1990): for a k from 0 to length / 2, documents
    over length - k stand alone, those over length / 2 need a bin each, and of the others those of at least k go first
    into what is left beside these; the largest such count over all k. Raises ValueError for a size out of range.
    """
    if not len(sizes):
        return 0
    if int(sizes.min()) < 1 or int(sizes.max()) > length:
        raise ValueError(f"sizes from {int(sizes.min())} to {int(sizes.max())}; allowed are 1 to {length}")
    counts = np.bincount(sizes, minlength=length + 1)
    number = np.concatenate([[0], np.cumsum(counts)])  # documents under s tokens at [s]
    tokens = np.concatenate([[0], np.cumsum(counts * np.arange(length + 1))])
    half = length // 2
    k = np.arange(half + 1)
    large = number[length + 1] - number[half + 1]  # over half: a bin each
    beside = number[length - k + 1] - number[half + 1]  # of these, at most length - k
    room = beside * length - (tokens[length - k + 1] - tokens[half + 1])
    small = tokens[half + 1] - tokens[k]
    return int((large + np.maximum(0, -(-(small - room) // length))).max())


def _proved(
    packed: pa.Table,
    ids: NDArray[np.int32],
    labels: NDArray[np.int32],
    sizes: NDArray[np.int64],
    length: int,
    first: int,
) -> Packed:
    columns = {name: _list(packed[name]) for name in ("input_ids", "labels", "row", "seq_lengths")}
    flat = {name: column.flatten().to_numpy() for name, column in columns.items()}
    bins, counts = columns["input_ids"].offsets.to_numpy(), columns["seq_lengths"].offsets.to_numpy()
    parts = flat["seq_lengths"].astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(parts)])
    order = flat["row"][starts[:-1]]
    if len(flat["input_ids"]) != len(ids) or not np.array_equal(np.sort(order), np.arange(len(sizes))):
        raise FinetuneError(f"packing made {len(order)} documents of {len(sizes)}: one is lost or doubled")
    source = np.concatenate([[0], np.cumsum(sizes)])[order]
    gather = np.repeat(source - starts[:-1], parts) + np.arange(len(ids))
    whole = np.array_equal(parts, sizes[order]) and np.array_equal(starts[counts], bins)
    if not whole or not all(np.array_equal(flat[n], v[gather]) for n, v in (("input_ids", ids), ("labels", labels))):
        raise FinetuneError("packing changed or cut a document; is TRL's version the one in constraints.txt?")
    if len(bins) > 1 and int(np.diff(bins).max()) > length:
        raise FinetuneError(f"packing made a row of {int(np.diff(bins).max())} tokens; at most {length} were asked for")
    documents = [order[a:b].tolist() for a, b in pairwise(counts)]
    labelled = np.add.reduceat(flat["labels"] != -100, bins[:-1]) if len(ids) else np.zeros(0)
    if (labelled == 0).any():
        bare = [first + row for row in documents[int(np.flatnonzero(labelled == 0)[0])][:5]]
        raise GateRefused(f"a packed row has no supervised token: rows number {bare} of render/train.parquet")
    kept = [columns[field.name].cast(field.type) for field in packed_schema()]
    return Packed(pa.table(kept, schema=packed_schema()), documents)


def _list(column: pa.ChunkedArray) -> pa.ListArray:
    """One list array whose offsets begin at 0."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    if len(array) and array.offsets[0].as_py():
        array = type(array).from_arrays(pa.array(array.offsets.to_numpy() - array.offsets[0].as_py()), array.flatten())
    return array

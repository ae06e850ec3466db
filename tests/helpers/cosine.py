"""Near-duplicates by cosine alone."""

from collections.abc import Sequence

from finetune.dedup.measures import Cosine, NewSearch, Vectors
from finetune.dedup.select import Pair, select


def near_duplicates(
    vectors: Vectors, order: Sequence[int], threshold: float, new_search: NewSearch, block_rows: int = 1024
) -> list[Pair]:
    """`select` without keys: `vectors` (N, d) float32, rows of length 1 or 0."""
    return select(order, None, [Cosine(vectors, threshold, new_search)], block_rows)

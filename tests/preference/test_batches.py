"""How far a micro-batch can be halved without another loss."""

import pytest

from finetune.preference.batches import least


@pytest.mark.parametrize(
    ("micro", "method", "loss", "smallest"),
    [(8, "dpo", "sigmoid", 1), (8, "kto", "kto", 2), (8, "dpo", "aot", 8), (8, "dpo", "aot_unpaired", 8)],
)
def test_the_smallest_micro_batch(micro, method, loss, smallest):
    assert least(micro, method, loss) == smallest

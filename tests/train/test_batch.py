"""A batch sized to the rows: enough steps, few epochs, packed where that is enough."""

import math

from hypothesis import given
from hypothesis import strategies as st

from finetune.train.batch import MOST_EPOCHS, WANTED_STEPS, size_to_rows, sizing_advice


@given(st.integers(1, 200_000), st.floats(0.001, 1))
def test_every_size_has_enough_steps_or_takes_all_it_has(rows, share):
    bins = max(1, math.ceil(rows * share))
    found = size_to_rows(rows, bins)
    units = bins if found.packed else rows
    assert found.steps == found.epochs * math.ceil(units / found.batch_rows) and found.epochs <= MOST_EPOCHS
    assert found.steps >= WANTED_STEPS or (found.batch_rows, found.epochs) == (1, MOST_EPOCHS)


def test_174_rows_in_9_bins_are_more_than_one_step():
    found = size_to_rows(174, 9)
    assert not found.packed and found.steps >= WANTED_STEPS
    assert "pack: null" in sizing_advice(174, 9) and "pack" not in sizing_advice(50_000, 9_000)

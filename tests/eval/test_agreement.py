"""Agreement of two models' next tokens."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.eval.metrics import agreement


def test_agreement() -> None:
    assert agreement(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 4])) == 0.75
    with pytest.raises(ValueError, match="positions"):
        agreement(np.array([], dtype=np.int64), np.array([], dtype=np.int64))

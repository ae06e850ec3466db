"""Keeps the libraries' own chatter off a person's screen while our progress is on it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NOISY = ("trl", "transformers", "accelerate", "peft", "bitsandbytes", "datasets")


@contextmanager
def quiet() -> Iterator[None]:
    """Errors still pass; progress bars, advice and deprecation notes of the training libraries do not."""
    from transformers.utils import logging as transformers_logging

    before = {name: logging.getLogger(name).level for name in _NOISY}
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)

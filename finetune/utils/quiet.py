"""Keep the libraries' own output off the screen while our progress is on it."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NOISY = ("trl", "transformers", "accelerate", "peft", "bitsandbytes", "datasets")
_VERBOSITY = {  # read when the library is imported, also in child processes
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "ACCELERATE_LOG_LEVEL": "ERROR",
    "WANDB_SILENT": "true",
}


def silence_libraries() -> None:
    """Drop warnings and log lines of the libraries for the rest of this process; errors still pass.

    The user's own settings win: `python -W` or PYTHONWARNINGS, and the variables above.
    """
    for name, value in _VERBOSITY.items():
        os.environ.setdefault(name, value)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextmanager
def no_bars(library: str) -> Iterator[None]:
    """Hide the progress bars of `datasets` or `huggingface_hub` inside the block."""
    tqdm = importlib.import_module(f"{library}.utils")
    shown = not tqdm.are_progress_bars_disabled()
    tqdm.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            tqdm.enable_progress_bars()


@contextmanager
def quiet(*more: str) -> Iterator[None]:
    """Drop progress bars, warnings and log lines of the training libraries, and of `more`; errors still pass."""
    from transformers.utils import logging as transformers_logging

    before = {name: logging.getLogger(name).level for name in (*_NOISY, *more)}
    for name in before:
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

"""Language detection with py3langid: a naive Bayes model of about 100 languages, included in its wheel."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from finetune.errors import InputError

PACKAGE = "py3langid"


def missing() -> str | None:
    """Return an error message if the detector is not installed, else None."""
    if importlib.util.find_spec(PACKAGE) is not None:
        return None
    return f"the rule language needs {PACKAGE}, which is not installed (pip install {PACKAGE})"


def detector(languages: Sequence[str]) -> Callable[[str], tuple[str, float]]:
    """Return a function from a text to its language (ISO 639-1) and a probability from 0 to 1.

    The model reads byte sequences, needs no network, and gives the same answer on every machine up to the rounding of
    float32. Raises InputError if it is not installed or does not know one of `languages`.
    """
    if why := missing():
        raise InputError(f"filter.rules: {why}")
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    known = sorted(model.labels)
    if unknown := [code for code in languages if code not in known]:
        raise InputError(f"filter.rules: language: found {', '.join(unknown)}; known are {', '.join(known)}")

    def detect(text: str) -> tuple[str, float]:
        code, confidence = model.classify(text)
        return str(code), float(confidence)

    return detect

"""A base whose classes come with its repository (`auto_map` in config.json): its code goes where its weights go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.utils.files import read_json, write_bytes, write_json

NAMED_IN = ("config.json", "tokenizer_config.json")


def copy_code(source: Path, target: Path) -> None:
    """Copy the Python files of `source` itself: those that auto_map names, and whatever they import."""
    for path in sorted(source.glob("*.py")):
        write_bytes(target / path.name, path.read_bytes())


def settle_code(base: Path, out: Path, say: Callable[[str], None], *, trusted: bool) -> None:
    """Set a finished model folder's references to such code: with trust it has the code, else it names none.

    Without trust transformers' own classes were used, and code that is named and missing fails for users who trust it.
    """
    named = [name for name in NAMED_IN if (out / name).exists() and "auto_map" in read_json(out / name)]
    if not named:
        return
    if trusted:
        copy_code(base, out)
        return
    for name in named:
        config: Mapping[str, Any] = read_json(out / name)
        write_json(out / name, {k: v for k, v in config.items() if k != "auto_map"})
    say(
        f"auto_map is taken out of {' and '.join(named)}: the base's own code was not used, as "
        "model.trust_remote_code is false"
    )

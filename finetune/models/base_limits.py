"""Untrusted parts of a base: limits on config.json and tokenizer.json, and the Python code beside them."""

from __future__ import annotations

import base64
import binascii
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError, InputError, from_outside, how_it_ended
from finetune.utils.files import read_json, write_bytes, write_json
from finetune.utils.limits import reading

MOST_LAYERS = 2000  # the deepest base has 126
LAYERS = re.compile(r"(n|num)_(\w+_)?layers?")
MOST_GROWTH = 256.0  # of a text, by all replacements together; a usual tokenizer's is 1
NAMED_IN = ("config.json", "tokenizer_config.json")  # where auto_map names code
MOST_NAMED = 200  # characters that its patterns name, each tried in a run of 400
CPU_SECONDS, CLOCK_SECONDS = 10, 120
MEMORY_BYTES = 2 << 30
# Runs of one character make a pattern that backtracks do so for ever, and a chain of replacements grow.
PROBE_TEXTS = (
    "".join(map(chr, range(32, 127))) * 4,
    *(c * 400 + end for c in "ax 0A.\n\t\u00e9\u4e2d" for end in ("", "!", "b")),
    "The 12 quick brown foxes, don't they?\n\n  " * 40,
)
CHILD = """
import json, resource, sys
asked = json.load(sys.stdin)
for kind, soft, hard in (("CPU", asked["cpu"], asked["cpu"] + 1), ("DATA", asked["memory"], asked["memory"])):
    most = resource.getrlimit(getattr(resource, f"RLIMIT_{kind}"))[1]  # a user's own limit may be lower, and stays
    limits = (soft, hard) if most < 0 else (min(soft, most), min(hard, most))
    resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), limits)
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(asked["file"])
for text in asked["texts"]:
    ids = tokenizer.encode(text).ids
    assert len(ids) <= asked["growth"] * (len(text) + 100), f"{len(ids)} tokens for {len(text)} characters"
    tokenizer.decode(ids)
print("fine")
"""


def check_config(path: Path) -> None:
    """Raise InputError if a config.json is not an object, or has more than MOST_LAYERS layers."""
    with reading(f"{path} is not a configuration"):
        config: Any = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: found a {type(config).__name__}, allowed is an object")
    nested = [value for value in config.values() if isinstance(value, dict)]  # text_config and its like
    for name, value in (item for part in (config, *nested) for item in part.items()):
        if LAYERS.fullmatch(str(name)) and isinstance(value, int | float) and not 0 <= value <= MOST_LAYERS:
            raise InputError(f"{path}: {name} is {value:,}, allowed is up to {MOST_LAYERS:,}; is it what it should be?")


def check_tokenizer(path: Path) -> None:
    """Look a tokenizer.json through and try it out in a process of its own, before it is used here.

    Raises InputError if it is larger, or lets a text grow more, than any tokenizer does, or if its patterns do
    not end on short texts; FinetuneError if another process ended that one. Takes 0.2 s.
    """
    if not path.is_file():
        return
    with reading(f"{path} is not a tokenizer"):
        value: Any = read_json(path)
        if not isinstance(value, dict):
            raise InputError(f"{path}: found a {type(value).__name__}, allowed is an object")
        growth = 1.0
        patterns = "".join(_patterns([value.get("normalizer"), value.get("pre_tokenizer")]))
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            for factor in _growth(value.get(part)):
                growth *= factor
    if growth > MOST_GROWTH:
        raise InputError(
            f"{path}: its replacements may make a text {growth:.3g} times as long, allowed is {MOST_GROWTH:g}; "
            "take the base's own tokenizer"
        )
    # A pattern that never ends does so on runs of characters that it names.
    named = sorted({c for c in patterns if c.isprintable()} - set("ax 0A."))[:MOST_NAMED]
    _try_out(path, [c * 400 + "!" for c in named])


def _patterns(value: object) -> Iterator[str]:
    """The regular expressions in a part of the file."""
    if isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _patterns(inner)
    if isinstance(value, dict) and isinstance(value.get("Regex"), str):
        yield value["Regex"]


def _growth(value: object) -> Iterator[float]:
    """By how much each replacement in a part of the file may lengthen a text; 1 for one that shortens it."""
    if isinstance(value, list):
        for inner in value:
            yield from _growth(inner)
    if not isinstance(value, dict):
        return
    if value.get("type") in ("Replace", "Metaspace") and isinstance(pattern := value.get("pattern", {}), dict):
        new = str(value.get("content", value.get("replacement", "")))
        old = str(pattern.get("String") or " ")  # a regular expression may match one character
        yield max(1.0, len(new) / len(old))
    for name, inner in value.items():
        if name == "precompiled_charsmap" and isinstance(inner, str):
            yield _longest_of(inner)
        elif name != "vocab":
            yield from _growth(inner)


def _longest_of(charsmap: str) -> float:
    """The longest replacement of a character in SentencePiece's table, over the 54 bytes that 18 characters may have.

    The table is a trie behind its length (4 bytes, little endian), then the replacements, each ended by a zero byte.
    """
    try:
        content = base64.b64decode(charsmap)
    except (binascii.Error, ValueError):
        return 1.0  # by its trial
    words = content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")
    return max(1.0, max(map(len, words)) / 54)


def _try_out(path: Path, more: list[str]) -> None:
    asked = {
        "file": str(path), "texts": [*PROBE_TEXTS, *more], "growth": MOST_GROWTH, "cpu": CPU_SECONDS,
        "memory": MEMORY_BYTES,
    }  # fmt: skip
    too_much = (
        f"{path}: it does not end within {CPU_SECONDS} s of work and {MEMORY_BYTES / 1e9:.1f} GB on texts of 400 "
        "characters; take the base's own tokenizer"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", CHILD], input=json.dumps(asked), capture_output=True, text=True,
            errors="replace", check=False, timeout=CLOCK_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise InputError(too_much) from None
    if from_outside(done.returncode) and done.returncode != -9:  # -9 is also what the hard limit on time ends with
        raise FinetuneError(f"the process that tries the tokenizer out {how_it_ended(done.returncode)}; run again")
    if done.returncode < 0:
        raise InputError(too_much)
    if done.returncode:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), "no word")
        raise InputError(f"{path} is not a tokenizer that can be used: {last[:300]}")


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

"""llama.cpp's own quantiser, for the K-quants that the gguf package reads but does not write."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from finetune.context import Context
from finetune.errors import FinetuneError, InputError, from_outside, how_it_ended
from finetune.utils.files import file_digest
from finetune.utils.secrets import redact

# name in a recipe -> bits a weight, about: for the room on the disk (llama.cpp's own table for a Llama 8B)
K_QUANTS = {
    "q6_k": 6.6, "q5_k_m": 5.8, "q5_k_s": 5.6, "q4_k_m": 5.0, "q4_k_s": 4.7,
    "q3_k_l": 4.4, "q3_k_m": 4.1, "q3_k_s": 3.7, "q2_k": 3.2,
}  # fmt: skip
PROGRAM = "llama-quantize"


def require_quantizer(kinds: Iterable[str]) -> str:
    """The path of llama-quantize; "" if no kind needs it. Raises InputError if it is needed and not there."""
    asked = [k for k in kinds if k in K_QUANTS]
    if not asked:
        return ""
    program = shutil.which(PROGRAM)
    if program is None:
        raise InputError(
            f"export.gguf: {', '.join(asked)} is made by llama.cpp's {PROGRAM}, which is not on the PATH; take a "
            "release from https://github.com/ggml-org/llama.cpp/releases (or brew install llama.cpp), or ask for q8_0 "
            "or q4_0, which are written here"
        )
    return program


def quantizer_digests() -> dict[str, str] | None:
    """Digests of llama-quantize and the libraries it is released with, by name; None if it is not on the PATH.

    It has no option that prints its version, and computes in libraries that are next to it or in ../lib.
    """
    tool = shutil.which(PROGRAM)
    if tool is None:
        return None
    program = Path(tool).resolve()
    folders = (program.parent, program.parent.parent / "lib")
    libraries = {p.resolve() for folder in folders for stem in ("libggml", "libllama") for p in folder.glob(f"{stem}*")}
    return {p.name: file_digest(p) for p in (program, *libraries) if p.is_file()}


def quantize(program: str, source: Path, target: Path, kind: str, ctx: Context) -> None:
    """Write `target`, a K-quant of the f32, f16 or bf16 GGUF `source`; synced to disk.

    Raises FinetuneError with the program's last line if it fails, Stopped when a signal came.
    """
    started = subprocess.Popen(
        [program, str(source), str(target), kind.upper()],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, errors="replace",
    )  # fmt: skip
    last = ""
    try:
        for line in started.stdout or ():
            ctx.stop.check()
            last = line.strip() or last
        status = started.wait()
    finally:
        _end(started)
    if status != 0 or not target.is_file():
        target.unlink(missing_ok=True)
        if from_outside(status):
            raise FinetuneError(f"{PROGRAM} {how_it_ended(status)} while it made {kind}; run again")
        raise FinetuneError(f"{PROGRAM} failed on {kind} (status {status}): {redact(last)[:300] or 'no output'}")
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def _end(started: subprocess.Popen[str]) -> None:
    """No child outlives its stage: asked first, killed after five seconds."""
    if started.poll() is None:
        started.terminate()
        try:
            started.wait(5)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
    if started.stdout:
        started.stdout.close()

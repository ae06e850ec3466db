"""`finetune doctor`: check packages, GPU, disk and tokens, with the command that fixes each. Changes nothing."""

from __future__ import annotations

import importlib.metadata
import netrc
import os
import platform
import shutil
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import FinetuneError
from finetune.utils.console import print_table
from finetune.utils.format import first_line, gb
from finetune.utils.runtime import available_memory, usable_cpus

PYTHON = (3, 11)
DISTRIBUTION = "finetune-recipes"  # the name in pyproject.toml
CORE = (  # required by `finetune run`
    "torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate", "sentence-transformers",
    "faiss-cpu", "scikit-learn", "huggingface_hub", "tokenizers", "safetensors", "pydantic", "pyarrow", "numpy",
    "jinja2", "xxhash",
)  # fmt: skip
OPTIONAL = {  # required by one setting
    "wandb": "tracking.wandb",
    "tensorboard": "tracking.tensorboard",
    "backports.zstd": "data files that end in .zst",
    "gguf": "export.gguf",
    "compressed-tensors": "export.hf: [fp8], [w4a16]",
    "lm-eval": "evaluate.tasks",
    "py3langid": "the filter rule language",
    "model2vec": "a dedup.embedding of model2vec:…",
    "deepspeed": "several GPUs under deepspeed_zero2",
}
QUANTIZER = "https://github.com/ggml-org/llama.cpp/releases, or brew install llama.cpp"
HUB_SECONDS = 4.0
ROOM_BYTES = 40_000_000_000  # the download of a 7B in 16 bits and its merged model, with some slack


@dataclass(frozen=True)
class Finding:
    """One row of the table. `broken`: no run can succeed before this is fixed."""

    what: str
    found: str
    fix: str = ""
    broken: bool = False


def examine(artifacts: Path, scratch: Path) -> None:
    """Print the table. Then raises FinetuneError if a core package is missing or does not work."""
    findings = [
        *python_and_packages(),
        *devices(),
        memory(),
        disk("artifacts", artifacts, "--artifacts"),
        disk("scratch", scratch, "--scratch", ROOM_BYTES),
        hub_login(),
        wandb_key(),
    ]
    print_table("this machine", ["", "found", "to fix it"], [[f.what, f.found, f.fix] for f in findings])
    if broken := [f for f in findings if f.broken]:
        raise FinetuneError("\n".join(f"{f.what}: {f.found}; {f.fix}" for f in broken))


def python_and_packages() -> list[Finding]:
    """Return findings on the versions of Python and of every package, compared with the requirements."""
    version, needed = platform.python_version(), ".".join(map(str, PYTHON))
    old = sys.version_info < PYTHON
    first = Finding("python", version, f"make PYTHON=/path/to/python{needed} setup" if old else "", broken=old)
    asked = required_versions()
    core = [package(name, asked.get(name, "")) for name in CORE]
    optional = [package(name, asked.get(name, ""), needed_for) for name, needed_for in OPTIONAL.items()]
    return [first, *core, *optional, quantizer()]


def quantizer() -> Finding:
    """Return whether llama.cpp's program for K-quants is installed."""
    from finetune.gguf.llama_cpp import PROGRAM

    program = shutil.which(PROGRAM)
    return Finding(
        PROGRAM, program or "missing, needed only for export.gguf of q…_k kinds", "" if program else QUANTIZER
    )


def required_versions() -> dict[str, str]:
    """Return package → required versions; empty if finetune itself is not installed."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {r.name: str(r.specifier) for r in map(Requirement, lines)}


def package(name: str, asked: str, needed_for: str | None = None) -> Finding:
    """Return whether a package is installed in a suitable version; `needed_for` is set for an optional one."""
    from packaging.specifiers import SpecifierSet

    core = needed_for is None
    fix = f'{sys.executable} -m pip install "{name}{asked}"'
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        state = "missing" if core else f"missing, needed only for {needed_for}"
        return Finding(name, state, fix, broken=core)
    if not SpecifierSet(asked).contains(version, prereleases=True):
        return Finding(name, f"{version}, but {asked} is asked for", fix, broken=core)
    return Finding(name, version)


def devices() -> list[Finding]:
    """Return findings on every GPU with its training precision, or on its absence, and whether NF4 works."""
    try:
        import torch

        from finetune.models.device import machine_notes, pick_precision
    except (ImportError, OSError) as error:  # OSError: a shared library that it needs
        return [Finding("torch works", f"no: {first_line(error)}", "rm -rf .venv && make setup", True)]
    others = [Finding(note.partition(": ")[0], note.partition(": ")[2]) for note in machine_notes()]
    if not torch.cuda.is_available():
        return [_no_gpu(torch.__version__, torch.version.cuda), *others, _quantises("cpu")]
    listed = others
    for i in range(torch.cuda.device_count()):
        properties, (free, total) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
        precision, _ = pick_precision("auto", f"cuda:{i}")
        about = (
            f"{properties.name}, {gb(free)} of {gb(total)} free, compute capability {properties.major}."
            f"{properties.minor}, trains in {precision}"
        )
        listed.append(Finding(f"GPU {i}", about))
    return [*listed, _quantises("cuda")]


def _no_gpu(version: str, cuda: str | None) -> Finding:
    if shutil.which("nvidia-smi") and cuda is None:
        fix = f"{sys.executable} -m pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
        return Finding("GPU", f"a driver is there, but torch {version} is built for CPUs only", fix)
    if cuda is not None and shutil.which("nvidia-smi"):
        return Finding(
            "GPU", f"none that torch {version} can use (CUDA_VISIBLE_DEVICES? driver too old?)", "nvidia-smi"
        )
    return Finding("GPU", "none: fp32 on the CPU, enough for builtin:tiny-mistral and for --until pack")


def _quantises(device: str) -> Finding:
    """Check a 4-bit round trip: bitsandbytes' library is the part of an installation that fails most often."""
    import torch

    fix = f"{sys.executable} -m pip install --force-reinstall --no-deps bitsandbytes"
    try:
        from finetune.utils.quiet import quiet

        with quiet():
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit

            value = torch.linspace(-1, 1, 4096, device=device)
            back = dequantize_4bit(*quantize_4bit(value, quant_type="nf4"))
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return Finding("NF4 works", f"no: {first_line(error)}", fix, broken=True)
    worst = float((back - value).abs().max())
    if not worst < 0.2:  # half of NF4's widest gap is 0.15 of the block's largest value
        return Finding("NF4 works", f"no: {worst:.2f} off on {device}", fix, broken=True)
    return Finding("NF4 works", f"yes, on {device}")


def memory() -> Finding:
    """Return cores and RAM, or the limits of the container."""
    cores = usable_cpus()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no cgroup, or the word max
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    available = available_memory()
    free = "" if available is None else f"{gb(available)} of "
    return Finding("memory", f"{free}{gb(total)}{' free' if free else ''}, {cores} cores")


def disk(what: str, root: Path, option: str, wanted: int = 0) -> Finding:
    """Return free space and write permission for `root` or its nearest existing parent; creates nothing."""
    root = root.absolute()
    there = next(p for p in (root, *root.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding(what, f"{root} cannot be written", f"{option} FOLDER")
    free = shutil.disk_usage(there).free
    fix = f"{option} FOLDER, for a 7B: {gb(wanted)}" if free < wanted else ""
    return Finding(what, f"{gb(free)} free in {root}", fix)


def hub_login(environment: Mapping[str, str] = os.environ) -> Finding:
    """Return the account that the Hub's client would use. Only that client reads the token; it is never printed."""
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return Finding("Hub", "unknown without huggingface_hub")
    if get_token() is None:
        return Finding("Hub", "not logged in: enough for open models and data", "hf auth login")
    where = "HF_TOKEN" if environment.get("HF_TOKEN") else "a saved token"
    if constants.is_offline_mode():
        return Finding("Hub", f"{where} is there, not tried: HF_HUB_OFFLINE is set")
    answer: list[Finding] = []
    # A name that does not resolve can take longer than a request's own limit, so the wait is limited from outside.
    thread = threading.Thread(target=lambda: answer.append(_who(where)), daemon=True, name="whoami")
    thread.start()
    thread.join(HUB_SECONDS + 1)
    return answer[0] if answer else Finding("Hub", f"{where} is there; offline: no answer in {HUB_SECONDS:.0f} s")


def _who(where: str) -> Finding:
    import httpx2
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers

    try:
        url = f"{constants.ENDPOINT}/api/whoami-v2"
        reply = get_session().get(url, headers=build_hf_headers(), timeout=HUB_SECONDS)
        status = reply.status_code
        name = reply.json().get("name", "") if status == 200 else ""
    except (httpx2.TransportError, OSError) as error:
        return Finding("Hub", f"{where} is there; offline: {type(error).__name__}")
    except ValueError:  # not JSON
        return Finding("Hub", f"{where} is there; {constants.ENDPOINT} does not answer like the Hub")
    if name:
        return Finding("Hub", f"logged in as {name} ({where})")
    if status == 401:
        return Finding("Hub", f"not logged in: the Hub does not accept {where}", "hf auth login")
    return Finding("Hub", f"{where} is there; the Hub answered with status {status}")


def wandb_key(environment: Mapping[str, str] = os.environ) -> Finding:
    """Return whether Weights & Biases would find a key: in the environment, then in netrc."""
    if environment.get("WANDB_API_KEY"):
        return Finding("W&B", "key present (WANDB_API_KEY)")
    file = Path(environment.get("NETRC") or Path.home() / ".netrc")
    host = environment.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].partition("/")[0]
    with suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(file).authenticators(host):
            return Finding("W&B", f"key present ({file})")
    return Finding("W&B", "no key: tracking.wandb: true records offline", "wandb login")

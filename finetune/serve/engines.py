"""The engines that serve a model, what each can read, and the command that starts it. No torch."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.errors import InputError

Engine = Literal["vllm", "llama-server", "transformers"]
ENGINES: tuple[Engine, ...] = ("vllm", "llama-server", "transformers")
KEY = "FINETUNE_API_KEY"  # environment variable with the key that clients must send
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks
INSTALL = {
    "vllm": "pip install vllm (Linux with a GPU)",
    "llama-server": "https://github.com/ggml-org/llama.cpp/releases, or brew install llama.cpp",
    "transformers": "pip install 'finetune-recipes[serve]', or pip install 'transformers[serving]'",
}


@dataclass(frozen=True)
class Served:
    """The files of one model, each None if it does not exist, and what an engine needs to know about them.

    Attributes:
        name: the model's name in requests.
        merged: folder of the merged model, or of any complete model.
        gguf: a GGUF file of it.
        base: folder or Hub id of the base of `adapter`.
        adapter: folder of the adapter.
        template: file with the chat template that was trained.
        context: longest sequence, in tokens.
        dtype: torch's name of the type that is computed in.
        limits: reasons why engines cannot apply the adapter on its base.
    """

    name: str
    merged: Path | None = None
    gguf: Path | None = None
    base: str | None = None
    adapter: Path | None = None
    rank: int = 0
    template: Path | None = None
    context: int | None = None
    dtype: str = "auto"
    limits: tuple[str, ...] = ()


def adapter_limits(config: Mapping[str, object]) -> list[str]:
    """Return the reasons why vLLM cannot apply an adapter on its base (vllm/lora/peft_helper.py); none: it can.

    Args:
        config: the content of adapter_config.json, or the same fields of a recipe.
    """
    reasons = []
    patterns = config.get("rank_pattern") or {}
    ranks = [config.get("r") or 0, *(patterns.values() if isinstance(patterns, Mapping) else ())]
    rank = max(int(str(r)) for r in ranks)
    if rank > VLLM_RANKS[-1]:
        reasons.append(f"rank {rank} is above vLLM's limit of {VLLM_RANKS[-1]}")
    if config.get("modules_to_save"):
        reasons.append("modules_to_save: whole modules are not part of vLLM's LoRA")
    if config.get("use_dora"):
        reasons.append("DoRA is not supported by vLLM's LoRA")
    if config.get("trainable_token_indices"):
        reasons.append("trained tokens are not part of vLLM's LoRA")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        reasons.append("trained biases are not part of vLLM's LoRA")
    return reasons


def installed() -> dict[Engine, bool]:
    """Return which engines this machine has."""
    return {
        "vllm": shutil.which("vllm") is not None or importlib.util.find_spec("vllm") is not None,
        "llama-server": shutil.which("llama-server") is not None,
        "transformers": all(importlib.util.find_spec(n) is not None for n in ("fastapi", "uvicorn", "openai")),
    }


def choose(asked: str, served: Served, installed: Mapping[Engine, bool]) -> Engine:
    """Return the engine that serves this model.

    `auto` takes vLLM if it is installed, then llama-server if there is a GGUF, then transformers.

    Raises InputError for an unknown engine, one that is not installed or one that cannot read any of the files.
    """
    if asked == "auto":
        usable = [engine for engine in ENGINES if installed[engine] and not _refusal(engine, served)]
        if usable:
            return usable[0]
        lines = [f"  {e}: {_refusal(e, served) or f'not installed: {INSTALL[e]}'}" for e in ENGINES]
        raise InputError("\n".join([f"no engine here can serve {served.name}:", *lines]))
    if asked not in ENGINES:
        raise InputError(f"--engine {asked}: allowed: auto, {', '.join(ENGINES)}")
    engine: Engine = asked
    if why := _refusal(engine, served):
        raise InputError(f"{engine} cannot serve {served.name}: {why}")
    if not installed[engine]:
        raise InputError(f"{engine} is not installed: {INSTALL[engine]}")
    return engine


def _refusal(engine: Engine, served: Served) -> str:
    """Return why an engine cannot serve these files; empty if it can."""
    if engine == "llama-server":
        return "" if served.gguf else "it reads GGUF, and there is none: set export.gguf: [q8_0] and run the recipe"
    if served.merged is not None:
        return ""
    if engine == "transformers" or served.adapter is None:
        return "there is no merged model: run the recipe to its end, or `finetune run RECIPE --until merge`"
    if served.limits:
        return f"{'; '.join(served.limits)}; serve the merged model: `finetune run RECIPE --until merge`"
    return ""


def read_key(variable: str = KEY) -> str:
    """Return the key in an environment variable without white space around it; "" if there is none.

    Raises InputError, without the value, for a key that no HTTP header can hold.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{variable}: found characters that are not printable ASCII; set it to the key alone")
    return key


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def command(engine: Engine, served: Served, host: str, port: int) -> list[str]:
    """Return the argument vector that starts the engine. Template, context length and dtype are stated explicitly.

    Tokens that end an answer come from generation_config.json of the folder and from the metadata of the GGUF. The key
    is handed over in the environment (`environment`), never as an argument.
    """
    if engine == "llama-server":
        words = ["llama-server", "--model", str(served.gguf), "--alias", served.name, "--jinja"]
        words += ["--chat-template-file", str(served.template)] if served.template else []
        words += ["--ctx-size", str(served.context)] if served.context else []
        return [*words, "--host", host, "--port", str(port)]
    if engine == "transformers":
        words = [sys.executable, "-P", "-m", "transformers.cli.transformers", "serve", str(served.merged)]
        return [*words, "--dtype", served.dtype, "--host", host, "--port", str(port)]
    words = ["vllm", "serve", str(served.merged or served.base)]
    if served.merged is not None:
        words += ["--served-model-name", served.name]
    else:
        rank = next(limit for limit in VLLM_RANKS if limit >= served.rank)
        words += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{served.name}={served.adapter}"]
    words += ["--chat-template", str(served.template)] if served.template else []
    words += ["--max-model-len", str(served.context)] if served.context else []
    return [*words, "--dtype", served.dtype, "--host", host, "--port", str(port)]


def environment(engine: Engine, key: str, outside: Mapping[str, str], *, loopback: bool = False) -> dict[str, str]:
    """Return the environment of the engine's process: the network is not asked, and the key is where it is read.

    Raises InputError if the engine has no keys and other machines reach it.
    """
    variable = {"vllm": "VLLM_API_KEY", "llama-server": "LLAMA_API_KEY"}.get(engine)
    if key and variable is None and not loopback:
        raise InputError("transformers serve has no keys: bind it to 127.0.0.1, or install vLLM or llama-server")
    added = {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"} | ({variable: key} if key and variable else {})
    return {**{k: v for k, v in outside.items() if k != KEY}, **added}

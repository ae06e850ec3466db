"""`finetune serve`: an OpenAI-compatible server of what a run made, and a check of such a server."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.options import ARTIFACTS, SCRATCH, Artifacts, Scratch
from finetune.errors import GateRefused, InputError
from finetune.serve import engines
from finetune.utils.resources import complete_recipe

if TYPE_CHECKING:
    from finetune.cli.voice import Voice
    from finetune.serve.check import Expected
    from finetune.utils.console import Screen


def serve(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RUN|FOLDER",
            help="RECIPE[@RUN], or the folder of a merged model.",
            autocompletion=complete_recipe,
        ),
    ],
    engine: Annotated[str, typer.Option(help="auto, vllm, llama-server or transformers.")] = "auto",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help=f"Other than this machine needs a key in {engines.KEY}.")] = "127.0.0.1",
    context: Annotated[
        int | None, typer.Option(min=16, metavar="TOKENS", help="Longest conversation; default: what the base reads.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare it with this package, then end.")] = False,
    server: Annotated[
        str | None, typer.Option("--server", metavar="URL", help="With --check: a server that already runs.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="With --server: the model's name there.")
    ] = None,
    artifacts: Artifacts = ARTIFACTS,
    scratch: Scratch = SCRATCH,
) -> None:
    """Serve a model behind an OpenAI-compatible API; Ctrl-C stops it. The engine's log is in SCRATCH/serve."""
    from finetune.utils.console import Screen

    screen = Screen()
    if server and not check:
        raise InputError("--server names a server that already runs: add --check, or leave it out to start one")
    if server:
        _check(name, server, model, exact=False, roots=(artifacts, scratch), screen=screen)
        return
    served = served_by(name, artifacts, scratch, screen)
    if context is not None:
        if served.context is not None and context > served.context:
            raise InputError(f"--context {context}: the base reads {served.context} tokens at most")
        served = replace(served, context=context)
    _serve(name, served, engine, host, port, check=check, roots=(artifacts, scratch), screen=screen)


def _serve(
    name: str,
    served: engines.Served,
    engine: str,
    host: str,
    port: int,
    *,
    check: bool,
    roots: tuple[Path, Path],
    screen: Screen,
) -> None:
    from finetune.cli.session import signals_handled
    from finetune.serve.process import ended, require_port, running

    if check:
        _merged(name, served)
    key = engines.read_key()
    if not engines.is_loopback(host) and not key:
        raise InputError(f"--host {host} lets other machines in: set {engines.KEY} to a key that clients must send")
    chosen = engines.choose(engine, served, engines.installed())
    if chosen == "llama-server" and served.gguf is not None:
        _refuse_older(served.gguf, served, screen)
    child_environment = engines.environment(chosen, key, os.environ, loopback=engines.is_loopback(host))
    require_port(host, port)
    command = engines.command(chosen, served, host, port)
    folder = roots[1] / "serve"
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / f"{port}.log").absolute()
    screen.say(f"serve: {chosen}; by hand:\n  {shlex.join(command)}")
    host_text = f"[{host}]" if ":" in host else host
    with signals_handled(screen) as stop, ExitStack() as stack:
        process = stack.enter_context(
            running(command, child_environment, f"http://{host_text}:{port}", log, screen.say, stop.check)
        )
        url = f"http://{host_text}:{port}/v1"
        model = str(served.merged) if chosen == "transformers" else served.name
        if check:
            _check(name, url, model, exact=chosen == "transformers", roots=roots, screen=screen)
            return
        screen.say(f"serve: ready at {url}, model {model}; Ctrl-C stops it")
        while process.poll() is None:
            stop.check()
            time.sleep(0.2)
        raise ended(process, log)


def served_by(name: str, artifacts: Path, scratch: Path, screen: Screen) -> engines.Served:
    """Return the files of a run or of a folder that an engine can serve. Raises InputError if there are none."""
    from finetune.cli.voice import model_folder

    folder = model_folder(name)
    if folder is not None:
        ggufs = sorted(folder.glob("*.gguf"))
        return engines.Served(
            folder.name or "model",
            merged=folder.absolute(),
            gguf=ggufs[0].absolute() if ggufs else None,
            template=_file(folder / "chat_template.jinja"),
            context=_context(folder),
            dtype=_dtype(),
        )
    return _of_run(name, artifacts, scratch, screen)


def _of_run(name: str, artifacts: Path, scratch: Path, screen: Screen) -> engines.Served:
    from finetune.pipeline import run_view
    from finetune.pipeline.store import Store
    from finetune.utils.files import read_json

    value = run_view.finished(Store(artifacts, scratch), name, run_view.adapter_needs, screen.say)
    done = {n: Path(s["path"]) for n, s in value["stages"].items() if s["status"] == "done" and s["path"]}
    base_folder, trained = run_view.done_folders(value, run_view.adapter_needs(value), name)
    merged, adapter = done.get("merge"), trained / "adapter"
    base, more = _base(value, name, base_folder, scratch)
    config = read_json(adapter / "adapter_config.json")
    files = sorted(done["export"].rglob("*.gguf")) if "export" in done else []
    ranks = [int(config.get("r") or 0), *(config.get("rank_pattern") or {}).values()]
    return engines.Served(
        value["recipe"],
        merged=merged.absolute() if merged else None,
        gguf=files[0].absolute() if files else None,
        base=base,
        adapter=adapter.absolute(),
        rank=max(ranks),
        template=_file(adapter / "template" / "inference.jinja", adapter / "chat_template.jinja"),
        context=_context(base_folder),
        dtype=_dtype(),
        limits=(*engines.adapter_limits(config), *more),
    )


def _refuse_older(gguf: Path, served: engines.Served, screen: Screen) -> None:
    """Raise InputError if a GGUF was made with another chat template than the one that is served."""
    from finetune.gguf.writer import read_facts

    if served.template is None:
        return
    try:
        template = read_facts(gguf)["template"]
    except ImportError:
        screen.say("serve: the template in the GGUF is not compared: pip install gguf")
        return
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{gguf}: no GGUF that can be read: {error}") from None
    if template != served.template.read_text(encoding="utf-8"):
        raise InputError(
            f"{gguf} was made with another chat template than {served.template}: run the recipe again, which writes it "
            "again, or delete the file"
        )


def _base(value: dict[str, Any], name: str, folder: Path, scratch: Path) -> tuple[str | None, list[str]]:
    """Return the local folder of the base, if its weights are here, and why an engine cannot put an adapter on it."""
    from huggingface_hub import try_to_load_from_cache

    from finetune.cli.voice import recipe_of
    from finetune.models.loading import weight_files
    from finetune.utils.files import read_json

    model = recipe_of(value, name.partition("@")[0]).model
    limits = ["model.rope_scaling is not in the base's own configuration"] if model.rope_scaling else []
    place: Path | None = folder if model.kind == "builtin" else model.folder
    if model.kind == "hub":
        revision = read_json(folder / "base.json")["revision"]
        config = try_to_load_from_cache(
            model.id, "config.json", cache_dir=scratch.absolute() / "hub", revision=revision
        )
        place = Path(config).parent if isinstance(config, str) else None
    if place is None or not weight_files(place):
        place = None
        limits.append(f"the weights of {model.id} are not in {scratch}")
    return str(place) if place else None, limits


def _file(*paths: Path) -> Path | None:
    return next((p.absolute() for p in paths if p.is_file()), None)


def _context(folder: Path) -> int | None:
    from finetune.models.architecture import positions
    from finetune.utils.files import read_json

    return positions(read_json(folder / "config.json")) if (folder / "config.json").is_file() else None


def _dtype() -> str:
    from finetune.models.device import DTYPES, pick_device, pick_precision

    return str(DTYPES[pick_precision("auto", pick_device("auto"))[0]])


def _merged(name: str, served: engines.Served) -> Path:
    """Return the merged model, which a server is compared with. Raises InputError if there is none."""
    if served.merged is None:
        raise InputError(f"{name} has no merged model to compare with: `finetune run {name} --until merge`")
    return served.merged


def _check(name: str, url: str, model: str | None, *, exact: bool, roots: tuple[Path, Path], screen: Screen) -> None:
    """Compare a server with the model loaded here. Raises GateRefused if a prompt or an answer differs."""
    from finetune.cli.voice import folder_voice
    from finetune.serve.check import compare
    from finetune.serve.client import connect, sentences
    from finetune.utils.console import print_table

    served = served_by(name, *roots, screen)
    folder = _merged(name, served)
    if model is None:
        with sentences(connect(url, "")) as server:
            listed = server.models()
        model = served.name if served.name in listed else listed[0] if len(listed) == 1 else str(folder)
    with folder_voice(folder, screen) as voice:
        results = compare(connect(url, model), _expecting(voice, screen), exact=exact)
    columns = ["conversation", "prompt ids", "answer", "end"]
    print_table(f"{url} against this package", columns, [[r.name, r.ids, r.answer, r.stop] for r in results])
    if wrong := [r.name for r in results if not r.passed]:
        raise GateRefused(f"{url} does not serve what was trained: {', '.join(wrong)} (the table says where)")


def _expecting(voice: Voice, screen: Screen) -> Callable[[list[dict[str, Any]], list[Any] | None], Expected | None]:
    """Return the function that gives prompt and greedy answer of a conversation; None if the template refuses it."""
    from finetune.cli.voice import prompt_ids
    from finetune.context import Context
    from finetune.eval.generation import Request, Sampling, answer
    from finetune.recipe import Runtime, Tracking
    from finetune.serve.check import TOKENS, Expected

    ctx = Context(Path(), Runtime(), Tracking())

    def expect(chat: list[dict[str, Any]], tools: list[Any] | None) -> Expected | None:
        if chat[0]["role"] == "system" and not voice.profile.takes_system:
            screen.say("check: this template has no system turn: clients must put that text before the first question")
            return None
        try:
            ids = prompt_ids(voice, chat, tools)
        except InputError as error:
            screen.say(f"check: left out, the chat template refuses it: {error}")
            return None
        if tools and ids == prompt_ids(voice, chat):
            screen.say("check: this template writes no tools: an engine that is given some ignores them")
            return None
        made = answer(voice.model, [Request(ids, TOKENS)], Sampling(), voice.terminators, voice.pad_id, ctx, 1)
        reply = next(made)[0]
        decode = voice.tokenizer.decode
        return Expected(
            ids,
            decode(ids),
            decode(reply.ids, skip_special_tokens=True),
            decode(reply.ids[:1], skip_special_tokens=True),
            reply.finish == "stop",
        )

    return expect

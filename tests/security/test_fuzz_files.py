"""Seeded mutations of bases, adapters, templates and run records: each ends well, or in one sentence.

`FINETUNE_FUZZ=N` tries N times as many.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import FinetuneError, GateRefused
from finetune.lora import resume
from finetune.pipeline.runner import Step, _refuse_stale_partials
from finetune.pipeline.stage_list import spec_of, stage_named
from finetune.pipeline.store import BUILDING, Store
from finetune.recipe import Lora, Recipe
from finetune.tokenization.template_sandbox import check_template
from finetune.train.tracking import IDENTITY, identify
from tests.helpers.tiny_models import save_adapter
from tests.report.made_run import RUN, MadeRun
from tests.security.conftest import Command, roots
from tests.security.test_untrusted_base import plain as plain
from tests.security.test_untrusted_base import run as run_base
from tests.stages.finished import context

TIMES = int(os.environ.get("FINETUNE_FUZZ", "1"))
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**30, 1e308, -0.5, float("nan"), "", "x", "\x1b[31m[/INST]", "../../x", "/etc/passwd",
    "\ud800", [], ["x"], {}, {"a": {"b": []}}, [[[[]]]], "9" * 5000,
)  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def changed(value: Any, chance: random.Random) -> Any:
    """A copy of a JSON value with one to three places replaced, removed or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.randint(1, 3)):
        found = list(places(value))
        if not found:
            return chance.choice(ODD)
        # A vocabulary has thousands of places: most changes go where the structure is.
        *way, last = chance.choice([p for p in found if len(p) <= 2] if chance.random() < 0.6 else found)
        inner = value
        for key in way:
            inner = inner[key]
        action = chance.random()
        if action < 0.7:
            inner[last] = chance.choice(ODD)
        elif action < 0.9 or isinstance(inner, list):
            del inner[last]
        else:
            inner[f"{last}x"] = inner.pop(last)
    return value


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The bytes with some flipped, cut off, doubled or replaced; safetensors are hit in their header half the time."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        reach = len(content) if chance.random() < 0.5 else min(len(content), 600)
        place = chance.randrange(max(1, reach))
        match chance.randrange(4):
            case 0 if content:
                content[place % len(content)] ^= 1 << chance.randrange(8)
            case 1:
                del content[place:]
            case 2:
                content[place:place] = content[place : place + chance.randrange(64)]
            case _:
                content[place : place + 8] = chance.randbytes(8)
    return bytes(content)


def spoil(path: Path, chance: random.Random) -> None:
    """Change a file's values where it is JSON, or its bytes."""
    content = path.read_bytes()
    if path.suffix == ".json" and chance.random() < 0.75:
        path.write_text(json.dumps(changed(json.loads(content), chance)), encoding="utf-8", errors="replace")
    else:
        path.write_bytes(damaged(content, chance))


def told(error: FinetuneError) -> None:
    """What a person reads is short and has no traceback."""
    assert 0 < len(str(error)) < 4000 and "Traceback" not in str(error), error


@pytest.mark.parametrize("seed", range(24 * TIMES))
def test_a_mutated_base(seed: int, plain: Path, tmp_path: Path) -> None:
    chance = random.Random(seed)
    model = Path(shutil.copytree(plain, tmp_path / "model"))
    for path in chance.sample(sorted(p for p in model.iterdir() if p.is_file()), chance.randint(1, 2)):
        spoil(path, chance)
    try:
        run_base(model, tmp_path)
    except FinetuneError as error:
        told(error)


@pytest.mark.parametrize("seed", range(16 * TIMES))
def test_a_mutated_adapter(seed: int, plain: Path, tmp_path: Path) -> None:
    chance = random.Random(seed)
    adapter = tmp_path / "adapter"
    save_adapter(plain, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    settings = {"r": config["r"], "alpha": config["lora_alpha"], "targets": sorted(config["target_modules"])}
    spoil(chance.choice([adapter / "adapter_config.json", adapter / "adapter_model.safetensors"]), chance)
    lora = Lora.model_validate({**settings, "start_from": str(adapter)}, context={"folder": tmp_path})
    try:
        resume.check(lora, adapter, plain, "folder:x", trust_remote_code=False)
    except FinetuneError as error:
        told(error)


@pytest.mark.parametrize("seed", range(24 * TIMES))
def test_a_mutated_record_of_a_run(seed: int, made: MadeRun, finetune: Command) -> None:
    """`show`, `report`, `publish` and `clean`: any exception but an exit fails the test."""
    chance = random.Random(seed)
    folder = made.store.artifacts / "runs" / "made" / RUN
    outside = sorted(made.store.artifacts.parent.iterdir())
    for name in chance.sample(["run.json", "recipe.yaml", "../latest"], 1 if chance.random() < 0.7 else 2):
        spoil(folder / name, chance)
    if chance.random() < 0.3:
        spoil(chance.choice(sorted(made.store.artifacts.glob("*/*/manifest.json"))), chance)
    if chance.random() < 0.5:  # figures, rows and samples that a report shows
        files = [p for p in made.store.artifacts.glob("*/*/**/*") if p.is_file() and "runs" not in p.parts]
        spoil(chance.choice(sorted(files)), chance)
    for words in ("show made", "show made --json", f"show made@{RUN} made@{RUN}", "show made --verify", "report made",
                  "publish made --dry-run", "clean"):  # fmt: skip
        ended = finetune(*words.split(), *roots(made))
        assert ended.status in (0, 1, 2, 3) and "Traceback" not in ended.err and "\x1b" not in ended.out + ended.err
        assert ended.status in (0, 1) or len(ended.err) < 8000
    assert sorted(made.store.artifacts.parent.iterdir()) == outside


@pytest.mark.parametrize("seed", range(8 * TIMES))
def test_a_mutated_template(seed: int) -> None:
    chance = random.Random(seed)
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content']|trim }} [/INST]"
        "{% elif loop.index0 % 2 == 1 %} {{ m.content[:-1] }}{{ eos_token }}{% else %}{{ raise_exception('no') }}"
        "{% endif %}{% endfor %}"
    )
    text = list(template)
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(len(text))
        text[place : place + chance.randrange(3)] = chance.choice(
            ["", "{{", "%}", "'", "*10**9", "~", "\x1b", "|join", "[", "("]
        )
    try:
        check_template("".join(text), {"bos_token": "<s>", "eos_token": "</s>"}, "template")
    except FinetuneError as error:
        told(error)


@pytest.mark.parametrize("seed", range(24 * TIMES))
def test_a_mutated_record_of_an_unfinished_training(seed: int, tmp_path: Path) -> None:
    """It is gone on with, refused by what differs, or passed over as nobody's."""
    chance = random.Random(seed)
    recipe = Recipe.model_validate({"name": "x", "model": "builtin:tiny-mistral", "data": [{"source": "pydoc"}]})
    stage, store = stage_named("train"), Store(tmp_path / "artifacts", tmp_path / "scratch")
    folder = store.folder("train", "0" * 16)
    (folder / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    (folder / "checkpoints" / "checkpoint-4" / "COMPLETE").touch()
    record = {"recipe": "x", "spec": {"lora": {"r": 1}, "seed": 3}, "inputs": {"pack": "ab"}, "fingerprint": {"a": "b"}}
    (folder / BUILDING).write_text(json.dumps({**record, "stage": "train", "launch": ""}))
    step = Step(stage, "missing", spec_of(stage, recipe), "1" * 16, folder.with_name("1" * 16))
    with pytest.raises(GateRefused, match="unfinished training"):
        _refuse_stale_partials(step, recipe, store, context(tmp_path), fresh=False)
    spoil(folder / BUILDING, chance)
    for fresh in (False, True):
        try:
            _refuse_stale_partials(step, recipe, store, context(tmp_path), fresh)
        except FinetuneError as error:
            told(error)
    (folder / IDENTITY).write_text('{"name": "x-1", "wandb_id": "0123"}')
    assert identify("y", folder).name == "x-1"
    for name in ("../../x", "/etc", ".", "", "a/b", ["x"], 3, None, "x" * 5000, "\x1b[31m"):
        (folder / IDENTITY).write_text(json.dumps({"name": name, "wandb_id": "0123"}))
        assert identify("y", folder).name == "y"

"""A base, an adapter or an encoder from somebody else: no link out of it, no pipe, nothing that does not end."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.context import Context
from finetune.errors import InputError
from finetune.lora import resume
from finetune.models import base_limits
from finetune.recipe import Lora, Recipe, Runtime, Tracking
from finetune.stages import base
from finetune.tiny import model as tiny_model
from finetune.utils.links import require_model
from tests.helpers.tiny_models import save_adapter, save_tiny

SECRET = "the secret of this machine"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base."""
    folder = save_tiny(tmp_path_factory.mktemp("plain") / "base", intermediate_size=128, vocab_size=512)
    tiny_model.train_tokenizer(["some words to learn"], 300).save_pretrained(folder)
    return folder


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    """A copy of the base to spoil."""
    import shutil

    return Path(shutil.copytree(plain, tmp_path / "model"))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of this machine that nothing may copy."""
    path = tmp_path / "id_rsa"
    path.write_text(SECRET)
    return path


def run(folder: Path, root: Path) -> dict[str, Any]:
    """The base stage on `folder`."""
    out = root / "out"
    out.mkdir(exist_ok=True)
    recipe = Recipe.model_validate({"name": "x", "model": str(folder), "data": [{"source": "pydoc"}]})
    spec = base.spec(recipe)
    base.fingerprint(spec)
    ctx = Context(scratch=root / "scratch", runtime=Runtime(), tracking=Tracking(), device="cpu")
    return dict(base.run(spec, {}, out, ctx))


def refused(folder: Path, root: Path, *words: str, seconds: float = 30) -> None:
    """The base stage ends in one InputError with these words, soon, and has copied no secret."""
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        run(folder, root)
    assert time.monotonic() - start < seconds
    assert all(word in str(caught.value) for word in words), caught.value
    assert SECRET not in str(caught.value) and len(str(caught.value)) < 1500
    for path in (root / "out").glob("*"):
        assert SECRET not in path.read_text(errors="replace")


@pytest.mark.parametrize(
    "name",
    ["tokenizer.model", "merges.txt", "chat_template.jinja", "config.json", "notes.txt", "chat_templates/x.jinja"],
)
def test_a_link_out_of_a_base_is_refused_by_name(name: str, model: Path, secret: Path, tmp_path: Path) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    refused(model, tmp_path, str(model / name), "link")


def test_a_link_by_another_link_or_a_linked_folder_is_refused(model: Path, secret: Path, tmp_path: Path) -> None:
    (model / "more").symlink_to(tmp_path)
    refused(model, tmp_path, "more", "link")
    (model / "more").unlink()
    (model / "first").symlink_to("second")
    (model / "second").symlink_to(secret)
    refused(model, tmp_path, "first", "link")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "model.safetensors", "generation_config.json", "x"]
)
def test_a_pipe_in_a_base_is_refused_without_being_opened(name: str, model: Path, tmp_path: Path) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    refused(model, tmp_path, name, "pipe", seconds=5)


def test_a_device_in_a_base_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.model").symlink_to("/dev/zero")
    refused(model, tmp_path, "tokenizer.model", "link", seconds=5)


def test_links_within_a_base_and_a_snapshot_of_the_hubs_cache_are_read(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.model").write_bytes(b"x")
    (model / "merges.txt").symlink_to("tokenizer.model")
    assert run(model, tmp_path)["parameters"] > 0
    cache = tmp_path / "hub" / "models--o--n"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in model.iterdir() if p.is_file())):
        (cache / "blobs" / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert run(snapshot, tmp_path)["parameters"] > 0
    (tmp_path / "alias").symlink_to(snapshot)
    require_model(tmp_path / "alias", "model")


def test_a_snapshot_whose_blobs_lead_elsewhere_is_refused(secret: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--o--n"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").symlink_to(secret.parent)
    (snapshot / "tokenizer.model").symlink_to("../../blobs/id_rsa")
    with pytest.raises(InputError, match="link"):
        require_model(snapshot, "model")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "README.md"])
def test_a_link_out_of_an_adapter_is_refused(name: str, plain: Path, secret: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    save_adapter(plain, adapter)
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).symlink_to(secret)
    with pytest.raises(InputError, match="link"):
        resume.fingerprint(Lora.model_validate({"start_from": str(adapter)}, context={"folder": tmp_path}))


def test_validate_names_each_folder_with_a_link_out_of_it(
    model: Path, secret: Path, tmp_path: Path, finetune: Any
) -> None:
    (model / "merges.txt").symlink_to(secret)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    data = "data:\n  - {source: local, path: rows.jsonl}\n"
    (tmp_path / "r.yaml").write_text(
        f"schema: 1\nname: r\nmodel: {model}\n{data}lora: {{start_from: {model}}}\ndedup: {{embedding: {model}}}\n"
    )
    err = finetune("validate", tmp_path / "r.yaml", status=2).err
    assert err.count("merges.txt is a link to") == 3 and SECRET not in err


@pytest.mark.parametrize("content", ["", "[]", "{", "3", '"x"', "[" * 100_000, '{"model": 3}', "\0", "{}"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
def test_a_broken_file_of_a_base_is_one_sentence(name: str, content: str, model: Path, tmp_path: Path) -> None:
    if content == "{}" and name != "config.json" and name != "tokenizer.json":
        return  # what says nothing takes nothing away
    if content == '{"model": 3}' and name in ("tokenizer_config.json", "generation_config.json"):
        return
    (model / name).write_text(content)
    refused(model, tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}', "[" * 100_000])
def test_a_broken_index_of_weights_is_one_sentence(content: str, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors.index.json").write_text(content)
    refused(model, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 1_000_000},
        {"num_hidden_layers": 1e9},
        {"num_hidden_layers": "many"},
        {"num_hidden_layers": -1},
        {"hidden_size": "wide"},
        {"hidden_size": None},
        {"rope_parameters": [1, 2]},
        {"vocab_size": {}},
        {"model_type": ["mistral"]},
        {"architectures": 3, "model_type": "no_such_type"},
        {"hidden_act": "does not exist"},
    ],
)
def test_a_config_of_odd_values_is_one_sentence_soon(change: dict[str, Any], model: Path, tmp_path: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(model, tmp_path, "config.json")


def test_an_architecture_that_takes_for_ever_to_build_is_given_up(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The silent side is every other test here: a base is built within the limit."""
    from finetune.models import loading

    monkeypatch.setattr(loading, "BUILD_SECONDS", 0.3)
    monkeypatch.setattr(base_limits, "MOST_LAYERS", 10**7)
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 1_000_000}))
    refused(model, tmp_path, "0.3 s of CPU time")


def replaced(model: Path, **parts: Any) -> None:
    """Put parts into tokenizer.json."""
    path = model / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))


def doubling(times: int) -> dict[str, Any]:
    """A chain that makes every `a` 2**times of them."""
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"type": "Sequence", "normalizers": [one] * times}


def test_a_tokenizer_that_grows_without_end_is_refused_before_a_text_is_given_to_it(
    model: Path, tmp_path: Path
) -> None:
    replaced(model, normalizer=doubling(40))
    refused(model, tmp_path, "tokenizer.json", "1.1e+12 times", seconds=10)
    replaced(model, normalizer=doubling(2))
    assert run(model, tmp_path)["parameters"] > 0


def test_a_tokenizer_that_grows_by_a_pattern_is_refused(model: Path, tmp_path: Path) -> None:
    one = {"type": "Replace", "pattern": {"Regex": "(?=a)"}, "content": "aaaaaaaaaa"}
    replaced(model, normalizer={"type": "Sequence", "normalizers": [one] * 9})
    refused(model, tmp_path, "tokenizer.json")


@pytest.mark.parametrize("pattern", ["(q+)+z", "(\u017f+)+z", "(a+)+$", "(x+x+)+y", "^(([a-z])+.)+[A-Z]([a-z])+$"])
def test_a_tokenizer_that_matches_without_end_is_refused(pattern: str, model: Path, tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    replaced(model, pre_tokenizer=split)
    refused(model, tmp_path, "tokenizer.json")


def test_a_tokenizer_that_takes_all_memory_ends_in_its_own_process(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_limits, "MOST_GROWTH", 1e30)
    monkeypatch.setattr(base_limits, "MEMORY_BYTES", 200_000_000)
    replaced(model, normalizer=doubling(40))
    refused(model, tmp_path, "tokenizer.json", "GB")


def test_an_encoder_is_tried_out_as_a_base_is(model: Path, tmp_path: Path) -> None:
    from finetune.dedup import encoders

    replaced(model, normalizer=doubling(40))
    ctx = Context(scratch=tmp_path / "scratch", runtime=Runtime(), tracking=Tracking(), device="cpu")
    with pytest.raises(InputError, match=r"tokenizer\.json: its replacements"):
        encoders._load("x", ctx, model, "cpu")


def test_a_tokenizer_with_a_table_that_makes_a_page_of_one_character_is_refused(model: Path, tmp_path: Path) -> None:
    import base64

    table = (0).to_bytes(4, "little") + b"x" * 10**5 + b"\0"
    replaced(model, normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()})
    refused(model, tmp_path, "tokenizer.json", "times as long")


@pytest.mark.parametrize("kind", ["header", "cut", "fp8", "integers", "nan", "empty"])
def test_a_damaged_or_foreign_adapter_is_one_sentence(kind: str, plain: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    save_adapter(plain, adapter)
    file = adapter / "adapter_model.safetensors"
    if kind in ("fp8", "integers", "nan"):
        change = {
            "fp8": lambda t: t.to(torch.float8_e4m3fn), "integers": lambda t: t.to(torch.int8),
            "nan": lambda t: t * float("nan"),
        }[kind]  # fmt: skip
        save_file({n: change(t) for n, t in load_file(file).items()}, file)
    else:
        content = file.read_bytes()
        file.write_bytes({"header": b"\xff" * 8 + content[8:], "cut": content[:-7], "empty": b""}[kind])
    config = json.loads((adapter / "adapter_config.json").read_text())
    targets = sorted(config["target_modules"])
    settings = {"r": config["r"], "alpha": config["lora_alpha"], "targets": targets, "start_from": str(adapter)}
    lora = Lora.model_validate(settings, context={"folder": tmp_path})
    with pytest.raises(InputError, match=r"lora\.start_from"):
        resume.check(lora, adapter, plain, "folder:x", trust_remote_code=False)


@pytest.mark.parametrize("content", ["[]", "{", '{"modules_to_save": [1, "a"], "peft_type": "LORA"}', "[" * 100_000])
def test_a_broken_adapter_config_is_one_sentence(content: str, plain: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    save_adapter(plain, adapter)
    (adapter / "adapter_config.json").write_text(content)
    lora = Lora.model_validate({"start_from": str(adapter)}, context={"folder": tmp_path})
    with pytest.raises(InputError, match=r"lora\.start_from"):
        resume.check(lora, adapter, plain, "folder:x", trust_remote_code=False)

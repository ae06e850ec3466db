"""The base stage pins what everything after it stands on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from finetune.context import Context
from finetune.errors import InputError
from finetune.recipe import Recipe, Runtime, Tracking
from finetune.stages import base
from finetune.tiny import model as tiny_model
from finetune.utils.files import file_digest, write_json
from tests.helpers.hub_server import LoopbackHub, point_client, serve
from tests.helpers.tiny_models import VOCABULARY, save_tiny
from tests.tiny.test_model import SMALL


def recipe(model: Any, **sections: Any) -> Recipe:
    return Recipe.model_validate({"name": "tiny", "model": model, "data": [{"source": "pydoc"}], **sections})


def run(root: Path, model: Any, name: str = "out", **sections: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    out = root / name
    out.mkdir()
    context = Context(scratch=root / "scratch", runtime=Runtime(), tracking=Tracking(), device="cpu")
    metrics = base.run(base.spec(recipe(model, **sections)), {}, out, context)
    return json.loads((out / "base.json").read_text()), metrics


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as somebody has it on disk, with its history in it."""
    made = save_tiny(tmp_path / "my-model", intermediate_size=128)
    tokenizer = tiny_model.train_tokenizer(["some words to learn"], 300)
    tokenizer.save_pretrained(made)
    config = json.loads((made / "config.json").read_text())
    write_json(made / "config.json", {**config, "_name_or_path": "/home/me/model", "vocab_size": VOCABULARY})
    (made / "tokenizer.model").write_bytes(b"pieces")
    return made


@pytest.fixture
def fitting(folder: Path) -> Path:
    save_tiny(folder, intermediate_size=128, vocab_size=512)
    return folder


def test_a_folder_is_pinned_by_its_files(fitting: Path, tmp_path: Path) -> None:
    pinned, metrics = run(tmp_path, str(fitting))
    assert pinned["id"] == "folder:my-model"
    assert pinned["kind"] == "folder"
    assert pinned["revision"] is None
    assert pinned["weights"] == {"model.safetensors": file_digest(fitting / "model.safetensors")}
    assert metrics["parameters"] == pinned["parameters"] > 100_000
    out = tmp_path / "out"
    assert not list(out.glob("*.safetensors"))
    assert {p.name for p in out.iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
    }
    assert not [p.name for p in out.iterdir() if str(tmp_path).encode() in p.read_bytes()]


def test_local_paths_stay_behind(fitting: Path, tmp_path: Path) -> None:
    config = json.loads((fitting / "config.json").read_text())
    write_json(fitting / "config.json", {**config, "_name_or_path": "/home/me/model"})
    run(tmp_path, str(fitting))
    assert b"/home/me" not in (tmp_path / "out" / "config.json").read_bytes()


def test_the_key_follows_the_files_of_a_folder(fitting: Path) -> None:
    spec = base.spec(recipe(str(fitting)))
    before = base.fingerprint(spec)
    assert before == base.fingerprint(spec)
    (fitting / "README.md").write_text("not a part of the model")
    assert before == base.fingerprint(spec)
    (fitting / "tokenizer.model").write_bytes(b"other pieces")
    assert before != base.fingerprint(spec)
    assert str(fitting) not in json.dumps([spec.model_dump(mode="json"), before])


def test_the_seed_matters_only_to_a_builtin(fitting: Path) -> None:
    assert base.spec(recipe(str(fitting), seed=1)) == base.spec(recipe(str(fitting), seed=2))
    assert base.spec(recipe("me/model", seed=1)) == base.spec(recipe("me/model", seed=2))
    builtin = "builtin:tiny-mistral"
    assert base.spec(recipe(builtin, seed=1)) != base.spec(recipe(builtin, seed=2))


@pytest.mark.parametrize(
    ("remove", "complaint"),
    [("model.safetensors", "no weights"), ("config.json", "no config.json")],
)
def test_a_folder_that_is_no_model_is_refused(fitting: Path, remove: str, complaint: str) -> None:
    (fitting / remove).unlink()
    with pytest.raises(InputError, match=complaint):
        base.fingerprint(base.spec(recipe(str(fitting))))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        base.fingerprint(base.spec(recipe(str(tmp_path / "nothing"))))


def test_pickled_weights_are_refused(fitting: Path) -> None:
    (fitting / "model.safetensors").rename(fitting / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        base.fingerprint(base.spec(recipe(str(fitting))))


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"only {VOCABULARY} embeddings"):
        run(tmp_path, str(folder))


def test_a_hub_model_is_pinned_without_its_weights(
    fitting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as hub:
        point_client(monkeypatch, hub, tmp_path / "hf_home")
        commit = plant(hub, fitting)
        spec = base.spec(recipe("lab/model"))
        assert base.fingerprint(spec) == {"revision": commit}
        pinned, metrics = run(tmp_path, "lab/model")
        assert pinned["revision"] == metrics["revision"] == commit
        assert pinned["weights"] == {}
        content = (fitting / "model.safetensors").read_bytes()
        assert metrics["weights_sha256"] == {"model.safetensors": hashlib.sha256(content).hexdigest()}
        assert not list((tmp_path / "scratch").rglob("*.safetensors"))
        assert not hub.asked("GET", r"resolve/.*safetensors")
        plant(hub, fitting, {"README.md": b"new"})
        assert base.fingerprint(spec) != {"revision": commit}
        assert base.fingerprint(base.spec(recipe({"id": "lab/model", "revision": commit}))) == {"revision": commit}


def plant(hub: LoopbackHub, folder: Path, more: dict[str, bytes] | None = None) -> str:
    return hub.plant("lab/model", {p.name: p.read_bytes() for p in folder.iterdir()} | (more or {}))


def test_the_builtin_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_model.build, "__defaults__", (SMALL,))
    pinned, metrics = run(tmp_path, "builtin:tiny-mistral")
    out = tmp_path / "out"
    assert pinned["kind"] == "builtin"
    assert pinned["dtype"] == "bfloat16"
    assert pinned["weights"] == {"model.safetensors": file_digest(out / "model.safetensors")}
    assert metrics["parameters"] == pinned["parameters"]
    assert metrics["pretraining_steps"] == SMALL.steps


def test_the_builtin_depends_on_the_text_it_reads() -> None:
    print_ = base.fingerprint(base.spec(recipe("builtin:tiny-mistral")))
    assert set(print_) == {"size", "text", "left_out"}
    json.dumps(print_)

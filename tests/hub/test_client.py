"""The real client against a loopback Hub: push, compare, pull; every refusal in one sentence; no token anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.errors import FinetuneError, InputError
from finetune.hub import client as under_test
from tests.helpers.hub_checks import code_of, no_token_in_output  # noqa: F401 - an autouse fixture
from tests.helpers.hub_server import TOKEN, LoopbackHub, sha256

Said = list[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A merged model of a few bytes, in the kinds of file a real one has."""
    made = tmp_path / "model"
    (made / "template").mkdir(parents=True)
    (made / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    (made / "config.json").write_text("{}")
    (made / "template" / "template.json").write_text('{"name": "chatml"}')
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 20)
    return made


def push(folder: Path, repo: str = "me/x", **options: Any) -> dict[str, Any]:
    waits = options.pop("waits", [])
    return under_test.push_folder(folder, repo, "merged", wait=waits.append, **options)


# --- push


@pytest.mark.parametrize("multipart_bytes", [None, 2000])
def test_push_verify_no_op_and_pull(
    hub: LoopbackHub, folder: Path, tmp_path: Path, multipart_bytes: int | None
) -> None:
    hub.multipart_bytes = multipart_bytes
    first = push(folder)
    assert first["new_commit"] and first["private"] and first["removed"] == []
    names = [f["path"] for f in first["files"]]
    assert names == ["README.md", "config.json", "model.safetensors", "template/template.json"]
    assert [("sha256" in f, "git_sha1" in f) for f in first["files"]] == [
        (n.endswith("tensors"), not n.endswith("tensors")) for n in names
    ]
    assert first["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

    hub.requests.clear()
    again = push(folder)
    assert not again["new_commit"] and again["commit"] == first["commit"] and again["files"] == first["files"]
    assert hub.asked("PUT", "") == 0 and hub.asked("POST", "/commit/") == 0

    from huggingface_hub import snapshot_download

    pulled = Path(snapshot_download("me/x", revision=first["commit"], cache_dir=tmp_path / "cache"))
    for name in names:
        assert (pulled / name).read_bytes() == (folder / name).read_bytes()


def test_only_what_changed_is_sent(hub: LoopbackHub, folder: Path) -> None:
    first = push(folder)
    (folder / "config.json").write_text('{"a": 1}')
    hub.requests.clear()
    second = push(folder)
    assert second["new_commit"] and second["commit"] != first["commit"]
    assert hub.asked("PUT", "/lfs/") == 0 and hub.asked("POST", "/commit/") == 1


def test_stale_shards_of_an_earlier_push_go(hub: LoopbackHub, folder: Path) -> None:
    push(folder)
    hub.repos["model", "me/x"].commit({**hub.files("me/x"), "NOTES.md": b"mine"})
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"two")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert push(folder)["removed"] == ["model.safetensors"]
    assert "model.safetensors" not in hub.files("me/x")
    assert hub.files("me/x")["NOTES.md"] == b"mine"


def test_weights_of_another_kind_are_not_mixed(hub: LoopbackHub, folder: Path) -> None:
    hub.plant("me/x", {"adapter_model.safetensors": b"a"}, private=True)
    with pytest.raises(InputError) as error:
        push(folder)
    assert "adapter_model.safetensors" in code_of(error)[1]
    assert hub.asked("POST", "/commit/") == 0


def test_a_public_repository_is_not_taken_for_private(hub: LoopbackHub, folder: Path) -> None:
    hub.plant("me/x", {"README.md": "old"})
    with pytest.raises(InputError, match="public"):
        push(folder)
    assert hub.asked("POST", "/commit/") == 0
    assert push(folder, private=False)["private"] is False


def test_private_is_the_default_and_public_is_possible(hub: LoopbackHub, folder: Path) -> None:
    push(folder)
    push(folder, "me/open", private=False)
    assert hub.repos["model", "me/x"].private and not hub.repos["model", "me/open"].private


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json"])
def test_a_file_that_differs_on_the_hub_is_found(hub: LoopbackHub, folder: Path, damaged: str) -> None:
    hub.corrupt = {damaged}
    with pytest.raises(FinetuneError) as error:
        push(folder)
    status, text = code_of(error)
    assert status == 1 and damaged in text and "differs from the local files" in text


def test_a_file_that_did_not_arrive_is_found(hub: LoopbackHub, folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("the client leaves this out without a word")
    with pytest.raises(FinetuneError, match=r"\.git/config is missing"):
        push(folder)


# --- what the Hub answers


@pytest.mark.parametrize(
    ("method", "where", "answer", "exit_status", "words"),
    [
        (
            "POST",
            "/api/repos/create",
            {"status": 401, "message": "Invalid credentials"},
            2,
            "does not accept the token",
        ),
        ("POST", "/objects/batch", {"status": 401}, 2, "does not accept the token"),
        ("PUT", "/lfs/", {"status": 403}, 2, "lacks this permission"),
        ("POST", "/commit/", {"status": 403}, 2, "lacks this permission"),
        ("POST", "/commit/", {"status": 404, "code": "RepoNotFound"}, 2, "no such repository"),
        ("GET", "/tree/", {"status": 404, "code": "RevisionNotFound"}, 2, "no such revision"),
        ("POST", "/commit/", {"status": 409}, 1, "another client"),
        ("POST", "/commit/", {"status": 413, "message": "too large"}, 2, "too large"),
        ("POST", "/commit/", {"status": 429}, 1, "rate limit"),
        ("POST", "/objects/batch", {"status": 502}, 1, "server error of the Hub"),
        ("PUT", "/lfs/", {"status": 500}, 1, "server error of the Hub"),
        ("PUT", "/lfs/", {"drop": "before"}, 1, "no connection"),
    ],
)
def test_a_lasting_failure_is_one_sentence_with_the_right_exit(
    hub: LoopbackHub, folder: Path, method: str, where: str, answer: dict[str, Any], exit_status: int, words: str
) -> None:
    hub.plant("me/x", {"README.md": "old"}, private=True)
    create_fails_for_good = where == "/api/repos/create"
    if create_fails_for_good:
        del hub.repos["model", "me/x"]
    hub.fail(method, where, times=1000, **answer)
    waits: list[float] = []
    with pytest.raises(FinetuneError) as error:
        push(folder, waits=waits)
    status, text = code_of(error)
    assert status == exit_status and words in text and "me/x" in text
    assert len(waits) <= 3 and sum(waits) <= 180  # bounded
    assert bool(waits) == (exit_status == 1 and answer.get("status") != 409)


PASSING = [
    {"status": 429, "headers": {"Retry-After": "7"}},
    {"status": 503},
    {"status": 502, "page": True},
    {"drop": "before"},
]


@pytest.mark.parametrize("answer", PASSING)
@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("POST", "/api/repos/create"),
        ("POST", "/api/validate-yaml"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        ("PUT", "/lfs/"),
        ("POST", "/commit/"),
        ("GET", "/tree/"),
        ("GET", "/api/models/me/x$"),
    ],
)
def test_a_passing_failure_is_survived(
    hub: LoopbackHub, folder: Path, method: str, where: str, answer: dict[str, Any]
) -> None:
    hub.fail(method, where, times=2, **answer)
    said: Said = []
    assert push(folder, say=said.append)["new_commit"]
    assert hub.files("me/x")["config.json"] == b"{}"
    assert all("trying again" in line for line in said)


def test_a_rate_limit_is_waited_for_as_long_as_the_hub_asks_within_bounds(hub: LoopbackHub, folder: Path) -> None:
    hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "7"})
    hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "86400"})
    waits: list[float] = []
    push(folder, waits=waits)
    assert waits == [7.0, 60.0]


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: LoopbackHub, folder: Path) -> None:
    hub.fail("POST", "/commit/", drop="after")
    receipt = push(folder)
    assert receipt["new_commit"] and len(hub.repos["model", "me/x"].commits) == 2  # the Hub's own first, and ours


def test_an_interrupted_upload_goes_on(hub: LoopbackHub, folder: Path) -> None:
    hub.fail("POST", "/commit/", status=403)
    with pytest.raises(InputError):
        push(folder)
    hub.requests.clear()
    push(folder)
    assert hub.asked("PUT", "/lfs/") == 0


def shards(folder: Path) -> list[str]:
    """Three files of two megabytes in place of one; returns the ids that LFS gives them."""
    (folder / "model.safetensors").unlink()
    contents = [bytes([n]) * 2_000_000 for n in range(3)]
    for n, content in enumerate(contents, start=1):
        (folder / f"model-0000{n}-of-00003.safetensors").write_bytes(content)
    return [sha256(content) for content in contents]


@pytest.mark.parametrize("drop", ["during", "before"])
def test_a_connection_that_breaks_within_an_upload_costs_only_that_file(
    hub: LoopbackHub, folder: Path, drop: str
) -> None:
    first, second, third = shards(folder)
    hub.fail("PUT", f"/lfs/{second}", drop=drop, times=1000)
    waits: list[float] = []
    with pytest.raises(FinetuneError, match="no connection") as error:
        push(folder, waits=waits)
    assert code_of(error)[0] == 1 and len(waits) == 3 and "config.json" not in hub.files("me/x")
    hub.faults.clear()
    receipt = push(folder)
    assert receipt["new_commit"] and len(receipt["files"]) == 6
    assert hub.asked("PUT", first) == hub.asked("PUT", third) == 1  # in both pushes and all their attempts


def test_a_broken_upload_goes_on_by_itself(hub: LoopbackHub, folder: Path) -> None:
    ids = shards(folder)
    hub.fail("PUT", f"/lfs/{ids[1]}", drop="during", times=8)  # more than the client's own attempts
    said: Said = []
    assert push(folder, say=said.append)["new_commit"]
    assert any("dropped connection; trying again" in line for line in said)
    assert [hub.asked("PUT", i) for i in (ids[0], ids[2])] == [1, 1]


def test_rows_go_to_a_data_sets_repository(hub: LoopbackHub, tmp_path: Path) -> None:
    made = tmp_path / "rows"
    (made / "data").mkdir(parents=True)
    (made / "data/train.parquet").write_bytes(b"PAR1")
    (made / "README.md").write_text("# rows")
    hub.plant("me/x", {"config.json": "{}"})  # a model of that name is another repository
    receipt = under_test.push_folder(made, "me/x", "dataset")
    assert receipt["url"] == f"{hub.url}/datasets/me/x" and receipt["new_commit"]
    assert set(hub.files("me/x", "dataset")) == {"data/train.parquet", "README.md", ".gitattributes"}


def test_a_server_that_repeats_a_token_is_not_quoted(hub: LoopbackHub, folder: Path) -> None:
    hub.fail("POST", "/commit/", status=418, message=f"bad token {TOKEN}")
    with pytest.raises(FinetuneError) as error:
        push(folder)
    assert "[hidden]" in code_of(error)[1]
    # The client's own exception stays chained, but no sentence shown to a person holds it.


def test_offline_is_said_before_anything(hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FinetuneError, match="HF_HUB_OFFLINE"):
        push(folder)
    assert hub.requests == []


# --- an adapter that is continued or merged


def test_an_adapter_is_described_by_its_configuration_and_header_alone(hub: LoopbackHub, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save

    weights = save({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 300_000)})
    files = {"adapter_config.json": '{"peft_type": "LORA", "r": 4}', "adapter_model.safetensors": weights}
    hub.plant("them/adapter", files)
    config, shapes = under_test.read_adapter_files("them/adapter", None, tmp_path)
    assert config["r"] == 4 and list(shapes.values()) == [(4, 300_000)]
    assert not list(tmp_path.rglob("*.safetensors"))  # the plan downloads no weights
    hub.plant("them/model", {"config.json": "{}"})
    with pytest.raises(InputError, match=r"holds no adapter_config\.json"):
        under_test.read_adapter_files("them/model", None, tmp_path)


def test_a_plan_tells_what_differs_from_an_adapter_on_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save

    from finetune.pipeline import preflight
    from finetune.recipe import Recipe

    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    config = '{"peft_type": "LORA", "r": 8, "lora_alpha": 32, "base_model_name_or_path": "them/other"}'
    files = {"adapter_config.json": config, "adapter_model.safetensors": save({name: torch.ones(8, 64)})}
    hub.plant("them/adapter", files)
    raw = {"name": "a", "model": "them/base", "data": [{"source": "pydoc"}], "lora": {"start_from": "them/adapter"}}
    recipe = Recipe.model_validate(raw)
    with pytest.raises(InputError) as error:
        preflight.refuse_start(recipe, None, tmp_path)
    told = str(error.value).splitlines()
    assert len(told) == 2 and "set model: them/other" in told[0] and "set lora.r: 8" in told[1]
    preflight.refuse_start(recipe, None)  # `validate` asks no network

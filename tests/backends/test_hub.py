"""The real client against a loopback Hub: push, compare, pull; every refusal in one sentence; no token anywhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from os import environ
from pathlib import Path
from typing import Any

import pytest

from finetune.backends import hub as under_test
from finetune.errors import FinetuneError, InputError
from tests.hub_server import TOKEN, LoopbackHub

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


@pytest.fixture(autouse=True)
def _no_token_in_output(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> Iterator[None]:
    yield
    out, err = capfd.readouterr()
    assert TOKEN not in out + err + caplog.text
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


def push(folder: Path, repo: str = "me/x", **options: Any) -> dict[str, Any]:
    waits = options.pop("waits", [])
    return under_test.push_folder(folder, repo, "merged", wait=waits.append, **options)


def code_of(error: pytest.ExceptionInfo[FinetuneError]) -> tuple[int, str]:
    text = str(error.value)
    assert "\n" not in text and TOKEN not in text
    return error.value.exit_status, text


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
    assert status == 1 and damaged in text and "not what was pushed" in text


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
        ("POST", "/api/repos/create", {"status": 403}, 2, "no right"),
        ("POST", "/preupload/", {"status": 403}, 2, "no right"),
        ("POST", "/preupload/", {"status": 404, "code": "RepoNotFound"}, 2, "no such repository"),
        ("POST", "/commit/", {"status": 403}, 2, "no right"),
        ("POST", "/commit/", {"status": 409}, 1, "somebody else"),
        ("POST", "/commit/", {"status": 413, "message": "too large"}, 2, "too large"),
        ("POST", "/api/repos/create", {"status": 429}, 1, "rate limit"),
        ("POST", "/commit/", {"status": 429}, 1, "rate limit"),
        ("POST", "/commit/", {"status": 503}, 1, "out of order"),
        ("GET", "/tree/", {"status": 500}, 1, "out of order"),
        ("POST", "/objects/batch", {"status": 502}, 1, "out of order"),
        ("PUT", "/lfs/", {"status": 500}, 1, "out of order"),
        ("POST", "/commit/", {"drop": "before"}, 1, "no connection"),
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


# --- revisions


def test_a_commit_is_returned_without_network(hub: LoopbackHub) -> None:
    sha = "0123456789abcdef0123456789abcdef01234567"
    assert under_test.resolve_revision("me/nowhere", sha) == sha
    assert hub.requests == []


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_a_name_is_resolved_and_remembered(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_type: under_test.RepoType
) -> None:
    sha = hub.plant("me/tiny", {"a.jsonl": "{}"}, repo_type)
    found = under_test.resolve_revision("me/tiny", None, repo_type, tmp_path / "scratch")
    assert found == sha and type(found) is str
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said: Said = []
    assert under_test.resolve_revision("me/tiny", "main", repo_type, tmp_path / "scratch", said.append) == sha
    assert "HF_HUB_OFFLINE" in said[0]
    with pytest.raises(FinetuneError, match=r"'v2' of .* me/tiny"):
        under_test.resolve_revision("me/tiny", "v2", repo_type, tmp_path / "scratch")


def test_the_default_cache_answers_for_an_empty_scratch(hub: LoopbackHub, tmp_path: Path) -> None:
    sha = hub.plant("me/tiny", {"config.json": "{}"})
    from huggingface_hub import snapshot_download

    snapshot_download("me/tiny")
    hub.fail("GET", "/api/models/me/tiny", times=9, drop="before")
    assert under_test.resolve_revision("me/tiny", None, "model", tmp_path / "scratch") == sha


@pytest.mark.parametrize("answer", [{"drop": "before"}, {"status": 503}, {"status": 429}])
def test_no_network_and_no_cache_is_an_error_that_names_repo_and_revision(
    hub: LoopbackHub, tmp_path: Path, answer: dict[str, Any]
) -> None:
    hub.plant("me/tiny", {"config.json": "{}"})
    hub.fail("GET", "/api/models/me/tiny", times=9, **answer)
    with pytest.raises(FinetuneError) as error:
        under_test.resolve_revision("me/tiny", None, "model", tmp_path / "scratch")
    status, text = code_of(error)
    assert status == 1 and "'main' of model me/tiny" in text


def test_what_does_not_exist_is_the_inputs_fault(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.plant("me/tiny", {"config.json": "{}"})
    with pytest.raises(InputError, match="no such revision"):
        under_test.resolve_revision("me/tiny", "v9", "model", tmp_path)
    with pytest.raises(InputError, match="no such repository"):
        under_test.resolve_revision("me/tinny", None, "model", tmp_path)


def test_resolving_loads_no_torch(hub: LoopbackHub, tmp_path: Path) -> None:
    sha = hub.plant("me/tiny", {"config.json": "{}"})
    code = (
        "import sys\nfrom finetune.backends.hub import resolve_revision\n"
        "print(resolve_revision('me/tiny', None), 'torch' in sys.modules, 'pyarrow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environ, **hub.env(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [sha, "False", "False"]


# --- access


def test_reading_what_is_open_is_allowed(hub: LoopbackHub) -> None:
    hub.plant("me/tiny", {})
    assert under_test.check_read("me/tiny") is None


def test_a_gated_base_says_where_to_accept(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.plant("big/llama", {}, gated=True)
    hub.plant("big/rows", {}, "dataset", gated=True)
    with pytest.raises(InputError) as error:
        under_test.check_read("big/llama")
    assert f"accept its terms at {hub.url}/big/llama" in code_of(error)[1]
    with pytest.raises(InputError, match="/datasets/big/rows"):
        under_test.check_read("big/rows", "dataset")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="hf auth login"):
        under_test.check_read("big/llama")


def test_access_that_cannot_be_checked_is_a_note(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fail("GET", "auth-check", drop="before")
    assert "could not be checked" in (under_test.check_read("me/tiny") or "")
    hub.fail("GET", "whoami", status=503)
    assert "could not be checked" in (under_test.check_write("me/tiny") or "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in (under_test.check_read("me/tiny") or "")
    assert "HF_HUB_OFFLINE" in (under_test.check_write("me/tiny") or "")


def test_writing_is_allowed_to_own_and_member_namespaces(hub: LoopbackHub) -> None:
    hub.plant("me/there", {})
    for repo in ("me/new", "me/there", "lab/new"):
        assert under_test.check_write(repo) is None
    assert hub.asked("POST", "") == 0


def test_a_mirror_that_cannot_be_asked_about_writing_does_not_stand_in_the_way(hub: LoopbackHub) -> None:
    hub.plant("me/there", {})
    hub.fail("GET", "auth-check/write", status=404)
    assert under_test.check_write("me/there") is None
    hub.fail("GET", "auth-check/write", status=403)
    with pytest.raises(InputError, match="no right"):
        under_test.check_write("me/there")


@pytest.mark.parametrize(("repo", "words"), [("reader/x", "only read"), ("stranger/x", "not a member")])
def test_writing_elsewhere_is_refused(hub: LoopbackHub, repo: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        under_test.check_write(repo)
    assert words in code_of(error)[1]


def test_a_token_for_reading_is_refused(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token_role = "read"
    with pytest.raises(InputError, match="may not write"):
        under_test.check_write("me/x")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="no Hub token"):
        under_test.check_write("me/x")
    hub.fail("GET", "whoami", status=401)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(InputError, match="does not accept the token"):
        under_test.check_write("me/x")


def test_a_fine_grained_token_counts_where_it_was_granted(hub: LoopbackHub) -> None:
    hub.fine_grained = {"scoped": [{"entity": {"type": "user", "name": "me"}, "permissions": ["repo.write"]}]}
    assert under_test.check_write("me/x") is None
    with pytest.raises(InputError, match="may not write"):
        under_test.check_write("lab/x")

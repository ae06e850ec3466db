"""The real client against a loopback Hub: which commit a name is, and whether this account may read or write."""

from __future__ import annotations

import socket
import subprocess
import sys
from os import environ
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import FinetuneError, InputError
from finetune.hub import client as under_test
from tests.helpers.hub_checks import code_of, no_token_in_output  # noqa: F401 - an autouse fixture
from tests.helpers.hub_server import TOKEN, LoopbackHub

Said = list[str]


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
        "import sys\nfrom finetune.hub.client import resolve_revision\n"
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


def test_a_hub_that_accepts_and_never_answers_is_not_waited_for(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("finetune.hub.guard.ASK_SECONDS", 0.2)
        for note in (under_test.check_read("me/tiny"), under_test.check_write("me/tiny")):
            assert "could not be checked" in (note or "") and "ReadTimeout" in (note or "")


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
    with pytest.raises(InputError, match="lacks this permission"):
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

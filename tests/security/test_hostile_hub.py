"""A Hub, or a mirror of it, that lies: other bytes, names that leave the cache, bodies without end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.context import Context
from finetune.errors import FinetuneError
from finetune.hub import guard, verified
from finetune.models import loading
from finetune.recipe import Model, Runtime, Tracking
from tests.helpers import hub_server
from tests.helpers.hub_server import LoopbackHub

FILES = {
    "config.json": b'{"model_type": "mistral"}', "tokenizer.json": b"{}", "model.safetensors": bytes(range(256)) * 40,
}  # fmt: skip


def fetch(root: Path, commit: str, weights: bool = True) -> Path:
    """The snapshot of lab/model, as a run fetches it."""
    said: list[str] = []
    ctx = Context(scratch=root / "scratch", runtime=Runtime(), tracking=Tracking(), device="cpu", say=said.append)
    model = Model.model_validate("lab/model")
    return loading.hub_snapshot(model, commit, ctx, weights=weights)


def files_outside(root: Path) -> list[str]:
    """Every file under `root` but those of the scratch folder's cache and the client's own home."""
    inside = (root / "scratch" / "hub", root / "hf_home")
    return [str(p) for p in root.rglob("*") if p.is_file() and not any(p.is_relative_to(i) for i in inside)]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change what the Hub answers: `change(status, value, headers, handler)` returns the three anew."""

    def install(change: Callable[..., Any]) -> None:
        real = hub_server._Handler._answer

        def answer(self: Any, status: int, value: Any, headers: dict[str, str]) -> None:
            changed = change(status, value, dict(headers), self)
            if changed is not None:
                real(self, *changed)

        monkeypatch.setattr(hub_server._Handler, "_answer", answer)

    return install


def test_right_weights_pass_and_are_read_once(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.plant("lab/model", FILES)
    read: list[str] = []
    real = verified.hub_digest
    monkeypatch.setattr(verified, "hub_digest", lambda path, *rest: read.append(path.name) or real(path, *rest))
    fetch(tmp_path, commit, weights=False)
    assert sorted(read) == ["config.json", "tokenizer.json"]
    fetch(tmp_path, commit)
    assert sorted(read) == ["config.json", "model.safetensors", "tokenizer.json"]
    hub.requests.clear()
    for _ in range(2):
        fetch(tmp_path, commit)
    assert len(read) == 3 and hub.requests == []


def test_weights_with_other_bytes_than_announced_are_refused_and_fetched_again(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    commit = hub.plant("lab/model", FILES)
    hub.served["model.safetensors"] = FILES["model.safetensors"][:-1] + b"!"
    with pytest.raises(FinetuneError, match=r"model\.safetensors differs from the Hub's announcement"):
        fetch(tmp_path, commit)
    hub.served.clear()
    folder = fetch(tmp_path, commit)
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_an_etag_is_a_promise_too(hub: LoopbackHub, tmp_path: Path, answers: Callable[..., None]) -> None:
    """Of a cache that an earlier release filled there is no listing: the blobs' names are what was announced."""
    commit = hub.plant("lab/model", FILES)
    folder = fetch(tmp_path, commit)
    verified._record(folder).unlink()
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(b"!" + blob.read_bytes()[1:])
    with pytest.raises(FinetuneError, match="announced"):
        fetch(tmp_path, commit)
    assert not blob.exists()


@pytest.mark.parametrize("name", ["ETag", "X-Linked-Etag", "X-Repo-Commit"])
@pytest.mark.parametrize("value", ["../../../../outside", "..", "/tmp/outside", "a/b", "x" * 5000, "a\\b"])
def test_a_name_that_leaves_the_cache_is_refused_before_anything_is_written(
    name: str, value: str, hub: LoopbackHub, tmp_path: Path, answers: Callable[..., None]
) -> None:
    commit = hub.plant("lab/model", FILES)

    def change(status: int, body: Any, headers: dict[str, str], handler: Any) -> Any:
        if "/resolve/" in handler.where:
            headers[name] = f'"{value}"' if name != "X-Repo-Commit" else value
        return status, body, headers

    answers(change)
    with pytest.raises(FinetuneError, match="that is not a valid file name"):
        fetch(tmp_path, commit)
    assert files_outside(tmp_path) == []


@pytest.mark.parametrize(
    "entry",
    [
        {"path": "../../outside.json"},
        {"path": "/tmp/outside.json"},
        {"oid": "../../outside"},
        {"lfs": {"oid": "../../../outside", "size": 3, "pointerSize": 3}},
        {"xetHash": "../outside"},
    ],
)
def test_a_listing_that_leaves_the_cache_is_refused(
    entry: dict[str, Any], hub: LoopbackHub, tmp_path: Path, answers: Callable[..., None]
) -> None:
    commit = hub.plant("lab/model", FILES)

    def change(status: int, body: Any, headers: dict[str, str], handler: Any) -> Any:
        if "/tree/" in handler.where:
            body = [{**e, **entry} if e["path"] == "tokenizer.json" else e for e in body]
        return status, body, headers

    answers(change)
    with pytest.raises(FinetuneError, match="the Hub listed"):
        fetch(tmp_path, commit)
    assert files_outside(tmp_path) == []


def endless(sent: list[int], pattern: str, chunk: bytes, pause: float = 0.0, most: int = 200_000_000) -> Any:
    """An answer without a length whose body goes on until the client leaves."""

    def change(status: int, body: Any, headers: dict[str, str], handler: Any) -> Any:
        if handler.command != "GET" or pattern not in handler.where:
            return status, body, headers
        handler.send_response(200)
        for header, text in {"Content-Type": "application/json", **headers, "Transfer-Encoding": "chunked"}.items():
            handler.send_header(header, text)
        handler.end_headers()
        handler.close_connection = True
        try:
            while sum(sent) < most:
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                handler.wfile.flush()
                sent.append(len(chunk))
                if pause:
                    handler.server.event.wait(pause)
        except OSError:
            pass
        return None

    return change


@pytest.mark.parametrize("pattern", ["model.safetensors", "config.json"])
def test_a_body_longer_than_announced_is_stopped(
    pattern: str, hub: LoopbackHub, tmp_path: Path, answers: Callable[..., None]
) -> None:
    sent: list[int] = []
    commit = hub.plant("lab/model", FILES)
    answers(endless(sent, pattern, b"x" * 50_000))
    with pytest.raises(FinetuneError, match=r"sends more than the [\d,]+ bytes that it announced"):
        fetch(tmp_path, commit)
    assert sum(sent) < 30_000_000  # what the sockets hold


@pytest.mark.parametrize("pattern", ["/tree/", "/revision/", "/api/models/lab/model"])
def test_an_answer_without_end_is_stopped(
    pattern: str, hub: LoopbackHub, tmp_path: Path, answers: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.hub.client import resolve_revision

    monkeypatch.setattr(guard, "ANSWER_BYTES", 1_000_000)
    sent: list[int] = []
    commit = hub.plant("lab/model", FILES)
    answers(endless(sent, pattern, b" " * 50_000))
    with pytest.raises(FinetuneError, match="sends more than"):
        if pattern == "/tree/":
            fetch(tmp_path, commit)
        else:
            resolve_revision("lab/model", "v1" if "revision" in pattern else None, scratch=tmp_path / "scratch")
            raise FinetuneError("sends more than: a revision is not asked for")
    assert sum(sent) < 60_000_000


def test_a_body_that_all_but_stands_still_is_stopped(
    hub: LoopbackHub, tmp_path: Path, answers: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    monkeypatch.setattr(guard, "PATIENCE_SECONDS", 0.4)
    monkeypatch.setattr(hub_server.ThreadingHTTPServer, "event", threading.Event(), raising=False)
    commit = hub.plant("lab/model", FILES)
    answers(endless([], "model.safetensors", b"x", pause=0.05, most=400))
    start = time.monotonic()
    with pytest.raises(FinetuneError, match=r"has sent \d+ bytes in"):
        fetch(tmp_path, commit)
    assert time.monotonic() - start < 15


def test_a_packing_that_nothing_asked_for_is_refused(
    hub: LoopbackHub, tmp_path: Path, answers: Callable[..., None]
) -> None:
    commit = hub.plant("lab/model", FILES)
    asked: list[str] = []

    def change(status: int, body: Any, headers: dict[str, str], handler: Any) -> Any:
        asked.append(handler.headers.get("Accept-Encoding", ""))
        if handler.command == "GET" and "config.json" in handler.where:
            headers["Content-Encoding"] = "zstd"
        return status, body, headers

    answers(change)
    with pytest.raises(FinetuneError, match="zstd"):
        fetch(tmp_path, commit)
    assert not any("zstd" in a or "br" in a for a in asked)


def test_a_client_that_was_made_anew_is_guarded_again(hub: LoopbackHub) -> None:
    from huggingface_hub import close_session, get_session

    guard.install()
    guard.install()
    assert get_session().event_hooks["response"].count(guard._check) == 1
    close_session()
    guard.install()
    assert get_session().event_hooks["response"].count(guard._check) == 1

"""Checks on the answers of a Hub or its mirror: names stay inside the cache, bodies are no longer than announced.

huggingface_hub derives file names from values of the server (an ETag, a commit, an LFS id) and writes a body until it
ends. The checks are hooks on the client that all its calls share (`get_session`), so they also cover
`snapshot_download`, datasets and transformers.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from finetune.errors import FinetuneError
from finetune.utils.format import clipped, visible

if TYPE_CHECKING:
    import httpx2

NAME = re.compile(r'(W/)?"?[A-Za-z0-9_+=-][A-Za-z0-9._+=:-]{0,199}"?')  # of a blob
COMMIT = re.compile(r"[0-9a-f]{40}")
NAMES = {"etag": NAME, "x-linked-etag": NAME, "x-repo-commit": COMMIT}
IDS, PATHS = ("oid", "sha", "xetHash"), ("path", "rfilename")
PACKINGS = ("identity", "gzip", "deflate", "")  # they expand a thousandfold at most
ANSWER_BYTES = 256 << 20  # limit of an answer that is not a file: the listing of a large repository takes some MB
SLACK_BYTES = 1 << 16
SLOWEST_BYTES_PER_SECOND, PATIENCE_SECONDS = 1000, 120.0
MOST_KNOWN = 10_000
ASK_SECONDS = 10.0  # without an answer, or between two parts of one

_lock = threading.Lock()
_announced: dict[str, int] = {}  # address without its query → bytes, from a HEAD request


def install() -> None:
    """Check every answer to huggingface_hub's client in this process from now on. Idempotent."""
    from huggingface_hub import get_session

    client = get_session()
    if _check not in client.event_hooks["response"]:
        hooks = client.event_hooks
        client.event_hooks = {"request": [*hooks["request"], _ask], "response": [*hooks["response"], _check]}


def _ask(request: httpx2.Request) -> None:
    """Set a time limit on a question to the API, and accept no encoding with unbounded expansion (zstd, br).

    The client of huggingface_hub has no limit, and accepts those encodings if their packages are installed.
    """
    limits = request.extensions.get("timeout", {})
    if request.method == "GET" and "/api/" in request.url.path and not any(limits.values()):
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), ASK_SECONDS)
    asked = request.headers.get("accept-encoding", "")
    if any(name.strip().partition(";")[0] not in PACKINGS for name in asked.split(",")):
        request.headers["accept-encoding"] = "gzip, deflate"


def _check(response: httpx2.Response) -> None:
    """Refuse names that leave the cache, record an announced length, bound the body."""
    import httpx2

    request, headers = response.request, response.headers
    where = f"{request.url.host}{request.url.path}"
    for name, allowed in NAMES.items():  # for files only: an ETag of an API answer, in base64, becomes no file name
        value = headers.get(name) if request.method == "HEAD" or "/resolve/" in request.url.path else None
        if value is not None and not allowed.fullmatch(value):
            raise FinetuneError(
                f"{where}: the Hub answered with a {name} that is not a valid file name: {quoted(value)}"
            )
    size: str = headers.get("x-linked-size") or ("" if response.is_redirect else headers.get("content-length")) or ""
    if request.method == "HEAD":
        if size.isdecimal() and response.status_code < 400:
            _remember(str(request.url), headers.get("location"), int(size))
        return
    most = _known(str(request.url))
    if response.is_redirect:
        if most is not None:
            _remember(str(request.url), headers.get("location"), most)
        most = ANSWER_BYTES
    elif most is None:
        most = int(size) if size.isdecimal() else ANSWER_BYTES
    packed = headers.get("content-encoding") or "identity"
    if packed not in PACKINGS:
        raise FinetuneError(f"{where}: the Hub answered with the encoding {quoted(packed)}, which was not requested")
    if isinstance(response.stream, httpx2.SyncByteStream):
        response.stream = _stream(response.stream, most, where)
    if "/api/" in request.url.path and "json" in headers.get("content-type", "") and request.method == "GET":
        response.read()
        try:
            _check_names(response.json(), where)
        except ValueError:
            return  # the caller reports the error


def _check_names(value: object, where: str) -> None:
    """Refuse a listing whose ids or paths, used as file names, would leave their folder."""
    if isinstance(value, list):
        for inner in value:
            _check_names(inner, where)
    if not isinstance(value, dict):
        return
    for name, inner in value.items():
        if isinstance(inner, str) and name in IDS and not NAME.fullmatch(inner):
            raise FinetuneError(f"{where}: the Hub listed a {name} that is not a valid file name: {quoted(inner)}")
        if isinstance(inner, str) and name in PATHS and (inner.startswith("/") or ".." in re.split(r"[/\\]", inner)):
            raise FinetuneError(f"{where}: the Hub listed a file outside its repository: {quoted(inner)}")
        _check_names(inner, where)


def _stream(inner: httpx2.SyncByteStream, most: int, where: str) -> httpx2.SyncByteStream:
    import httpx2

    class Bounded(httpx2.SyncByteStream):
        """Body that raises FinetuneError if it is longer than announced or almost stalls."""

        def __iter__(self) -> Iterator[bytes]:
            taken, begin = 0, time.monotonic()
            for chunk in inner:
                taken += len(chunk)
                if taken > most + SLACK_BYTES:
                    raise FinetuneError(
                        f"{where}: the Hub sends more than the {most:,} bytes that it announced; stopped"
                    )
                seconds = time.monotonic() - begin
                if seconds > PATIENCE_SECONDS and taken < seconds * SLOWEST_BYTES_PER_SECOND:
                    raise FinetuneError(f"{where}: the Hub has sent {taken:,} bytes in {seconds:.0f} s; stopped")
                yield chunk

        def close(self) -> None:
            inner.close()

    return Bounded()


def _remember(address: str, location: str | None, size: int) -> None:
    with _lock:
        if len(_announced) >= MOST_KNOWN:
            _announced.clear()
        for url in (address, urljoin(address, location) if location else address):
            _announced[_plain(url)] = size


def _known(address: str) -> int | None:
    with _lock:
        return _announced.get(_plain(address))


def _plain(address: str) -> str:
    """Return an address without its query, a signature that changes at each request."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


def quoted(value: str) -> str:
    """Format a value of the server for a message."""
    return repr(visible(clipped(value, 100)))

"""What a Hub, or a mirror of one, may answer: names that stay within a cache, and bodies no longer than announced.

huggingface_hub makes file names of what the server sends (an ETag, a commit, an LFS id) and writes a body until it
ends. The checks are hooks of the client that it shares between all its calls (`get_session`), so also of its
`snapshot_download`, of datasets and of transformers.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from finetune.errors import FinetuneError
from finetune.utils.format import clipped, visible

if TYPE_CHECKING:
    import httpx2

NAME = re.compile(r'(W/)?"?[A-Za-z0-9_+=-][A-Za-z0-9._+=:-]{0,199}"?')  # of a blob
COMMIT = re.compile(r"[0-9a-f]{40}")
NAMES = {"etag": NAME, "x-linked-etag": NAME, "x-repo-commit": COMMIT}
IDS, PATHS = ("oid", "sha", "xetHash"), ("path", "rfilename")
PACKINGS = ("identity", "gzip", "deflate", "")  # which grow a thousandfold at most
ANSWER_BYTES = 256 << 20  # of an answer that is no file: the listing of a large repository has some MB
SLACK_BYTES = 1 << 16
SLOWEST_BYTES_PER_SECOND, PATIENCE_SECONDS = 1000, 120.0
MOST_KNOWN = 10_000

_lock = threading.Lock()
_announced: dict[str, int] = {}  # address without its query → bytes, as a HEAD said


def install() -> None:
    """Check every answer to huggingface_hub's client in this process from now on; again is fine."""
    from huggingface_hub import get_session

    client = get_session()
    if _check not in client.event_hooks["response"]:
        hooks = client.event_hooks
        client.event_hooks = {"request": [*hooks["request"], _ask], "response": [*hooks["response"], _check]}


def _ask(request: httpx2.Request) -> None:
    """Ask for no packing whose growth has no bound (zstd, br), which the client does where it has a package for it."""
    asked = request.headers.get("accept-encoding", "")
    if any(name.strip().partition(";")[0] not in PACKINGS for name in asked.split(",")):
        request.headers["accept-encoding"] = "gzip, deflate"


def _check(response: httpx2.Response) -> None:
    """Refuse names that leave the cache, remember an announced length, bound the body."""
    import httpx2

    request, headers = response.request, response.headers
    where = f"{request.url.host}{request.url.path}"
    for name, allowed in NAMES.items():  # of files only: an ETag of an API's answer, in base64, names nothing
        value = headers.get(name) if request.method == "HEAD" or "/resolve/" in request.url.path else None
        if value is not None and not allowed.fullmatch(value):
            raise FinetuneError(f"{where}: the Hub answered with a {name} that is no name: {shown(value)}")
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
        raise FinetuneError(f"{where}: the Hub answered in {shown(packed)}, which nothing asked for")
    if isinstance(response.stream, httpx2.SyncByteStream):
        response.stream = _stream(response.stream, most, where)
    if "/api/" in request.url.path and "json" in headers.get("content-type", "") and request.method == "GET":
        response.read()
        try:
            _check_names(response.json(), where)
        except ValueError:
            return  # the caller reports what is wrong with it


def _check_names(value: Any, where: str) -> None:  # noqa: ANN401 - JSON
    """Refuse a listing whose ids or paths would leave the folder that they become names in."""
    if isinstance(value, list):
        for inner in value:
            _check_names(inner, where)
    if not isinstance(value, dict):
        return
    for name, inner in value.items():
        if isinstance(inner, str) and name in IDS and not NAME.fullmatch(inner):
            raise FinetuneError(f"{where}: the Hub listed a {name} that is no name: {shown(inner)}")
        if isinstance(inner, str) and name in PATHS and (inner.startswith("/") or ".." in re.split(r"[/\\]", inner)):
            raise FinetuneError(f"{where}: the Hub listed a file outside its repository: {shown(inner)}")
        _check_names(inner, where)


def _stream(inner: httpx2.SyncByteStream, most: int, where: str) -> httpx2.SyncByteStream:
    import httpx2

    class Bounded(httpx2.SyncByteStream):
        """A body that stops: once it is longer than announced, or all but stands still."""

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
    """An address without its query, which signs a CDN's address anew each time."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


def shown(value: str) -> str:
    """A value of the server's in a message."""
    return repr(visible(clipped(value, 100)))

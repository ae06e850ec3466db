"""Run an engine as a child process: wait until it answers, stop it with this process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.errors import FinetuneError, InputError, how_it_ended
from finetune.utils.runtime import end_with_parent

POLL_SECONDS = 0.5
STOP_SECONDS = 10.0
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine's own port
SAID_SECONDS = 15.0
TAIL_LINES = 5


def require_port(host: str, port: int) -> None:
    """Raise InputError if the port is in use, or if this machine has no such address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(f"--host {host}: {error.strerror or error}") from None
    with socket.socket(family[0], family[1]) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(family[4])
        except OSError as error:
            raise InputError(f"--port {port} on {host}: {error.strerror}; name another one with --port") from None


@contextmanager
def running(
    command: Sequence[str],
    environment: Mapping[str, str],
    url: str,
    log: Path,
    say: Callable[[str], None],
    check: Callable[[], None],
) -> Iterator[subprocess.Popen[bytes]]:
    """Start an engine and yield its process once `url`/health answers; terminate it afterwards.

    Its output goes to `log`. `check` is called while waiting and may raise. Raises FinetuneError with the last lines of
    the log if the engine ends before it answers.
    """
    with log.open("wb") as file, tempfile.TemporaryDirectory() as folder:  # an empty working folder: no json.py in it
        process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C comes to this process, which stops the engine
            preexec_fn=end_with_parent,
        )
        try:
            _wait(process, url, log, say, check)
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the engine and its own children: SIGTERM, and SIGKILL to what is still there after 10 s."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError, PermissionError):  # no process of its session is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ended(process: subprocess.Popen[bytes], log: Path) -> FinetuneError:
    """Return the error for an engine that ended by itself."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    tail = "\n".join(f"  {line[:300]}" for line in lines[-TAIL_LINES:])
    return FinetuneError(f"the engine {how_it_ended(process.returncode)}; the end of its log {log}:\n{tail}")


def _wait(
    process: subprocess.Popen[bytes], url: str, log: Path, say: Callable[[str], None], check: Callable[[], None]
) -> None:
    begun = reported = time.monotonic()
    while not _answers(f"{url}/health"):
        if process.poll() is not None:
            raise ended(process, log)
        check()
        now = time.monotonic()
        if now - reported > SAID_SECONDS:
            reported = now
            say(f"serve: loading, {now - begun:.0f} s so far (log: {log})")
        time.sleep(POLL_SECONDS)


def _answers(address: str) -> bool:
    try:
        with DIRECT.open(address, timeout=2) as reply:
            return bool(reply.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False

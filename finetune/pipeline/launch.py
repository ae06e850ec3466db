"""Start several processes of one run on this machine, forward signals, and exit with the first failure.

`accelerate launch` starts the same processes and is required for FSDP, ZeRO and several machines, but turns every exit
status into 1 and ends in a traceback. With this launcher a run of N processes exits like a run of one.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from finetune.errors import FinetuneError, InputError, Stopped, how_it_ended
from finetune.train.oom import SMALLER
from finetune.utils.runtime import end_with_parent, usable_cpus

POLL_SECONDS = 0.1
GRACE_SECONDS = 15.0  # for the others after one has failed; after a signal there is no limit, for the checkpoint
FLOOR_SECONDS = 10.0  # an interpreter with torch takes seconds to exit on a busy machine


def ranks(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return rank and number of processes from the variables of accelerate, torchrun or `launch`.

    Raises InputError if accelerate was configured for several processes but started one, which happens silently for
    `--cpu --num_processes 2` and for `distributed_type: MULTI_CPU`: it then sets an address and no rank.
    """
    if "WORLD_SIZE" in environment:
        return int(environment.get("RANK", "0")), int(environment["WORLD_SIZE"])
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
        raise InputError(
            "accelerate was configured for several processes but started one, as it does for --cpu and for "
            "distributed_type MULTI_CPU. Use --config_file recipes/accelerate/multi_cpu.yaml, or finetune run "
            "--processes N"
        )
    return 0, 1


def launch(arguments: Sequence[str], processes: int) -> None:
    """Run `finetune ARGUMENTS` in `processes` processes and wait for them.

    If a GPU ran out of memory, they are restarted with the smaller micro-batch that its process requested. Exits with
    the status of the process that failed first, which has printed its message. Raises FinetuneError if a process was
    killed, Stopped after a signal that was forwarded to every process.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "micro_batch_rows"
        while status := _launch_once(arguments, processes, asked):
            if not asked.exists():
                sys.exit(status)
            arguments = [*arguments, "--set", f"runtime.micro_batch_rows={int(asked.read_text())}"]
            asked.unlink()


def _launch_once(arguments: Sequence[str], processes: int, asked: Path) -> int:
    """Return the status of the process that failed first; 0 if none failed."""
    port = free_port()
    threads = str(max(1, usable_cpus() // processes))
    started: list[subprocess.Popen[bytes]] = []
    with _handing_on(started) as received:
        for rank in range(processes):
            environment = {
                "OMP_NUM_THREADS": threads,
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                SMALLER: str(asked),
            }
            _start(started, received, arguments, environment)
        rank, status = _wait(started, received)
    if received and status == 128 + received[0]:
        raise Stopped(received[0])
    if status < 0:
        how = f"was killed by {signal.Signals(-status).name}" if received else how_it_ended(status)
        raise FinetuneError(
            f"process {rank + 1} of {processes} {how}; run the same command to resume from the last checkpoint"
        )
    return status


def run_alone(arguments: Sequence[str]) -> int:
    """Run `finetune ARGUMENTS` in one child process and return its status; signals are forwarded to it.

    What it prints on stdout goes to stderr: stdout is for the caller's own result.

    Raises Stopped after a forwarded signal.
    """
    started: list[subprocess.Popen[bytes]] = []
    with _handing_on(started) as received:
        _start(started, received, arguments, os.environ, stdout=2, preexec_fn=end_with_parent)
        status = started[0].wait()
    if received:
        raise Stopped(received[0])
    return status


def _start(
    started: list[subprocess.Popen[bytes]],
    received: Sequence[int],
    arguments: Sequence[str],
    environment: Mapping[str, str],
    **options: Any,  # noqa: ANN401 - of Popen
) -> None:
    """Start `finetune ARGUMENTS`, and hand a signal on that came before."""
    # -P, and the variable for its own children: a json.py in the working folder is data, not a module. A new session:
    # otherwise Ctrl-C in a terminal would reach each process twice, directly and from here.
    command = [sys.executable, "-P", "-m", "finetune", *arguments]
    environment = {**environment, "PYTHONSAFEPATH": "1"}
    started.append(subprocess.Popen(command, env=environment, start_new_session=True, **options))
    if received:
        started[-1].send_signal(received[0])


def _wait(started: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> tuple[int, int]:
    """Wait for all; after the first failure stop the others, and kill them if they do not exit. After a signal there is
    no time limit: rank 0 may be uploading a checkpoint.

    Returns rank and status of the first failure; of several at once a killed process, since it causes errors in others.
    """
    failed = (0, 0)
    deadline = 0.0
    while True:
        statuses = [p.poll() for p in started]
        if not failed[1]:
            seen = [(status, rank) for rank, status in enumerate(statuses) if status]
            if seen:
                status, rank = min(seen)
                failed, deadline = (rank, status), time.monotonic() + GRACE_SECONDS
                _send(started, signal.SIGTERM)
        elif time.monotonic() > deadline and not received:
            _send(started, signal.SIGKILL)
        if None not in statuses:
            return failed
        time.sleep(POLL_SECONDS)


def _send(started: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in started:
        if process.poll() is None:
            process.send_signal(number)


@contextmanager
def _handing_on(started: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Forward SIGINT and SIGTERM to every process; a repeated signal kills them. Yields the signals received."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        _send(started, signal.SIGKILL if number in received else number)
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """Return a free port below the range of outgoing connections on Linux (from 32768): torch binds it only seconds
    later, when an outgoing connection could already use it.
    """
    while True:
        port = random.randrange(20000, 30000)  # noqa: S311 - two launches at once must not try the same ones in turn
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def message(error: FinetuneError, environment: Mapping[str, str]) -> str:
    """Return the message of this process for its failure; empty if another process prints it.

    An error in a recipe occurs in every process: rank 0 prints it, and the others are stopped before they repeat it. An
    error of a higher rank only is printed after a delay, with its number.
    """
    rank = int(environment.get("RANK", "0"))
    if rank == 0:
        return str(error)
    if isinstance(error, Stopped):
        return ""
    time.sleep(FLOOR_SECONDS)
    return f"process {rank + 1}: {error}"

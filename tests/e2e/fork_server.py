"""Runs of the command line in forked processes, so that many runs pay for the heavy imports once.

Reads one JSON request a line and answers with one: {"start": [arguments], "log": path} → {"pid": n};
{"wait": pid} → {"status": n}, negative for the signal that killed it. A start may name another file for what the run
"said" on stderr, a file that is "typed" on stdin and a "folder" to run in, and add to its "environment"; with "stop_at"
the run stops itself, as by SIGSTOP, once it has said that line, and with "stop_writing", checkpoint-N/FILE, with half
of that file of torch's written, or, for COMPLETE, all others. Ends with its stdin.
"""

import io
import json
import os
import signal
import sys
from pathlib import Path

import accelerate
import bitsandbytes
import datasets
import faiss
import peft
import sklearn
import torch
import transformers
import trl

from finetune.cli.main import main
from finetune.train import callbacks
from finetune.utils.console import Screen

IMPORTED = (accelerate, bitsandbytes, datasets, faiss, peft, sklearn, torch, transformers, trl)


def stop_after(line):
    say = Screen.say

    def say_and_stop(self, said):
        say(self, said)
        if said == line:
            os.kill(os.getpid(), signal.SIGSTOP)

    Screen.say = say_and_stop


def stop_inside(place):
    folder, _, name = place.partition("/")
    save, mark = torch.save, callbacks.mark_complete

    def save_half(value, target, *more, **options):
        if isinstance(target, str) and target.endswith(f"/{place}"):
            whole = io.BytesIO()
            save(value, whole, *more, **options)
            Path(target).write_bytes(whole.getvalue()[: whole.tell() // 2])
            os.kill(os.getpid(), signal.SIGSTOP)
        save(value, target, *more, **options)

    def mark_later(checkpoint, made_by):
        if name == callbacks.COMPLETE and checkpoint.name == folder:
            os.kill(os.getpid(), signal.SIGSTOP)
        mark(checkpoint, made_by)

    torch.save, callbacks.mark_complete = save_half, mark_later


def start(arguments, log, said=None, typed=os.devnull, folder=None, stop_at=None, stop_writing=None, environment=()):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for number, path in ((1, log), (2, said or log)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(typed, os.O_RDONLY), 0)
        os.chdir(folder or os.curdir)
        sys.argv = ["finetune", *arguments]
        os.environ.update(environment)
        if stop_at is not None:
            stop_after(stop_at)
        if stop_writing is not None:
            stop_inside(stop_writing)
        main()
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


for line in sys.stdin:
    request = json.loads(line)
    if "start" in request:
        answer = {"pid": start(request.pop("start"), **request)}
    else:
        answer = {"status": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
    print(json.dumps(answer), flush=True)

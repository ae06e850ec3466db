"""Runs of the command line in forked processes, so that many runs pay for the heavy imports once.

Reads one JSON request a line and answers with one: {"start": [arguments], "log": path} → {"pid": n};
{"wait": pid} → {"status": n}, negative for the signal that killed it. A start may name another file for what the run
"said" on stderr and a "folder" to run in, and add to its "environment"; with "stop_at" the run stops itself, as by
SIGSTOP, once it has said that line. Ends with its stdin.
"""

import json
import os
import signal
import sys

import accelerate
import bitsandbytes
import datasets
import faiss
import peft
import sklearn
import torch
import transformers
import trl

from finetune.cli import main
from finetune.report.console import Screen

IMPORTED = (accelerate, bitsandbytes, datasets, faiss, peft, sklearn, torch, transformers, trl)


def stop_after(line):
    say = Screen.say

    def say_and_stop(self, said):
        say(self, said)
        if said == line:
            os.kill(os.getpid(), signal.SIGSTOP)

    Screen.say = say_and_stop


def start(arguments, log, said=None, folder=None, stop_at=None, environment=()):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        for number, path in ((1, log), (2, said or log)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder or os.curdir)
        sys.argv = ["finetune", *arguments]
        os.environ.update(environment)
        if stop_at is not None:
            stop_after(stop_at)
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

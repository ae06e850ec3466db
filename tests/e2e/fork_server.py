"""Runs of the command line in forked processes, so that many runs pay for the heavy imports once.

Reads one JSON request a line and answers with one: {"start": [arguments], "log": path} → {"pid": n};
{"wait": pid} → {"status": n}, negative for the signal that killed it. Ends with its stdin.
"""

import json
import os
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

IMPORTED = (accelerate, bitsandbytes, datasets, faiss, peft, sklearn, torch, transformers, trl)


def start(arguments, log):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(descriptor, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["finetune", *arguments]
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
        answer = {"pid": start(request["start"], request["log"])}
    else:
        answer = {"status": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
    print(json.dumps(answer), flush=True)

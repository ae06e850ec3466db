"""llama-cpp-python's server with a GGUF of a small model: the real openai client, and the check of `finetune serve`.

LLAMA_PYTHON names an interpreter that has llama-cpp-python[server]; without it this one is tried.
"""

import json
import os
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

import pytest

from finetune.cli import serve
from finetune.errors import GateRefused
from finetune.pipeline.launch import free_port
from finetune.serve import process
from finetune.serve.client import Sampling, connect
from finetune.utils.console import Screen
from tests.helpers.exported import merged
from tests.stages.test_export import run

pytestmark = pytest.mark.slow
pytest.importorskip("openai")
pytest.importorskip("gguf")
PYTHON = os.environ.get("LLAMA_PYTHON", sys.executable)
CHAT = [{"role": "user", "content": "Is the sea wide?"}]


@contextmanager
def served(folder, comment):
    """Address of the server and the merged folder that its GGUF was made of, whose template begins with `comment`."""
    if subprocess.run([PYTHON, "-c", "import llama_cpp.server.app"], capture_output=True).returncode:
        pytest.skip("llama-cpp-python[server] is not installed")
    model = merged(folder / "merge", dtype="float16")
    template = model / "chat_template.jinja"
    template.write_text(comment + template.read_text())
    run(model, folder / "out", "f16")
    port = free_port()
    command = [PYTHON, "-m", "llama_cpp.server", "--model", str(folder / "out" / "model-f16.gguf"), "--n_ctx", "256"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--model_alias", "merge"]
    root = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:  # it has no /health: its list of models comes once the model is loaded
        patch.setattr(process, "_answers", lambda address: _lists(root))
        with process.running(command, os.environ, root, folder / "log", print, lambda: None):
            yield f"{root}/v1", model


def _lists(root):
    try:
        with urllib.request.urlopen(f"{root}/v1/models", timeout=2) as reply:
            return bool(json.load(reply)["data"])
    except OSError:
        return False


def check(url, folder, roots):
    serve._check(str(folder), url, "merge", exact=False, roots=(roots, roots), screen=Screen())


def test_prompt_tokens_answer_and_stream_are_those_of_the_merged_model(tmp_path):
    from transformers import AutoTokenizer

    with served(tmp_path, "{# as trained #}") as (url, folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        server = connect(url, "merge")
        reply = server.ask(CHAT, Sampling(8))
        ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
        assert reply.prompt_tokens == len(ids)
        assert "".join(server.stream(CHAT, Sampling(8))) == reply.text
        check(url, folder, tmp_path)


def test_the_check_finds_a_template_that_the_server_replaces(tmp_path):
    """llama-cpp-python 0.3.36 knows the text of ChatML and writes an empty system turn instead of rendering it."""
    with served(tmp_path, "") as (url, folder), pytest.raises(GateRefused, match="one turn"):
        check(url, folder, tmp_path)

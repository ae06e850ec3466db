"""`finetune serve` with transformers' server and the real openai client, on a small model."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from finetune.pipeline.launch import free_port
from finetune.pipeline.leases import is_running
from tests.e2e.conftest import Workspace

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai")


def arguments(workspace, *words):
    roots = ["--artifacts", str(workspace.folder / "artifacts"), "--scratch", str(workspace.folder / "scratch")]
    return [sys.executable, "-m", "finetune", *map(str, words), *roots]


def started(workspace, *words):
    """A server's process, once it is ready, and its address."""
    port = free_port()
    process = subprocess.Popen(
        arguments(workspace, "serve", "small", "--engine", "transformers", "--port", port, *words),
        cwd=workspace.folder, env=workspace.environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "ready at" in line:
            return process, f"http://127.0.0.1:{port}/v1"
    raise AssertionError("".join(lines))


@pytest.fixture(scope="module")
def work(finished, tmp_path_factory):
    return Workspace(shutil.copytree(finished.folder, tmp_path_factory.mktemp("serve") / "work"))


@pytest.fixture(scope="module")
def merged(work):
    return json.loads(work.run("show", "small", "--json").stdout)["stages"]["merge"]["path"]


@pytest.fixture(scope="module")
def url(work):
    process, address = started(work)
    yield address
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(n) for n in found]


def test_two_clients_at_once_get_what_one_gets_and_a_stream_is_the_whole_answer(url, merged):
    client = openai.OpenAI(base_url=url, api_key="none")
    asked = {"model": merged, "max_tokens": 8, "temperature": 0}

    def text(noun):
        chat = [{"role": "user", "content": f"What does the {noun} number 3 do?"}]
        return client.chat.completions.create(messages=chat, **asked).choices[0].message.content

    alone = {noun: text(noun) for noun in ("tree", "river")}
    together = {}
    threads = [threading.Thread(target=lambda n=n: together.update({n: text(n)})) for n in alone]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert together == alone
    chat = [{"role": "user", "content": "What does the tree number 3 do?"}]
    pieces = client.chat.completions.create(messages=chat, stream=True, **asked)
    streamed = "".join(c.choices[0].delta.content or "" for c in pieces if c.choices)
    assert streamed.strip() == alone["tree"].strip()


def test_generate_and_chat_ask_the_server_and_get_what_the_model_here_answers(work, url, merged):
    prompts = work.folder / "prompts.txt"
    prompts.write_text("What does the tree number 3 do?\nWhat does the river number 5 do?\n")
    common = ["--input", prompts, "--max-new-tokens", "12"]
    for name, out, more in ((merged, "served.jsonl", ["--server", url]), (merged, "here.jsonl", [])):
        command = arguments(work, "generate", name, *common, "--output", work.folder / out, *more)
        subprocess.run(command, cwd=work.folder, env=work.environment(), check=True, capture_output=True)
    served, here = (
        [json.loads(line) for line in (work.folder / name).read_text().splitlines()]
        for name in ("served.jsonl", "here.jsonl")
    )
    assert [s["answer"].strip() for s in served] == [h["answer"].strip() for h in here]
    assert [(s["id"], s["finish"]) for s in served] == [(h["id"], h["finish"]) for h in here]
    chat = arguments(work, "chat", merged, "--server", url, "--temperature", "0", "--max-new-tokens", "12")
    done = subprocess.run(
        [*chat, "--prompt", "What does the tree number 3 do?"], cwd=work.folder, env=work.environment(), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == served[0]["answer"].strip()


def test_the_check_passes_for_what_was_merged_and_fires_for_another_template(work, url, merged):
    check = arguments(work, "serve", "small", "--check", "--server", url)
    done = subprocess.run(check, cwd=work.folder, env=work.environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one turn" in done.stdout
    other = Workspace(shutil.copytree(work.folder, work.folder.parent / "other"))
    changed = Path(shutil.copytree(merged, other.folder / "changed"))
    text = (changed / "chat_template.jinja").read_text()
    (changed / "chat_template.jinja").write_text("Please answer: " + text)
    check = arguments(other, "serve", changed, "--check", "--server", url, "--model", merged)
    done = subprocess.run(check, cwd=other.folder, env=other.environment(), text=True, capture_output=True)
    assert done.returncode == 3 and "expected" in done.stdout


def test_a_killed_command_leaves_no_server(work):
    process, address = started(work)
    (engine,) = children(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while is_running(engine) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not is_running(engine)
    with pytest.raises(openai.APIConnectionError):
        openai.OpenAI(base_url=address, api_key="x", max_retries=0).models.list()


def test_a_port_in_use_another_machine_without_a_key_and_a_folder_that_is_no_model_are_refused(work, url):
    port = url.split(":")[2].split("/")[0]
    for words, expected in (
        (["small", "--engine", "transformers", "--port", port], "name another one with --port"),
        (["small", "--engine", "transformers", "--host", "0.0.0.0"], "FINETUNE_API_KEY"),
        (["./artifacts"], "config.json"),
        (["small", "--engine", "llama-server"], "llama-server"),
    ):
        done = subprocess.run(
            arguments(work, "serve", *words), cwd=work.folder, env=work.environment(), text=True, capture_output=True
        )
        assert done.returncode == 2 and expected in done.stderr, done.stderr

"""The client of an OpenAI-compatible server: addresses, keys, and answers that are none."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from finetune.errors import FinetuneError, InputError
from finetune.serve.client import NoCompletion, Sampling, _words, connect, sentences

pytest.importorskip("openai")
CALL = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
ANSWER = {"role": "assistant", "content": None, "tool_calls": [CALL]}
COMPLETION = {
    "id": "x", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "message": ANSWER, "finish_reason": "tool_calls"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
}  # fmt: skip


@pytest.fixture
def server():
    """A server that answers every request with `status` and `body`; it keeps the keys that it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            made.keys.append(self.headers["Authorization"])
            made.sent = str(self.headers)
            body = made.body if isinstance(made.body, bytes) else made.body.encode()
            self.send_response(made.status)
            self.send_header("Content-Type", made.kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    made.status, made.body, made.keys, made.kind = 200, json.dumps(COMPLETION), [], "application/json"
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    made.url = f"http://127.0.0.1:{made.server_port}"
    yield made
    made.shutdown()


def ask(server):
    return connect(server.url, "m").ask([{"role": "user", "content": "a"}], Sampling(4))


def test_tool_calls_are_kept(server):
    reply = ask(server)
    assert reply.calls == (CALL,) and reply.finish == "tool_calls" and (reply.prompt_tokens, reply.tokens) == (5, 2)


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "http://127.0.0.1:abc/v1", "http://[::1/v1", "ftp://x", "http://u:p@x", "http://a..b/v1",
     "http://exä..de/v1", f"http://{'a' * 64}.de/v1", "http://1.2.3.999/v1"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(InputError, match="--server"):
        connect(url, "m")


def test_a_key_of_another_service_is_not_sent_in_clear(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-account")
    monkeypatch.delenv("FINETUNE_API_KEY", raising=False)
    ask(server)
    assert server.keys == ["Bearer none"]
    assert connect("https://api.openai.com/v1", "m").client.api_key == "sk-account"
    monkeypatch.setenv("FINETUNE_API_KEY", "ours")
    ask(server)
    assert server.keys[-1] == "Bearer ours"


def test_a_key_goes_to_no_host_that_only_a_recipe_names(server, monkeypatch):
    def key(url, **more):
        return connect(url, "m", **more).client.api_key

    monkeypatch.setenv("FINETUNE_API_KEY", "ours")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-account")
    monkeypatch.delenv("FINETUNE_API_HOST", raising=False)
    there = "https://llm.example.com/v1"
    assert [key(u, typed=False) for u in (there, server.url, "http://localhost:1", "https://api.openai.com/v1")] == [
        "none", "ours", "ours", "sk-account",
    ]  # fmt: skip
    assert "FINETUNE_API_HOST=llm.example.com" in connect(there, "m", typed=False).key_help
    monkeypatch.setenv("FINETUNE_API_HOST", "LLM.example.com")
    assert key(there, typed=False) == key("https://other.example.com/v1") == "ours"
    assert key("https://xllm.example.com/v1", typed=False) == "none"


def test_the_names_of_an_openai_account_go_to_no_other_host(server, monkeypatch):
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "account-name")
    ask(server)
    assert "account-name" not in server.sent
    listing = connect(server.url, "m").client.with_options(max_retries=0)
    assert not listing.organization and not listing.project
    assert connect("https://api.openai.com/v1", "m").client.organization == "account-name"


@pytest.mark.parametrize("key", ["se\ncret", "secr\u00e9t", "se\x7fcret"])
def test_a_key_that_no_header_holds_is_refused_without_its_value(server, monkeypatch, key):
    monkeypatch.setenv("FINETUNE_API_KEY", key)
    with pytest.raises(InputError, match="FINETUNE_API_KEY: found characters") as caught:
        ask(server)
    assert "cr" not in str(caught.value).replace("characters", "")
    monkeypatch.setenv("FINETUNE_API_KEY", " a-secret\r\n")
    ask(server)
    assert server.keys == ["Bearer a-secret"]


def test_a_key_is_hidden_also_as_python_writes_it():
    for key in ("se\\cret", "secret'", "secret\n"):
        assert "ecret" not in _words(ValueError(f"Illegal header value {('Bearer ' + key).encode()!r}"), key)


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (200, "{}", FinetuneError, "something else than a chat completion"),
        (401, "{}", InputError, "refused the key"),
        (404, "{}", InputError, "has no model m"),
        (400, '{"error": {"message": "too long"}}', InputError, "too long"),
    ],
)
def test_a_refusal_is_one_sentence(server, status, body, kind, words):
    server.status, server.body = status, body
    with pytest.raises(kind, match=words):
        ask(server)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"<html>log in</html>", "text/html"),
        (b"<html>log in</html>", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"choices": "\xff\xfe"}', "application/json"),
    ],
)
def test_what_is_no_answer_of_such_an_api_is_one_sentence(server, body, kind):
    server.body, server.kind = body, kind
    for call in (ask, lambda server: listed(connect(server.url, "m"))):
        with pytest.raises(NoCompletion, match="answered with something else than"):
            call(server)


def listed(server):
    with sentences(server):
        return server.models()


def completion(message, **more):
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return json.dumps({**COMPLETION, "choices": choices, **more})


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({**COMPLETION, "choices": {"0": 1}}),
        json.dumps({**COMPLETION, "choices": ["text"]}),
        completion("text"),
        completion({"role": "assistant", "content": 5}),
        completion({"role": "assistant", "content": {"text": "a"}}),
        completion({"role": "assistant", "content": ["a"]}),
        completion({"role": "assistant", "content": [{"type": "text", "text": None}]}),
        completion({"role": "assistant", "content": "a", "tool_calls": ["b"]}),
        completion({"role": "assistant", "content": "a", "tool_calls": 5}),
    ],
)
def test_a_malformed_completion_is_none(server, body):
    server.body = body
    with pytest.raises(NoCompletion, match="than a chat completion"):
        ask(server)


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None}, {"completion_tokens": "7"}, [], "many", 5])
def test_tokens_that_are_not_stated_are_none(server, usage):
    server.body = completion({"role": "assistant", "content": ""}, usage=usage)
    assert (ask(server).prompt_tokens, ask(server).tokens) == (0, 0)


def test_parts_of_text_are_joined(server):
    parts = [{"type": "thinking", "thinking": "x"}, {"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    server.body = completion({"role": "assistant", "content": parts}, model="m\ud800")
    assert (ask(server).text, ask(server).model) == ("a b", "m?")


def test_a_server_that_is_not_there_is_one_sentence(server, monkeypatch):
    monkeypatch.setattr("finetune.serve.client.RETRIES", 0)
    server.shutdown()
    server.server_close()
    with pytest.raises(FinetuneError, match="cannot be reached"):
        ask(server)

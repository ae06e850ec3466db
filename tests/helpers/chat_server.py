"""A loopback OpenAI-compatible server: what it answers is a function of the request; faults can be queued."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """Attributes: `requests` (bodies in order), `keys`, `answer` (a function of the body), `faults` (one per request).

    A fault is a status (429), or `cut` (a body that breaks off), `garbled` (no JSON), `other` (JSON, no completion),
    or a number of seconds to wait first ("slow").
    """

    def __init__(self, answer, models=("m",)):
        self.answer, self.models, self.requests, self.keys, self.faults = answer, list(models), [], [], []
        self.wanted_key, self.slow, self.named, self.finish, self.usage = None, 0.0, None, "stop", True
        self.lock, self.at_once, self.most_at_once = threading.Lock(), 0, 0
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"chat": self}))
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # a client that does not wait for a slow answer
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    @property
    def prompts(self):
        return [body["messages"][-1]["content"] for body in self.requests]


class _Handler(BaseHTTPRequestHandler):
    chat: ChatServer

    def do_GET(self):
        key = self.headers["Authorization"].removeprefix("Bearer ")
        if self.chat.wanted_key not in (None, key):
            return self._send(401, {"error": {"message": f"Incorrect API key provided: {key}"}})
        return self._send(200, {"object": "list", "data": [{"id": m, "object": "model"} for m in self.chat.models]})

    def do_POST(self):
        chat = self.chat
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Authorization"].removeprefix("Bearer ")
        with chat.lock:
            chat.keys.append(key)
            fault = chat.faults.pop(0) if chat.faults else None
            chat.requests.append(body)
            chat.at_once += 1
            chat.most_at_once = max(chat.most_at_once, chat.at_once)
        try:
            self._answer(body, key, fault)
        finally:
            with chat.lock:
                chat.at_once -= 1

    def _answer(self, body, key, fault):
        chat = self.chat
        if chat.wanted_key is not None and key != chat.wanted_key:
            return self._send(401, {"error": {"message": f"Incorrect API key provided: {key}"}})
        if body["model"] not in chat.models:
            return self._send(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        if isinstance(fault, int):
            return self._send(fault, {"error": {"message": f"fault {fault} with key {key}"}})
        if fault == "slow":
            time.sleep(chat.slow)
        text = chat.answer(body)
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 10, "completion_tokens": len(text.split()), "total_tokens": 10 + len(text.split())}
        made = {
            "id": "x", "object": "chat.completion", "created": 1, "model": chat.named or body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": chat.finish}],
            **({"usage": usage} if chat.usage else {}),
        }  # fmt: skip
        if fault == "other":
            made = {"detail": "a proxy's words"}
        return self._send(200, made, cut=fault == "cut", garbled=fault == "garbled")

    def _send(self, status, value, *, cut=False, garbled=False):
        content = b"{not json" if garbled else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def chat_server(answer, **options):
    """Serve until the block ends."""
    made = ChatServer(answer, **options)
    thread = threading.Thread(target=made.http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.http.shutdown()
        made.http.server_close()

"""Measure a server: time to first token and tokens per second at several numbers of clients.

    python scripts/bench/serve.py --server http://127.0.0.1:8000/v1 --model NAME --plot serve.svg

Each client sends one request after the other, with a long common prefix and its own question, and reads the stream. A
token is counted per streamed piece. With continuous batching the tokens per second of all clients together grow with
their number while one client's time to first token grows little; without it both stay with one client at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finetune.publish.card_curve import standalone
from finetune.serve.client import Sampling, Server, connect
from finetune.utils import svg
from finetune.utils.files import write_bytes

PREFIX = "Read this before you answer. " + "The sea is wide and the ships are small. " * 4


def main() -> None:
    """Measure, print one JSON line per number of clients, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, metavar="URL")
    parser.add_argument("--model", required=True, metavar="NAME")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer, at most")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    asked = parser.parse_args()
    server = connect(asked.server, asked.model)
    one(server, "warm up", asked.tokens)
    measured = [measure(server, clients, asked.requests, asked.tokens) for clients in asked.concurrency]
    for line in measured:
        print(json.dumps(line))
    if asked.plot:
        points = [(f"{m['clients']}", m["tokens_per_second"], 1000 * m["ttft_median_s"]) for m in measured]
        drawn = svg.points("latency against throughput, by clients", points, "tokens/s, all clients", "first token, ms")
        write_bytes(asked.plot, standalone(str(drawn)).encode())


def one(server: Server, question: str, tokens: int) -> tuple[float, float, int]:
    """One streamed request: (seconds to the first piece, seconds in all, pieces)."""
    begun = time.perf_counter()
    first, pieces = 0.0, 0
    chat = [{"role": "user", "content": f"{PREFIX}{question}"}]
    for _ in server.stream(chat, Sampling(max_new_tokens=tokens)):
        first = first or time.perf_counter() - begun
        pieces += 1
    return first, time.perf_counter() - begun, pieces


def measure(server: Server, clients: int, requests: int, tokens: int) -> dict[str, float]:
    """Run `clients` at once; seconds and tokens per second over all of them."""

    def client(number: int) -> list[tuple[float, float, int]]:
        return [one(server, f"What does the tree number {number * 100 + i} do?", tokens) for i in range(requests)]

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = [answer for answers in pool.map(client, range(clients)) for answer in answers]
    seconds = time.perf_counter() - begun
    first = sorted(f for f, _, _ in found)
    written = sum(n for _, _, n in found)
    return {
        "clients": clients,
        "requests": len(found),
        "ttft_median_s": round(statistics.median(first), 4),
        "ttft_max_s": round(first[-1], 4),
        "tokens": written,
        "tokens_per_second": round(written / seconds, 1),
    }


if __name__ == "__main__":
    main()

"""How much of a server's throughput the judge reaches, and in how much memory.

    python experiments/bench/judge_throughput.py --calls 10000 --concurrency 64

A server that answers at once, or after 20, 50 or 100 ms, is asked by the cheapest
client there is (sockets and nothing else), by the judge alone, and by the judge with
the store (what ``jaxalign judge`` does). Every client and the server have a process of
their own; memory is the client's peak above what its imports take. About three minutes
on two quiet cores. The judge is one Python process: it is as fast as the server up to
what one core can do, and no faster. Expected: 0.8 to 1.0 ms of a core a call, half of
it in aiohttp, and some 10 MB whatever the number of calls.
"""

import argparse
import asyncio
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxalign.judging import prompts
from jaxalign.judging.asking import ask
from jaxalign.judging.config import ASPECTS, JudgeConfig
from jaxalign.judging.judge import JudgeRequest, Subject
from jaxalign.judging.make import make_judge
from jaxalign.judging.store import Store


WORDS = "the river runs past seven blue houses and nobody there has seen the sea . "
SPANS = tuple((80 * n, 80 * n + 80) for n in range(4))
LENGTH = re.compile(rb"(?i)content-length: *(\d+)")


def requests(count: int) -> Iterator[JudgeRequest]:
    """Yield requests of the usual size: four segments, five aspects."""
    for number in range(count):
        response = (f"{number} " + WORDS * 5)[:320]
        yield prompts.scores_request(
            Subject(f"{number}: {WORDS * 2}", response, spans=SPANS, aspects=ASPECTS)
        )


class Server(asyncio.Protocol):
    """Answers every request with the same scores after a while."""

    def __init__(self, latency: float):
        self.latency, self.got = latency, b""
        text = json.dumps({"segments": [dict.fromkeys(ASPECTS, 3)] * len(SPANS)})
        choice = {"finish_reason": "stop", "message": {"content": text}}
        usage = {"prompt_tokens": 900, "completion_tokens": 90}
        body = json.dumps({"choices": [choice], "usage": usage}).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
        self.reply = head.encode() + body

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.got += data
        end = self.got.find(b"\r\n\r\n") + 4
        if end < 4 or (length := LENGTH.search(self.got[:end])) is None:
            return
        if len(self.got) >= end + int(length[1]):
            self.got = b""
            loop = asyncio.get_running_loop()
            loop.call_later(self.latency, self.transport.write, self.reply)


async def serve(latency: float) -> None:
    """Serve until killed; the first line on stdout is the port."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Server(latency), "127.0.0.1", 0, backlog=1024
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def bare(port: int, calls: int, concurrency: int) -> None:
    """Ask as cheaply as one can, with a ready-made request of the same size."""
    (request,) = requests(1)
    shape = {"type": "json_schema", "json_schema": {"schema": request.schema}}
    body = json.dumps({"messages": request.messages, "response_format": shape}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
    sent, left = head.encode() + body, iter(range(calls))

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in left:
            writer.write(sent)
            got = LENGTH.search(await reader.readuntil(b"\r\n\r\n"))
            assert got is not None
            json.loads(await reader.readexactly(int(got[1])))
        writer.close()

    await asyncio.gather(*(work() for _ in range(concurrency)))


async def judged(port: int, calls: int, concurrency: int, store: Path | None) -> None:
    """Ask with the judge, and write if there is a store."""
    judge = make_judge(
        JudgeConfig(
            base_url=f"http://127.0.0.1:{port}/v1", model="m", concurrency=concurrency
        )
    )
    count = 0
    if store is None:
        async for _, verdict in judge.grade(requests(calls)):
            count += verdict.failure is None
    else:
        with Store(store) as opened:
            async for answer in ask(judge, requests(calls), opened):
                count += answer.verdict.failure is None
    assert count == calls


def client(kind: str, port: int, calls: int, concurrency: int) -> None:
    """Run one client and print what it took."""
    if kind != "bare":
        make_judge(JudgeConfig(base_url="http://127.0.0.1:1/v1", model="m"))
    before = _peak()
    with tempfile.TemporaryDirectory() as directory:
        began, busy = time.perf_counter(), time.process_time()
        if kind == "bare":
            asyncio.run(bare(port, calls, concurrency))
        else:
            store = Path(directory) / "s.db" if kind == "store" else None
            asyncio.run(judged(port, calls, concurrency, store))
        seconds = time.perf_counter() - began
        busy = time.process_time() - busy
    print(
        json.dumps(
            {
                "rate": calls / seconds,
                "cpu_ms": 1e3 * busy / calls,
                "megabytes": (_peak() - before) / 1e3,
            }
        )
    )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument(
        "--latency", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.1]
    )
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role and options.role[0] == "server":
        asyncio.run(serve(float(options.role[1])))
        return
    if options.role:
        kind, port = options.role
        client(kind, int(port), options.calls, options.concurrency)
        return
    command = [sys.executable, __file__, "--calls", str(options.calls)]
    command += ["--concurrency", str(options.concurrency), "--role"]
    print(f"{options.calls} calls, {options.concurrency} at a time\n")
    print("| latency | client | calls/s | of bare | CPU ms/call | peak + MB |")
    print("|---|---|---|---|---|---|")
    for latency in options.latency:
        server = subprocess.Popen(
            [*command, "server", str(latency)], stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        port, best = server.stdout.readline().strip(), 0.0
        for kind in ("bare", "judge", "store"):
            ended = subprocess.run(
                [*command, kind, port],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env={**os.environ, "OPENAI_API_KEY": "sk-bench-000000000000"},
            )
            took = json.loads(ended.stdout)
            best = best or took["rate"]
            print(
                f"| {1e3 * latency:.0f} ms | {kind} | {took['rate']:.0f} | "
                f"{took['rate'] / best:.0%} | {took['cpu_ms']:.2f} | "
                f"{took['megabytes']:.0f} |",
                flush=True,
            )
        server.terminate()
        server.communicate()


if __name__ == "__main__":
    main()

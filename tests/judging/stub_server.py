"""A server that speaks chat completions, and fails as it is told to.

Its replies follow the schema of the request. It counts what it was asked, by the system
and first user message, and what it has answered well.
"""

import asyncio
import contextlib
import email.utils
import json
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


FAILURES = (
    *("500", "503", "429", "429 after", "429 date", "time-out", "reset", "html"),
    *("cut JSON", "cut body", "prose", "out of range", "wrong length", "no choices"),
    *("refusal", "cut off"),
)
OUTSIDE = ("cut JSON", "prose", "out of range", "wrong length")
"""Those whose reply is a text outside the schema."""

Behave = Callable[[str, int, dict[str, Any]], str]
"""What to do for (question, how often it was asked before, body)."""
Say = Callable[[dict[str, Any]], str]


@dataclass
class Call:
    """One request that came in."""

    behaviour: str
    instant: float
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class Stub:
    """A running server and what it has seen."""

    behave: Behave
    latency: float = 0.0
    say: Say | None = None
    """What a good reply holds; default what fits the request's schema."""
    calls: defaultdict[str, list[Call]] = field(
        default_factory=lambda: defaultdict(list)
    )
    answered: Counter[str] = field(default_factory=Counter)
    most_at_once: int = 0
    url: str = ""
    _open: int = 0

    @property
    def total(self) -> int:
        """All calls."""
        return sum(len(calls) for calls in self.calls.values())


def question(body: dict[str, Any]) -> str:
    """Return what makes two requests the same: the first two messages."""
    return json.dumps(body["messages"][:2])


def fitting(schema: Mapping[str, Any]) -> Any:
    """Return a value of a schema, of the kinds that judges are asked for."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema["type"]
    if kind == "object":
        return {name: fitting(part) for name, part in schema["properties"].items()}
    if kind == "array":
        return [fitting(schema["items"]) for _ in range(schema["minItems"])]
    return {"integer": schema.get("maximum", 1) - 1, "string": "text"}[kind]


@contextlib.contextmanager
def serving(
    behave: Behave | None = None, latency: float = 0.0, say: Say | None = None
) -> Iterator[Stub]:
    """Serve from a thread of this process."""
    stub = Stub(behave or (lambda *_: "ok"), latency, say)
    started = threading.Event()
    inside: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
    connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_connection(stub, reader, writer))
        connections[task] = writer
        task.add_done_callback(connections.pop)

    async def serve() -> None:
        server = await asyncio.start_server(accept, "127.0.0.1", 0, backlog=512)
        stub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        inside.append((asyncio.get_running_loop(), asyncio.Event()))
        started.set()
        await inside[0][1].wait()
        # Clients that broke off may have connected just now. asyncio leaves a socket
        # open whose server closes before its transport is made, and so does a task
        # that asyncio.run cancels before it has begun.
        await asyncio.sleep(0.01)
        server.close()
        for writer in connections.values():
            writer.transport.abort()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    started.wait()
    try:
        yield stub
    finally:
        loop, over = inside[0]
        loop.call_soon_threadsafe(over.set)
        thread.join()


async def _connection(
    stub: Stub, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            assert head.startswith("POST /v1/chat/completions ")
            lines = [line for line in head.split("\r\n")[1:] if line]
            headers = dict(line.split(": ", 1) for line in lines)
            headers = {name.lower(): value for name, value in headers.items()}
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            if not await _answer(stub, headers, body, writer):
                break
    except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
        pass  # the client has gone, or the server is over
    finally:
        writer.close()


async def _answer(
    stub: Stub,
    headers: dict[str, str],
    body: dict[str, Any],
    writer: asyncio.StreamWriter,
) -> bool:
    """Answer one request; tell whether the connection goes on."""
    asked = question(body)
    behaviour = stub.behave(asked, len(stub.calls[asked]), body)
    stub.calls[asked].append(Call(behaviour, time.time(), headers, body))
    stub._open += 1
    stub.most_at_once = max(stub.most_at_once, stub._open)
    try:
        if stub.latency:
            await asyncio.sleep(stub.latency)
        if behaviour == "time-out":
            await asyncio.sleep(3600)
        if behaviour == "reset":
            sock: socket.socket = writer.get_extra_info("socket")
            linger = struct.pack("ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            return False
        status, extra, text = _reply(behaviour, body, headers, stub.say)
        data = text.encode()
        cut = len(data) // 2 if behaviour == "cut body" else len(data)
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(data)}", *extra]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data[:cut])
        await writer.drain()
        if behaviour == "ok":
            stub.answered[asked] += 1
        return behaviour != "cut body"
    finally:
        stub._open -= 1


def _reply(
    behaviour: str,
    body: dict[str, Any],
    headers: dict[str, str],
    say: Say | None = None,
) -> tuple[int, list[str], str]:
    """Return status, further headers and body."""
    if behaviour.startswith("status "):
        _, status, text = behaviour.split(" ", 2)
        return int(status), ["Location: http://127.0.0.1:9/v1"], text
    if behaviour[:3].isdigit():
        date = email.utils.formatdate(time.time() + 2, usegmt=True)
        after = {"429 after": "1", "429 date": date}.get(behaviour)
        extra = ["X-Note: überlastet"]  # a header need not be ASCII
        extra += [] if after is None else [f"Retry-After: {after}"]
        # A server that echoes the key in its errors.
        echo = headers.get("authorization", "")
        text = json.dumps({"error": {"message": f"busy; you sent {echo}"}})
        return int(behaviour[:3]), extra, text
    if behaviour == "html":
        return 200, ["Content-Type: text/html"], "<html>gateway</html>"
    message: dict[str, Any] = {"role": "assistant"}
    if say is not None and behaviour in ("ok", "no usage", "cut body", "no choices"):
        message["content"] = say(body)
    else:
        message["content"] = content(behaviour, schema_of(body), headers)
    if behaviour.startswith("message "):
        given = behaviour.removeprefix("message ")
        quoted = json.dumps(content("ok", schema_of(body)))[1:-1]
        message = json.loads(given.replace("$", quoted))
    ended = "length" if behaviour == "cut off" else "stop"
    if behaviour == "refusal":
        message = {"role": "assistant", "content": None, "refusal": "I would not."}
    choices = [{"index": 0, "finish_reason": ended, "message": message}]
    reply = {
        "object": "chat.completion",
        "choices": [] if behaviour == "no choices" else choices,
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }
    if behaviour == "no usage":
        del reply["usage"]
    return 200, ["Content-Type: application/json"], json.dumps(reply)


def schema_of(body: dict[str, Any]) -> Any:
    """Return the schema that a request asks for, wherever it stands."""
    form = body.get("response_format", {})
    if form.get("type") == "json_schema":
        return form["json_schema"]["schema"]
    return json.loads(body["messages"][0]["content"].rpartition("\n\n")[2])


def content(
    behaviour: str, schema: Mapping[str, Any], headers: dict[str, str] | None = None
) -> str:
    """Return the text of a reply."""
    value = fitting(schema)
    if behaviour == "out of range":
        value["segments"][0][next(iter(value["segments"][0]))] = 5
    if behaviour == "wrong length":
        value["segments"].append(value["segments"][0])
    text = json.dumps(value)
    if behaviour.startswith("around "):
        return behaviour.removeprefix("around ").replace("$", text)
    if behaviour in ("cut JSON", "cut off"):
        return text[: len(text) // 2]
    if behaviour == "prose":
        echo = (headers or {}).get("authorization", "")
        return f"Here are the scores ({echo}):\n{text}"
    return text

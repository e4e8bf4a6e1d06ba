"""A server for tests, its clients, and what the engine makes without it."""

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import uvicorn

from jaxalign.data import records
from jaxalign.data.rendering import Renderer
from jaxalign.generation import text_model
from jaxalign.generation.engine import (
    Completion,
    Event,
    Request,
    Sampling,
    generate,
)
from jaxalign.generation.serving import server, service
from jaxalign.generation.steering import Steering


TURNS: list[Any] = [{"role": "user", "content": "What is the answer?"}]


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Wait for a condition; fail when it does not come."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited in vain for: {what}"
        time.sleep(0.005)
    return found


class Gate:
    """Holds an engine's steps back."""

    def __init__(self, engine: Any):
        self._changed = threading.Condition()
        self._step, self._left = engine.step, float("inf")
        self.steps = 0
        engine.step = self

    def __call__(self, **options: Any) -> list[Event]:
        with self._changed:
            self._changed.wait_for(lambda: self._left > 0)
            self._left -= 1
        self.steps += 1
        return self._step(**options)

    def shut(self) -> None:
        with self._changed:
            self._left, self.steps = 0, 0

    def let(self, steps: float) -> None:
        with self._changed:
            self._left += steps
            self._changed.notify_all()

    def open(self) -> None:
        self.let(float("inf"))


class Served(NamedTuple):
    service: service.Service
    url: str
    gate: Gate

    @property
    def engine(self) -> Any:
        return self.service.driver.engine

    def client(self, kind: Any = openai.OpenAI, api_key: str = "none") -> Any:
        return kind(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0)

    def is_idle(self) -> bool:
        driver = self.service.driver
        return not (driver.texts or self.engine.busy or self.service.answering)


@contextlib.contextmanager
def serving(model: Path, *, key: str | None = None, **options: Any) -> Iterator[Served]:
    config = service.ServeConfig(
        model=str(model), port=0, model_name="tiny", **{"max_length": 200, **options}
    )
    made = text_model.load(
        config.model,
        template_kwargs=config.chat_template_kwargs,
        max_pixels=config.max_pixels,
    )
    state = service.Service(config, made, service.make_engine(config, made))
    gate = Gate(state.driver.engine)
    with server._listen(config) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = server.make_app(state, key)
        runner = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=runner.run, args=([listener],))
        thread.start()
        try:
            until(lambda: runner.started, "the server")
            yield Served(state, url, gate)
        finally:
            gate.open()
            runner.should_exit = True
            thread.join()


def alone(
    served: Served,
    tokens: list[int],
    *,
    steering: Steering | None = None,
    ends: frozenset[int] | None = None,
    **options: Any,
) -> list[Completion]:
    """Return what the engine makes of a prompt, without the server."""
    made = served.service.made
    ends = made.stop_tokens if ends is None else ends
    request = Request(tokens, Sampling(**options), ends, steering=steering)
    found = generate(
        made.model,
        made.variables,
        [request],
        text_of=text_model.text_with(made.tokenizer),
        tokenizer=made.tokenizer,
    )
    return found[0]


def tokens_of(served: Served, prompt: Any) -> list[int]:
    parsed = records.parse_prompt({"prompt": prompt})
    return Renderer(served.service.made.tokenizer).prompt_tokens(parsed)


@contextlib.contextmanager
def command(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run ``jaxalign serve``; yield the process and its address."""
    arguments = ["serve", "--model", str(model), "--port", "0", *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxalign.cli.main", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"serving (\S+) on (http://127.0.0.1:\d+)\n", line)
            assert found, line
            yield process, found[2]
        finally:
            process.kill()

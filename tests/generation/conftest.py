"""A server that the tests of a file share."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.generation.scenes import Served, serving, until


@pytest.fixture(scope="module")
def shared(tiny_llama: Path) -> Iterator[Served]:
    with serving(tiny_llama, batch_slots=8) as found:
        yield found


@pytest.fixture
def served(shared: Served) -> Iterator[Served]:
    """Return the server that the file shares; a test leaves nothing behind in it."""
    yield shared
    shared.gate.open()
    until(shared.is_idle, "an idle server")


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as found:
        yield found

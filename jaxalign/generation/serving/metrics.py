"""What a server has done so far, as Prometheus reads it."""

import contextlib
import time
from collections.abc import Callable, Iterator

from jaxalign.errors import UserError
from jaxalign.generation.serving.api_error import ApiError


try:
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        generate_latest,
    )
except ImportError as error:
    raise UserError(
        f"jaxalign serve needs a package that is not installed ({error.name}): "
        "pip install 'jaxalign[serve]'"
    ) from None


__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Of the text: https://prometheus.io/docs/instrumenting/exposition_formats/."""

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts of one server.

    Args:
      running: gives the completions that are being made.
      waiting: gives those that wait for a slot.
    """

    def __init__(self, *, running: Callable[[], int], waiting: Callable[[], int]):
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "jaxalign_requests",
            "Requests that were answered, by the status of the answer.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._read = Counter(
            "jaxalign_prompt_tokens",
            "Tokens of prompts.",
            registry=self._registry,
        )
        self._made = Counter(
            "jaxalign_completion_tokens",
            "Tokens of completions.",
            registry=self._registry,
        )
        self._seconds = Histogram(
            "jaxalign_request_seconds",
            "Time from a request to the end of its answer.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        for name, text, value in (
            ("running", "Completions that are being made.", running),
            ("waiting", "Completions that wait for a slot.", waiting),
        ):
            gauge = Gauge(f"jaxalign_completions_{name}", text, registry=self._registry)
            gauge.set_function(value)

    @contextlib.contextmanager
    def timed(self, endpoint: str) -> Iterator[None]:
        """Count a request and its time."""
        began, status = time.monotonic(), 200
        try:
            yield
        except ApiError as error:
            status = error.status
            raise
        except Exception:
            status = 500
            raise
        finally:
            self._requests.labels(endpoint, str(status)).inc()
            self._seconds.labels(endpoint).observe(time.monotonic() - began)

    def count_prompt(self, tokens: int) -> None:
        """Count tokens of a prompt."""
        self._read.inc(tokens)

    def count_completion(self) -> None:
        """Count a token of a completion."""
        self._made.inc()

    def text(self) -> bytes:
        """Return all of it."""
        return generate_latest(self._registry)

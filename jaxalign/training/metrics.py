"""Where metrics go: a JSON Lines file always, TensorBoard and W&B where asked."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jaxalign.errors import UserError
from jaxalign.types import Mean, Metrics
from jaxalign.whole_file import write_text


__all__ = [
    "MetricsLog",
    "Sink",
    "merge",
    "open_log",
    "parse_report_to",
    "peak_memory_gb",
    "read",
    "to_floats",
]

SINKS = ("none", "tensorboard", "wandb")


def to_floats(metrics: Metrics, prefix: str = "") -> dict[str, float]:
    """Fetch metrics as total / weight; those that counted nothing are left out.

    >>> to_floats({"loss": Mean(3.0, 2.0), "none": Mean(0.0, 0.0)}, "eval_")
    {'eval_loss': 1.5}
    """
    host: Metrics = jax.device_get(metrics)
    return {
        f"{prefix}{name}": float(np.float64(mean.total) / np.float64(mean.weight))
        for name, mean in host.items()
        if mean.weight != 0
    }


def merge(left: Metrics, right: Metrics) -> Metrics:
    """Merge the metrics of two batches exactly.

    >>> merge({"loss": Mean(1.0, 1.0)}, {"loss": Mean(3.0, 3.0)})["loss"].value
    1.0
    """
    return {name: Mean(*left[name]).merge(Mean(*right[name])) for name in left}


def peak_memory_gb() -> float:
    """Return the most memory used so far in 10^9 bytes: a device's, or our own.

    >>> peak_memory_gb() > 0
    True
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks and jax.local_devices()[0].platform != "cpu":
        return max(peaks) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@runtime_checkable
class Sink(Protocol):
    """Where the lines of a log go beside its file."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a step."""
        ...

    def flush(self) -> None:
        """Bring to the disk what was written."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class MetricsLog:
    """Writes one line a step. Close it to flush what the sinks hold back.

    A file that is there already keeps the lines up to step ``start``, each step once,
    and loses what an earlier process wrote past the checkpoint of that step; with
    ``start`` 0 there is no checkpoint, and all begins anew.

    Raises:
      OSError: the file cannot be written.
    Example:
      >>> import tempfile
      >>> log = MetricsLog(Path(tempfile.mkdtemp()) / "metrics.jsonl")
      >>> log.write(1, {"loss": 0.75})
      >>> log.close()
      >>> read(log.path)[1]["loss"]
      0.75
    """

    def __init__(self, path: Path, sinks: Sequence[Sink] = (), *, start: int = 0):
        self.path = path
        _forget_after(path, start)
        self._file = path.open("a", encoding="utf-8")
        self._sinks = list(sinks)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line and pass the values on."""
        line = {"step": step, "time": time.time(), **values}
        text = json.dumps(
            {k: v if _finite(v) else str(v) for k, v in line.items()}, allow_nan=False
        )
        self._file.write(text + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(step, values)

    def flush(self) -> None:
        """Have the sinks bring to the disk what they hold back."""
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Flush and close everything, even where a part of it fails."""
        with contextlib.ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)
            self._file.close()


def _forget_after(path: Path, start: int) -> None:
    """Leave a log's lines up to a step, replacing the file as a whole."""
    if not path.is_file():
        return
    kept = [line for step, line in read(path).items() if start and step <= start]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    if text.encode() != path.read_bytes():
        write_text(path, text)


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def parse_report_to(text: str) -> tuple[str, ...]:
    """Read ``--report_to``: names separated by commas.

    >>> parse_report_to("tensorboard,wandb")
    ('tensorboard', 'wandb')
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in SINKS:
            raise UserError(
                f"report_to {name!r} is not known: expected {', '.join(SINKS)}, or "
                "several separated by commas"
            )
    if "none" in names and len(names) > 1:
        raise UserError(f"report_to {text!r}: 'none' goes alone")
    return tuple(name for name in names if name != "none")


def open_log(
    run: Path, report_to: Sequence[str], config: Mapping[str, Any], start: int
) -> MetricsLog:
    """Open the metrics log of a run directory.

    Args:
      run: its directory.
      report_to: see :func:`parse_report_to`.
      config: of the run, for those that show it.
      start: step of the checkpoint that the run goes on from, or 0.
    Raises:
      UserError: wandb was asked for and is not installed.
    Example::

      log = open_log(Path("run"), ("tensorboard",), config={}, start=0)
      log.write(1, {"loss": 0.69})
      log.close()
    """
    sinks: list[Sink] = []
    if "tensorboard" in report_to:
        from jaxalign.training.event_files import EventFile

        sinks.append(EventFile(run / "tensorboard", start + 1 if start else 0))
    if "wandb" in report_to:
        sinks.append(_Wandb(run, config))
    return MetricsLog(run / "metrics.jsonl", sinks, start=start)


class _Wandb:
    """A run of Weights & Biases."""

    def __init__(self, run: Path, config: Mapping[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(
                "report_to wandb needs the package: pip install 'jaxalign[wandb]'"
            ) from None
        self._run = wandb.init(dir=str(run), config=dict(config), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Do nothing: a process of its own sends the lines."""

    def close(self) -> None:
        self._run.finish()


def read(path: str | Path) -> dict[int, dict[str, Any]]:
    """Read a metrics file: by step, the last line of each; a torn line is left out.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> _ = path.write_text("\\n".join(['{"step": 1, "loss": 0.7}', '{"step": 2, "lo']))
    >>> read(path)
    {1: {'step': 1, 'loss': 0.7}}
    """
    path = Path(path)
    steps: dict[int, dict[str, Any]] = {}
    if not path.is_file():
        return steps
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        steps[values["step"]] = values
    return dict(sorted(steps.items()))

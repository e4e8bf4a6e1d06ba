"""Where metrics go: a JSON Lines file always, TensorBoard and W&B where asked."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.errors import UserError
from jaxalign.types import Mean, Metrics


__all__ = [
    "MetricsLog",
    "merge",
    "open_log",
    "parse_report_to",
    "peak_memory_gb",
    "read",
    "to_floats",
]

SINKS = ("none", "tensorboard", "wandb")


def to_floats(metrics: Metrics, prefix: str = "") -> dict[str, float]:
    """Fetch metrics as total / weight; those that counted nothing are left out."""
    host: Metrics = jax.device_get(metrics)
    return {
        f"{prefix}{name}": float(np.float64(mean.total) / np.float64(mean.weight))
        for name, mean in host.items()
        if mean.weight != 0
    }


def merge(left: Metrics, right: Metrics) -> Metrics:
    """Merge the metrics of two batches exactly."""
    return {name: Mean(*left[name]).merge(Mean(*right[name])) for name in left}


def peak_memory_gb() -> float:
    """Return the most memory used so far in 10^9 bytes: a device's, or our own."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks and jax.local_devices()[0].platform != "cpu":
        return max(peaks) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class MetricsLog:
    """Writes one line a step. Close it to flush what the sinks hold back."""

    def __init__(self, path: Path, sinks: Sequence[Callable[[int, dict], Any]]):
        self.path = path
        self._drop_torn_line()
        self._file = path.open("a", encoding="utf-8")
        self._sinks = list(sinks)

    def _drop_torn_line(self) -> None:
        """Cut off the last line if a kill left it incomplete."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line and pass the values on."""
        line = {"step": step, "time": time.time(), **values}
        text = json.dumps(
            {k: v if _finite(v) else str(v) for k, v in line.items()}, allow_nan=False
        )
        self._file.write(text + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink(step, dict(values))

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        for sink in self._sinks:
            sink(-1, {})


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
    run: Path, report_to: Sequence[str], config: Mapping[str, Any]
) -> MetricsLog:
    """Open the metrics log of a run directory.

    Raises:
      UserError: wandb was asked for and is not installed.
    """
    sinks: list[Callable[[int, dict], Any]] = []
    if "tensorboard" in report_to:
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(str(run / "tensorboard"))

        def to_tensorboard(step: int, values: dict[str, float]) -> None:
            if step < 0:
                writer.close()
                return
            for name, value in values.items():
                group = "eval" if name.startswith("eval_") else "train"
                writer.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, step)

        sinks.append(to_tensorboard)
    if "wandb" in report_to:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(
                "report_to wandb needs the package: pip install 'jaxalign[wandb]'"
            ) from None
        session = wandb.init(dir=str(run), config=dict(config), resume="allow")

        def to_wandb(step: int, values: dict[str, float]) -> None:
            session.finish() if step < 0 else session.log(values, step=step)

        sinks.append(to_wandb)
    return MetricsLog(run / "metrics.jsonl", sinks)


def read(path: Path) -> dict[int, dict[str, Any]]:
    """Read a metrics file: by step, the last line of each; a torn line is left out.

    Lines of one step are not mixed: after a resume the later one replaces the earlier.
    """
    steps: dict[int, dict[str, Any]] = {}
    if not path.is_file():
        return steps
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        steps[values["step"]] = values
    return dict(sorted(steps.items()))

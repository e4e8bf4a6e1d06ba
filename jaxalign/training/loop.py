"""The loop: step, log, evaluate, save, and stop cleanly when told to."""

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import jax

from jaxalign.checkpoints.state import StateStore
from jaxalign.training import metrics as metrics_lib
from jaxalign.training.alarms import DisplacementAlarm
from jaxalign.training.metrics import MetricsLog
from jaxalign.training.step import TrainState
from jaxalign.types import Metrics


__all__ = ["LoopConfig", "Preempted", "Preemption", "TrainingDiverged", "fit"]

_MOST_NONFINITE = 5


class Preempted(Exception):
    """The process was told to end (SIGTERM); everything worth keeping is saved."""


class TrainingDiverged(RuntimeError):
    """Several updates in a row were not finite."""


class Preemption:
    """Turns SIGTERM into a flag that loops look at.

    Until a loop runs there is nothing to lose, and the signal ends the process at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self.deferred = False

    def install(self) -> None:
        """Catch SIGTERM from now on."""
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        self.requested = True
        if not self.deferred:
            raise Preempted


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How often things happen, in steps; None is never (``save_steps``: at the end)."""

    num_steps: int
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = None


def fit(
    state: TrainState,
    frozen: Any,
    batches: Iterator[Any],
    *,
    step_fn: Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]],
    put: Callable[[Any], Any],
    config: LoopConfig,
    start: int = 0,
    log: MetricsLog,
    store: StateStore,
    data_state: Callable[[], dict[str, Any]],
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    extra: Callable[[int], Mapping[str, float]] = lambda step: {},
    show: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
    warn: Callable[[str], None] = lambda text: None,
    preemption: Preemption | None = None,
) -> TrainState:
    """Train from step ``start`` to the end and return the final state.

    Metrics are fetched one step late, so that the device never waits for the host.

    Args:
      state: where to start; donated.
      frozen: everything that is not trained.
      batches: host batches from step ``start`` on.
      step_fn: compiled training step.
      put: sends a host batch to the devices.
      config: how often.
      start: updates made already.
      log: gets a line a logged step.
      store: gets the checkpoints.
      data_state: the data iterator's state, saved with each checkpoint.
      evaluate: returns ``eval_*`` values.
      extra: more values for a step's line (learning rate, epoch).
      show: tells the user how a step went.
      warn: tells the user what the metrics show together.
      preemption: checked after every step and evaluation batch.
    Raises:
      Preempted: after saving, when SIGTERM came.
      TrainingDiverged: after several updates in a row that were not finite.
    """
    clock = _Clock()
    alarm = DisplacementAlarm()
    nonfinite = 0

    def finish(step: int, fetched: Metrics, evaluated: dict[str, float]) -> None:
        nonlocal nonfinite
        values = metrics_lib.to_floats(fetched)
        nonfinite = nonfinite + 1 if values.pop("nonfinite", 0) else 0
        clock.count(step, values.pop("pairs"), values.pop("tokens"))
        if nonfinite >= _MOST_NONFINITE:
            raise TrainingDiverged(
                f"the loss or gradient was not finite in the last {nonfinite} steps "
                f"(up to step {step}); those updates were left out. Lower "
                "--optimizer.learning_rate or use --dtype float32"
            )
        if (
            _due(step, config.logging_steps)
            or step in (1, config.num_steps)
            or evaluated
        ):
            line = {
                **values,
                **extra(step),
                **clock.rates(),
                "memory/peak_gb": metrics_lib.peak_memory_gb(),
                **evaluated,
            }
            log.write(step, line)
            show(step, line)
            warning = alarm.update(step, line)
            if warning is not None:
                warn(warning)

    pending: tuple[int, Metrics, dict[str, float]] | None = None
    if preemption is not None:
        preemption.deferred = True
    if start == 0 and evaluate is not None:
        before = evaluate(state)
        log.write(0, before)
        show(0, before)
        alarm.update(0, before)
    clock.start()
    for step in range(start + 1, config.num_steps + 1):
        state, fetched = step_fn(state, frozen, put(next(batches)))
        if pending is not None:
            finish(*pending)
        evaluated: dict[str, float] = {}
        last = step == config.num_steps
        stop = preemption is not None and preemption.requested
        if (
            evaluate is not None
            and not stop
            and (last or _due(step, config.eval_steps))
        ):
            jax.block_until_ready(state.step)
            with clock.paused():
                evaluated = evaluate(state)
            stop = preemption is not None and preemption.requested
        pending = (step, fetched, evaluated)
        if last or stop or _due(step, config.save_steps):
            # The line of a step must be on disk before the checkpoint that skips it.
            finish(*pending)
            pending = None
            with clock.paused():
                store.save(step, state, data_state())
                if last or stop:
                    store.wait()
        if stop and not last:
            raise Preempted
    return state


def _due(step: int, every: int | None) -> bool:
    return bool(every) and step % int(every or 1) == 0


class _Clock:
    """Rates of training alone, without compilation, evaluation and saving."""

    def __init__(self) -> None:
        self._mark = self._seconds = self._pairs = self._tokens = 0.0

    def start(self) -> None:
        self._mark = time.perf_counter()

    def paused(self) -> Any:
        return _Pause(self)

    def count(self, step: int, pairs: float, tokens: float) -> None:
        del step
        now = time.perf_counter()
        self._seconds += now - self._mark
        self._mark = now
        self._pairs += pairs
        self._tokens += tokens

    def rates(self) -> dict[str, float]:
        seconds = max(self._seconds, 1e-9)
        rates = {
            "perf/pairs_per_second": self._pairs / seconds,
            "perf/tokens_per_second": self._tokens / seconds,
        }
        self._seconds = self._pairs = self._tokens = 0.0
        return rates


class _Pause:
    def __init__(self, clock: _Clock):
        self.clock = clock

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.clock._mark += time.perf_counter() - self.begin

"""The loop: step, log, evaluate, save, and stop cleanly when told to."""

import contextlib
import time
from typing import Any

import jax
import numpy as np

from jaxalign import progress
from jaxalign.checkpoints.state import SavedState
from jaxalign.configs import to_dict
from jaxalign.training import metrics as metrics_lib
from jaxalign.training import optimizer as optimizer_lib
from jaxalign.training import step as step_lib
from jaxalign.training.alarms import DisplacementAlarm
from jaxalign.training.metrics import MetricsLog
from jaxalign.training.preemption import Preempted, Preemption
from jaxalign.training.setup import Session
from jaxalign.training.step import TrainState
from jaxalign.types import Metrics


__all__ = ["TrainingDiverged", "fit"]

_MOST_NONFINITE = 5


class TrainingDiverged(RuntimeError):
    """Several updates in a row were not finite."""


def fit(session: Session, *, preemption: Preemption | None = None) -> TrainState:
    """Train from where a session stands to its last step and return the final state.

    Metrics are fetched one step late, so that the device never waits for the host.

    Args:
      session: see ``setup.setup``; its state is donated.
      preemption: checked after every step and evaluation batch.
    Raises:
      Preempted: after saving, when SIGTERM came.
      TrainingDiverged: after several updates in a row that were not finite.
    """
    with _Account(session) as account:
        if preemption is not None:
            preemption.deferred = True
        return _fit(session, account, preemption)


def _fit(
    session: Session, account: "_Account", preemption: Preemption | None
) -> TrainState:
    config, evaluate, state = session.config, session.evaluate, session.state
    last_step = session.source.num_steps

    def told_to_stop() -> bool:
        return preemption is not None and preemption.requested

    if session.start == 0 and evaluate is not None:
        account.show_start(evaluate(state))
    pending: tuple[int, Metrics, dict[str, float]] | None = None
    account.clock.start()
    for step in range(session.start + 1, last_step + 1):
        batch = session.put(next(session.batches))
        state, metrics = session.step_fn(state, session.frozen, batch)
        if pending is not None:
            account.finish(*pending)
        session.store.check()
        evaluated: dict[str, float] = {}
        last, stop = step == last_step, told_to_stop()
        if evaluate and not stop and (last or _due(step, config.eval_steps)):
            jax.block_until_ready(state.step)
            with account.clock.paused():
                evaluated = evaluate(state)
            stop = told_to_stop()
        pending = (step, metrics, evaluated)
        if last or stop or _due(step, config.save_steps):
            # The line of a step must be on disk before the checkpoint that skips it.
            account.finish(*pending)
            account.flush()
            pending = None
            with account.clock.paused():
                _save(session, state, step, wait=last or stop)
        if stop and not last:
            raise Preempted
    return state


def _save(session: Session, state: TrainState, step: int, *, wait: bool) -> None:
    trainable, optimizer = step_lib.to_saved(state)
    data = session.batches.get_state()
    session.store.save(SavedState(step, trainable, optimizer, data))
    if wait:
        session.store.wait()


def _due(step: int, every: int) -> bool:
    return step % every == 0


class _Account:
    """What is told of a run's steps: to the log, to the user, and to the alarm."""

    def __init__(self, session: Session):
        self.session = session
        self.clock = _Clock()
        self._alarm = DisplacementAlarm()
        self._nonfinite = 0
        self._schedule = optimizer_lib.make_schedule(
            session.config.optimizer, session.source.num_steps
        )
        self._stack = contextlib.ExitStack()
        self._log: MetricsLog
        self._display: progress.TrainingDisplay

    def __enter__(self) -> "_Account":
        session, config = self.session, self.session.config
        sinks = metrics_lib.parse_report_to(config.report_to)
        log = metrics_lib.open_log(session.run, sinks, to_dict(config), session.start)
        self._log = self._stack.enter_context(contextlib.closing(log))
        display = progress.TrainingDisplay(session.source.num_steps, session.start)
        self._display = self._stack.enter_context(display)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def show_start(self, values: dict[str, float]) -> None:
        """Tell what the model was like before the first step."""
        self._log.write(0, values)
        self._display.show(0, values)
        self._alarm.update(0, values)

    def finish(self, step: int, metrics: Metrics, evaluated: dict[str, float]) -> None:
        """Fetch a step's metrics, and log them if it is their turn.

        Raises:
          TrainingDiverged: the last few updates were not finite.
        """
        values = metrics_lib.to_floats(metrics)
        bad = values.pop("nonfinite", 0)
        self._nonfinite = self._nonfinite + 1 if bad else 0
        self.clock.count(values.pop("pairs"), values.pop("tokens"))
        if self._nonfinite >= _MOST_NONFINITE:
            raise TrainingDiverged(
                f"the loss or gradient was not finite in the last {self._nonfinite} "
                f"steps (up to step {step}); those updates were left out. Lower "
                "--optimizer.learning_rate or use --dtype float32"
            )
        every, source = self.session.config.logging_steps, self.session.source
        if not (_due(step, every) or step in (1, source.num_steps) or evaluated):
            return
        line = {
            **values,
            "learning_rate": np.asarray(self._schedule(step - 1)).item(),
            "epoch": source.epoch_of(step - 1) if step else 0.0,
            **self.clock.rates(),
            "memory/peak_gb": metrics_lib.peak_memory_gb(),
            **evaluated,
        }
        self._log.write(step, line)
        self._display.show(step, line)
        warning = self._alarm.update(step, line)
        if warning is not None:
            progress.say(warning)

    def flush(self) -> None:
        """Bring to the disk what was logged so far."""
        self._log.flush()


class _Clock:
    """Rates of training alone, without compilation, evaluation and saving."""

    def __init__(self) -> None:
        self._mark = self._seconds = self._pairs = self._tokens = 0.0

    def start(self) -> None:
        self._mark = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Any:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._mark += time.perf_counter() - began

    def count(self, pairs: float, tokens: float) -> None:
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

"""The loop: step, log, evaluate, save, and stop cleanly when told to."""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxalign import progress
from jaxalign.checkpoints.state import SavedState
from jaxalign.configs import to_dict
from jaxalign.parallel import multihost
from jaxalign.training import metrics as metrics_lib
from jaxalign.training import step as step_lib
from jaxalign.training.alarms import DisplacementAlarm
from jaxalign.training.interrupts import Interrupts
from jaxalign.training.metrics import MetricsLog
from jaxalign.training.preemption import Preempted, Preemption
from jaxalign.training.session import Session
from jaxalign.training.step import TrainState
from jaxalign.types import Metrics


__all__ = ["TrainingDiverged", "fit"]

_MOST_NONFINITE = 5


class TrainingDiverged(RuntimeError):
    """Several updates in a row were not finite.

    Example::

      try:
          fit(session)
      except TrainingDiverged:
          state = session.state  # before the updates that were left out
    """


def fit(
    session: Session,
    *,
    preemption: Preemption | None = None,
    report: Callable[[int, Mapping[str, float]], None] | None = None,
) -> TrainState:
    """Train from where a session stands to its last step and return the final state.

    Metrics are fetched one step late, so that the device never waits for the host.
    However it ends, the session holds the state after its last whole step, no thread
    of the data is left, and ``fit(session)`` goes on from there to the very same
    numbers. Ctrl-C and SIGTERM also save it where the session has a run directory.

    Args:
      session: see ``setup.setup``; its state is donated and replaced step by step.
      preemption: checked after every step and evaluation batch.
      report: called with (step, metrics) of every line of the log, also where there is
        no log.
    Raises:
      Preempted: after saving, when SIGTERM came.
      KeyboardInterrupt: after saving, when Ctrl-C came.
      TrainingDiverged: after several updates in a row that were not finite.
    Example::

      with setup(config, model=base, rows=rows) as session:
          state = fit(session, report=lambda step, metrics: print(step, metrics))
    """
    interrupts = Interrupts()
    with (
        interrupts.watched(),
        _Account(session, report) as account,
        contextlib.closing(session.open_batches()) as batches,
    ):
        if preemption is not None:
            preemption.deferred = True
        begun = session.step
        try:
            _fit(session, batches, account, interrupts, preemption)
        except KeyboardInterrupt:
            # Several processes save together, or not at all: that is SIGTERM's.
            some = begun < session.step < session.source.num_steps
            if some and not multihost.several():
                account.finish_pending()
                account.flush()
                _save(session, wait=True)
            raise
    return session.state


def _fit(
    session: Session,
    batches: Any,
    account: "_Account",
    interrupts: Interrupts,
    preemption: Preemption | None,
) -> None:
    config, evaluate = session.config, session.evaluate
    last_step = session.source.num_steps

    def told_to_stop() -> bool:
        return preemption is not None and preemption.reached()

    if session.step == 0 and evaluate is not None:
        account.show_start(evaluate(session.state))
    account.clock.start()
    for step in range(session.step + 1, last_step + 1):
        batch = session.put(next(batches))
        with interrupts.held():
            state, metrics = session.step_fn(session.state, session.frozen, batch)
            session.state, session.step = state, step
            session.data_state = batches.get_state()
            account.finish_pending(then=(step, metrics, {}))
        if session.store is not None:
            session.store.check()
        last, stop = step == last_step, told_to_stop()
        if evaluate and not stop and (last or _due(step, config.eval_steps)):
            jax.block_until_ready(state.step)
            with account.clock.paused():
                evaluated = evaluate(state)
            account.pending = (step, metrics, evaluated)
            stop = told_to_stop()
        if last or stop or _due(step, config.save_steps):
            # The line of a step must be on disk before the checkpoint that skips it.
            with interrupts.held():
                account.finish_pending()
                account.flush()
                with account.clock.paused():
                    _save(session, wait=last or stop)
        if stop and not last:
            raise Preempted


def _save(session: Session, *, wait: bool) -> None:
    if session.store is None:
        return
    trainable, optimizer = step_lib.to_saved(session.state)
    data = session.data_state or {}
    session.store.save(SavedState(session.step, trainable, optimizer, data))
    if wait:
        session.store.wait()


def _due(step: int, every: int) -> bool:
    return step % every == 0


class _Account:
    """What is told of a run's steps: to the log, to the user, and to the alarm."""

    def __init__(
        self,
        session: Session,
        report: Callable[[int, Mapping[str, float]], None] | None,
    ):
        self.session = session
        self.pending: tuple[int, Metrics, dict[str, float]] | None = None
        """The last step's, not fetched yet."""
        self._report = report
        self.clock = _Clock()
        self._alarm = DisplacementAlarm()
        self._nonfinite = 0
        self._stack = contextlib.ExitStack()
        self._log: MetricsLog | None = None
        self._display: progress.TrainingDisplay

    def __enter__(self) -> "_Account":
        session, config = self.session, self.session.config
        if session.run is not None and multihost.is_first():
            sinks = metrics_lib.parse_report_to(config.report_to)
            options = to_dict(config)
            log = metrics_lib.open_log(session.run, sinks, options, session.step)
            self._log = self._stack.enter_context(contextlib.closing(log))
        display = progress.TrainingDisplay(session.source.num_steps, session.step)
        self._display = self._stack.enter_context(display)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def show_start(self, values: dict[str, float]) -> None:
        """Tell what the model was like before the first step."""
        self._tell(0, values)

    def finish_pending(
        self, then: tuple[int, Metrics, dict[str, float]] | None = None
    ) -> None:
        """Fetch the metrics that wait, and log them if it is their turn.

        Args:
          then: those that wait from now on.
        Raises:
          TrainingDiverged: the last few updates were not finite.
        """
        pending, self.pending = self.pending, then
        if pending is None:
            return
        step, metrics, evaluated = pending
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
        schedule, rate = self.session.schedule, {}
        if schedule is not None:
            rate["learning_rate"] = np.asarray(schedule(step - 1)).item()
        line = {
            **values,
            **rate,
            "epoch": source.epoch_of(step - 1) if step else 0.0,
            **self.clock.rates(),
            "memory/peak_gb": metrics_lib.peak_memory_gb(),
            **evaluated,
        }
        self._tell(step, line)

    def _tell(self, step: int, line: dict[str, float]) -> None:
        if self._log is not None:
            self._log.write(step, line)
        self._display.show(step, line)
        warning = self._alarm.update(step, line)
        if warning is not None:
            progress.say(warning)
        if self._report is not None:
            self._report(step, line)

    def flush(self) -> None:
        """Bring to the disk what was logged so far."""
        if self._log is not None:
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

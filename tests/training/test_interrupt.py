"""Ctrl-C: the last whole step is kept, and the run goes on to the same bits."""

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jaxalign.checkpoints import load
from jaxalign.training import metrics as metrics_lib
from jaxalign.training.interrupts import Interrupts
from jaxalign.training.loop import fit
from jaxalign.training.session import Session
from jaxalign.training.setup import setup
from tests import synthetic
from tests.training.test_own_parts import config, dpo, same


ROWS = synthetic.feedback_records(12)
STEPS = 5


def ready(model: Any, out: str = "", **changes: Any) -> Session:
    settings = config(out=out, max_steps=STEPS, **changes)
    return setup(settings, objective=dpo, model=model, rows=ROWS)


@pytest.fixture(scope="module")
def model(tiny_llama) -> Any:
    return load.load(tiny_llama)


@pytest.fixture(scope="module")
def undisturbed(model) -> tuple[Any, dict[int, float]]:
    lines: dict[int, float] = {}
    with ready(model) as session:
        state = fit(
            session, report=lambda step, line: lines.update({step: line["loss"]})
        )
    return state, lines


def at(step: int, do: Callable[[], None]) -> Callable[[int, Any], None]:
    def report(now: int, line: Any) -> None:
        del line
        if now == step:
            do()

    return report


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def by_hand() -> None:
    raise KeyboardInterrupt


def threads_of_data() -> list[str]:
    names = [t.name for t in threading.enumerate()]
    return [name for name in names if name.startswith("grain")]


def no_thread_of_data() -> bool:
    for _ in range(100):
        if not threads_of_data():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("how", [ctrl_c, by_hand])
def test_a_session_without_files_goes_on(model, undisturbed, how) -> None:
    state, lines = undisturbed
    session = ready(model)
    begin = jax.tree.map(np.array, session.state.trainable)
    seen: dict[int, float] = {}

    def report(step: int, line: Any) -> None:
        assert step not in seen
        seen[step] = line["loss"]
        at(2, how)(step, line)

    with pytest.raises(KeyboardInterrupt):
        fit(session, report=report)
    # Step 2's line is told while step 3 is on its way: that one is whole too.
    assert session.step == int(session.state.step) == 3
    now = session.state  # nothing of it was given away
    alive, _ = jax.tree.map(np.asarray, (now.trainable, now.opt_state))
    assert not all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(begin), jax.tree.leaves(alive), strict=True)
    )
    jax.tree.map(np.asarray, model.variables)
    jax.tree.map(np.asarray, session.frozen)
    assert no_thread_of_data()
    same(fit(session, report=report), state)
    assert seen == lines
    assert no_thread_of_data()
    assert fit(session) is session.state  # at its end there is nothing left to do


def test_a_run_is_saved_as_at_sigterm(model, undisturbed, tmp_path) -> None:
    state, lines = undisturbed
    out = tmp_path / "run"
    with ready(model, str(out), save_steps=100) as session:
        with pytest.raises(KeyboardInterrupt):
            fit(session, report=at(2, ctrl_c))
        assert session.store is not None and session.store.steps() == [3]
        same(fit(session), state)
    kept = {k: v["loss"] for k, v in metrics_lib.read(out / "metrics.jsonl").items()}
    assert kept == lines
    with ready(model, str(tmp_path / "other"), save_steps=100) as session:
        with pytest.raises(KeyboardInterrupt):
            fit(session, report=at(2, by_hand))
    with ready(model, str(tmp_path / "other"), save_steps=100) as session:  # begun anew
        assert session.step == 3
        same(fit(session), state)


def test_ctrl_c_waits_while_a_state_is_given_away() -> None:
    interrupts, done = Interrupts(), []
    before = signal.getsignal(signal.SIGINT)
    with interrupts.watched():
        with pytest.raises(KeyboardInterrupt):
            with interrupts.held():
                ctrl_c()
                done.append("whole")
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
        with interrupts.held():
            done.append("again")
    assert done == ["whole", "again"]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_the_step_itself_keeps_the_step(model, undisturbed) -> None:
    session = ready(model)
    step_fn = session.step_fn

    def interrupted(state: Any, frozen: Any, batch: Any) -> Any:
        if session.step == 1:
            session.step_fn = step_fn
            ctrl_c()  # the state is given away in a moment
        return step_fn(state, frozen, batch)

    session.step_fn = interrupted
    with pytest.raises(KeyboardInterrupt):
        fit(session)
    assert session.step == int(session.state.step) == 2
    same(fit(session), undisturbed[0])

"""Checkpoints of a run: three items, each read alone; older ones, with one, too."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxalign.checkpoints.state import SavedState, StateStore
from jaxalign.errors import UserError


class OldState(NamedTuple):
    """As training saved it before there were three items."""

    step: Any
    trainable: Any
    opt_state: Any
    key: Any


TRAINABLE = {"lora": {"a": jnp.arange(6.0).reshape(2, 3), "scale": None}}
OPTIMIZER = {
    "step": jnp.int32(4),
    "opt_state": (None, {"mu": {"a": jnp.ones((2, 3))}}),
    "key": jax.random.key(7),
}


def write_old(directory: Path, step: int) -> None:
    """Save a state as one item."""
    manager = ocp.CheckpointManager(directory.absolute())
    state = OldState(trainable=TRAINABLE, **OPTIMIZER)
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"next_index": 4})
    )
    manager.save(step, args=items)
    manager.close()


def assert_restored(saved: SavedState | None) -> None:
    assert saved is not None
    assert saved.step == 4 and saved.data == {"next_index": 4}
    np.testing.assert_array_equal(saved.trainable["lora"]["a"], TRAINABLE["lora"]["a"])
    assert saved.trainable["lora"]["scale"] is None
    assert saved.optimizer.keys() == OPTIMIZER.keys()
    assert saved.optimizer["step"] == 4
    assert saved.optimizer["key"] == OPTIMIZER["key"]
    moment = saved.optimizer["opt_state"][1]["mu"]["a"]
    np.testing.assert_array_equal(moment, np.ones((2, 3)))


@pytest.mark.parametrize("old", [False, True], ids=["three items", "one item"])
def test_a_state_comes_back_whole_or_the_trained_part_alone(tmp_path, old) -> None:
    if old:
        write_old(tmp_path, 4)
    store = StateStore(tmp_path)
    if not old:
        store.save(SavedState(4, TRAINABLE, OPTIMIZER, {"next_index": 4}))
        store.wait()
        items = {path.name for path in (tmp_path / "4").iterdir() if path.is_dir()}
        assert items == {"trainable", "optimizer", "data"}
    assert_restored(store.restore(TRAINABLE, OPTIMIZER))
    step, trainable = store.restore_trainable(TRAINABLE)
    assert step == 4 and trainable["lora"]["scale"] is None
    np.testing.assert_array_equal(trainable["lora"]["a"], TRAINABLE["lora"]["a"])
    with pytest.raises(UserError, match="no checkpoint of step 5: got 4"):
        store.restore_trainable(TRAINABLE, 5)
    store.close()


def test_an_older_run_goes_on_in_the_new_form(tmp_path) -> None:
    write_old(tmp_path, 4)
    store = StateStore(tmp_path)
    saved = store.restore(TRAINABLE, OPTIMIZER)
    assert saved is not None
    store.save(saved._replace(step=6))
    store.wait()
    assert store.steps() == [4, 6]
    later = store.restore(TRAINABLE, OPTIMIZER)
    assert later is not None and later.step == 6
    assert_restored(later._replace(step=4))
    store.close()


def test_there_is_no_checkpoint_yet(tmp_path) -> None:
    store = StateStore(tmp_path / "checkpoints")
    assert store.restore(TRAINABLE, OPTIMIZER) is None
    with pytest.raises(UserError, match="has no complete checkpoint yet"):
        store.restore_trainable(TRAINABLE)
    store.close()

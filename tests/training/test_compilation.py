"""A step compiled before its weights are there is the step that is then run."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.parallel import sharding
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from jaxalign.training import compilation
from jaxalign.training import step as step_lib
from jaxalign.training.optimizer import OptimizerConfig, make_optimizer


def train_step(state, frozen, batch):
    new = jax.tree.map(lambda leaf: leaf + batch.sum(), state.trainable)
    return state._replace(step=state.step + 1, trainable=new), {"sum": frozen.sum()}


def real(mesh, width):
    """Return state, frozen and batch, as a run makes them."""
    everywhere = sharding.replicated(mesh)
    put = lambda tree: jax.tree.map(  # noqa: E731
        lambda leaf: jax.device_put(leaf, everywhere), tree
    )
    tx = make_optimizer(OptimizerConfig(), 4)
    trainable = put({"lora": {"a": jnp.zeros((2, width))}})
    state = put(step_lib.init(trainable, tx, key=jax.random.key(0)))
    batch = sharding.put_batch(np.ones((1, 2), np.float32), mesh, leading=1)
    return tx, (state, put(jnp.ones(3)), batch)


def test_the_state_is_as_it_was_said_to_be() -> None:
    mesh = make_mesh(MeshConfig(data=2))
    tx, (state, *_) = real(mesh, 4)
    said = compilation.abstract_state(compilation.abstract(state.trainable), tx, mesh)
    assert compilation._alike(compilation.abstract(state), said)


def test_a_step_is_compiled_once_and_anew_for_other_arguments() -> None:
    mesh = make_mesh(MeshConfig(data=2))
    tx, (state, frozen, batch) = real(mesh, 4)
    said = compilation.abstract_state(compilation.abstract(state.trainable), tx, mesh)
    ahead = compilation.compile_ahead(train_step, said, frozen, batch)
    step = ahead.result(state, frozen, batch)
    assert step is ahead.compiled.result()
    new, metrics = step(state, frozen, batch)
    assert int(new.step) == 1 and float(metrics["sum"]) == 3
    np.testing.assert_array_equal(new.trainable["lora"]["a"], np.full((2, 4), 2.0))
    _, (wider, *_) = real(mesh, 5)
    other = ahead.result(wider, frozen, batch)
    assert other is not step
    assert other(wider, frozen, batch)[0].trainable["lora"]["a"].shape == (2, 5)

"""The training step's compilation, which can begin before the weights are there."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from jaxalign.parallel import sharding
from jaxalign.training import step as step_lib
from jaxalign.training.step import TrainState


__all__ = [
    "StepCompilation",
    "abstract",
    "abstract_state",
    "compile_ahead",
    "jit_step",
]


def abstract(tree: Any) -> Any:
    """Return shape, dtype and place of every leaf, an array or as much already."""

    def describe(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=leaf.sharding,
            weak_type=getattr(leaf, "weak_type", False),
        )

    return jax.tree.map(describe, tree)


def abstract_state(
    trainable: Any, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Return what a state before the first update will look like on a mesh.

    Args:
      trainable: see :func:`abstract`; the optimiser's numbers lie where theirs do.
      tx: optimiser over the trained leaves.
      mesh: devices, each of which holds all else whole.
    """
    everywhere = sharding.replicated(mesh)

    def put(leaf: Any, place: Any) -> Any:
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place, weak_type=leaf.weak_type
        )

    state = jax.eval_shape(
        lambda leaves: step_lib.init(leaves, tx, key=jax.random.key(0)), trainable
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    return TrainState(
        step=put(state.step, everywhere),
        trainable=trainable,
        opt_state=optax.tree_map_params(
            tx,
            put,
            state.opt_state,
            places,
            transform_non_params=lambda leaf: put(leaf, everywhere),
        ),
        key=put(state.key, everywhere),
    )


class StepCompilation(NamedTuple):
    """A training step that is being compiled."""

    train_step: Callable[..., Any]
    arguments: tuple[TrainState, Any, Any]
    """State, frozen and batch, as they were expected: see :func:`abstract`."""
    compiled: Future[Any]

    def result(self, state: TrainState, frozen: Any, batch: Any) -> Any:
        """Wait for the step; where the arguments turn out others, compile it anew."""
        arguments = abstract((state, frozen, batch))
        if not _alike(arguments, self.arguments):
            anew = compile_ahead(self.train_step, *arguments)
            return anew.compiled.result()
        return self.compiled.result()


def _alike(arguments: Any, others: Any) -> bool:
    """Tell whether a program for the ones takes the others."""
    mine, structure = jax.tree.flatten(arguments)
    theirs, other = jax.tree.flatten(others)
    return structure == other and all(
        (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
        and a.sharding.is_equivalent_to(b.sharding, len(a.shape))
        for a, b in zip(mine, theirs, strict=True)
    )


def jit_step(
    train_step: Callable[..., Any], state: TrainState, *, donate: bool = True
) -> Any:
    """Return a training step that is compiled once, on any mesh.

    The new state lies where the old one does. Left to itself the compiler may place it
    elsewhere, and the second step would be compiled anew.

    Args:
      train_step: see ``step.make_train_step``.
      state: as of ``step.init``; only where its leaves lie is looked at.
      donate: give the old state's memory to the new one.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    given = (0,) if donate else ()
    return jax.jit(train_step, donate_argnums=given, out_shardings=(places, None))


def compile_ahead(
    train_step: Callable[..., Any], state: Any, frozen: Any, batch: Any
) -> StepCompilation:
    """Begin to compile a training step; its state is donated and stays where it is.

    The step is traced here and compiled in a thread, which needs no lock of Python's:
    weights can be loaded meanwhile.

    Args:
      train_step: see ``step.make_train_step``.
      state: its arrays, or what :func:`abstract_state` says of them.
      frozen: likewise.
      batch: likewise.
    """
    arguments = abstract((state, frozen, batch))
    lowered = jit_step(train_step, arguments[0]).lower(*arguments)
    pool = ThreadPoolExecutor(1, "compile")
    compiled = pool.submit(lowered.compile)
    pool.shutdown(wait=False)
    return StepCompilation(train_step, arguments, compiled)

"""Adapters that change a tiny model in every part of theirs."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import trees
from jaxalign.adapters import adapter
from jaxalign.checkpoints import adapter_start
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.models import decoder
from jaxalign.types import Model, ModelInputs


class Adapted(NamedTuple):
    """A checkpoint with an adapter of which no leaf is trivial."""

    checkpoint: Checkpoint
    collections: dict[str, Any]

    @property
    def variables(self) -> dict[str, Any]:
        return {**self.checkpoint.variables, **self.collections}


def load(
    directory: Path, config: Any, *, groups: Any = None, **options: Any
) -> Checkpoint:
    """Load a checkpoint cut for an adapter."""
    model = load_lib.open_config(directory)[0].text
    if groups is None:
        shapes = decoder.param_shapes(model)
        groups = adapter.groups(config, shapes, model.num_layers)
    return load_lib.load(directory, groups=groups, **options)


def adapted(
    directory: Path, config: Any, *, seed: int = 0, size: float = 0.3, **options: Any
) -> Adapted:
    """Load a checkpoint and make an adapter whose every trained leaf is random."""
    checkpoint = load(directory, config, **options)
    made = adapter_start.make(jax.random.key(seed), config, checkpoint)
    return Adapted(checkpoint, shaken(made, seed=seed, size=size))


def shaken(collections: Any, *, seed: int = 0, size: float = 0.3) -> Any:
    """Add noise to what training changes, by path, so that groups do not matter."""
    mask = adapter.trained(collections)

    def shake(path: str, keep: bool, leaf: Any) -> Any:
        if not keep:
            return leaf
        rng = np.random.default_rng([seed, *path.encode()])
        return leaf + jnp.asarray(size * rng.normal(size=leaf.shape), leaf.dtype)

    return trees.map_with_paths(shake, mask, collections)


def one_sequence(tokens: Any) -> ModelInputs:
    """Return the inputs of one sequence a row, without padding."""
    tokens = jnp.asarray(tokens, jnp.int32)
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return ModelInputs(tokens, positions, ones, 0 * ones)


def logits(made: Adapted, inputs: ModelInputs) -> np.ndarray:
    """Run the adapted model over rows."""
    return np.asarray(_logits(made.variables, inputs, model=made.checkpoint.model))


@functools.partial(jax.jit, static_argnames="model")
def _logits(variables: Any, inputs: ModelInputs, *, model: Model) -> Any:
    return model.logits_fn(variables, model.hidden_fn(variables, inputs))

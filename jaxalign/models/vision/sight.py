"""What a model sees with: the tower and the connector, as one module."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.models.config import ConnectorConfig, ModelConfig, VisionConfig
from jaxalign.models.linear import Runtime
from jaxalign.models.vision.connector import Connector
from jaxalign.models.vision.tower import Tower, VisionBlock
from jaxalign.stacks import Group
from jaxalign.types import ImageInputs, Variables


__all__ = ["Sight", "features", "of_config", "param_shapes"]


class Sight(nn.Module):
    """Tower and connector. Parameters: ``vision/...`` and ``connector/...``."""

    vision_config: VisionConfig
    connector_config: ConnectorConfig
    groups: tuple[Group, ...]
    runtime: Runtime
    remat: Any = None
    """What the backward pass keeps of a layer; None: everything."""

    def setup(self) -> None:
        block: Any = VisionBlock
        if self.remat is not None:
            block = nn.remat(block, policy=self.remat, prevent_cse=False)
        self.vision = Tower(self.vision_config, self.groups, self.runtime, block)
        self.connector = Connector(self.connector_config, self.runtime)

    def states(self, images: ImageInputs) -> Float[Array, "b m w"]:
        """Return what the tower makes of the patches."""
        return self.vision(images)

    def __call__(self, images: ImageInputs) -> Float[Array, "b u d"]:
        """Return the features of a row's pictures, from as far as they are computed."""
        if images.features is not None:
            return images.features
        states = images.states
        if states is None:
            states = self.states(images)
        return self.connector(states.astype(self.runtime.dtype))


def of_config(
    config: ModelConfig,
    groups: Sequence[Group] | None,
    runtime: Runtime,
    remat: Any = None,
) -> Sight | None:
    """Return what a model sees with, None where it does not.

    Args:
      config: of the model.
      groups: how the tower's layers are cut into stacks; default one stack of all.
      runtime: how it is computed.
      remat: what the backward pass keeps of a layer; None: everything.
    """
    if config.vision is None or config.connector is None:
        return None
    cut = tuple((low, high) for low, high in groups or ((0, config.vision.num_layers),))
    return Sight(config.vision, config.connector, cut, runtime, remat)


def features(
    sight: Sight,
    variables: Variables,
    images: ImageInputs,
    *,
    key: Any = None,
    states: bool = False,
) -> Float[Array, "b n d"]:
    """Return the features of rows' pictures, with dropout of adapters for a key.

    With ``states`` what the tower alone makes of them, one a patch.
    """
    rngs = None
    if key is not None:
        noisy = dataclasses.replace(sight.runtime, deterministic=False)
        # Another key than the decoder's, whose layers have the same names.
        sight = sight.clone(runtime=noisy)
        rngs = {"dropout": jax.random.fold_in(key, 1)}
    method = Sight.states if states else Sight.__call__
    out: Any = sight.apply(variables, images, rngs=rngs, method=method)
    return out


def param_shapes(sight: Sight) -> Any:
    """Return the shapes of tower and connector without making any weights."""
    config = sight.vision_config
    unit = sight.connector_config.unit
    ids = jnp.ones((1, unit), jnp.int32)
    images = ImageInputs(
        ids,
        jnp.zeros((1, unit, 2), jnp.int32),
        jnp.zeros((1, 1), jnp.int32),
        jnp.zeros((1, unit, config.patch_values)),
    )
    return jax.eval_shape(lambda: sight.init(jax.random.key(0), images)["params"])

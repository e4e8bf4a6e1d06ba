"""From a tower's states to the decoder's width: what makes features of them."""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxalign.models.config import ConnectorConfig
from jaxalign.models.linear import Dense, Runtime
from jaxalign.models.vision.tower import Norm


__all__ = ["Connector"]


class Connector(nn.Module):
    """Join the states of a unit's patches, and map them to a feature.

    With one patch a unit and two layers it is LLaVA's projector; with 16 and one layer
    SmolVLM's pixel shuffle; with 4, a norm and two layers Qwen's merger.
    """

    config: ConnectorConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, states: Float[Array, "b m w"]) -> Float[Array, "b u d"]:
        config, x = self.config, states
        if config.norm is not None:
            x = Norm(config.norm, config.norm_eps, name="norm")(x)
        x = x.reshape(x.shape[0], -1, config.unit * x.shape[-1])
        for i, (name, features) in enumerate(config.layers):
            if i:
                x = nn.gelu(x, approximate=False)
            x = Dense(features, self.runtime, config.bias, name=name)(x)
        return x

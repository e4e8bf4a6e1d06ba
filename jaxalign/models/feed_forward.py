"""Gated MLPs: one for all tokens, or a mixture of experts."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.adapters import low_rank
from jaxalign.models import attention as attention_lib
from jaxalign.models import routing
from jaxalign.models.config import DecoderConfig, Mixture
from jaxalign.models.linear import (
    SAVED_NAMES,
    Dense,
    Layout,
    Runtime,
    adapter_leaves,
    kernel_of,
)


__all__ = ["ACTIVATIONS", "MLP", "ROUTED", "Experts"]

ROUTED = "routed"
"""Collection that, where a caller makes it mutable, gets what each router did."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}
"""Of MLPs, by what configs call them."""


class MLP(nn.Module):
    """Gated: down(act(gate(x)) * up(x))."""

    config: DecoderConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout
    ) -> Float[Array, "b t d"]:
        config, runtime = self.config, self.runtime

        def dense(name: str, features: int, x: Array) -> Array:
            return Dense(features, runtime, config.mlp_bias, name=name)(x, layout)

        if config.fused:
            gate, up = jnp.split(dense("gate_up_proj", 2 * config.mlp_width, x), 2, -1)
        else:
            gate = dense("gate_proj", config.mlp_width, x)
            up = dense("up_proj", config.mlp_width, x)
        product = ACTIVATIONS[config.activation](gate) * up
        return dense("down_proj", config.width, product)


class ExpertDense(nn.Module):
    """The weights of a linear layer for each expert, and their LoRA update."""

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self) -> routing.ExpertWeights:
        kernel = kernel_of(self, self.shape)
        return routing.ExpertWeights(
            kernel, adapter_leaves(self, "lora", low_rank.LEAVES)
        )


class ExpertMLPs(nn.Module):
    """The weights of an :class:`MLP` for each expert."""

    config: DecoderConfig
    experts: int

    @nn.compact
    def __call__(self) -> routing.MLPWeights:
        width, wide = self.config.width, self.config.mlp_width
        into, out_of = (self.experts, width, wide), (self.experts, wide, width)
        return routing.MLPWeights(
            ExpertDense(into, name="gate_proj")(),
            ExpertDense(into, name="up_proj")(),
            ExpertDense(out_of, name="down_proj")(),
        )


class Experts(nn.Module):
    """A mixture of experts: each token's few MLPs, weighed by its router."""

    config: DecoderConfig
    mixture: Mixture
    runtime: Runtime

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout
    ) -> Float[Array, "b t d"]:
        mixture = self.mixture
        router = Dense(mixture.experts, self.runtime, rounded=False, name="router")
        logits = router(x, layout)
        routes = routing.route(logits, mixture.per_token, normalize=mixture.normalize)
        if isinstance(layout, attention_lib.RowLayout) and self.is_mutable_collection(
            ROUTED
        ):
            self.sow(ROUTED, "sums", routing.sums(routes, layout.sequence_ids > 0))
        return routing.apply(
            x,
            routes.experts,
            routes.weights,
            ExpertMLPs(self.config, mixture.experts, name="experts")(),
            activation=ACTIVATIONS[self.config.activation],
            saved_name=SAVED_NAMES[0],
            mesh=self.runtime.mesh,
        )

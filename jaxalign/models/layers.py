"""One layer of a decoder, attention and MLP, and what differs between the layers."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxalign.models import rotary
from jaxalign.models.config import DecoderConfig
from jaxalign.models.feed_forward import MLP, ROUTED, Experts
from jaxalign.models.linear import (
    CACHE,
    SAVED_NAMES,
    Dense,
    Embedding,
    Layout,
    RMSNorm,
    Runtime,
)
from jaxalign.models.self_attention import KEYS_AND_VALUES, Attention


__all__ = [
    "CACHE",
    "KEYS_AND_VALUES",
    "ROUTED",
    "SAVED_NAMES",
    "Block",
    "Dense",
    "Embedding",
    "Layout",
    "RMSNorm",
    "Runtime",
    "Traits",
    "traits",
]


class Traits(NamedTuple):
    """What differs between the layers of a stack, scanned with their weights."""

    rotary: Int[Array, "*l"] | int
    """Which of the model's rotaries."""
    window: Int[Array, "*l"] | None
    """See ``attention.RowLayout``."""


def traits(config: DecoderConfig, low: int, high: int) -> Traits:
    """Return the traits of layers [low, high).

    >>> sizes = {"vocab_size": 8, "width": 8, "mlp_width": 16, "num_layers": 3}
    >>> heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
    >>> both = rotary.Rotary(theta=1e4, dims=4), rotary.Rotary(theta=1e6, dims=4)
    >>> config = DecoderConfig(**sizes, **heads, norm_eps=1e-6, rotaries=both,
    ...                        layer_rotaries=(0, 0, 1), windows=(64, 64, None))
    >>> found = traits(config, 1, 3)
    >>> found.rotary.tolist(), found.window.tolist()
    ([0, 1], [64, 2147483647])
    """
    kinds = config.layer_rotaries[low:high] or (0,) * (high - low)
    windows = None
    if any(window is not None for window in config.windows[low:high]):
        far = np.iinfo(np.int32).max
        found = [far if w is None else w for w in config.windows[low:high]]
        windows = jnp.asarray(found, jnp.int32)
    return Traits(jnp.asarray(kinds, jnp.int32), windows)


class Block(nn.Module):
    """One layer: attention and MLP, each added to the stream.

    Norms have the names that Hugging Face gives them: ``input_layernorm`` before
    attention; ``post_attention_layernorm`` before the MLP or, where attention's output
    is normed, on that; ``pre_feedforward_layernorm``, ``post_feedforward_layernorm``.

    Example::

      block, layout = Block(config, Runtime()), attention.row_layout(inputs)
      far = attention.lengths(layout)
      tables = rotary.make_tables(config.rotaries, inputs.positions, far)
      x, _ = block.apply(variables, x, tables, layout, Traits(0, None))
    """

    config: DecoderConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        tables: rotary.Tables,
        layout: Layout,
        own: Traits,
    ) -> tuple[Float[Array, "b t d"], None]:
        config = self.config
        before, after = config.norms != "output", config.norms != "before"

        def norm(wanted: bool, name: str, x: Array) -> Array:
            return RMSNorm(config, name=name)(x) if wanted else x

        def add(x: Array, out: Array) -> Array:
            if config.residual_scale != 1.0:
                out = out * jnp.asarray(config.residual_scale, out.dtype)
            return x + out

        if own.window is not None:
            layout = layout._replace(window=own.window)
        normed = norm(before, "input_layernorm", x)
        out = Attention(config, self.runtime, name="self_attn")(
            normed, tables.of(own.rotary), layout
        )
        x = add(x, norm(after, "post_attention_layernorm", out))
        name = "pre_feedforward_layernorm" if after else "post_attention_layernorm"
        if config.mixture is None:
            mlp = MLP(config, self.runtime, name="mlp")
        else:
            mlp = Experts(config, config.mixture, self.runtime, name="mlp")
        out = mlp(norm(before, name, x), layout)
        return add(x, norm(after, "post_feedforward_layernorm", out)), None

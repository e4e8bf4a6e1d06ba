"""Self-attention: projections, rotary positions, the cache and a prefix."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxalign.adapters import gates, prefix
from jaxalign.models import attention as attention_lib
from jaxalign.models import rotary
from jaxalign.models.attention import cached
from jaxalign.models.config import DecoderConfig
from jaxalign.models.linear import (
    CACHE,
    Dense,
    Layout,
    RMSNorm,
    Runtime,
    adapter_leaves,
    gate_mean,
)


__all__ = ["KEYS_AND_VALUES", "Attention"]

KEYS_AND_VALUES = "keys_and_values"
"""Collection that, where a caller makes it mutable, gets keys (before rotation) and
values of every token."""


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, and a prefix if there is one."""

    config: DecoderConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], tables: rotary.Tables, layout: Layout
    ) -> Float[Array, "b t d"]:
        config, runtime = self.config, self.runtime
        q, k, v = self._project(x, layout)
        if self.is_mutable_collection(KEYS_AND_VALUES):
            self.sow(KEYS_AND_VALUES, "key", k)
            self.sow(KEYS_AND_VALUES, "value", v)
        q = rotary.apply_rotary(q, tables.cos, tables.sin)
        k = rotary.apply_rotary(k, tables.cos, tables.sin)
        scale = config.query_scale or config.head_dim**-0.5
        if isinstance(layout, attention_lib.CacheLayout):
            own = cached.attend(
                q,
                self._cached("key", k, layout),
                self._cached("value", v, layout),
                layout,
                scale=scale,
                softcap=config.attention_softcap,
            )
        else:
            own = attention_lib.attention(
                q,
                k,
                v,
                layout,
                scale=scale,
                softcap=config.attention_softcap,
                implementation=runtime.attention,
                block=runtime.attention_block,
                sequences=runtime.attention_sequences,
                mesh=runtime.mesh,
            )
        out = own[0]
        if leaves := adapter_leaves(self, "prefix", prefix.LEAVES):
            if runtime.attention == "cudnn":
                raise ValueError("cudnn has no log-sum-exp for a prefix to join by")
            out = prefix.attend(
                q,
                own,
                leaves,
                key=rotary.rotate_all(leaves["key"], leaves["position"], tables.speeds),
                gate=gates.value(leaves, x, gate_mean(self, layout)),
                scale=scale,
                softcap=config.attention_softcap,
            )
        out = out.reshape(*x.shape[:2], -1)
        return Dense(config.width, runtime, config.o_bias, name="o_proj")(out, layout)

    def _project(self, x: Array, layout: Layout) -> list[Array]:
        """Return queries, keys and values, normed but not rotated."""
        config, runtime = self.config, self.runtime
        names, sizes = ("q_proj", "k_proj", "v_proj"), [config.num_kv_heads] * 3
        sizes[0] = config.num_heads
        widths = [n * config.head_dim for n in sizes]
        if config.fused:
            dense = Dense(sum(widths), runtime, config.qkv_bias, name="qkv_proj")
            parts = jnp.split(dense(x, layout), np.cumsum(widths)[:2], axis=-1)
        else:
            parts = [
                Dense(width, runtime, config.qkv_bias, name=name)(x, layout)
                for name, width in zip(names, widths, strict=True)
            ]
        found = []
        for name, part, heads in zip(
            ("q_norm", "k_norm", ""), parts, sizes, strict=True
        ):
            if name and config.qk_norm == "whole":
                part = RMSNorm(config, name=name)(part)
            part = part.reshape(*x.shape[:2], heads, config.head_dim)
            if name and config.qk_norm == "head":
                part = RMSNorm(config, name=name)(part)
            found.append(part)
        return found

    def _cached(
        self, name: str, new: Array, layout: attention_lib.CacheLayout
    ) -> tuple[Array, ...]:
        """Put the new tokens' keys or values in the cache and return all of it."""
        blocks = cached.put(
            self.get_variable(CACHE, name), new, layout, axis=cached.PLACES_AXIS[name]
        )
        self.put_variable(CACHE, name, blocks)
        return blocks

"""The layers of a decoder: thin Linen modules that read adapters they find."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxalign.adapters import gates, lora, prefix
from jaxalign.models import attention as attention_lib
from jaxalign.models import rotary


__all__ = [
    "MLP",
    "Attention",
    "Block",
    "CACHE",
    "KEYS_AND_VALUES",
    "DecoderConfig",
    "Dense",
    "Embedding",
    "RMSNorm",
    "Runtime",
    "SAVED_NAMES",
]


SAVED_NAMES = ("dense_out", lora.SAVED_NAME)
"""Names under which a remat policy may keep what linear layers compute."""

CACHE = "cache"
"""Collection of the keys and values (and the gates' sums) of the tokens so far."""

Layout = attention_lib.RowLayout | attention_lib.CacheLayout

KEYS_AND_VALUES = "keys_and_values"
"""Collection that, where a caller makes it mutable, gets keys (before rotation) and
values of every token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and options of a decoder; what a family reads from config.json."""

    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    """Fields of the scaling rule; a tuple, so that a config can be hashed."""
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """How the layers are computed; changes no weight."""

    dtype: Any = jnp.float32
    attention: attention_lib.Implementation = "xla"
    attention_block: int = 64
    lora_dropout: float = 0.0
    deterministic: bool = True


def _leaves(
    module: nn.Module, collection: str, names: Sequence[str]
) -> dict[str, Array]:
    """Return what a collection holds for a module."""
    return {
        name: module.get_variable(collection, name)
        for name in names
        if module.has_variable(collection, name)
    }


def _mean(module: nn.Module, layout: Layout | None) -> gates.Mean | None:
    """Return how a module's gate averages over tokens."""
    if layout is None:
        return None
    if isinstance(layout, attention_lib.RowLayout):
        return gates.row_means(layout.sequence_ids, layout.branch_ids)

    def so_far(name: str, values: Array) -> Array:
        if name == "mean_gate":
            raise ValueError("a mean_gate reads tokens that are not there yet")
        # The sum over the tokens before; a slot that begins anew forgets its last one.
        before = module.get_variable(CACHE, "gate_sum")
        before = jnp.where(layout.positions[:, 0] == 0, 0.0, before)
        sums = jnp.cumsum(jnp.where(layout.valid, values, 0.0), axis=1)
        sums = sums + before[:, None]
        module.put_variable(CACHE, "gate_sum", sums[:, -1])
        return sums / (layout.positions + 1)

    return so_far


class Dense(nn.Module):
    """A linear layer, with a LoRA update if the ``lora`` collection has one for it."""

    features: int
    runtime: Runtime
    use_bias: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*n fan_in"],
        layout: Layout | None = None,
    ) -> Float[Array, "*n features"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        y = x @ kernel.astype(x.dtype)
        if leaves := _leaves(self, "lora", lora.LEAVES):
            y = lora.apply(
                y,
                x,
                leaves,
                kernel=kernel,
                mean=_mean(self, layout),
                dropped=self._dropped(x),
            )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
            y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
        # DoRA keeps its output before the magnitude already.
        return y if "magnitude" in leaves else checkpoint_name(y, SAVED_NAMES[0])

    def _dropped(self, x: Array) -> Array | None:
        if not self.runtime.lora_dropout or self.runtime.deterministic:
            return None
        keep = 1.0 - self.runtime.lora_dropout
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
        return jnp.where(kept, x / keep, 0.0)


class Embedding(nn.Module):
    """Token embeddings, with a LoRA update of those that are looked up."""

    vocab_size: int
    width: int
    runtime: Runtime

    def setup(self) -> None:
        normal = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", normal, (self.vocab_size, self.width))

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        x = self.embedding[tokens].astype(self.runtime.dtype)
        if leaves := _leaves(self, "lora", lora.LEAVES):
            x = x + lora.embed(tokens, leaves, x.dtype)
        return x

    def attend(self, hidden: Float[Array, "*n d"]) -> Float[Array, "*n v"]:
        """Return logits, in float32. A tied head is the base's, without the update."""
        weights = self.embedding.astype(hidden.dtype)
        return jnp.einsum(
            "...d,vd->...v", hidden, weights, preferred_element_type=jnp.float32
        )


class RMSNorm(nn.Module):
    """Divide by the root mean square, taken in float32, and scale."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        # Rounded before the scale is applied, as the reference implementation does.
        normed = (wide * jax.lax.rsqrt(mean + self.eps)).astype(x.dtype)
        return normed * jnp.broadcast_to(scale.astype(x.dtype), x.shape)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, and a prefix if there is one."""

    config: DecoderConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        tables: rotary.Tables,
        layout: Layout,
    ) -> Float[Array, "b t d"]:
        config, runtime = self.config, self.runtime

        def project(name: str, heads: int) -> Array:
            out = Dense(
                heads * config.head_dim, runtime, config.attention_bias, name=name
            )(x, layout)
            return out.reshape(*x.shape[:2], heads, config.head_dim)

        q = rotary.apply_rotary(project("q_proj", config.num_heads), *tables.rows)
        k = project("k_proj", config.num_kv_heads)
        v = project("v_proj", config.num_kv_heads)
        if self.is_mutable_collection(KEYS_AND_VALUES):
            self.sow(KEYS_AND_VALUES, "key", k)
            self.sow(KEYS_AND_VALUES, "value", v)
        scale = config.head_dim**-0.5
        k = rotary.apply_rotary(k, *tables.rows)
        if isinstance(layout, attention_lib.CacheLayout):
            own = attention_lib.cached_attention(
                q,
                self._cached("key", k, layout),
                self._cached("value", v, layout),
                layout,
                scale=scale,
            )
        else:
            own = attention_lib.attention_with_lse(
                q,
                k,
                v,
                layout,
                scale=scale,
                implementation=runtime.attention,
                block=runtime.attention_block,
            )
        out = own[0]
        if leaves := _leaves(self, "prefix", prefix.LEAVES):
            out = prefix.attend(
                q,
                own,
                leaves,
                key=rotary.rotate_all(leaves["key"], leaves["position"], tables.speeds),
                gate=gates.value(leaves, x, _mean(self, layout)),
                scale=scale,
            )
        return Dense(config.width, runtime, config.attention_bias, name="o_proj")(
            out.reshape(*x.shape[:2], -1), layout
        )

    def _cached(
        self, name: str, new: Array, layout: attention_lib.CacheLayout
    ) -> Array:
        """Put the new tokens' keys or values in the cache and return all of it."""
        cache = self.get_variable(CACHE, name)
        # What is not valid gets a place beyond the end, and is dropped.
        places = jnp.where(layout.valid, layout.positions, cache.shape[1])
        rows = jnp.arange(cache.shape[0])[:, None]
        cache = cache.at[rows, places].set(new.astype(cache.dtype), mode="drop")
        self.put_variable(CACHE, name, cache)
        return cache.astype(new.dtype)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: DecoderConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], layout: Layout
    ) -> Float[Array, "b t d"]:
        config, runtime = self.config, self.runtime

        def dense(name: str, features: int, x: Array) -> Array:
            return Dense(features, runtime, config.mlp_bias, name=name)(x, layout)

        gate = dense("gate_proj", config.mlp_width, x)
        up = dense("up_proj", config.mlp_width, x)
        return dense("down_proj", config.width, nn.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention and MLP, each on the norm of the stream and added to it."""

    config: DecoderConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        tables: rotary.Tables,
        layout: Layout,
    ) -> tuple[Float[Array, "b t d"], None]:
        eps = self.config.norm_eps
        normed = RMSNorm(eps, name="input_layernorm")(x)
        x = x + Attention(self.config, self.runtime, name="self_attn")(
            normed, tables, layout
        )
        normed = RMSNorm(eps, name="post_attention_layernorm")(x)
        return x + MLP(self.config, self.runtime, name="mlp")(normed, layout), None

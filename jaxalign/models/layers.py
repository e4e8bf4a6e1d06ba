"""The layers of a decoder: thin Linen modules that read adapters they find."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxalign.adapters import gates, lora, prefix
from jaxalign.models import attention as attention_lib
from jaxalign.models import quantised, rotary, routing
from jaxalign.models.attention import cached
from jaxalign.models.config import DecoderConfig, Mixture
from jaxalign.models.quantised import Quantised


__all__ = [
    "MLP",
    "Attention",
    "Block",
    "CACHE",
    "KEYS_AND_VALUES",
    "Dense",
    "Embedding",
    "Experts",
    "ROUTED",
    "RMSNorm",
    "Runtime",
    "SAVED_NAMES",
    "Traits",
    "traits",
]


SAVED_NAMES = ("dense_out", lora.SAVED_NAME)
"""Names under which a remat policy may keep what linear layers compute."""

CACHE = "cache"
"""Collection of the keys and values (and the gates' sums) of the tokens so far."""

Layout = attention_lib.RowLayout | attention_lib.CacheLayout

KEYS_AND_VALUES = "keys_and_values"
"""Collection that, where a caller makes it mutable, gets keys (before rotation) and
values of every token."""


ROUTED = "routed"
"""Collection that, where a caller makes it mutable, gets what each router did."""


class Traits(NamedTuple):
    """What differs between the layers of a stack, scanned with their weights."""

    rotary: Int[Array, "*l"] | int
    """Which of the model's rotaries."""
    window: Int[Array, "*l"] | None
    """See ``attention.RowLayout``."""


def traits(config: DecoderConfig, low: int, high: int) -> Traits:
    """Return the traits of layers [low, high)."""
    kinds = config.layer_rotaries[low:high] or (0,) * (high - low)
    windows = None
    if any(window is not None for window in config.windows[low:high]):
        far = np.iinfo(np.int32).max
        found = [far if w is None else w for w in config.windows[low:high]]
        windows = jnp.asarray(found, jnp.int32)
    return Traits(jnp.asarray(kinds, jnp.int32), windows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """How the layers are computed; changes no weight."""

    dtype: Any = jnp.float32
    attention: attention_lib.Implementation = "xla"
    attention_block: int = 64
    attention_sequences: int | None = None
    mesh: Mesh | None = None
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


def _kernel(module: nn.Module, shape: tuple[int, ...]) -> Any:
    """Return a module's weight, as an array or as codes."""
    kernel = module.get_variable("params", "kernel")
    if isinstance(kernel, Quantised):  # which Flax did not make and cannot check
        return kernel
    return module.param("kernel", nn.initializers.lecun_normal(), shape)


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
        kernel = _kernel(self, shape)
        y = quantised.apply(jnp.matmul, x, kernel)
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
    scale: float = 1.0

    def setup(self) -> None:
        normal = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", normal, (self.vocab_size, self.width))

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        x = self.embedding[tokens].astype(self.runtime.dtype)
        if leaves := _leaves(self, "lora", lora.LEAVES):
            x = x + lora.embed(tokens, leaves, x.dtype)
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, x.dtype)
        return x

    def attend(self, hidden: Float[Array, "*n d"]) -> Float[Array, "*n v"]:
        """Return logits, in float32. A tied head is the base's, without the update."""
        weights = self.embedding.astype(hidden.dtype)
        return jnp.einsum(
            "...d,vd->...v", hidden, weights, preferred_element_type=jnp.float32
        )


class RMSNorm(nn.Module):
    """Divide by the root mean square, taken in float32, and scale."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        config = self.config
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean + config.norm_eps)
        if config.norm_offset:
            factor = scale.astype(jnp.float32) + config.norm_offset
            return (normed * jnp.broadcast_to(factor, x.shape)).astype(x.dtype)
        # Rounded before the scale is applied, as the reference implementation does.
        return normed.astype(x.dtype) * jnp.broadcast_to(scale.astype(x.dtype), x.shape)


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
        if leaves := _leaves(self, "prefix", prefix.LEAVES):
            if runtime.attention == "cudnn":
                raise ValueError("cudnn has no log-sum-exp for a prefix to join by")
            out = prefix.attend(
                q,
                own,
                leaves,
                key=rotary.rotate_all(leaves["key"], leaves["position"], tables.speeds),
                gate=gates.value(leaves, x, _mean(self, layout)),
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


_ACTIVATIONS = {
    "silu": nn.silu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
}


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
        product = _ACTIVATIONS[config.activation](gate) * up
        return dense("down_proj", config.width, product)


class ExpertDense(nn.Module):
    """The weights of a linear layer for each expert, and their LoRA update."""

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self) -> routing.ExpertWeights:
        kernel = _kernel(self, self.shape)
        return routing.ExpertWeights(kernel, _leaves(self, "lora", lora.LEAVES))


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
        logits = Dense(mixture.experts, self.runtime, name="router")(x, layout)
        routes = routing.route(logits, mixture.per_token, normalize=mixture.normalize)
        if isinstance(layout, attention_lib.RowLayout) and self.is_mutable_collection(
            ROUTED
        ):
            self.sow(ROUTED, "sums", routing.sums(routes, layout.sequence_ids > 0))
        return routing.apply(
            x,
            routes.experts,
            routes.weights.astype(x.dtype),
            ExpertMLPs(self.config, mixture.experts, name="experts")(),
            activation=_ACTIVATIONS[self.config.activation],
            saved_name=SAVED_NAMES[0],
            mesh=self.runtime.mesh,
        )


class Block(nn.Module):
    """One layer: attention and MLP, each added to the stream.

    Norms have the names that Hugging Face gives them: ``input_layernorm`` before
    attention; ``post_attention_layernorm`` before the MLP or, where attention's output
    is normed, on that; ``pre_feedforward_layernorm``, ``post_feedforward_layernorm``.
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

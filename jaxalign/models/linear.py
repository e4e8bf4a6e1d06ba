"""Linear layers and norms: thin Linen modules that read adapters they find."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxalign import products
from jaxalign.adapters import gates, low_rank, saved
from jaxalign.models import attention as attention_lib
from jaxalign.models import quantised
from jaxalign.models.config import DecoderConfig
from jaxalign.models.quantised import Quantised


__all__ = [
    "CACHE",
    "Dense",
    "Embedding",
    "Layout",
    "RMSNorm",
    "Runtime",
    "SAVED_NAMES",
    "adapter_leaves",
    "gate_mean",
    "kernel_of",
    "weight_of",
]

SAVED_NAMES = ("dense_out", low_rank.SAVED_NAME)
"""Names under which a remat policy may keep what linear layers compute."""

CACHE = "cache"
"""Collection of the keys and values (and the gates' sums) of the tokens so far."""

Layout = attention_lib.RowLayout | attention_lib.CacheLayout


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


def adapter_leaves(
    module: nn.Module, collection: str, names: Sequence[str]
) -> dict[str, Array]:
    """Return what a collection holds for a module."""
    return {
        name: module.get_variable(collection, name)
        for name in names
        if module.has_variable(collection, name)
    }


def gate_mean(module: nn.Module, layout: Layout | None) -> gates.Mean | None:
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


def kernel_of(module: nn.Module, shape: tuple[int, ...]) -> Any:
    """Return a module's weight, as an array or as codes."""
    kernel = module.get_variable("params", "kernel")
    own = module.has_variable(saved.COLLECTION, "kernel")
    if isinstance(kernel, Quantised) and not own:
        return kernel  # which Flax did not make and cannot check
    return weight_of(module, "kernel", nn.initializers.lecun_normal(), shape)


def weight_of(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Array:
    """Return a module's weight: what an adapter has in its place, or the base's."""
    if module.has_variable(saved.COLLECTION, name):
        return module.get_variable(saved.COLLECTION, name)
    return module.param(name, init, shape)


class Dense(nn.Module):
    """A linear layer, with a LoRA update if the ``lora`` collection has one for it.

    Product, update and bias are added in float32 and rounded once to the dtype of the
    inputs, unless ``rounded`` is false: scores and logits are wanted as they are.
    """

    features: int
    runtime: Runtime
    use_bias: bool = False
    rounded: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*n fan_in"],
        layout: Layout | None = None,
    ) -> Float[Array, "*n features"]:
        shape = (x.shape[-1], self.features)
        kernel = kernel_of(self, shape)
        y = quantised.apply(products.matmul, x, kernel)
        if rows := adapter_leaves(self, saved.COLLECTION, saved.ROWS):
            y = saved.put_logits(y, x, rows)
        if leaves := adapter_leaves(self, "lora", low_rank.LEAVES):
            y = low_rank.apply(
                y,
                x,
                leaves,
                kernel=kernel,
                mean=gate_mean(self, layout),
                dropped=self._dropped(x),
            )
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            bias = weight_of(self, "bias", zeros, (self.features,))
            y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
        if self.rounded:
            y = y.astype(x.dtype)
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
        if self.has_variable(saved.COLLECTION, "embedding"):
            table = self.get_variable(saved.COLLECTION, "embedding")
        else:
            table = self.embedding
        x = table[tokens].astype(self.runtime.dtype)
        if rows := adapter_leaves(self, saved.COLLECTION, saved.ROWS):
            x = saved.put_rows(x, tokens, rows, self.vocab_size)
        if leaves := adapter_leaves(self, "lora", low_rank.LEAVES):
            x = (x + low_rank.embed(tokens, leaves, x.dtype)).astype(x.dtype)
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, x.dtype)
        return x

    def attend(
        self, hidden: Float[Array, "*n d"], own: Mapping[str, Array] | None = None
    ) -> Float[Array, "*n v"]:
        """Return logits, in float32. A tied head is the base's, without the update.

        Args:
          hidden: last hidden states.
          own: what an adapter has saved for the head, see ``adapters.saved``.
        """
        own = own or {}
        if "kernel" in own:
            logits = products.matmul(hidden, own["kernel"])
        else:
            logits = products.einsum("...d,vd->...v", hidden, self.embedding)
        if "rows" not in own:
            own = adapter_leaves(self, saved.COLLECTION, saved.ROWS)
        return saved.put_logits(logits, hidden, own) if own else logits


class RMSNorm(nn.Module):
    """Divide by the root mean square, taken in float32, and scale."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        config = self.config
        scale = weight_of(self, "scale", nn.initializers.ones_init(), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean + config.norm_eps)
        if config.norm_offset:
            factor = scale.astype(jnp.float32) + config.norm_offset
            return (normed * jnp.broadcast_to(factor, x.shape)).astype(x.dtype)
        # Rounded before the scale is applied, as the reference implementation does.
        normed = normed.astype(x.dtype).astype(jnp.float32)
        factor = jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
        return (normed * factor).astype(x.dtype)

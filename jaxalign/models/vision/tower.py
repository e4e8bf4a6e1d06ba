"""The vision tower: a transformer over the patches of packed images.

One module with options, like the decoder. The patches of a row's images lie one image
behind the other and see those of their own image; in layers with windows those of their
own square of it, which then lie one behind the other too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.adapters.adapter import COLLECTIONS
from jaxalign.models import attention as attention_lib
from jaxalign.models import rotary
from jaxalign.models.config import VisionConfig
from jaxalign.models.feed_forward import ACTIVATIONS
from jaxalign.models.linear import Dense, Runtime, weight_of
from jaxalign.stacks import Group, group_name
from jaxalign.types import ImageInputs


__all__ = ["Norm", "Tower", "VisionTraits", "layouts", "traits"]


class VisionTraits(NamedTuple):
    """What differs between the layers of a stack, scanned with their weights."""

    full: Bool[Array, "*l"] | None
    """Whether patches see all of their image; None where all layers are alike."""


class Layouts(NamedTuple):
    """Which patches see each other."""

    image: attention_lib.RowLayout
    window: attention_lib.RowLayout | None


def traits(config: VisionConfig, low: int, high: int) -> VisionTraits:
    """Return the traits of layers [low, high)."""
    if config.window is None:
        return VisionTraits(None)
    return VisionTraits(
        jnp.asarray([i in config.full_layers for i in range(low, high)])
    )


def layouts(config: VisionConfig, images: ImageInputs) -> Layouts:
    """Return who sees whom, in layers without a window and in those with one."""
    ids = images.image_ids
    whole = attention_lib.both_ways(ids)
    if config.window is None:
        return Layouts(whole, None)
    squares = images.places_in_image // config.window
    changed = (squares[:, 1:] != squares[:, :-1]).any(-1) | (ids[:, 1:] != ids[:, :-1])
    first = jnp.ones_like(changed[:, :1])
    windows = jnp.cumsum(jnp.concatenate([first, changed], axis=1), axis=1)
    windows = jnp.where(ids > 0, windows, 0).astype(ids.dtype)
    return Layouts(whole, attention_lib.both_ways(windows))


def _block(config: VisionConfig, runtime: Runtime) -> int:
    """Return the queries of a block: twice the decoder's where all of an image is seen.

    No key is left out there, so that a longer block costs nothing, and takes half as
    many steps; in windows it would see two of them.
    """
    return runtime.attention_block * (1 if config.window else 2)


def _choose(found: Layouts, own: VisionTraits) -> attention_lib.RowLayout:
    if found.window is None or (is_full := own.full) is None:
        return found.image
    return jax.tree.map(lambda full, window: jnp.where(is_full, full, window), *found)


class Norm(nn.Module):
    """Layer norm or root mean square norm, taken in float32."""

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        width = (x.shape[-1],)
        scale = weight_of(self, "scale", nn.initializers.ones_init(), width)
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean + self.eps)
        if self.kind == "rms":
            # Rounded before the scale is applied, as the reference implementation does.
            normed = normed.astype(x.dtype).astype(jnp.float32)
        normed = normed * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
        if self.kind == "layer":
            bias = weight_of(self, "bias", nn.initializers.zeros_init(), width)
            normed = normed + jnp.broadcast_to(bias.astype(jnp.float32), x.shape)
        return normed.astype(x.dtype)


class VisionAttention(nn.Module):
    """Attention among patches, of an image or of a window."""

    config: VisionConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b m d"],
        turned: tuple[Array, Array] | None,
        layout: attention_lib.RowLayout,
    ) -> Float[Array, "b m d"]:
        config, runtime, names = self.config, self.runtime, self.config.names
        if names.qkv is not None:
            dense = Dense(3 * config.width, runtime, config.qkv_bias, name=names.qkv)
            parts = jnp.split(dense(x), 3, axis=-1)
        else:
            parts = [
                Dense(config.width, runtime, config.qkv_bias, name=name)(x)
                for name in (names.query, names.key, names.value)
            ]
        q, k, v = (p.reshape(*x.shape[:2], config.num_heads, -1) for p in parts)
        if turned is not None:
            q, k = (rotary.apply_rotary(part, *turned) for part in (q, k))
        out, _ = attention_lib.attention(
            q,
            k,
            v,
            layout,
            scale=q.shape[-1] ** -0.5,
            # cuDNN's kernels here are for what is causal.
            implementation="xla" if runtime.attention == "cudnn" else runtime.attention,
            block=_block(config, runtime),
            mesh=runtime.mesh,
        )
        out = out.reshape(x.shape)
        return Dense(config.width, runtime, True, name=names.out)(out)


class VisionMLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x))."""

    config: VisionConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x: Float[Array, "b m d"]) -> Float[Array, "b m d"]:
        config, names = self.config, self.config.names

        def dense(name: str, features: int, x: Array) -> Array:
            return Dense(features, self.runtime, True, name=name)(x)

        act = ACTIVATIONS[config.activation]
        up = dense(names.up, config.mlp_width, x)
        if names.gate is None:
            wide = act(up)
        else:
            wide = act(dense(names.gate, config.mlp_width, x)) * up
        return dense(names.down, config.width, wide)


class VisionBlock(nn.Module):
    """One layer: attention and MLP, each normed before and added to the stream."""

    config: VisionConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b m d"],
        turned: tuple[Array, Array] | None,
        found: Layouts,
        own: VisionTraits,
    ) -> tuple[Float[Array, "b m d"], None]:
        config = self.config

        def add(x: Array, out: Array, name: str) -> Array:
            if config.layer_scale:
                ones = nn.initializers.ones_init()
                scale = weight_of(self, name, ones, (config.width,)).astype(out.dtype)
                out = out * jnp.broadcast_to(scale, out.shape)
            return x + out

        def norm(name: str, x: Array) -> Array:
            return Norm(config.norm, config.norm_eps, name=name)(x)

        attend = VisionAttention(config, self.runtime, name=config.names.attention)
        out = attend(norm("norm1", x), turned, _choose(found, own))
        x = add(x, out, "layer_scale1")
        out = VisionMLP(config, self.runtime, name="mlp")(norm("norm2", x))
        return add(x, out, "layer_scale2"), None


class Tower(nn.Module):
    """Patches in, states out, in their places.

    Parameters: ``patch_embedding/{kernel, bias}`` [frames * patch, d];
    ``class_token`` [d]; ``positions`` [n, d], the class token's first;
    ``first_norm``, ``last_norm``; for every group [lo, hi) a subtree
    ``layers_<lo>_<hi>`` whose leaves have hi - lo as their first axis.
    """

    config: VisionConfig
    groups: tuple[Group, ...]
    runtime: Runtime
    block: Callable[..., Any]
    """The module of a layer, maybe rematerialised."""

    @nn.compact
    def __call__(self, images: ImageInputs) -> Float[Array, "b m d"]:
        config, places = self.config, images.places_in_image
        x = self._embedded(images)
        turned = None
        if config.rotary_theta is not None:
            head = config.width // config.num_heads
            turned = rotary.turned_in_plane(config.rotary_theta, head, places)
        if config.first_norm:
            x = Norm(config.norm, config.norm_eps, name="first_norm")(x)
        found = layouts(config, images)
        for low, high in self.groups:
            scanned = nn.scan(
                self.block,
                variable_axes=dict.fromkeys(("params", *COLLECTIONS), 0),
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
                length=high - low,
            )
            layer = scanned(config, self.runtime, name=group_name((low, high)))
            x, _ = layer(x, turned, found, traits(config, low, high))
        if config.last_norm:
            x = Norm(config.norm, config.norm_eps, name="last_norm")(x)
        return x

    def _embedded(self, images: ImageInputs) -> Float[Array, "b m d"]:
        config, runtime = self.config, self.runtime
        assert images.patches is not None
        patches = images.patches.astype(runtime.dtype)
        if config.frames > 1:
            channels = patches.reshape(*patches.shape[:2], 3, 1, -1)
            repeats = (1, 1, 1, config.frames, 1)
            patches = jnp.tile(channels, repeats).reshape(*patches.shape[:2], -1)
        dense = Dense(config.width, runtime, config.patch_bias, name="patch_embedding")
        x = dense(patches)
        rows, columns = images.places_in_image[..., 0], images.places_in_image[..., 1]
        if config.class_token:
            zeros = nn.initializers.zeros_init()
            token = weight_of(self, "class_token", zeros, (config.width,))
            x = jnp.where((rows < 0)[..., None], token.astype(x.dtype)[None, None], x)
        if config.positions:
            normal = nn.initializers.normal(0.02)
            table = weight_of(
                self, "positions", normal, (config.positions, config.width)
            )
            index = jnp.where(rows < 0, 0, rows * config.side + columns + 1)
            index = index - (0 if config.class_token else 1)
            x = x + table[jnp.maximum(index, 0)].astype(x.dtype)
        return x

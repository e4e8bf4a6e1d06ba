"""Weights of linear layers as int8 or 4-bit codes, turned back a layer at a time.

A :class:`Quantised` stands in the place of a ``kernel`` of the layers' attention and
MLP. It is a pytree whose arrays keep the leading layer axis, so that a scan hands each
layer its own codes, and the weights that they stand for exist for one layer at a time:
in the forward pass, and again in the backward pass, which keeps none of them. (Stacks
of a single layer are no loop, and the compiler may turn back several at once.) Codes
are constants: only what lies beside them, adapters, can be trained.

* ``int8``: a scale for each output, its largest absolute weight / 127; codes are
  rounded to the nearest.
* ``nf4``: [QLoRA](https://arxiv.org/abs/2305.14314)'s 4-bit NormalFloat. The weights of
  an output fall into blocks of 64 inputs, each scaled by its largest absolute weight;
  codes are the nearest of 16 levels. Two codes take a byte: 4.5 bits a weight with the
  scales in float32. Where a linear layer's inputs are a multiple of 64 these are the
  numbers of bitsandbytes without its second quantisation, that of the scales.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from jaxalign import stacks, trees
from jaxalign.parallel import sharding


__all__ = [
    "BLOCK",
    "LEVELS",
    "Kind",
    "Quantised",
    "Quantize",
    "apply",
    "holds_codes",
    "place",
    "quantise",
    "quantise_params",
]

Kind = Literal["int8", "nf4"]

Quantize = Literal["none", "int8", "nf4"]
"""How a model's frozen linear weights are held; ``none`` is as they are."""

BLOCK = 64
"""Inputs that share a scale in ``nf4``."""

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Of ``nf4``: quantiles of a normal distribution over [-1, 1] with an exact 0 (QLoRA,
appendix E): 8 evenly spaced in probability up to the 0, 9 from there on."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A weight [*l, fan_in, fan_out] as codes.

    Attributes:
      codes: int8 [*l, fan_in, fan_out]; for ``nf4`` uint8 [*l, blocks * 32, fan_out],
        in each byte a code of its block's first half (low bits) and one of the second.
      scales: float32 [*l, blocks, fan_out]; ``int8`` has one block.
      kind: how codes are read.
      fan_in: inputs, of which the last block may have fewer than 64.

    >>> codes = quantise(jnp.ones((2, 2)), "int8")
    >>> codes.codes.dtype.name, codes.kind
    ('int8', 'int8')
    """

    codes: Any
    scales: Any
    kind: Kind = dataclasses.field(metadata={"static": True})
    fan_in: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that the codes stand for."""
        *stack, _, fan_out = self.codes.shape
        return (*stack, self.fan_in, fan_out)

    @property
    def ndim(self) -> int:
        """Axes of the weight."""
        return self.codes.ndim

    @property
    def dtype(self) -> Any:
        """In which the weight is exact."""
        return self.scales.dtype

    def astype(self, dtype: Any) -> Float[Array, "*l fan_in fan_out"]:
        """Return the weight itself, ``level(code) * scale``."""
        *stack, _, fan_out = self.codes.shape
        blocks = self.scales.shape[-2]
        codes = self.codes.reshape(*stack, blocks, -1, fan_out)
        if self.kind == "nf4":
            halves = [_levels(codes & 15), _levels(codes >> 4)]
            values = jnp.concatenate(halves, axis=-2)
        else:
            values = codes.astype(jnp.float32)
        values = values * jnp.broadcast_to(self.scales[..., None, :], values.shape)
        values = values.reshape(*stack, -1, fan_out)[..., : self.fan_in, :]
        return values.astype(dtype)


def _levels(codes: Array) -> Array:
    # A look-up: choosing by bits, with 15 selects, takes the CPU half a step longer.
    levels = jnp.asarray(LEVELS, jnp.float32)
    return levels.at[codes].get(mode="promise_in_bounds")


def quantise(weight: Float[Array, "*l fan_in fan_out"], kind: Kind) -> Quantised:
    """Return a weight as codes.

    The largest error of a weight is ``int8`` half its output's scale, ``nf4`` 0.152
    (half the widest gap between levels) of its block's scale.

    >>> quantise(jnp.array([[0.0, 1.0], [2.0, -4.0]]), "int8").codes.tolist()
    [[0, 32], [127, -127]]
    """
    *stack, fan_in, fan_out = weight.shape
    wide = weight.astype(jnp.float32)
    if kind == "int8":
        scales = jnp.max(jnp.abs(wide), axis=-2, keepdims=True) / 127
        # Rounding could leave the largest weight above 127 of its own scale.
        codes = jnp.clip(jnp.round(_divided(wide, scales)), -127, 127)
        return Quantised(codes.astype(jnp.int8), scales, kind, fan_in)
    blocks = -(-fan_in // BLOCK)
    missing = [(0, 0)] * len(stack) + [(0, blocks * BLOCK - fan_in), (0, 0)]
    wide = jnp.pad(wide, missing).reshape(*stack, blocks, BLOCK, fan_out)
    scales = jnp.max(jnp.abs(wide), axis=-2)
    shares = _divided(wide, scales[..., None, :])
    levels = np.array(LEVELS)
    middles = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    codes = sum((shares > middle).astype(jnp.uint8) for middle in middles)
    low, high = jnp.split(jnp.asarray(codes, jnp.uint8), 2, axis=-2)
    codes = (low | (high << 4)).reshape(*stack, -1, fan_out)
    return Quantised(codes, scales, kind, fan_in)


def _divided(wide: Array, scales: Array) -> Array:
    scales = jnp.where(scales == 0, 1.0, scales)
    return wide / jnp.broadcast_to(scales, wide.shape)


def apply(fn: Callable[[Array, Array], Array], x: Array, weight: Any) -> Array:
    """Return ``fn(x, W)``.

    Codes are turned back into W, in the dtype of x, for this call, and again where its
    derivative is taken: what is kept in between is the codes, which are there anyway.

    Args:
      fn: linear in x.
      x: inputs.
      weight: an array or codes.
    Example:
      >>> x, w = jnp.array([[1.0, 2.0]]), jnp.array([[127.0, 0.0], [0.0, 127.0]])
      >>> apply(jnp.matmul, x, quantise(w, "int8")).tolist()
      [[127.0, 254.0]]
    """
    if not isinstance(weight, Quantised):
        return fn(x, weight)
    return jax.checkpoint(lambda x, codes: fn(x, codes.astype(x.dtype)))(x, weight)


def holds_codes(path: str) -> bool:
    """Tell by its path whether quantising holds a weight as codes.

    Linear layers of attention, MLPs and experts are, of a vision tower too; embeddings,
    head, connector, routers, norms and biases are not.

    >>> holds_codes("layers_0_2/mlp/up_proj/kernel"), holds_codes("norm/scale")
    (True, False)
    >>> holds_codes("vision/layers_0_27/mlp/fc1/kernel")
    True
    """
    place = stacks.split(path)
    if place.group is None:
        return False
    # A tower has nothing but linear layers in its stacks.
    return path.endswith("/kernel" if place.scope else "_proj/kernel")


def quantise_params(params: Any, kind: Quantize) -> Any:
    """Return parameters with the weights of linear layers as codes.

    >>> import jax
    >>> kernel = jax.ShapeDtypeStruct((2, 100, 8), "float32")
    >>> params = {"layers_0_2": {"mlp": {"up_proj": {"kernel": kernel}}}}
    >>> made = jax.eval_shape(lambda p: quantise_params(p, "nf4"), params)
    >>> trees.num_bytes(params), trees.num_bytes(made)
    (6400, 1152)
    """
    if kind == "none":
        return params

    def change(path: str, leaf: Any) -> Any:
        return quantise(leaf, kind) if holds_codes(path) else leaf

    return trees.map_with_paths(change, params)


def place(codes: Quantised, where: NamedSharding) -> Quantised:
    """Return where codes lie on a mesh: as their weight would.

    Blocks stay whole: where an axis does not divide them, it is left out.

    Args:
      codes: arrays or shapes.
      where: of the weight.
    Returns:
      The same with shardings in the place of its arrays.
    Example:
      >>> from jax.sharding import PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("tensor",))
      >>> codes = quantise(jnp.ones((2, 4)), "int8")
      >>> found = place(codes, NamedSharding(mesh, PartitionSpec(None, "tensor")))
      >>> tuple(found.codes.spec)
      (None, 'tensor')
    """
    mesh = where.mesh
    scales = sharding.fitted(where.spec, codes.scales.shape, mesh)
    own = where if codes.kind == "int8" else NamedSharding(mesh, scales)
    return dataclasses.replace(codes, codes=own, scales=NamedSharding(mesh, scales))

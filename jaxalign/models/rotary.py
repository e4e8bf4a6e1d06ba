"""Rotary position embedding, as arithmetic on arrays."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxalign.errors import UserError


__all__ = [
    "Tables",
    "apply_rotary",
    "inverse_frequencies",
    "make_tables",
    "rotary_tables",
    "rotate_all",
]


def inverse_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any]
) -> np.ndarray:
    """Return the rotation speed of each pair of dimensions, in radians a position.

    ``theta ** (-2 i / head_dim)``, then scaled: ``linear`` divides all by ``factor``;
    ``llama3`` divides slow ones, keeps fast ones and blends those between.
    [RoFormer](https://arxiv.org/abs/2104.09864); the Llama 3.1 rule is that of its
    reference code.

    Raises:
      UserError: a scaling that is not implemented.
    """
    speeds = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return speeds.astype(np.float32)
    try:
        factor = float(scaling["factor"])
        if kind == "linear":
            return (speeds / factor).astype(np.float32)
        if kind == "llama3":
            low = float(scaling["low_freq_factor"])
            high = float(scaling["high_freq_factor"])
            length = float(scaling["original_max_position_embeddings"])
            turns = length * speeds / (2 * math.pi)
            blend = np.clip((turns - low) / (high - low), 0, 1)
            return ((1 - blend) * speeds / factor + blend * speeds).astype(np.float32)
    except KeyError as error:
        raise UserError(f"rotary scaling {kind!r} lacks its field {error}") from None
    raise UserError(
        f"rotary scaling {kind!r} is not implemented: expected default, linear or "
        "llama3"
    )


class Tables(NamedTuple):
    """What rotates a row's queries and keys, and what further keys are rotated with."""

    rows: tuple[Float[Array, "b t 1 half"], Float[Array, "b t 1 half"]]
    """Cosine and sine of every token's angles."""
    speeds: Float[Array, " half"]


def make_tables(
    positions: Int[Array, "b t"], speeds: Float[np.ndarray, " half"]
) -> Tables:
    """Return the tables of a row's positions."""
    return Tables(rotary_tables(positions, speeds), jnp.asarray(speeds))


def rotary_tables(
    positions: Int[Array, "b t"], speeds: Float[np.ndarray, " half"]
) -> tuple[Float[Array, "b t 1 half"], Float[Array, "b t 1 half"]]:
    """Return cosine and sine of every position's angles, in float32."""
    angles = positions[..., None, None].astype(jnp.float32) * speeds[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate_all(
    keys: Float[Array, "g p h"],
    position: Float[Array, ""],
    speeds: Float[Array, " half"],
) -> Float[Array, "g p h"]:
    """Rotate keys that all stand at one position, a negative one too."""
    angles = position * speeds
    shape = (*keys.shape[:2], angles.shape[0])
    cos = jnp.broadcast_to(jnp.cos(angles), shape)
    sin = jnp.broadcast_to(jnp.sin(angles), shape)
    return apply_rotary(keys[None], cos[None], sin[None])[0]


def apply_rotary(
    x: Float[Array, "b t n h"],
    cos: Float[Array, "b t n_or_1 half"],
    sin: Float[Array, "b t n_or_1 half"],
) -> Float[Array, "b t n h"]:
    """Rotate dimension i against dimension i + h/2 (the Hugging Face order)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return rotated.astype(x.dtype)

"""Rotary position embedding, as arithmetic on arrays.

A model may rotate its layers at different speeds, or some not at all: :class:`Tables`
holds the angles of every kind, and each layer picks its own.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxalign.errors import UserError


__all__ = [
    "SCALINGS",
    "Rotary",
    "Tables",
    "apply_rotary",
    "make_tables",
    "rotate_all",
    "speeds_of",
    "turned_in_plane",
]

SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor", "max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
"""Rules by which speeds are scaled, and the fields that each needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """How a layer's queries and keys are rotated.

    Attributes:
      theta: base; pair i of dimensions turns ``theta ** (-2 i / dims)`` radians a
        position.
      dims: dimensions of a head that are rotated, from the first.
      kind: one of :data:`SCALINGS`; ``none`` rotates nothing.
      scaling: its fields; a tuple, so that a config can be hashed.
      sections: of multimodal rotary, how many pairs of dimensions turn with the first
        axis of positions [b t 3] (time), then with the second (row) and the third
        (column); where positions are [b t], all turn alike.

    >>> Rotary(dims=64, theta=10000.0).scaling
    ()
    """

    theta: float
    dims: int
    kind: str = "default"
    scaling: tuple[tuple[str, Any], ...] = ()
    sections: tuple[int, ...] = ()


class Speeds(NamedTuple):
    """Rotation speed of each pair of dimensions, in radians a position."""

    near: Float[np.ndarray, " half"]
    far: Float[np.ndarray, " half"]
    """For sequences above ``limit``."""
    limit: float
    factor: float
    """Cosine and sine are multiplied by it."""


def speeds_of(rotary: Rotary) -> Speeds:
    """Return a rule's speeds.

    ``linear`` divides all by ``factor``; ``llama3`` divides slow ones, keeps fast ones
    and blends those between; [YaRN](https://arxiv.org/abs/2309.00071) blends between
    dims that make ``beta_fast`` and ``beta_slow`` turns; [LongRoPE](https://arxiv.org/
    abs/2402.13753) has a factor for each pair, others for long sequences; ``dynamic``
    makes the base grow with the length of the sequence, see :func:`make_tables`.

    Raises:
      UserError: a scaling that is not implemented, or one of its fields is missing.
    Example:
      >>> speeds_of(Rotary(dims=4, theta=100.0)).near.tolist()
      [1.0, 0.10000000149011612]
    """
    pairs = np.arange(0, rotary.dims, 2, dtype=np.float64)
    speeds = rotary.theta ** (-pairs / rotary.dims)
    fields = dict(rotary.scaling)
    if rotary.kind not in SCALINGS:
        raise UserError(
            f"rotary scaling {rotary.kind!r} is not implemented: expected "
            f"{', '.join(SCALINGS)}"
        )
    for name in SCALINGS[rotary.kind]:
        if name not in fields:
            raise UserError(f"rotary scaling {rotary.kind!r} lacks its field {name!r}")
    far, limit, factor = speeds, math.inf, 1.0
    if rotary.kind == "none":
        speeds = far = 0 * speeds
    elif rotary.kind == "linear":
        speeds = far = speeds / fields["factor"]
    elif rotary.kind == "llama3":
        speeds = far = _llama3(speeds, fields)
    elif rotary.kind == "yarn":
        speeds = far = _yarn(speeds, rotary, fields)
        factor = _yarn_factor(fields)
    elif rotary.kind == "longrope":
        limit = float(fields["original_max_position_embeddings"])
        far = speeds / np.asarray(fields["long_factor"], np.float64)
        speeds = speeds / np.asarray(fields["short_factor"], np.float64)
        factor = _longrope_factor(fields)
    elif rotary.kind == "dynamic":
        limit = float(fields["max_position_embeddings"])
    return Speeds(speeds.astype(np.float32), far.astype(np.float32), limit, factor)


def _llama3(speeds: np.ndarray, fields: Mapping[str, Any]) -> np.ndarray:
    low, high = float(fields["low_freq_factor"]), float(fields["high_freq_factor"])
    turns = fields["original_max_position_embeddings"] * speeds / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - blend) * speeds / fields["factor"] + blend * speeds


def _yarn(speeds: np.ndarray, rotary: Rotary, fields: Mapping[str, Any]) -> np.ndarray:
    length = fields["original_max_position_embeddings"]

    def dimension(turns: Any) -> float:
        """Return where a pair makes that many turns over the original length."""
        return (
            rotary.dims
            * math.log(length / (turns * 2 * math.pi))
            / (2 * math.log(rotary.theta))
        )

    low = dimension(fields.get("beta_fast") or 32)
    high = dimension(fields.get("beta_slow") or 1)
    if fields.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dims - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(rotary.dims // 2) - low) / (high - low), 0, 1)
    return speeds / fields["factor"] * ramp + speeds * (1 - ramp)


def _yarn_factor(fields: Mapping[str, Any]) -> float:
    if fields.get("attention_factor") is not None:
        return float(fields["attention_factor"])

    def mscale(weight: float = 1.0) -> float:
        factor = fields["factor"]
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    weight, whole = fields.get("mscale"), fields.get("mscale_all_dim")
    if weight and whole:
        return mscale(weight) / mscale(whole)
    return mscale()


def _longrope_factor(fields: Mapping[str, Any]) -> float:
    if fields.get("attention_factor") is not None:
        return float(fields["attention_factor"])
    factor = float(fields.get("factor", 1.0))
    if factor <= 1:
        return 1.0
    length = fields["original_max_position_embeddings"]
    return math.sqrt(1 + math.log(factor) / math.log(length))


class Tables(NamedTuple):
    """What rotates queries and keys, for every kind of layer."""

    cos: Float[Array, "k b t 1 dims"]
    """Of each pair's angle, for both its dimensions."""
    sin: Float[Array, "k b t 1 dims"]
    """Likewise; for the first of the two it is negated."""
    speeds: Float[Array, "k half"]

    def of(self, kind: Int[Array, ""] | int) -> "Tables":
        """Return those of one kind, without the first axis."""
        return Tables(*(table[kind] for table in self))


def make_tables(
    rotaries: Sequence[Rotary],
    positions: Int[Array, "b t *axes"],
    lengths: Int[Array, "b t"],
) -> Tables:
    """Return the tables of rows, in float32.

    Args:
      rotaries: the kinds; all rotate as many dimensions.
      positions: of every token.
      lengths: of the sequence that each token is of; ``longrope`` and ``dynamic`` turn
        slower in long ones. Responses that share a prompt have one length, the longer.
    Example:
      >>> places = jnp.array([[0, 1]])
      >>> tables = make_tables([Rotary(dims=4, theta=100.0)], places, places + 2)
      >>> tables.cos.shape
      (1, 1, 2, 1, 4)
    """
    cos, sin, plain = [], [], []
    for rotary in rotaries:
        speeds = speeds_of(rotary)
        near = jnp.asarray(speeds.near)
        turn: Any = near[None, None, None]
        if rotary.kind == "dynamic":
            turn = _dynamic(rotary, lengths)[..., None, :]
        elif rotary.kind == "longrope":
            long = (lengths > speeds.limit)[..., None, None]
            shape = (*lengths.shape, 1, near.shape[0])
            turn = jnp.where(
                jnp.broadcast_to(long, shape),
                jnp.broadcast_to(jnp.asarray(speeds.far), shape),
                jnp.broadcast_to(near, shape),
            )
        both = _cos_sin(_of_pairs(rotary, positions).astype(jnp.float32) * turn)
        cos.append(both[0] * speeds.factor)
        sin.append(both[1] * speeds.factor)
        plain.append(near)
    return Tables(jnp.stack(cos), jnp.stack(sin), jnp.stack(plain))


def _of_pairs(rotary: Rotary, positions: Int[Array, "b t *axes"]) -> Array:
    """Return the position that each pair of dimensions turns with."""
    if positions.ndim == 2:
        return positions[..., None, None]
    axes = np.repeat(np.arange(len(rotary.sections)), rotary.sections)
    return positions[..., axes][..., None, :]


def turned_in_plane(
    theta: float, head_dim: int, places: Int[Array, "b m 2"]
) -> tuple[Float[Array, "b m 1 h"], Float[Array, "b m 1 h"]]:
    """Return what turns a vision tower's heads by row and column.

    The first quarter of a head's dimensions turns with the row, the second with the
    column, each against its partner half a head further on, at speeds
    ``theta ** (-4 i / head_dim)``, as Qwen2-VL's tower does.

    Args:
      theta: base.
      head_dim: size of a head.
      places: row and column.
    Example:
      >>> cos, _ = turned_in_plane(10000.0, 8, jnp.zeros((1, 2, 2), jnp.int32))
      >>> cos.shape, bool((cos == 1).all())  # at the origin nothing turns
      ((1, 2, 1, 8), True)
    """
    pairs = np.arange(0, head_dim // 2, 2, dtype=np.float64)
    speeds = jnp.asarray(theta ** (-pairs / (head_dim // 2)), jnp.float32)
    angles = places[..., None].astype(jnp.float32) * speeds[None, None, None]
    return _cos_sin(angles.reshape(*places.shape[:2], 1, -1))


def _dynamic(rotary: Rotary, lengths: Int[Array, "b t"]) -> Float[Array, "b t half"]:
    """Let the base grow with the length, [NTK-aware](https://arxiv.org/abs/2309.00071)."""
    fields, dims = dict(rotary.scaling), rotary.dims
    most, factor = fields["max_position_embeddings"], fields["factor"]
    length = jnp.maximum(lengths, most).astype(jnp.float32)
    growth = (factor * length / most - (factor - 1)) ** (dims / (dims - 2))
    base = (rotary.theta * growth)[..., None]
    pairs = jnp.arange(0, dims, 2, dtype=jnp.float32)[None, None]
    return jnp.exp(-jnp.log(base) * (pairs / dims))


def rotate_all(
    keys: Float[Array, "g p h"],
    position: Float[Array, ""],
    speeds: Float[Array, " half"],
) -> Float[Array, "g p h"]:
    """Rotate keys that all stand at one position, a negative one too.

    >>> key, speeds = jnp.array([[[1.0, 0.0]]]), jnp.array([jnp.pi / 2])
    >>> rotate_all(key, jnp.array(-2.0), speeds).round(3)[..., 0].tolist()
    [[-1.0]]
    """
    cos, sin = _cos_sin((position * speeds)[None, None, None])
    return apply_rotary(keys[None], cos, sin)[0]


def _cos_sin(angles: Float[Array, "*n half"]) -> tuple[Array, Array]:
    """Return cosines and sines in the form of :class:`Tables`."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


def apply_rotary(
    x: Float[Array, "b t n h"],
    cos: Float[Array, "b_or_1 t_or_1 n_or_1 dims"],
    sin: Float[Array, "b_or_1 t_or_1 n_or_1 dims"],
) -> Float[Array, "b t n h"]:
    """Rotate dimension i against dimension i + half (the Hugging Face order).

    Dimensions from ``dims``, two halves, on stay as they are.

    >>> x = jnp.array([[[[1.0, 0.0]]]])
    >>> quarter = jnp.full((1, 1, 1, 2), jnp.pi / 2)
    >>> turned = apply_rotary(x, jnp.cos(quarter), jnp.sin(quarter))
    >>> abs(turned).round(3).tolist()
    [[[[0.0, 1.0]]]]
    """
    dims = cos.shape[-1]
    wide = x.astype(jnp.float32)
    turned, rest = wide[..., :dims], wide[..., dims:]
    # A roll, not two halves put together, which XLA's CPU code does one by one.
    turned = turned * cos + jnp.roll(turned, dims // 2, axis=-1) * sin
    if rest.shape[-1]:
        turned = jnp.concatenate([turned, rest], axis=-1)
    return turned.astype(x.dtype)

"""Linear weights that others have stored as codes: FP8, AWQ, GPTQ, compressed-tensors.

Each is turned back into float32 [out, in], one at a time:

* scaled (block-wise FP8 of DeepSeek and Qwen3, FP8 and int8 of compressed-tensors):
  ``weight`` [out, in] times a scale of the whole, of each output, or of each block.
* AWQ ("gemm"): ``qweight`` int32 [in, out / 8], whose bits 4 i to 4 i + 3 are of the
  output (0, 2, 4, 6, 1, 3, 5, 7)[i] of eight; ``qzeros`` [groups, out / 8] likewise;
  ``scales`` [groups, out]. A weight is (code - zero) scale.
* GPTQ: ``qweight`` int32 [in bits / 32, out], lowest bits first; ``qzeros`` [groups,
  out bits / 32]; ``scales`` [groups, out]; ``g_idx`` [in], the group of each input,
  which are not in order where it was made with ``desc_act``. In format ``gptq`` the
  packed zeros are one less in every code, in ``gptq_v2`` they are not.
* packed (compressed-tensors): ``weight_packed`` int32 [out, in bits / 32], codes above
  the middle; ``weight_scale`` [out, groups], ``weight_zero_point`` [out bits / 32,
  groups] likewise above the middle, ``weight_g_idx`` as above.

Formats as AutoAWQ (https://github.com/casper-hansen/AutoAWQ), GPTQModel
(https://github.com/ModelCloud/GPTQModel), compressed-tensors
(https://github.com/vllm-project/compressed-tensors) and transformers write them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxalign.errors import UserError


__all__ = ["AWQ_ORDER", "Layout", "decode", "shape_of", "unpack"]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each four bits of an integer of AWQ are of."""


class Layout(NamedTuple):
    """How the codes of a checkpoint are to be read."""

    kind: str
    """``scaled``, ``awq``, ``gptq`` or ``packed``."""
    bits: int = 8
    group_size: int | None = None
    """Inputs that share a scale; None for all of them."""
    block: tuple[int, int] | None = None
    """Outputs and inputs that share a scale, of ``scaled`` weights that have blocks."""
    zeros_less_one: bool = False
    """Whether GPTQ's zeros are stored one too low."""


def shape_of(layout: Layout, main: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a weight [out, in] from that of its codes."""
    many = 32 // layout.bits
    if layout.kind == "awq":
        return main[1] * many, main[0]
    if layout.kind == "gptq":
        return main[1], main[0] * many
    if layout.kind == "packed":
        return main[0], main[1] * many
    return tuple(main)


def decode(layout: Layout, name: str, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return a weight [out, in] in float32.

    Args:
      layout: of the checkpoint.
      name: of the weight, for errors.
      parts: its tensors, by the last part of their names.
    Raises:
      UserError: they do not fit each other.
    """
    if layout.kind == "scaled":
        return _scaled(layout, name, parts)
    if layout.kind == "awq":
        codes = unpack(parts["qweight"], 4, axis=1, order=AWQ_ORDER)
        zeros = unpack(parts["qzeros"], 4, axis=1, order=AWQ_ORDER)
        return _grouped(layout, name, codes, zeros, parts["scales"], None).T
    if layout.kind == "gptq":
        codes = unpack(parts["qweight"], layout.bits, axis=0)
        packed = parts["qzeros"].view(np.uint32)
        if layout.zeros_less_one:
            # All codes of an integer at once, as the writer took the ones away: what
            # borrowed from its neighbour gives it back.
            ones = sum(1 << shift for shift in range(0, 32, layout.bits))
            packed = packed + np.uint32(ones)
        zeros = unpack(packed, layout.bits, axis=1)
        g_idx = parts.get("g_idx")
        return _grouped(layout, name, codes, zeros, parts["scales"], g_idx).T
    codes = unpack(parts["weight_packed"], layout.bits, axis=1).T
    scales = np.atleast_2d(parts["weight_scale"]).T
    zeros = np.full((1, 1), 1 << (layout.bits - 1), np.uint8)
    if "weight_zero_point" in parts:
        # Both are above the middle, which their difference does not show.
        zeros = unpack(parts["weight_zero_point"], layout.bits, axis=0).T
    zeros = np.broadcast_to(zeros, scales.shape)
    g_idx = parts.get("weight_g_idx")
    return _grouped(layout, name, codes, zeros, scales, g_idx).T


def unpack(
    packed: np.ndarray, bits: int, *, axis: int, order: tuple[int, ...] | None = None
) -> np.ndarray:
    """Return the codes of 32-bit integers as uint8, along an axis of two.

    >>> unpack(np.array([[0x76543210]], np.int32), 4, axis=1)
    array([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=uint8)
    """
    many = 32 // bits
    words = packed.view(np.uint32)
    shape = list(words.shape)
    shape[axis] *= many
    codes = np.empty(shape, np.uint8)
    for i in range(many):
        at = slice(order[i] if order else i, None, many)
        part = (words >> np.uint32(bits * i)) & np.uint32((1 << bits) - 1)
        codes[(slice(None),) * axis + (at,)] = part
    return codes


def _grouped(
    layout: Layout,
    name: str,
    codes: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    g_idx: np.ndarray | None,
) -> np.ndarray:
    """Return ``(code - zero) scale`` of codes [in, out] in float32."""
    fan_in, fan_out = codes.shape
    size = layout.group_size or fan_in
    groups = -(-fan_in // size)
    if g_idx is not None and g_idx.size and g_idx.max() >= groups:
        groups = int(g_idx.max()) + 1
    if scales.shape != (groups, fan_out) or zeros.shape != (groups, fan_out):
        raise UserError(
            f"{name}: {fan_in} inputs in groups of {size} need scales and zeros "
            f"[{groups}, {fan_out}]: got {list(scales.shape)} and {list(zeros.shape)}. "
            "Check group_size in quantization_config"
        )
    if g_idx is None or not g_idx.size:
        g_idx = None
    elif g_idx.shape != (fan_in,) or g_idx.min() < 0:
        raise UserError(
            f"{name}: g_idx must be a group from 0 on for each of {fan_in} inputs: got "
            f"the shape {list(g_idx.shape)} and {g_idx.min()} as the lowest"
        )
    made = codes.astype(np.float32)
    for group in range(groups):
        low = group * size
        rows: Any = slice(low, low + size)
        if g_idx is not None:
            rows = np.flatnonzero(g_idx == group)
        part = made[rows] - zeros[group].astype(np.float32)[None]
        made[rows] = part * scales[group].astype(np.float32)[None]
    return made


def _scaled(layout: Layout, name: str, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    kind = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    scale = np.asarray(parts[kind], np.float32)
    made = parts["weight"].astype(np.float32)
    fan_out, fan_in = made.shape
    if layout.block is None:
        if scale.size != 1 and scale.shape not in ((fan_out, 1), (fan_out,)):
            raise UserError(
                f"{name}: {kind} must be one number or one for each of {fan_out} "
                f"outputs: got {list(scale.shape)}"
            )
        made *= scale.reshape(-1, 1)
        return made
    high, wide = layout.block
    wanted = (-(-fan_out // high), -(-fan_in // wide))
    if scale.shape != wanted:
        raise UserError(
            f"{name}: blocks of {high} by {wide} of a weight [{fan_out}, {fan_in}] "
            f"need {kind} {list(wanted)}: got {list(scale.shape)}"
        )
    for row in range(wanted[0]):
        along = np.repeat(scale[row], wide)[:fan_in]
        made[row * high : (row + 1) * high] *= along[None]
    return made

"""Which kernel runs attention, and why.

What can run is read off a device of the mesh and the work to do, never off JAX's
default backend, so that it is also right for a machine that is only compiled for.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from jaxalign.errors import UserError
from jaxalign.models.attention import splash


__all__ = [
    "AttentionOption",
    "KernelChoice",
    "Implementation",
    "Machine",
    "Work",
    "available",
    "choose",
    "machine_of",
]

Implementation = Literal["xla", "dense", "cudnn", "splash"]

AttentionOption = Literal["auto", "xla", "cudnn", "splash", "dense"]

_CAPABILITY = (9, 0)
_CUDNN = 90600


class Machine(NamedTuple):
    """What a device is."""

    platform: str
    """``cpu``, ``tpu``, or ``gpu``."""
    capability: tuple[int, ...] | None = None
    """Of an NVIDIA GPU, (9, 0) for a Hopper."""
    cudnn: int | None = None
    """Its version, 90600 for 9.6.0; None if there is none."""


class KernelChoice(NamedTuple):
    """A kernel, and why it was chosen."""

    implementation: Implementation
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What attention has to do.

    Attributes:
      dtype: of the computation.
      heads: of the queries.
      kv_heads: of keys and values.
      head_dim: size of a head.
      rows: of a micro-batch, on one device.
      row_length: places of a row.
      windows: whether any layer has a sliding window.
      softcap: whether scores are capped.
      prefix: whether an adapter adds keys and values.
      tensor: devices that share a layer's heads.
    """

    dtype: Any
    heads: int
    kv_heads: int
    head_dim: int
    rows: int
    row_length: int
    windows: bool = False
    softcap: bool = False
    prefix: bool = False
    tensor: int = 1


def machine_of(device: Any) -> Machine:
    """Return what a device is."""
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or capability is None:
        return Machine(device.platform)
    from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version

    try:
        cudnn = check_cudnn_version()
    except RuntimeError:
        cudnn = None
    return Machine("gpu", tuple(int(x) for x in capability.split(".")), cudnn)


def available(machine: Machine) -> dict[str, str]:
    """Return which kernels there are, and whether they run on a machine."""
    runs = f"runs on {machine.platform}; "
    said = {
        "xla": runs + "blocks of queries and keys, skips what is unseen",
        "dense": runs + "the plain formula, for comparison",
        "cudnn": runs + "for bfloat16, without sliding windows, soft caps and prefixes",
        "splash": runs + f"for rows of up to {splash.LONGEST} places",
    }
    for name in ("cudnn", "splash"):
        if reason := _missing(name, machine):
            said[name] = f"does not run: {reason}"
    return said


def choose(asked: AttentionOption, machine: Machine, work: Work) -> KernelChoice:
    """Return the kernel to use.

    Args:
      asked: a kernel, or ``auto`` for the platform's own if it can do the work and
        ``xla`` otherwise.
      machine: where it is to run.
      work: what it is to do.
    Raises:
      UserError: the kernel that is asked for cannot run.
    """
    if asked in ("xla", "dense"):
        return KernelChoice(asked, "as asked")
    if asked != "auto":
        if reason := _missing(asked, machine) or _refused(asked, work):
            raise UserError(
                f"attention {asked} cannot run: {reason}. Use --attention auto, or xla"
            )
        return KernelChoice(asked, "as asked")
    native: dict[str, Implementation] = {"gpu": "cudnn", "tpu": "splash"}
    name = native.get(machine.platform)
    if name is None:
        reason = "cudnn needs an NVIDIA GPU, splash a TPU"
        return KernelChoice("xla", f"{machine.platform}: {reason}")
    if reason := _missing(name, machine) or _refused(name, work):
        return KernelChoice("xla", f"{machine.platform}; not {name}: {reason}")
    return KernelChoice(name, machine.platform)


def _missing(name: str, machine: Machine) -> str | None:
    """Return what the machine lacks for a kernel."""
    if name == "splash":
        return None if machine.platform == "tpu" else "it needs a TPU"
    if machine.platform != "gpu" or machine.capability is None:
        return "it needs an NVIDIA GPU"
    if machine.capability < _CAPABILITY:
        found = ".".join(map(str, machine.capability))
        return f"packed rows need a Hopper GPU or a later one (9.0): this is {found}"
    if machine.cudnn is None or machine.cudnn < _CUDNN:
        return f"packed rows need cuDNN 9.6 ({_CUDNN}): found {machine.cudnn}"
    return None


def _refused(name: str, work: Work) -> str | None:
    """Return what a kernel cannot do of the work."""
    # Keys are repeated until every device has some.
    if work.heads % math.lcm(work.kv_heads, work.tensor):
        return (
            f"{work.heads} heads with {work.kv_heads} of keys cannot be split over "
            f"mesh.tensor = {work.tensor} devices"
        )
    if name == "splash":
        if work.row_length > splash.LONGEST:
            return (
                f"it takes rows of up to {splash.LONGEST} places: row_length is "
                f"{work.row_length}"
            )
        return None
    dtype = jnp.dtype(work.dtype)
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16: dtype is {dtype.name}"
    if work.head_dim % 8 or work.head_dim > 256:
        return (
            "it takes heads of a multiple of 8 up to 256: the model's have "
            f"{work.head_dim}"
        )
    if work.windows:
        return "it has no sliding windows that differ by layer, as this model has"
    if work.softcap:
        return "it has no soft cap on scores, as this model has"
    if work.prefix:
        return (
            "it gives no derivative of the log-sum-exp, by which the adapter's prefix "
            "joins"
        )
    if 2 * work.rows * work.row_length * work.heads * work.head_dim >= 2**31:
        return "a micro-batch has too many tokens for it: lower batch_rows"
    return None

"""The mesh of devices: data, fsdp and tensor."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jaxalign.configs import check_fields
from jaxalign.errors import UserError
from jaxalign.parallel import multihost


__all__ = ["AXES", "BATCH_AXES", "MeshConfig", "make_mesh"]

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
"""Axes over which the rows of a batch are split."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each axis has; their product is the number of devices used.

    Attributes:
      data: copies of the weights, each working on its own rows.
      fsdp: devices that split weights and rows among them.
      tensor: devices that split each layer's columns among them.

    >>> MeshConfig(data=2, fsdp=4).tensor
    1
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise UserError(
                    f"mesh.{axis} must be at least 1: got {getattr(self, axis)}"
                )

    @property
    def size(self) -> int:
        """Return the number of devices."""
        return self.data * self.fsdp * self.tensor

    @property
    def rows(self) -> int:
        """Return into how many parts the rows of a batch are split."""
        return self.data * self.fsdp


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange devices in a mesh with Auto axes (the compiler decides what is implied).

    Raises:
      UserError: there are fewer devices than the axes ask for.
    Example:
      >>> dict(make_mesh(MeshConfig(data=1), jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    everywhere = devices is None
    devices = list(jax.devices() if devices is None else devices)
    if config.size > len(devices):
        raise UserError(
            f"the mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} "
            f"needs {config.size} devices: got {len(devices)}. Lower --mesh.*, or for "
            "a trial on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{config.size}"
        )
    if everywhere and multihost.several() and config.size < len(devices):
        raise UserError(
            f"the mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} "
            f"has {config.size} of the {len(devices)} devices of "
            f"{jax.process_count()} processes, each of which takes part: raise "
            "--mesh.* to all of them, or use --distributed off"
        )
    return jax.make_mesh(
        (config.data, config.fsdp, config.tensor),
        AXES,
        axis_types=(AxisType.Auto,) * 3,
        devices=devices[: config.size],
    )

"""Meshes and placement."""

from jaxalign.parallel import mesh, sharding


__all__ = ["mesh", "sharding"]

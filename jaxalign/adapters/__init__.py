"""Adapters: what is trained instead of the base weights."""

from jaxalign.adapters import lora, selection


__all__ = ["lora", "selection"]

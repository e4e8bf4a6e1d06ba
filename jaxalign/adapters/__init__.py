"""Adapters: what is trained instead of the base weights."""

from jaxalign.adapters import adapter, gates, hybrid, lora, prefix, selection


__all__ = ["adapter", "gates", "hybrid", "lora", "prefix", "selection"]

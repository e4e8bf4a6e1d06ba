"""Data: feedback records, rendering, packing and loading."""

from jaxalign.data import chat, loader, packing, pairs, records, spans


__all__ = ["chat", "loader", "packing", "pairs", "records", "spans"]

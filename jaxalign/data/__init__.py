"""Data: feedback records, rendering, packing and loading."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.data import chat, loader, packing, pairs, records, rows, spans

__all__ = ["chat", "loader", "packing", "pairs", "records", "rows", "spans"]

__getattr__, __dir__ = submodules(__name__, __all__)

"""Data: feedback records, rendering, packing and loading."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.data import (
        chat,
        layouts,
        loader,
        packing,
        pairs,
        patchers,
        patches,
        picture,
        records,
        reference_cache,
        rendering,
        rows,
        sample,
        seen,
        spans,
        tfds_builders,
        tokenizer,
    )

__all__ = [
    "chat",
    "layouts",
    "loader",
    "packing",
    "pairs",
    "patchers",
    "patches",
    "picture",
    "reference_cache",
    "records",
    "rendering",
    "rows",
    "sample",
    "seen",
    "spans",
    "tfds_builders",
    "tokenizer",
]

__getattr__, __dir__ = submodules(__name__, __all__)

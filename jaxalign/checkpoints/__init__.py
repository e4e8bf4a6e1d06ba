"""Checkpoints: Hugging Face and PEFT in and out, training state, small assets."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.checkpoints import (
        adapter_files,
        adapter_start,
        contents,
        convert,
        export,
        fetch,
        gguf,
        hub,
        load,
        policy,
        renderer,
        runs,
        state,
        tensors,
    )

__all__ = [
    "adapter_files",
    "adapter_start",
    "contents",
    "convert",
    "export",
    "fetch",
    "gguf",
    "hub",
    "load",
    "policy",
    "renderer",
    "runs",
    "state",
    "tensors",
]

__getattr__, __dir__ = submodules(__name__, __all__)

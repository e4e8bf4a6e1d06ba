"""Text from a model: the engine, sampling, given answers, files, and a server."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.generation import (
        answer_logps,
        completions,
        context,
        engine,
        files,
        sampling,
        serving,
        slots,
        steps,
        structure,
        text_model,
    )

__all__ = [
    "answer_logps",
    "completions",
    "context",
    "engine",
    "files",
    "sampling",
    "serving",
    "slots",
    "steps",
    "structure",
    "text_model",
]

__getattr__, __dir__ = submodules(__name__, __all__)

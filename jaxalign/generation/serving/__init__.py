"""An OpenAI-compatible server in front of the engine."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.generation.serving import server, service, wire

__all__ = ["server", "service", "wire"]

__getattr__, __dir__ = submodules(__name__, __all__)

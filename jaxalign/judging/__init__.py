"""Judging: what asks for verdicts, what gives them, and where they are kept."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.judging import (
        agreement,
        asking,
        config,
        endpoint_model,
        engine_model,
        estimate,
        graders,
        judge,
        make,
        prompts,
        refusals,
        safety,
        store,
        votes,
        writing,
    )

__all__ = [
    "agreement",
    "asking",
    "config",
    "endpoint_model",
    "engine_model",
    "estimate",
    "graders",
    "judge",
    "make",
    "prompts",
    "refusals",
    "safety",
    "store",
    "votes",
    "writing",
]

__getattr__, __dir__ = submodules(__name__, __all__)

"""Judging: what asks for verdicts, what gives them, and where they are kept."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.judging import asking, config, judge, make, prompts, store, votes

__all__ = ["asking", "config", "judge", "make", "prompts", "store", "votes"]

__getattr__, __dir__ = submodules(__name__, __all__)

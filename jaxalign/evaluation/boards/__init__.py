"""Boards of models against a baseline: files, verdicts and maths of three of them."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.evaluation.boards import (
        alpaca_files,
        arena_files,
        authors_wording,
        bradley_terry,
        fastchat,
        length_control,
        logistic_fit,
        style,
        verdicts,
    )

__all__ = [
    "alpaca_files",
    "arena_files",
    "authors_wording",
    "bradley_terry",
    "fastchat",
    "length_control",
    "logistic_fit",
    "style",
    "verdicts",
]

__getattr__, __dir__ = submodules(__name__, __all__)

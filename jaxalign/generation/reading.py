"""Reading a prompt on the device: its pictures once, then its tokens by the piece."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxalign.generation import completions, programs
from jaxalign.generation.completions import Event
from jaxalign.generation.prefill import WaitingPrompt
from jaxalign.generation.steps import Sights


__all__ = ["read_piece"]


def read_piece(
    prompt: WaitingPrompt, variables: Any, dtype: Any, static: Mapping[str, Any]
) -> list[Event]:
    """Read the next piece of a prompt; return its tokens if they are to be told.

    Args:
      prompt: has a row, and its pictures are encoded.
      variables: of the model.
      dtype: of hidden states.
      static: model and mesh.
    """
    piece = prompt.piece()
    sights = None
    if piece.which is not None:
        features = programs.pick(
            prompt.features, piece.which, dtype=dtype, mesh=static["mesh"]
        )
        arrays: Any = piece.which, piece.turned
        sights = Sights(features, *arrays)
    prompt.logits, prompt.row, scores = programs.prefill(
        *(variables, prompt.row, piece.tokens),
        *(np.int32(piece.begin), np.int32(piece.length)),
        *(np.int32(len(prompt.request.tokens)), piece.following, sights),
        **static,
    )
    prompt.begin += piece.length
    if prompt.is_read:
        prompt.features = None  # which are many numbers, and of no further use
    if scores is None:
        return []
    scores = jax.device_get(scores)
    return [
        completions.event(prompt.number, None, prompt.request, scores, n, None)
        for n in range(piece.told)
    ]

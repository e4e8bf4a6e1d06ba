"""The head of a reward model: one row beside a decoder, and what config.json says."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxalign.checkpoints import contents, hub, load, tensors
from jaxalign.errors import UserError


__all__ = ["RewardHead", "check", "read"]

NAME = "score.weight"
"""What transformers calls the head of its ``...ForSequenceClassification``."""


class RewardHead(NamedTuple):
    """What makes a score of hidden states."""

    weight: Float[np.ndarray, " d"]
    padding: int | None
    """Token that is never scored; None where config.json names none."""


def check(model: str | Path) -> None:
    """Check a reward model by its config and the headers of its files alone.

    Args:
      model: Hugging Face directory or id.
    Raises:
      UserError: it is of no supported family, has no head of one score, or its tensors
        are not what its config asks for.
    """
    load.open_config(model)
    found = contents.tensor_infos(model).get(NAME)
    if found is None:
        raise UserError(
            f"{model} has no tensor {NAME}: expected a reward model, a checkpoint of a "
            "...ForSequenceClassification with one label. One that writes text judges "
            "with judge.name local"
        )
    if len(found.shape) != 2 or found.shape[0] != 1:
        raise UserError(
            f"{model}: {NAME} is {list(found.shape)}, which gives {found.shape[0]} "
            "scores: expected a reward model with one label (num_labels 1)"
        )
    load.check(model, headless=True)


def read(model: str | Path) -> RewardHead:
    """Read the head of a reward model that :func:`check` has found in order."""
    weight = contents.read_tensor(model, NAME)
    assert weight is not None
    config = tensors.read_json(hub.directory_of(model) / "config.json")
    return RewardHead(weight[0].astype(np.float32), config.get("pad_token_id"))

"""Supervised fine-tuning on the desirable completions."""

import dataclasses
from typing import Literal


__all__ = ["SFTConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Options of supervised fine-tuning, ``L = - sum_t log pi(y_t) / tokens``.

    The mean is over all tokens of a step, as in TRL, not a mean of means.

    Attributes:
      name: the objective.
      completion_only_loss: whether the prompt's tokens are left out of the loss.
    """

    name: Literal["sft"] = "sft"
    completion_only_loss: bool = True

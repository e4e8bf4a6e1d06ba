"""Supervised fine-tuning on the desirable completions."""

import dataclasses
from typing import Literal

from jaxalign.configs import check_fields
from jaxalign.objectives.policy import TokenLogps, pair_logps
from jaxalign.objectives.record import Aspects, Losses, Needs, Objective, Term
from jaxalign.types import PreferenceBatch


__all__ = ["SFTConfig", "make"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Options of supervised fine-tuning, ``L = - sum_t log pi(y_t) / tokens``.

    The mean is over all tokens of a step, as in TRL, not a mean of means.

    Attributes:
      name: the objective.
      completion_only_loss: whether the prompt's tokens are left out of the loss.

    >>> SFTConfig().name
    'sft'
    """

    name: Literal["sft"] = "sft"
    completion_only_loss: bool = True

    def __post_init__(self) -> None:
        check_fields(self)


def make(config: SFTConfig, aspects: Aspects = None) -> Objective:
    """Return the objective of supervised fine-tuning.

    >>> make(SFTConfig()).needs.form
    'completions'
    """
    del aspects
    needs = Needs(
        form="completions", reference=False, prompt=not config.completion_only_loss
    )
    return Objective(needs, (Term(_losses),))


def _losses(tokens: TokenLogps, batch: PreferenceBatch) -> Losses:
    pair = pair_logps(tokens, batch)
    return Losses(-pair.logps[..., 0], counts=pair.tokens[..., 0])

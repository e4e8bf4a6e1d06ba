"""An objective of one's own: a function, where a config names one of the library's."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

from jaxtyping import Array, Float

from jaxalign.errors import UserError
from jaxalign.functions import identity
from jaxalign.objectives.options import ObjectiveConfig
from jaxalign.objectives.policy import TokenLogps
from jaxalign.objectives.record import Aspects, Losses, Needs, Objective, Term
from jaxalign.types import PreferenceBatch


__all__ = ["LossOfPairs", "OwnObjective", "as_config", "kept", "own"]

LossOfPairs: TypeAlias = Callable[
    [TokenLogps, PreferenceBatch], Float[Array, "b p"] | Losses
]
"""From scored tokens and their batch to the loss of every pair."""


@dataclasses.dataclass(frozen=True)
class OwnObjective:
    """An objective that was given as an object, in the place of a config.

    Attributes:
      name: of its function.
      code: SHA-256 of the function's text; both are all that a run's files keep.
      made: the objective itself.
    """

    name: str
    code: str
    made: dataclasses.InitVar[Objective]

    def __post_init__(self, made: Objective) -> None:
        object.__setattr__(self, "_made", made)

    def make(self, aspects: Aspects = None) -> Objective:
        """Return the objective, which knows its aspects itself."""
        del aspects
        made: Any = vars(self)["_made"]
        return made


def own(
    given: Objective | LossOfPairs, *, needs: Needs | None = None, beta: float = 1.0
) -> OwnObjective:
    """Return a loss of one's own as the config of an objective.

    The short way is a function ``(tokens, batch) -> losses [b, p]`` of every pair by
    itself, neither averaged nor masked (``tokens`` as of ``policy.TokenLogps``). What
    it needs of data and model is said by ``needs``: by default pairs and a reference.
    An ``Objective`` says all that itself, sums of several terms included.

    Args:
      given: the function, or the whole ``Objective``.
      needs: of a function.
      beta: temperature of the rewards that a function's run reports.

    >>> import jax
    >>> from jaxalign.objectives import policy
    >>> def hinge(tokens, batch):
    ...     ratio = policy.pair_logps(tokens, batch).logratios  # [b p 2]
    ...     return jax.nn.relu(1 - 0.1 * (ratio[..., 0] - ratio[..., 1]))
    >>> own(hinge).name, own(hinge).make().needs.form
    ('hinge', 'pairs')
    """
    if isinstance(given, Objective):
        found = [identity(term.losses) for term in given.terms]
        made = given
    else:
        found = [identity(given)]
        term = Term(functools.partial(_losses, given))
        made = Objective(needs or Needs(), (term,), beta)
    name = "+".join(part["name"].rpartition(".")[2] for part in found)
    return OwnObjective(name, "+".join(part["code"] for part in found), made)


def as_config(given: Objective | LossOfPairs | ObjectiveConfig) -> ObjectiveConfig:
    """Return a config as it is, and what :func:`own` takes as one.

    >>> from jaxalign.objectives.pairwise import PairwiseConfig
    >>> as_config(PairwiseConfig(name="simpo")).name, as_config(lambda t, b: b).name
    ('simpo', '<lambda>')
    """
    if isinstance(given, Objective) or not isinstance(given, ObjectiveConfig):
        return own(given)
    return given


def kept(name: str, code: str) -> OwnObjective:
    """Return what a run's files tell of an objective of one's own: which it was.

    Its losses refuse to be computed, since the function is not there.

    >>> kept("hinge", "0a1b").name
    'hinge'
    """

    def gone(tokens: TokenLogps, batch: PreferenceBatch) -> Losses:
        raise UserError(
            f"the objective {name!r} was a function given in Python, of which a run's "
            "files keep the name and the hash of its code alone: give it again, "
            "setup(config, objective=FUNCTION)"
        )

    return OwnObjective(name, code, Objective(Needs(), (Term(gone),)))


def _losses(given: LossOfPairs, tokens: TokenLogps, batch: PreferenceBatch) -> Losses:
    """Return what a function gives as losses.

    Raises:
      ValueError: it gives no value a pair.
    """
    losses = given(tokens, batch)
    if not isinstance(losses, Losses):
        losses = Losses(losses)
    if losses.values.shape != batch.pair_mask.shape:
        raise ValueError(
            f"the objective gives an array of shape {losses.values.shape}; expected "
            f"one loss for each pair, {batch.pair_mask.shape}, not their mean"
        )
    return losses

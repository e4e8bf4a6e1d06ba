"""Objectives over whole pairs: the DPO family, with a reference and without.

A loss is a function of the two sides of a batch; :data:`LOSSES` gives it its name and
its options. A new one is a function and a line of that table.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jaxtyping import Array

from jaxalign.configs import check_fields
from jaxalign.errors import UserError
from jaxalign.objectives import (
    anchored,
    logistic,
    margins,
    optimal_transport,
    reference_free,
)
from jaxalign.objectives.divergences import Divergence, make_divergence
from jaxalign.objectives.logistic import dpo_loss
from jaxalign.objectives.options import check_common, fill, refuse_others
from jaxalign.objectives.policy import TokenLogps
from jaxalign.objectives.record import Aspects, Losses, Needs, Objective, Term
from jaxalign.objectives.responses import responses_of_batch
from jaxalign.types import PreferenceBatch


__all__ = ["LOSSES", "Loss", "Name", "PairwiseConfig", "dpo_loss", "make", "names"]

_TAIL = {"ld_alpha": None}
_RATIOS = {
    **_TAIL,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": None,
}


class Loss(NamedTuple):
    """A loss of pairs by name: the function and the options it has."""

    fn: Callable[..., Array]
    """``(chosen: Responses, rejected: Responses, **options) -> [b p]``."""
    options: Mapping[str, float]
    """Its keywords with their defaults."""
    sums: Mapping[str, Any] = _RATIOS
    """The options of how tokens are summed and what an f-divergence makes of the sums,
    with their defaults; None is off."""
    reference: bool = True
    """Whether it compares with a reference."""
    ranked: bool = False
    """Whether it sorts the pairs of the batch, and is told which there are (mask)."""


_DPO = Loss(logistic.sigmoid_loss, {"beta": 0.1, "label_smoothing": 0.0})

LOSSES: Mapping[str, Loss] = {
    "dpo": _DPO,
    "sigmoid": _DPO,
    "hinge": Loss(margins.hinge_loss, {"beta": 0.1}),
    "ipo": Loss(margins.ipo_loss, {"beta": 0.1}),
    "exo_pair": Loss(logistic.exo_pair_loss, {"beta": 0.1, "label_smoothing": 1e-3}),
    "nca_pair": Loss(anchored.nca_pair_loss, {"beta": 0.1}, _TAIL),
    "robust": Loss(logistic.robust_loss, {"beta": 0.1, "label_smoothing": 0.0}),
    "bco_pair": Loss(anchored.bco_pair_loss, {"beta": 0.1}, _TAIL),
    "sppo_hard": Loss(margins.sppo_hard_loss, {"beta": 0.1}, _TAIL),
    "aot": Loss(
        optimal_transport.aot_loss,
        {"beta": 0.1, "label_smoothing": 0.0},
        _TAIL,
        ranked=True,
    ),
    "aot_unpaired": Loss(
        optimal_transport.aot_unpaired_loss,
        {"beta": 0.1, "label_smoothing": 0.0},
        _TAIL,
        ranked=True,
    ),
    "apo_zero": Loss(anchored.apo_zero_loss, {"beta": 0.1}, _TAIL),
    "apo_down": Loss(anchored.apo_down_loss, {"beta": 0.1}, _TAIL),
    "discopop": Loss(logistic.discopop_loss, {"beta": 0.1, "discopop_tau": 0.05}),
    "sigmoid_norm": Loss(logistic.sigmoid_norm_loss, {"beta": 0.1}),
    "cdpo": Loss(logistic.sigmoid_loss, {"beta": 0.1, "label_smoothing": 0.1}),
    "dpop": Loss(logistic.dpop_loss, {"beta": 0.1, "lambda_": 50.0}, {}),
    "rpo": Loss(logistic.rpo_loss, {"beta": 0.1, "alpha": 1.0}, {}),
    "r_dpo": Loss(logistic.r_dpo_loss, {"beta": 0.1, "alpha": 0.01}, {}),
    "ld_dpo": Loss(logistic.sigmoid_loss, {"beta": 0.1}, {"alpha": 0.5}),
    "simpo": Loss(
        reference_free.simpo_loss,
        {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.0},
        {},
        reference=False,
    ),
    "orpo": Loss(reference_free.orpo_loss, {"beta": 0.1}, {}, reference=False),
    "cpo": Loss(
        reference_free.cpo_loss,
        {"beta": 0.1, "alpha": 1.0, "label_smoothing": 0.0},
        {},
        reference=False,
    ),
}
"""Every loss of whole pairs; ``sigmoid`` and ``dpo`` are one."""

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(LOSSES)]


def names() -> tuple[Name, ...]:
    """Return the names of the pairwise objectives.

    >>> names()[:3]
    ('dpo', 'sigmoid', 'hinge')
    """
    return tuple(LOSSES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairwiseConfig:
    """Options of an objective over whole pairs; None is the objective's own default.

    Attributes:
      name: the objective; ``sigmoid`` and ``dpo`` are one.
      beta: temperature; for ipo tau, for orpo the weight of the odds-ratio term.
      label_smoothing: share of pairs believed to be labelled the wrong way round, in
        [0, 0.5]; below 0.5 for robust, above 0 for exo_pair.
      gamma: simpo: target margin of the rewards.
      alpha: rpo, cpo: weight of -log pi(y_w) / |y_w|; r_dpo: of the length difference;
        ld_dpo: of the tokens beyond the shorter response, in [0, 1].
      lambda_: dpop: weight of the fall of the chosen response.
      discopop_tau: discopop: temperature of the blend, in (0, 1].
      ld_alpha: weighs the tokens beyond the shorter response, as TRL's option does for
        every loss that has a reference.
      f_divergence_type: the divergence whose derivative takes the place of H.
      f_alpha_divergence_coef: alpha of alpha_divergence (default 0.5).

    >>> config = PairwiseConfig(name="simpo")
    >>> config.beta, config.gamma
    (2.0, 0.5)
    """

    name: Name = "sigmoid"
    beta: float | None = None
    label_smoothing: float | None = None
    gamma: float | None = None
    alpha: float | None = None
    lambda_: float | None = None
    discopop_tau: float | None = None
    ld_alpha: float | None = None
    f_divergence_type: Divergence | None = None
    f_alpha_divergence_coef: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        loss = LOSSES[self.name]
        defaults = {**loss.options, **loss.sums}
        refuse_others(self, defaults)
        fill(self, defaults)
        options = dataclasses.asdict(self)
        check_common(options["beta"], options["label_smoothing"] or 0.0)
        self._check_values()
        if self.f_divergence_type == "alpha_divergence":
            fill(self, {"f_alpha_divergence_coef": 0.5})
        elif self.f_alpha_divergence_coef is not None:
            raise UserError(
                "objective.f_alpha_divergence_coef has no effect without "
                "objective.f_divergence_type=alpha_divergence: got "
                f"{self.f_alpha_divergence_coef}"
            )

    def _check_values(self) -> None:
        smoothing = self.label_smoothing
        if self.name == "robust" and smoothing == 0.5:
            raise UserError(
                "objective.label_smoothing must be below 0.5 for robust, which divides "
                "by 1 - 2 × label_smoothing: got 0.5"
            )
        if self.name == "exo_pair" and smoothing == 0:
            raise UserError(
                "objective.label_smoothing must be above 0 for exo_pair, which takes "
                "its logarithm: got 0. Its usual value is 0.001"
            )
        for field, top in (
            ("gamma", None),
            ("alpha", 1.0 if self.name == "ld_dpo" else None),
            ("lambda_", None),
            ("ld_alpha", 1.0),
        ):
            value = getattr(self, field)
            if value is not None and not 0 <= value <= (top or _LARGEST):
                upper = "a finite number" if top is None else f"{top:g}"
                raise UserError(
                    f"objective.{field} must lie between 0 and {upper}: got {value}"
                )
        if self.discopop_tau is not None and not 0 < self.discopop_tau <= 1:
            raise UserError(
                f"objective.discopop_tau must lie in (0, 1]: got {self.discopop_tau}"
            )


_LARGEST = 1e30


def make(config: PairwiseConfig, aspects: Aspects = None) -> Objective:
    """Return the objective of a loss of whole pairs.

    >>> make(PairwiseConfig(name="simpo")).needs.reference
    False
    """
    del aspects
    loss = LOSSES[config.name]
    options: dict[str, Any] = {name: getattr(config, name) for name in loss.options}
    # What TRL calls ld_alpha for all losses is LD-DPO's own alpha.
    tail = config.alpha if "alpha" in loss.sums else config.ld_alpha
    divergence = make_divergence(
        config.f_divergence_type, config.f_alpha_divergence_coef
    )

    def losses(tokens: TokenLogps, batch: PreferenceBatch) -> Losses:
        chosen, rejected = responses_of_batch(
            tokens, batch, tail_weight=tail, divergence=divergence
        )
        there = {"mask": batch.pair_mask} if loss.ranked else {}
        return Losses(loss.fn(chosen, rejected, **options, **there))

    return Objective(
        Needs(reference=loss.reference, coupled=loss.ranked, ranked=loss.ranked),
        (Term(losses),),
        beta=options["beta"],
    )

"""Several objectives added up: a combinator over them, and its options."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from jaxalign.configs import check_fields
from jaxalign.errors import UserError, did_you_mean
from jaxalign.objectives.divergences import Divergence
from jaxalign.objectives.options import ObjectiveConfig
from jaxalign.objectives.record import Aspects, Needs, Objective
from jaxalign.objectives.table import OBJECTIVES


__all__ = ["MixConfig", "make", "members", "mix"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Several objectives added up, as in TRL's lists of loss types and weights.

    Attributes:
      name: the objective.
      mix: weight of each objective by name, such as ``{sigmoid: 1.0, sft: 0.2}``.

    The other fields are options of the members; each goes to all of them that have it
    and is refused where none has.

    >>> MixConfig(mix={"dpo2d": 1.0, "sft": 0.2}, beta=0.1).name
    'mix'
    """

    mix: dict[str, float] = dataclasses.field(hash=False)
    name: Literal["mix"] = "mix"
    beta: float | None = None
    label_smoothing: float | None = None
    gamma: float | None = None
    alpha: float | None = None
    lambda_: float | None = None
    discopop_tau: float | None = None
    ld_alpha: float | None = None
    f_divergence_type: Divergence | None = None
    f_alpha_divergence_coef: float | None = None
    aspect_weights: dict[str, float] | None = dataclasses.field(
        default=None, hash=False
    )
    form: Literal["group", "vanilla"] | None = None
    top_k: int | None = None
    pairing: Literal["rank", "order"] | None = None
    max_score: float | None = None
    normalize: Literal["max", "none", "mean1"] | None = None
    rejected_weight: Literal["score", "inverted", "uniform", "centred"] | None = None
    reduction: Literal["sum", "mean"] | None = None
    skip_contradictory: bool | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.mix:
            raise UserError("objective.mix is empty: expected objectives with weights")
        mixed = [name for name, kind in OBJECTIVES.items() if kind.mixes]
        for name, weight in self.mix.items():
            if name not in mixed:
                raise UserError(
                    f"objective.mix cannot hold {name!r}. {did_you_mean(name, mixed)}"
                )
            if not 0 < weight < float("inf"):
                raise UserError(
                    f"objective.mix: the weight of {name} must be positive: got "
                    f"{weight}"
                )
        members(self)


def members(config: MixConfig) -> list[tuple[float, ObjectiveConfig]]:
    """Return the options of a mix's members with their weights.

    Raises:
      UserError: an option that no member has, or that one refuses.
    Example:
      >>> mixed = MixConfig(mix={"dpo": 1.0, "sft": 0.2})
      >>> [(weight, member.name) for weight, member in members(mixed)]
      [(1.0, 'dpo'), (0.2, 'sft')]
    """
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("name", "mix") and getattr(config, field.name) is not None
    }
    used: set[str] = set()
    parts: list[tuple[float, ObjectiveConfig]] = []
    for name, weight in config.mix.items():
        kind = OBJECTIVES[name]
        own = {k: v for k, v in given.items() if k in kind.options}
        used |= set(own)
        parts.append((weight, kind.config(**{**own, "name": name})))
    for name in given:
        if name not in used:
            raise UserError(
                f"objective.{name} has no effect: no member of the mix "
                f"{', '.join(config.mix)} has that option"
            )
    return parts


def make(config: MixConfig, aspects: Aspects = None) -> Objective:
    """Return the objective of a mix.

    >>> make(MixConfig(mix={"dpo": 1.0, "sft": 0.2})).needs.reference
    True
    """
    objectives = {
        part.name: OBJECTIVES[part.name].make(part, aspects)
        for _, part in members(config)
    }
    return mix(objectives, config.mix)


def mix(objectives: Mapping[str, Objective], weights: Mapping[str, float]) -> Objective:
    """Add objectives up: ``sum_i weight_i × mean of loss_i``, all on the same batch.

    The terms of all stand side by side, each under its objective's name; rewards are
    reported at the first temperature there is.

    >>> from jaxalign.objectives import pairwise
    >>> simpo = pairwise.make(pairwise.PairwiseConfig(name="simpo"))
    >>> mix({"simpo": simpo}, {"simpo": 1.0}).needs.reference
    False
    """
    terms = tuple(
        term._replace(weight=weights[name] * term.weight, name=name)
        for name, objective in objectives.items()
        for term in objective.terms
    )
    parts = tuple(objectives.values())
    betas = [part.beta for part in parts if part.beta is not None]
    models = [part.weight_models for part in parts if part.weight_models is not None]
    return Objective(
        _all_needs(tuple(part.needs for part in parts)),
        terms,
        beta=betas[0] if betas else None,
        weight_models=models[0] if models else None,
    )


def _all_needs(parts: tuple[Needs, ...]) -> Needs:
    """Return what data and model must have for all of several objectives."""
    completions = [part.form == "completions" for part in parts]
    scales = [part.max_score for part in parts if part.max_score is not None]
    return Needs(
        form="completions" if all(completions) else "pairs",
        reference=any(part.reference for part in parts),
        kl=any(part.kl for part in parts),
        # The sum of two means over different counts is no mean over either.
        coupled=any(part.coupled for part in parts)
        or (len(parts) > 1 and any(completions)),
        segments=any(part.segments for part in parts),
        scores=any(part.scores for part in parts),
        token_weights=any(part.token_weights for part in parts),
        end_of_turn=all(part.end_of_turn for part in parts),
        prompt=any(part.prompt for part in parts),
        ranked=any(part.ranked for part in parts),
        max_score=min(scales) if scales else None,
    )

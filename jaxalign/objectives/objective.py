"""Any objective of the library as functions of a batch, alone or mixed.

An objective is named by its config. Scoring the tokens (:func:`score`) is told apart
from the loss made of them (:func:`loss_of_tokens`), because some losses need the whole
batch: sorted differences (aot), the KL estimate of kto, the reward shift of bco.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxalign.errors import UserError, did_you_mean
from jaxalign.objectives import (
    diagnostics,
    dpo2d,
    logps,
    pairwise,
    token_level,
    unpaired,
)
from jaxalign.objectives.balance import balance_loss
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.objectives.pairwise import PairwiseConfig, Responses
from jaxalign.objectives.policy import (
    TokenLogps,
    pair_logps,
    policy_and_kl,
    policy_token_logps,
    score_tokens,
    tail_weights,
)
from jaxalign.objectives.sft import SFTConfig
from jaxalign.objectives.token_level import (
    SDPOConfig,
    SePOConfig,
    StepDPOConfig,
    TDPOConfig,
    TISConfig,
)
from jaxalign.objectives.unpaired import BCOConfig, KTOConfig
from jaxalign.types import Form, Mean, Metrics, Model, PreferenceBatch, Variables


__all__ = [
    "CONFIGS",
    "MixConfig",
    "Needs",
    "Objective",
    "beta_of",
    "loss_fn",
    "loss_of_tokens",
    "members",
    "needs",
    "pair_losses",
    "score",
    "score_under",
    "weight_models",
]

Single = (
    DPO2DConfig
    | PairwiseConfig
    | TDPOConfig
    | TISConfig
    | SePOConfig
    | StepDPOConfig
    | SDPOConfig
    | KTOConfig
    | BCOConfig
    | SFTConfig
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Several objectives added up, as in TRL's lists of loss types and weights.

    Attributes:
      name: the objective.
      mix: weight of each objective by name, such as ``{sigmoid: 1.0, sft: 0.2}``.

    The other fields are options of the members; each goes to all of them that have it
    and is refused where none has.
    """

    mix: dict[str, float]
    name: Literal["mix"] = "mix"
    beta: float | None = None
    label_smoothing: float | None = None
    gamma: float | None = None
    alpha: float | None = None
    lambda_: float | None = None
    discopop_tau: float | None = None
    ld_alpha: float | None = None
    f_divergence_type: pairwise.Divergence | None = None
    f_alpha_divergence_coef: float | None = None
    aspect_weights: dict[str, float] | None = None
    form: Literal["group", "vanilla"] | None = None
    top_k: int | None = None
    pairing: Literal["rank", "order"] | None = None
    max_score: float | None = None
    normalize: Literal["max", "none", "mean1"] | None = None
    rejected_weight: Literal["score", "inverted", "uniform", "centred"] | None = None
    reduction: Literal["sum", "mean"] | None = None
    skip_contradictory: bool | None = None

    def __post_init__(self) -> None:
        if not self.mix:
            raise UserError("objective.mix is empty: expected objectives with weights")
        for name, weight in self.mix.items():
            if name not in _MIXED:
                raise UserError(
                    f"objective.mix cannot hold {name!r}. {did_you_mean(name, _MIXED)}"
                )
            if not 0 < weight < float("inf"):
                raise UserError(
                    f"objective.mix: the weight of {name} must be positive: got "
                    f"{weight}"
                )
        members(self)


CONFIGS: Mapping[str, type] = {
    "dpo2d": DPO2DConfig,
    **dict.fromkeys(pairwise.names(), PairwiseConfig),
    "tdpo1": TDPOConfig,
    "tdpo2": TDPOConfig,
    "tis_dpo": TISConfig,
    "step_dpo": StepDPOConfig,
    "sdpo": SDPOConfig,
    "sepo": SePOConfig,
    "kto": KTOConfig,
    "bco": BCOConfig,
    "sft": SFTConfig,
    "mix": MixConfig,
}
"""The options of each objective by its name."""

Objective = Single | MixConfig

_MIXED = tuple(n for n in CONFIGS if n not in ("kto", "bco", "mix", "step_dpo"))


def members(config: Objective) -> list[tuple[float, Single]]:
    """Return the objectives of a mix with their weights; of another, itself.

    Raises:
      UserError: an option that no member has, or that one refuses.
    """
    if not isinstance(config, MixConfig):
        return [(1.0, config)]
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("name", "mix") and getattr(config, field.name) is not None
    }
    used: set[str] = set()
    found: list[tuple[float, Single]] = []
    for name, weight in config.mix.items():
        cls = CONFIGS[name]
        mine = {k: v for k, v in given.items() if k in _options(name)}
        used |= set(mine)
        found.append((weight, cls(**({**mine, "name": name}))))
    for name in given:
        if name not in used:
            raise UserError(
                f"objective.{name} has no effect: no member of the mix "
                f"{', '.join(config.mix)} has that option"
            )
    return found


def _options(name: str) -> set[str]:
    if name in pairwise.names():
        return pairwise.options(name)
    fields = {field.name for field in dataclasses.fields(CONFIGS[name])}
    return fields - {"alpha"} if name == "tdpo1" else fields


class Needs(NamedTuple):
    """What an objective asks of data and model."""

    form: Form
    """What a record becomes."""
    reference: bool
    """Whether there is a reference at all."""
    kl: bool
    """Whether whole distributions are compared, so that it cannot be cached."""
    coupled: bool
    """Whether a loss depends on other pairs: of the step, or of an evaluation batch."""
    segments: bool
    """Whether records must have segments."""
    token_weights: bool
    """Whether completion tokens must have weights."""
    end_of_turn: bool
    """Whether completions end with their end of turn."""
    prompt: bool
    """Whether the prompt's tokens are learnt too."""


def needs(config: Objective) -> Needs:
    """Return what an objective asks of data and model."""
    parts = [part for _, part in members(config)]

    def of(*kinds: type) -> bool:
        return any(isinstance(part, kinds) for part in parts)

    form: Form = "pairs"
    if of(KTOConfig):
        form = "labelled_kl"
    elif of(BCOConfig):
        form = "labelled"
    elif all(isinstance(part, SFTConfig) for part in parts):
        form = "completions"
    free = (SePOConfig, SFTConfig)
    return Needs(
        form=form,
        reference=any(
            part.needs_reference
            if isinstance(part, PairwiseConfig)
            else not isinstance(part, free)
            for part in parts
        ),
        kl=of(TDPOConfig),
        # The sum of two means over different counts is no mean over either.
        coupled=of(KTOConfig, BCOConfig)
        or any(isinstance(part, PairwiseConfig) and part.coupled for part in parts)
        or (len(parts) > 1 and of(SFTConfig)),
        segments=of(DPO2DConfig, SDPOConfig),
        token_weights=of(TISConfig, SePOConfig),
        end_of_turn=not of(StepDPOConfig),
        prompt=any(
            isinstance(part, SFTConfig) and not part.completion_only_loss
            for part in parts
        ),
    )


def weight_models(config: Objective) -> dict[str, str]:
    """Return the checkpoints that token weights come from, by their option's name."""
    return {
        name: getattr(part, name)
        for _, part in members(config)
        if isinstance(part, TISConfig | SePOConfig) and part.positive_model is not None
        for name in ("positive_model", "negative_model")
    }


def beta_of(config: Objective) -> float:
    """Return the temperature of the rewards that are reported; 1 without any."""
    for _, part in members(config):
        if not isinstance(part, SFTConfig):
            return part.temperature if isinstance(part, PairwiseConfig) else part.beta
    return 1.0


def score(
    trainable: Any,
    frozen: Any,
    batch: PreferenceBatch,
    key: Key[Array, ""] | None,
    *,
    model: Model,
    config: Objective,
) -> TokenLogps:
    """Score the completion tokens as the objective needs them."""
    asked = needs(config)
    return score_tokens(
        trainable,
        frozen,
        batch,
        key,
        model=model,
        reference=asked.reference,
        kl=asked.kl,
    )


def score_under(
    variables: Variables,
    ref_variables: Variables,
    batch: PreferenceBatch,
    *,
    models: tuple[Model, Model],
    config: Objective,
) -> TokenLogps:
    """Score the completion tokens under two given models, without training."""
    if needs(config).kl:
        return policy_and_kl(variables, ref_variables, batch, None, models=models)
    return TokenLogps(
        policy_token_logps(variables, batch, model=models[0]),
        policy_token_logps(ref_variables, batch, model=models[1]),
    )


def pair_losses(
    tokens: TokenLogps,
    batch: PreferenceBatch,
    config: Single,
    aspects: tuple[str, ...] = (),
) -> Float[Array, "b p"]:
    """Return the loss of every pair (or single completion) of a batch.

    Meaningless where there is no pair. For sft it is the sum over the tokens.
    """
    mask = batch.pair_mask
    match config:
        case DPO2DConfig():
            return dpo2d.batch_losses(tokens, batch, config, aspects).losses
        case PairwiseConfig():
            tail = config.tail_weight
            weights = None if tail is None else tail_weights(batch, tail)
            chosen, rejected = _responses(tokens, batch, weights)
            return pairwise.pairwise_loss(chosen, rejected, config=config, mask=mask)
        case StepDPOConfig():
            ratios = pair_logps(tokens, batch).logratios
            return pairwise.dpo_loss(ratios[..., 0], ratios[..., 1], beta=config.beta)
        case TDPOConfig():
            ratios = pair_logps(tokens, batch).logratios
            assert tokens.kl is not None
            response = batch.completions.response
            kl = logps.response_sums(tokens.kl, response, mask.shape[1])
            return token_level.tdpo_loss(
                *(ratios[..., 0], ratios[..., 1], kl[..., 0], kl[..., 1]), config=config
            )
        case TISConfig():
            ratios = pair_logps(tokens, batch, _token_weights(batch)).logratios
            return token_level.tis_dpo_loss(
                ratios[..., 0], ratios[..., 1], beta=config.beta
            )
        case SDPOConfig():
            shape = batch.segment_mask.shape[1], batch.segment_mask.shape[3]
            sums = logps.segment_sums(tokens.logratios, batch.completions, shape)
            return token_level.sdpo_loss(
                sums[..., 0, :],
                sums[..., 1, :],
                chosen_mask=batch.segment_mask[..., 0, :],
                rejected_mask=batch.segment_mask[..., 1, :],
                beta=config.beta,
            )
        case SePOConfig():
            return _sepo_losses(tokens, batch, config)
        case SFTConfig():
            return -pair_logps(tokens, batch).logps[..., 0]
        case KTOConfig() | BCOConfig():
            return _labelled_losses(tokens, batch, config)


def _responses(
    tokens: TokenLogps, batch: PreferenceBatch, weights: Array | None
) -> tuple[Responses, Responses]:
    pair = pair_logps(tokens, batch, weights)
    chosen, rejected = (
        Responses(
            pair.logps[..., side], pair.ref_logps[..., side], pair.tokens[..., side]
        )
        for side in (0, 1)
    )
    return chosen, rejected


def _token_weights(batch: PreferenceBatch) -> Array:
    if batch.token_weights is None:
        raise ValueError(
            "the objective needs a weight for every completion token: give the records "
            "chosen_token_weights and rejected_token_weights, or the batch "
            "token_weights"
        )
    return batch.token_weights


def _sepo_losses(
    tokens: TokenLogps, batch: PreferenceBatch, config: SePOConfig
) -> Array:
    response = batch.completions.response
    kept = token_level.select_tokens(_token_weights(batch), response, config)
    pairs = batch.pair_mask.shape[1]
    sums = logps.response_sums(jnp.where(kept, tokens.policy, 0.0), response, pairs)
    counts = logps.response_sums(kept.astype(jnp.float32), response, pairs)
    means = sums / jnp.maximum(counts, 1)
    return token_level.sepo_loss(means[..., 0], means[..., 1], beta=config.beta)


def _labelled_losses(
    tokens: TokenLogps, batch: PreferenceBatch, config: KTOConfig | BCOConfig
) -> Array:
    if batch.labels is None:
        raise ValueError(
            f"{config.name} needs labelled completions: prepare the records with "
            f"form={needs(config).form!r}"
        )
    pair = pair_logps(tokens, batch)
    own = pair.logratios[..., 0]
    if isinstance(config, BCOConfig):
        return unpaired.bco_loss(own, batch.labels, config=config, mask=batch.pair_mask)
    kl = diagnostics.mismatched_kl(pair, batch).value
    return unpaired.kto_loss(own, batch.labels, kl, config=config)


def loss_of_tokens(
    tokens: TokenLogps,
    batch: PreferenceBatch,
    *,
    config: Objective,
    aspects: tuple[str, ...] = (),
    router_weight: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the loss of a batch whose tokens are scored, and the metrics.

    The loss is the mean over pairs (or single completions) of weight × loss, for sft
    over the tokens; of a mix the weighted sum of those. For a mixture of experts
    ``router_weight`` × :func:`balance.balance_loss` is added, which the metrics tell
    apart: ``loss`` is without it.
    """
    parts, mixed = members(config), isinstance(config, MixConfig)
    loss: Any = jnp.zeros(())
    metrics: Metrics = {}
    pairs = batch.pair_mask.sum().astype(jnp.float32)
    for factor, part in parts:
        losses = pair_losses(tokens, batch, part, aspects)
        if batch.weights is not None:
            losses = losses * batch.weights
        count = pairs
        if isinstance(part, SFTConfig):
            of_chosen = pair_logps(tokens, batch).tokens[..., 0]
            count = jnp.where(batch.pair_mask, of_chosen, 0).sum()
        mean = Mean(jnp.where(batch.pair_mask, losses, 0).sum(), count)
        loss = loss + factor * mean.total / jnp.maximum(mean.weight, 1)
        metrics[f"loss/{part.name}" if mixed else "loss"] = mean
    if mixed:
        metrics["loss"] = Mean(loss * pairs, pairs)
    metrics.update(_metrics(tokens, batch, config, aspects))
    if tokens.router is not None:
        balance = balance_loss(tokens.router)
        metrics["router_loss"] = Mean(balance * pairs, pairs)
        loss = loss + router_weight * balance
    return loss, metrics


def _metrics(
    tokens: TokenLogps,
    batch: PreferenceBatch,
    config: Objective,
    aspects: tuple[str, ...],
) -> Metrics:
    asked, beta = needs(config), beta_of(config)
    if asked.form == "completions":
        return diagnostics.completion_metrics(tokens, batch)
    if asked.form != "pairs":
        return diagnostics.label_metrics(tokens, batch, beta=beta)
    metrics = diagnostics.pair_metrics(
        tokens, batch, beta=beta, reference=asked.reference
    )
    for _, part in members(config):
        if isinstance(part, DPO2DConfig):
            result = dpo2d.batch_losses(tokens, batch, part, aspects)
            metrics.update(dpo2d.batch_metrics(result, tokens, batch, part, aspects))
    return metrics


def loss_fn(
    trainable: Any,
    frozen: Any,
    batch: PreferenceBatch,
    key: Key[Array, ""] | None,
    *,
    model: Model,
    config: Objective,
    aspects: tuple[str, ...] = (),
    router_weight: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the loss of a batch under any objective, and the metrics.

    Args:
      trainable: the leaves to differentiate, None elsewhere (``trees.partition``).
      frozen: all the others; may hold a ``reference`` collection.
      batch: packed pairs, or single completions.
      key: for dropout; None runs without.
      model: the policy.
      config: the objective and its options.
      aspects: names of the last axis of ``batch.scores``; 2D-DPO needs them.
      router_weight: see :func:`loss_of_tokens`.
    Returns:
      The scalar to minimise, and metrics as mergeable means.
    Raises:
      UserError: ``aspect_weights`` names an aspect that is not among ``aspects``.
      ValueError: the batch lacks what the objective needs.
    """
    tokens = score(trainable, frozen, batch, key, model=model, config=config)
    return loss_of_tokens(
        tokens, batch, config=config, aspects=aspects, router_weight=router_weight
    )

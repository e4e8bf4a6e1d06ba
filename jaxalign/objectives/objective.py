"""Any objective of the library as functions of a batch, alone or mixed.

An objective is named by its config. Scoring the tokens (:func:`score`) is told apart
from the loss made of them (:func:`loss_of_tokens`), because some losses need the whole
batch: sorted differences (aot), the KL estimate of kto, the reward shift of bco.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxalign.objectives import diagnostics, mix
from jaxalign.objectives.balance import balance_loss
from jaxalign.objectives.mix import MixConfig
from jaxalign.objectives.options import ObjectiveConfig
from jaxalign.objectives.own import OwnObjective
from jaxalign.objectives.policy import (
    TokenLogps,
    policy_and_kl,
    policy_token_logps,
    score_tokens,
)
from jaxalign.objectives.record import Aspects, Needs, Objective, per_pair
from jaxalign.objectives.table import OBJECTIVES, Kind
from jaxalign.types import Mean, Metrics, Model, PreferenceBatch, Variables


__all__ = [
    "CONFIGS",
    "MixConfig",
    "Needs",
    "Objective",
    "ObjectiveConfig",
    "beta_of",
    "loss_fn",
    "loss_of_tokens",
    "make",
    "members",
    "needs",
    "pair_losses",
    "score",
    "score_under",
    "weight_models",
]

_KINDS = {
    **OBJECTIVES,
    "mix": Kind(MixConfig, mix.make, mixes=False, members=mix.members),
}

CONFIGS: Mapping[str, type] = {name: kind.config for name, kind in _KINDS.items()}
"""The options of each objective by its name."""


def make(config: ObjectiveConfig, aspects: Aspects = None) -> Objective:
    """Return the objective that a config names, closed over its options.

    Args:
      config: the objective and its options.
      aspects: names of the last axis of ``batch.scores``, () where the data has none;
        None to see what the objective needs before there is any data.
    Raises:
      UserError: the data lacks an aspect that the config names.
    Example:
      >>> make(CONFIGS["kto"]()).needs.reference
      True
    """
    if isinstance(config, OwnObjective):
        return config.make(aspects)
    return _KINDS[config.name].make(config, aspects)


def members(config: ObjectiveConfig) -> list[tuple[float, ObjectiveConfig]]:
    """Return the options of a mix's objectives with their weights; of another, itself.

    Raises:
      UserError: an option that no member has, or that one refuses.
    Example:
      >>> [(weight, one.name) for weight, one in members(CONFIGS["kto"]())]
      [(1.0, 'kto')]
    """
    if isinstance(config, OwnObjective):
        return [(1.0, config)]
    return _KINDS[config.name].members(config)


def needs(config: ObjectiveConfig) -> Needs:
    """Return what an objective asks of data and model.

    >>> needs(CONFIGS["kto"]()).form, needs(CONFIGS["dpo2d"]()).segments
    ('labelled_kl', True)
    """
    return make(config).needs


def weight_models(config: ObjectiveConfig) -> dict[str, str]:
    """Return the checkpoints that token weights come from, by their option's name.

    >>> weight_models(CONFIGS["kto"]())
    {}
    """
    models = make(config).weight_models
    return {} if models is None else models.paths


def beta_of(config: ObjectiveConfig) -> float:
    """Return the temperature of the rewards that are reported; 1 without any.

    >>> beta_of(CONFIGS["dpo"](beta=0.3)), beta_of(CONFIGS["sft"]())
    (0.3, 1.0)
    """
    beta = make(config).beta
    return 1.0 if beta is None else beta


def score(
    trainable: Any,
    frozen: Any,
    batch: PreferenceBatch,
    key: Key[Array, ""] | None,
    *,
    model: Model,
    config: ObjectiveConfig,
) -> TokenLogps:
    """Score the completion tokens as the objective needs them.

    See :func:`loss_fn` for the arguments and what raises.

    >>> from jaxalign.types import Completions, ModelInputs
    >>> bigrams = Model(lambda v, x: v["params"][x.tokens], lambda v, hidden: hidden)
    >>> row = ModelInputs(*[jnp.array([[1, 2, 3]])] * 4)
    >>> answers = Completions(*[jnp.array([[0, 1]])] * 4)  # tokens 0 and 1
    >>> yes = jnp.ones((1, 1, 2, 1), bool)
    >>> scores, pairs = 4.0 * yes[..., None], yes[..., 0, 0]
    >>> batch = PreferenceBatch(row, answers, scores, yes, pairs)
    >>> trained, frozen = {"params": jnp.zeros((4, 4))}, {"params": None}
    >>> config = CONFIGS["sft"]()  # which has no reference
    >>> found = score(trained, frozen, batch, None, model=bigrams, config=config)
    >>> print([f"{logp:.4f}" for logp in found.policy[0]])  # log 1/4
    ['-1.3863', '-1.3863']
    """
    what = needs(config)
    return score_tokens(
        trainable,
        frozen,
        batch,
        key,
        model=model,
        reference=what.reference,
        kl=what.kl,
    )


def score_under(
    variables: Variables,
    ref_variables: Variables,
    batch: PreferenceBatch,
    *,
    models: tuple[Model, Model],
    config: ObjectiveConfig,
) -> TokenLogps:
    """Score the completion tokens under two given models, without training.

    Args:
      variables: the policy's.
      ref_variables: the reference's.
      batch: packed rows.
      models: policy and reference.
      config: the objective; its ``kl`` is taken where it needs one.
    Example:
      >>> from jaxalign.types import Completions, ModelInputs
      >>> bigrams = Model(lambda v, x: v["params"][x.tokens], lambda v, hidden: hidden)
      >>> row = ModelInputs(*[jnp.array([[1, 2, 3]])] * 4)
      >>> answers = Completions(*[jnp.array([[0, 1]])] * 4)  # tokens 0 and 1
      >>> yes = jnp.ones((1, 1, 2, 1), bool)
      >>> scores, pairs = 4.0 * yes[..., None], yes[..., 0, 0]
      >>> batch = PreferenceBatch(row, answers, scores, yes, pairs)
      >>> table = {"params": jnp.zeros((4, 4))}
      >>> both, config = (bigrams, bigrams), CONFIGS["dpo"]()
      >>> found = score_under(table, table, batch, models=both, config=config)
      >>> found.logratios.tolist()
      [[0.0, 0.0]]
    """
    if needs(config).kl:
        return policy_and_kl(variables, ref_variables, batch, None, models=models)
    return TokenLogps(
        policy_token_logps(variables, batch, model=models[0]),
        policy_token_logps(ref_variables, batch, model=models[1]),
    )


def pair_losses(
    tokens: TokenLogps,
    batch: PreferenceBatch,
    config: ObjectiveConfig,
    aspects: tuple[str, ...] = (),
) -> Float[Array, "b p"]:
    """Return the loss of every pair (or single completion) of a batch by itself.

    Meaningless where there is no pair. For sft it is the mean over the tokens.

    >>> from jaxalign.types import Completions
    >>> answers = Completions(*[jnp.array([[0, 1]])] * 4)  # one token a response
    >>> yes = jnp.ones((1, 1, 2, 1), bool)
    >>> scores, pairs = 4.0 * yes[..., None], yes[..., 0, 0]
    >>> batch = PreferenceBatch(None, answers, scores, yes, pairs)
    >>> tokens = TokenLogps(jnp.array([[-1.0, -6.0]]), jnp.array([[-2.0, -3.0]]))
    >>> (loss,) = pair_losses(tokens, batch, CONFIGS["dpo"](beta=0.5))[0]
    >>> print(f"{loss:.4f}")  # -log sigmoid(0.5 * (1 + 3))
    0.1269
    """
    return per_pair(make(config, aspects), tokens, batch).values


def loss_of_tokens(
    tokens: TokenLogps,
    batch: PreferenceBatch,
    *,
    config: ObjectiveConfig,
    aspects: tuple[str, ...] = (),
    router_weight: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """Return the loss of a batch whose tokens are scored, and the metrics.

    The loss is the mean over pairs (or single completions) of weight × loss, for sft
    over the tokens; of a mix the weighted sum of those. For a mixture of experts
    ``router_weight`` × :func:`balance.balance_loss` is added, which the metrics tell
    apart: ``loss`` is without it.

    Args:
      tokens: see :func:`score`.
      batch: what they are of.
      config: the objective and its options.
      aspects: names of the last axis of ``batch.scores``.
      router_weight: of a mixture's balance.
    Raises:
      UserError: ``aspect_weights`` names an aspect that is not among ``aspects``.
    Example:
      >>> from jaxalign.types import Completions
      >>> answers = Completions(*[jnp.array([[0, 1]])] * 4)  # one token a response
      >>> yes = jnp.ones((1, 1, 2, 1), bool)
      >>> scores, pairs = 4.0 * yes[..., None], yes[..., 0, 0]
      >>> batch = PreferenceBatch(None, answers, scores, yes, pairs)
      >>> tokens = TokenLogps(jnp.array([[-1.0, -6.0]]), jnp.array([[-2.0, -3.0]]))
      >>> config = CONFIGS["dpo"](beta=0.5)
      >>> loss, metrics = loss_of_tokens(tokens, batch, config=config)
      >>> print(f"{loss:.4f}", metrics["rewards/margins"].value)
      0.1269 2.0
    """
    objective = make(config, aspects)
    loss: Any = jnp.zeros(())
    metrics: Metrics = {}
    own: Metrics = {}
    pairs = batch.pair_mask.sum().astype(jnp.float32)
    for term in objective.terms:
        losses = term.losses(tokens, batch)
        values, count = losses.values, pairs
        if batch.weights is not None:
            values = values * batch.weights
        if losses.counts is not None:
            count = jnp.where(batch.pair_mask, losses.counts, 0).sum()
        mean = Mean(jnp.where(batch.pair_mask, values, 0).sum(), count)
        loss = loss + term.weight * mean.total / jnp.maximum(mean.weight, 1)
        metrics[f"loss/{term.name}" if term.name else "loss"] = mean
        own.update(term.metrics(tokens, batch, losses))
    metrics.setdefault("loss", Mean(loss * pairs, pairs))
    metrics.update(_metrics_of_form(tokens, batch, objective))
    metrics.update(own)
    if tokens.router is not None:
        balance = balance_loss(tokens.router)
        metrics["router_loss"] = Mean(balance * pairs, pairs)
        loss = loss + router_weight * balance
    return loss, metrics


def _metrics_of_form(
    tokens: TokenLogps, batch: PreferenceBatch, objective: Objective
) -> Metrics:
    """Return the metrics that all objectives of a form have."""
    beta = 1.0 if objective.beta is None else objective.beta
    if objective.needs.form == "completions":
        return diagnostics.completion_metrics(tokens, batch)
    if objective.needs.form == "pairs":
        return diagnostics.pair_metrics(
            tokens, batch, beta=beta, reference=objective.needs.reference
        )
    return diagnostics.label_metrics(tokens, batch, beta=beta)


def loss_fn(
    trainable: Any,
    frozen: Any,
    batch: PreferenceBatch,
    key: Key[Array, ""] | None,
    *,
    model: Model,
    config: ObjectiveConfig,
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
    Example:
      >>> import jax.numpy as jnp
      >>> from jaxalign.types import Completions, ModelInputs
      >>> bigrams = Model(lambda v, x: v["params"][x.tokens], lambda v, hidden: hidden)
      >>> one, branches = jnp.ones((1, 3), jnp.int32), jnp.array([[0, 1, 2]])
      >>> places = jnp.minimum(branches, 1)  # both responses follow one token
      >>> row = ModelInputs(jnp.array([[1, 2, 3]]), places, one, branches)
      >>> first = jnp.zeros((1, 2), jnp.int32)  # whose hidden state predicts either
      >>> answers = Completions(first, jnp.array([[2, 3]]), jnp.array([[0, 1]]), first)
      >>> scores, yes = jnp.ones((1, 1, 2, 1, 1)), jnp.ones((1, 1, 2, 1), bool)
      >>> batch = PreferenceBatch(row, answers, scores, yes, yes[..., 0, 0])
      >>> trained = {"params": jnp.zeros((4, 4))}
      >>> frozen = {"params": None, "reference": trained}
      >>> config = CONFIGS["dpo"](beta=0.1)
      >>> loss, _ = loss_fn(trained, frozen, batch, None, model=bigrams, config=config)
      >>> print(f"{loss:.4f}")  # policy = reference: log 2
      0.6931
    """
    tokens = score(trainable, frozen, batch, key, model=model, config=config)
    return loss_of_tokens(
        tokens, batch, config=config, aspects=aspects, router_weight=router_weight
    )

"""Objectives over whole pairs: the DPO family, with a reference and without.

``H`` is log pi(y|x) - log pi_ref(y|x) summed over a completion, ``D = H_w - H_l``,
``s`` the logistic function, ``|y|`` a completion's tokens.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.errors import UserError


__all__ = [
    "Name",
    "PairwiseConfig",
    "Responses",
    "check_common",
    "dpo_loss",
    "logistic_loss",
    "names",
    "options",
    "pairwise_loss",
]

Name = Literal[
    "dpo", "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop",
    "sigmoid_norm", "cdpo", "dpop", "rpo", "r_dpo", "ld_dpo", "simpo", "orpo", "cpo",
]  # fmt: skip

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

_DIVERGENCE = {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": None}
_SHARED = {"beta": 0.1, "ld_alpha": None}

_OPTIONS: dict[str, dict[str, Any]] = {
    "dpo": {**_SHARED, **_DIVERGENCE, "label_smoothing": 0.0},
    "sigmoid": {**_SHARED, **_DIVERGENCE, "label_smoothing": 0.0},
    "hinge": {**_SHARED, **_DIVERGENCE},
    "ipo": {**_SHARED, **_DIVERGENCE},
    "exo_pair": {**_SHARED, **_DIVERGENCE, "label_smoothing": 1e-3},
    "nca_pair": _SHARED,
    "robust": {**_SHARED, **_DIVERGENCE, "label_smoothing": 0.0},
    "bco_pair": _SHARED,
    "sppo_hard": _SHARED,
    "aot": {**_SHARED, "label_smoothing": 0.0},
    "aot_unpaired": {**_SHARED, "label_smoothing": 0.0},
    "apo_zero": _SHARED,
    "apo_down": _SHARED,
    "discopop": {**_SHARED, **_DIVERGENCE, "discopop_tau": 0.05},
    "sigmoid_norm": {**_SHARED, **_DIVERGENCE},
    "cdpo": {**_SHARED, **_DIVERGENCE, "label_smoothing": 0.1},
    "dpop": {"beta": 0.1, "lambda_": 50.0},
    "rpo": {"beta": 0.1, "alpha": 1.0},
    "r_dpo": {"beta": 0.1, "alpha": 0.01},
    "ld_dpo": {"beta": 0.1, "alpha": 0.5},
    "simpo": {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.0},
    "orpo": {"beta": 0.1},
    "cpo": {"beta": 0.1, "alpha": 1.0, "label_smoothing": 0.0},
}
"""The options of each objective with their defaults; None is off."""

_WITHOUT_REFERENCE = ("simpo", "orpo", "cpo")
_COUPLED = ("aot", "aot_unpaired")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairwiseConfig:
    """Options of an objective over whole pairs; None is the objective's own default.

    Attributes:
      name: the objective, see :func:`pairwise_loss`; ``sigmoid`` and ``dpo`` are one.
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
        options = _OPTIONS[self.name]
        for field in dataclasses.fields(self):
            if field.name == "name":
                continue
            value = getattr(self, field.name)
            if value is not None and field.name not in options:
                raise UserError(
                    f"objective.{field.name} has no effect for {self.name}: got "
                    f"{value}. Its options are {', '.join(sorted(options))}"
                )
            if value is None:
                object.__setattr__(self, field.name, options.get(field.name))
        check_common(self.temperature, self.label_smoothing or 0.0)
        self._check_values()

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
        if self.f_divergence_type == "alpha_divergence":
            if self.f_alpha_divergence_coef is None:
                object.__setattr__(self, "f_alpha_divergence_coef", 0.5)
        elif self.f_alpha_divergence_coef is not None:
            raise UserError(
                "objective.f_alpha_divergence_coef has no effect without "
                "objective.f_divergence_type=alpha_divergence: got "
                f"{self.f_alpha_divergence_coef}"
            )

    @property
    def temperature(self) -> float:
        """Return beta, which every objective has."""
        assert self.beta is not None
        return self.beta

    @property
    def needs_reference(self) -> bool:
        """Tell whether a reference is compared with."""
        return self.name not in _WITHOUT_REFERENCE

    @property
    def coupled(self) -> bool:
        """Tell whether a pair's loss depends on the other pairs of the batch."""
        return self.name in _COUPLED

    @property
    def tail_weight(self) -> float | None:
        """Return the weight of tokens beyond the shorter response; None is 1."""
        return self.alpha if self.name == "ld_dpo" else self.ld_alpha


_LARGEST = 1e30


def check_common(beta: float, label_smoothing: float) -> None:
    """Refuse a temperature or a smoothing that makes no loss."""
    if not 0 < beta < float("inf"):
        raise UserError(f"objective.beta must be a positive number: got {beta}")
    if not 0 <= label_smoothing <= 0.5:
        raise UserError(
            f"objective.label_smoothing must lie in [0, 0.5]: got {label_smoothing}. "
            "It is the share of pairs believed to be labelled the wrong way round"
        )


def logistic_loss(
    logits: Float[Array, "*batch"], label_smoothing: float
) -> Float[Array, "*batch"]:
    """Return ``-(1 - e) log sigmoid(z) - e log sigmoid(-z)``."""
    positive = -jax.nn.log_sigmoid(logits)
    if label_smoothing == 0:
        return positive
    negative = -jax.nn.log_sigmoid(-logits)
    return (1 - label_smoothing) * positive + label_smoothing * negative


def dpo_loss(
    chosen_logratios: Float[Array, "*batch"],
    rejected_logratios: Float[Array, "*batch"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "*batch"]:
    """Return the DPO loss of every pair.

    ``L = -log sigmoid(beta (H_w - H_l))`` with ``H = log pi(y|x) - log pi_ref(y|x)``;
    with smoothing e, ``-(1 - e) log sigmoid(z) - e log sigmoid(-z)``.
    [DPO](https://arxiv.org/abs/2305.18290), eq. 7; smoothing from its authors'
    [cDPO note](https://ericmitchell.ai/cdpo.pdf), eq. 3.

    Args:
      chosen_logratios: H of the preferred response, natural log, summed over tokens.
      rejected_logratios: H of the other one.
      beta: temperature, positive.
      label_smoothing: in [0, 0.5].
    Returns:
      One loss a pair; not averaged, not masked. ln 2 where the two ratios are equal.
    Example:
      >>> print(f"{dpo_loss(jnp.array(10.0), jnp.array(0.0), beta=0.1):.4f}")
      0.3133
    """
    chex.assert_equal_shape([chosen_logratios, rejected_logratios])
    return logistic_loss(
        beta * (chosen_logratios - rejected_logratios), label_smoothing
    )


class Responses(NamedTuple):
    """One side of a batch of pairs, as sums over the completion tokens."""

    logps: Float[Array, "*batch"]
    ref_logps: Float[Array, "*batch"]
    """Not read by simpo, orpo and cpo."""
    tokens: Float[Array, "*batch"]
    """Completion tokens |y|."""


def pairwise_loss(
    chosen: Responses,
    rejected: Responses,
    *,
    config: PairwiseConfig,
    mask: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Return the loss of every pair under any of the pairwise objectives.

    With z = beta D and e the label smoothing::

        sigmoid, dpo, cdpo  -(1-e) log s(z) - e log s(-z)            2305.18290
        hinge               max(0, 1 - z)                            2305.10425
        ipo                 (H_w/|y_w| - H_l/|y_l| - 1/(2b))^2       2310.12036 (17)
        exo_pair            s(z) (log s(z) - log(1-e))
                            + s(-z) (log s(-z) - log e)              2402.00856 (16)
        nca_pair            -log s(b H_w)
                            - [log s(-b H_w) + log s(-b H_l)] / 2    2402.05369
        robust              [-(1-e) log s(z) + e log s(-z)] / (1-2e) 2403.00409
        bco_pair            -log s(b H_w) - log s(-b H_l)            2404.04656
        sppo_hard           (H_w - 1/(2b))^2 + (H_l + 1/(2b))^2      2405.00675 (4.7)
        aot, aot_unpaired   logistic loss of sorted differences      2406.05882
        apo_zero            1 - s(b H_w) + s(b H_l)                  2408.06266 (7)
        apo_down            s(b H_w) + 1 - s(z)                      2408.06266 (8)
        discopop            (1-m) (-log s(z)) + m exp(-z)
                            with m = s(z / tau)                      2406.08414 (5)
        sigmoid_norm        -log s(b (H_w/|y_w| - H_l/|y_l|))        TRL
        dpop                -log s(b (D - lambda max(0, -H_w)))      2402.13228
        rpo                 -log s(z) + alpha NLL_w                  2404.19733
        r_dpo               -log s(z + alpha (|y_w| - |y_l|))        2403.19159
        ld_dpo              -log s(z), tail tokens weigh alpha       2409.06411
        simpo               -log s(b (p_w/|y_w| - p_l/|y_l|) - gamma) 2405.14734
        orpo                NLL_w - b log s(o_w - o_l)               2403.07691
        cpo                 -log s(b (p_w - p_l)) + alpha NLL_w      2401.08417

    where b = beta, p = log pi(y|x), NLL_w = -p_w / |y_w|, and o is the log-odds of the
    mean token log-probability; simpo and cpo are smoothed as dpo is; bco_pair has no
    reward shift. The numbers are arXiv's, with the equation. An f-divergence replaces H
    by f'(pi / pi_ref) ([f-DPO](https://arxiv.org/abs/2309.16240)). Tail tokens (ld) are
    weighed where the tokens are summed, see ``policy.tail_weights``.

    Args:
      chosen: the preferred responses.
      rejected: the other ones.
      config: the objective and its options.
      mask: which pairs exist; only the sorted ones (aot) need to know.
    Returns:
      One loss a pair; not averaged, not masked, not weighted. With aot a pair has the
      loss of its rank among all pairs given.
    Example:
      >>> w = Responses(jnp.array(-5.0), jnp.array(-15.0), jnp.array(4.0))
      >>> l = Responses(jnp.array(-7.0), jnp.array(-7.0), jnp.array(4.0))
      >>> print(f"{pairwise_loss(w, l, config=PairwiseConfig(name='hinge')):.4f}")
      0.0000
    """
    chex.assert_equal_shape([*chosen, *rejected])
    beta, name = config.temperature, config.name
    smoothing = config.label_smoothing or 0.0
    length_w, length_l = (jnp.maximum(side.tokens, 1) for side in (chosen, rejected))
    if not config.needs_reference:
        return _without_reference(chosen, rejected, length_w, length_l, config)

    raw_w = chosen.logps - chosen.ref_logps
    raw_l = rejected.logps - rejected.ref_logps
    h_w, h_l = _divergence(raw_w, config), _divergence(raw_l, config)
    z = beta * (h_w - h_l)
    log_s = jax.nn.log_sigmoid
    match name:
        case "hinge":
            return jax.nn.relu(1 - z)
        case "ipo":
            return (h_w / length_w - h_l / length_l - 1 / (2 * beta)) ** 2
        case "exo_pair":
            return jax.nn.sigmoid(z) * (
                log_s(z) - jnp.log1p(-smoothing)
            ) + jax.nn.sigmoid(-z) * (log_s(-z) - jnp.log(smoothing))
        case "nca_pair":
            return (
                -log_s(beta * h_w) - 0.5 * log_s(-beta * h_w) - 0.5 * log_s(-beta * h_l)
            )
        case "robust":
            clean, flipped = -log_s(z), -log_s(-z)
            return ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)
        case "bco_pair":
            return -log_s(beta * h_w) - log_s(-beta * h_l)
        case "sppo_hard":
            return (h_w - 0.5 / beta) ** 2 + (h_l + 0.5 / beta) ** 2
        case "aot":
            return _sorted_loss(
                chosen.logps - rejected.logps,
                chosen.ref_logps - rejected.ref_logps,
                mask,
                config,
            )
        case "aot_unpaired":
            return _sorted_loss(h_w, h_l, mask, config)
        case "apo_zero":
            return 1 - jax.nn.sigmoid(beta * h_w) + jax.nn.sigmoid(beta * h_l)
        case "apo_down":
            return jax.nn.sigmoid(beta * h_w) + 1 - jax.nn.sigmoid(z)
        case "discopop":
            assert config.discopop_tau is not None
            scaled = z / config.discopop_tau
            # exp(-z) s(z / tau) in one exponent: neither factor alone stays finite.
            exponential = jnp.exp(log_s(scaled) - z)
            return -log_s(z) * jax.nn.sigmoid(-scaled) + exponential
        case "sigmoid_norm":
            return -log_s(beta * (h_w / length_w - h_l / length_l))
        case "dpop":
            return -log_s(z - beta * _given(config.lambda_) * jax.nn.relu(-h_w))
        case "rpo":
            return -log_s(z) - _given(config.alpha) * chosen.logps / length_w
        case "r_dpo":
            longer = chosen.tokens - rejected.tokens
            return -log_s(z + _given(config.alpha) * longer)
        case _:
            return logistic_loss(z, smoothing)


def _given(value: float | None) -> float:
    assert value is not None
    return value


def _divergence(ratio: Array, config: PairwiseConfig) -> Array:
    """Return f'(exp(ratio)) up to a constant."""
    match config.f_divergence_type:
        case "forward_kl":
            return -_expm1(-ratio)
        case "js_divergence":
            return jnp.log(2.0) + jax.nn.log_sigmoid(ratio)
        case "alpha_divergence":
            power = _given(config.f_alpha_divergence_coef) - 1
            if abs(power) < 1e-6:
                return ratio
            return _expm1(power * ratio) / power
        case _:
            return ratio


def _expm1(x: Array) -> Array:
    """Return exp(x) - 1, going on as a straight line where it would grow too large.

    Its square stays a float32, and a response that has fallen that far still gets a
    gradient.
    """
    return jnp.expm1(jnp.minimum(x, _LINEAR_FROM)) + math.exp(
        _LINEAR_FROM
    ) * jax.nn.relu(x - _LINEAR_FROM)


_LINEAR_FROM = 30.0


def _without_reference(
    chosen: Responses,
    rejected: Responses,
    length_w: Array,
    length_l: Array,
    config: PairwiseConfig,
) -> Array:
    beta, smoothing = config.temperature, config.label_smoothing or 0.0
    mean_w, mean_l = chosen.logps / length_w, rejected.logps / length_l
    if config.name == "simpo":
        logits = beta * (mean_w - mean_l) - _given(config.gamma)
        return logistic_loss(logits, smoothing)
    if config.name == "cpo":
        logits = beta * (chosen.logps - rejected.logps)
        return logistic_loss(logits, smoothing) - _given(config.alpha) * mean_w
    odds = _log_odds(mean_w) - _log_odds(mean_l)
    return -mean_w - beta * jax.nn.log_sigmoid(odds)


def _log_odds(logp: Array) -> Array:
    """Return log(p / (1 - p)); a probability of 1 counts as the largest below it."""
    logp = jnp.minimum(logp, -1e-7)
    return logp - jnp.log(-jnp.expm1(logp))


def _sorted_loss(
    better: Array, worse: Array, mask: Array | None, config: PairwiseConfig
) -> Array:
    """Compare the k-th smallest of one with the k-th smallest of the other."""
    shape = better.shape
    valid = jnp.ones(shape, bool) if mask is None else mask
    flat = valid.reshape(-1)

    def ascending(values: Array) -> tuple[Array, Array]:
        values = values.reshape(-1)
        keys = jax.lax.stop_gradient(jnp.where(flat, values, jnp.inf))
        order = jnp.argsort(keys)
        return jnp.where(flat, values, 0.0)[order], order

    upper, order = ascending(better)
    lower, _ = ascending(worse)
    losses = logistic_loss(
        config.temperature * (upper - lower), config.label_smoothing or 0.0
    )
    return jnp.zeros_like(losses).at[order].set(losses).reshape(shape)


def names() -> tuple[Name, ...]:
    """Return the names of the pairwise objectives."""
    return get_args(Name)


def options(name: str) -> set[str]:
    """Return the names of the options that a pairwise objective has."""
    return set(_OPTIONS[name])

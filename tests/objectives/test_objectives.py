"""Every objective against its source: TRL's own code, or a float64 reference.

Losses and gradients towards the policy's token log-probabilities, on batches with
several pairs a row, unused places, one-token completions and unequal lengths.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

from jaxalign.errors import UserError
from jaxalign.objectives import logps, objective, policy
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.objectives.objective import MixConfig
from jaxalign.objectives.pairwise import PairwiseConfig, names
from jaxalign.objectives.policy import TokenLogps
from jaxalign.objectives.sft import SFTConfig
from jaxalign.objectives.token_level import (
    SDPOConfig,
    SePOConfig,
    StepDPOConfig,
    TDPOConfig,
    TISConfig,
    tis_weights,
)
from jaxalign.objectives.unpaired import BCOConfig, KTOConfig
from jaxalign.types import Completions, ModelInputs, PreferenceBatch
from tests.objectives import reference_objectives as reference
from tests.objectives.reference_dpo2d import reference_dpo2d


ASPECTS = ("a", "b")
SEGMENTS = 3
WANTED = 20
LAYOUT = (
    ((5, 3), (1, 4), None),
    ((2, 2), (7, 1), (1, 1)),
    (None, (3, 6), None),
    ((4, 4), None, (2, 5)),
)
"""Tokens of (chosen, rejected) in the places of each row; None is an unused place."""


class Scene(NamedTuple):
    """A batch and the numbers of its tokens, as numpy arrays."""

    batch: PreferenceBatch
    policy: np.ndarray
    reference: np.ndarray
    kl: np.ndarray

    def tokens(self, dtype: Any = None) -> TokenLogps:
        """Return the numbers as JAX arrays, in float64 where that is on."""
        return TokenLogps(*(jnp.asarray(x, dtype) for x in self[1:]))


Layout = tuple[tuple[tuple[int, int] | None, ...], ...]


def make_scene(
    layout: Layout = LAYOUT, *, wanted: int = WANTED, weighted: bool = True
) -> Scene:
    """Lay out a batch with segments, scores, token weights and labels.

    What a pair looks like does not depend on where it lies: numbers are drawn pair
    after pair. Everything at padding is garbage that must not count.
    """
    rng = np.random.default_rng(0)
    rows, places = len(layout), len(layout[0])
    response = np.full((rows, wanted), -1, np.int32)
    segment = np.full((rows, wanted), -1, np.int32)
    weights = np.full((rows, wanted), 9.0)
    segment_mask = np.zeros((rows, places, 2, SEGMENTS), bool)
    scores = np.full((rows, places, 2, SEGMENTS, len(ASPECTS)), np.nan)
    pair_mask = np.zeros((rows, places), bool)
    labels = np.zeros((rows, places), bool)
    pair_weights = np.full((rows, places), 5.0)
    policy_logps = np.zeros((rows, wanted))
    ref_logps = np.zeros((rows, wanted))
    kl = np.zeros((rows, wanted))
    for row in range(rows):
        at = 0
        for place in range(places):
            lengths = layout[row][place]
            if lengths is None:
                continue
            pair_mask[row, place] = True
            labels[row, place] = rng.random() < 0.5
            pair_weights[row, place] = rng.uniform(0.5, 2)
            for side, length in enumerate(lengths):
                here = slice(at, at + length)
                at += length
                response[row, here] = 2 * place + side
                count = int(rng.integers(1, min(SEGMENTS, length) + 1))
                owner = np.minimum(np.arange(length) * count // length, count - 1)
                owner[count:][rng.random(length - count) < 0.2] = -1
                segment[row, here] = owner
                there = [k in owner for k in range(SEGMENTS)]
                segment_mask[row, place, side] = np.cumprod(there)
                scores[row, place, side] = rng.integers(0, 5, (SEGMENTS, len(ASPECTS)))
                if rng.random() < 0.3:
                    scores[row, place, side, 0, 1] = np.nan
                weights[row, here] = rng.uniform(0.5, 1.5, length)
                policy_logps[row, here] = -np.abs(rng.normal(0, 2, length)) - 0.05
                shift = rng.normal(0, 0.5, length)
                ref_logps[row, here] = policy_logps[row, here] - shift
                kl[row, here] = rng.uniform(0, 0.7, length)
    zeros = np.zeros((rows, wanted), np.int32)
    return Scene(
        PreferenceBatch(
            ModelInputs(zeros, zeros, zeros, zeros),
            Completions(zeros, zeros, response, segment),
            scores,
            segment_mask,
            pair_mask,
            weights=pair_weights if weighted else None,
            labels=labels,
            token_weights=weights,
        ),
        policy_logps,
        ref_logps,
        kl,
    )


@functools.cache
def scene(weighted: bool) -> Scene:
    return make_scene(weighted=weighted)


class Case(NamedTuple):
    """An objective, what it is compared with, and how closely."""

    config: objective.Objective
    source: str
    """``formula`` (tests/objectives/reference_*) or a function of ``trl_source``."""
    tolerance: float = 1e-10
    weighted: bool = False
    """Whether pairs have weights, which TRL does not know."""

    @property
    def label(self) -> str:
        """Name the objective and the options that are not its defaults."""
        default = type(self.config)
        fresh = default(**_name(self.config))
        given = [
            f"{k.rstrip('_')}={_short(v)}"
            for k, v in dataclasses.asdict(self.config).items()
            if v != getattr(fresh, k)
        ]
        return " ".join([self.config.name, *given])


def _name(config: objective.Objective) -> dict[str, Any]:
    if isinstance(config, MixConfig):
        return {"mix": {"sft": 0.5}}
    return {"name": config.name}


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "+".join(f"{v:g} {k}" for k, v in value.items())
    return str(value)


DIVERGENCES = (
    {},
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.7},
)
DIVERGENT = (
    "sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm",
)  # fmt: skip
PLAIN = (
    "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
)  # fmt: skip
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")


def trl_configs() -> Iterator[objective.Objective]:
    """Yield what TRL's DPO and KTO can compute too."""
    yield PairwiseConfig(name="dpo")
    for name in DIVERGENT:
        for options in DIVERGENCES:
            yield PairwiseConfig(name=name, beta=0.5, **options)
    for name in PLAIN:
        yield PairwiseConfig(name=name)
    for name in (*DIVERGENT, *PLAIN):
        yield PairwiseConfig(name=name, ld_alpha=0.3)
    for alpha in (0.0, 1.0):
        yield PairwiseConfig(name="sigmoid", ld_alpha=alpha)
    for name in SMOOTHED:
        for smoothing in (0.1, 0.4):
            yield PairwiseConfig(name=name, label_smoothing=smoothing, beta=0.7)
    for tau in (0.2, 1.0):
        yield PairwiseConfig(name="discopop", discopop_tau=tau, beta=1.3)
    yield PairwiseConfig(
        name="ipo", beta=0.9, ld_alpha=0.4, f_divergence_type="js_divergence"
    )
    yield PairwiseConfig(name="ld_dpo")
    yield PairwiseConfig(name="ld_dpo", alpha=0.0, beta=0.8)
    yield SFTConfig()
    yield MixConfig(mix={"sigmoid": 1.0, "sft": 0.2})
    yield MixConfig(mix={"hinge": 0.5, "aot": 2.0, "sft": 0.7}, beta=0.3, ld_alpha=0.5)
    yield MixConfig(
        mix={"robust": 0.3, "exo_pair": 0.6, "aot_unpaired": 1.1},
        beta=0.4,
        label_smoothing=0.2,
    )
    yield MixConfig(
        mix={"ipo": 1.0, "discopop": 0.8, "sigmoid_norm": 2.0},
        beta=0.6,
        discopop_tau=0.3,
        f_divergence_type="forward_kl",
    )
    yield StepDPOConfig(beta=0.4)
    for good, bad in ((1.0, 1.0), (1.3, 0.6), (0.0, 2.0)):
        yield KTOConfig(beta=0.3, desirable_weight=good, undesirable_weight=bad)


def other_configs() -> Iterator[objective.Objective]:
    """Yield what TRL has not, or not as a whole."""
    yield PairwiseConfig(name="sigmoid", label_smoothing=0.2, beta=0.5)
    yield PairwiseConfig(name="cdpo")
    yield PairwiseConfig(name="cdpo", beta=0.9, label_smoothing=0.3, ld_alpha=0.5)
    yield PairwiseConfig(name="cdpo", f_divergence_type="js_divergence")
    for name in ("dpop", "rpo", "r_dpo", "simpo", "orpo", "cpo"):
        yield PairwiseConfig(name=name)
    yield PairwiseConfig(name="dpop", lambda_=2.5, beta=0.4)
    yield PairwiseConfig(name="rpo", alpha=0.3, beta=0.4)
    yield PairwiseConfig(name="r_dpo", alpha=0.5, beta=0.4)
    yield PairwiseConfig(name="simpo", gamma=1.4, beta=1.5, label_smoothing=0.1)
    yield PairwiseConfig(name="orpo", beta=0.8)
    yield PairwiseConfig(name="cpo", alpha=0.3, beta=0.4, label_smoothing=0.1)
    yield TDPOConfig(name="tdpo1")
    yield TDPOConfig(name="tdpo1", beta=0.7)
    yield TDPOConfig(name="tdpo2")
    yield TDPOConfig(name="tdpo2", beta=0.7, alpha=1.5)
    yield TISConfig()
    yield TISConfig(beta=0.6)
    yield StepDPOConfig()
    yield SDPOConfig()
    yield SDPOConfig(beta=0.9)
    yield SePOConfig()
    yield SePOConfig(beta=2.0, chosen_share=0.5, rejected_share=0.75)
    yield BCOConfig()
    yield BCOConfig(beta=0.7)
    yield DPO2DConfig()
    yield DPO2DConfig(
        form="vanilla", beta=0.5, dpo_weight=0.4, sft_weight=0.3, normalize="mean1"
    )
    yield DPO2DConfig(
        pairing="order", rejected_weight="inverted", label_smoothing=0.1, top_k=2
    )
    yield MixConfig(mix={"dpo2d": 1.0, "tdpo2": 0.5, "sft": 0.1}, alpha=0.8)
    yield MixConfig(
        mix={"simpo": 1.0, "cpo": 0.3, "orpo": 0.2, "sepo": 2.0, "sft": 0.4},
        beta=0.8,
        gamma=0.3,
    )
    yield MixConfig(mix={"tis_dpo": 1.0, "sdpo": 0.5, "r_dpo": 0.3, "tdpo1": 1.2})


def trl_source_of(config: objective.Objective) -> tuple[str, float]:
    """Return the function of ``trl_source`` for an objective, and how exact it is."""
    if isinstance(config, KTOConfig):
        return "kto_loss", 1e-10
    text = repr(config)
    if "alpha_divergence'" in text:
        return "dpo_loss", 1e-5  # float32 in TRL
    # TRL keeps the smoothing of exo_pair in float32.
    return "dpo_loss", 2e-7 if "exo_pair" in text else 1e-10


TRL_CASES = [
    *(Case(config, *trl_source_of(config)) for config in trl_configs()),
    Case(PairwiseConfig(name="simpo"), "cpo_loss"),
    Case(PairwiseConfig(name="simpo", gamma=1.2, label_smoothing=0.1), "cpo_loss"),
    Case(PairwiseConfig(name="cpo", label_smoothing=0.1), "cpo_loss"),
    Case(PairwiseConfig(name="orpo", beta=0.6), "orpo_loss", 1e-6),
]
FORMULA_CASES = [
    *(Case(config, "formula", weighted=True) for config in other_configs()),
    *(Case(config, "formula") for config in trl_configs()),
]


class Values(NamedTuple):
    """A loss and its gradients towards policy and divergence [b c]."""

    loss: float
    gradient: np.ndarray
    kl_gradient: np.ndarray


def ours(config: objective.Objective, data: Scene) -> Values:
    """Return the library's values in float64."""
    known = repr(config), id(data)
    if known not in _OURS:
        _OURS[known] = _compute(config, data)
    return _OURS[known]


_OURS: dict[tuple[str, int], Values] = {}


def _compute(config: objective.Objective, data: Scene) -> Values:
    with jax.enable_x64(True):
        batch = jax.tree.map(jnp.asarray, data.batch)

        def total(policy: Any, kl: Any) -> Any:
            tokens = data.tokens()._replace(policy=policy, kl=kl)
            return objective.loss_of_tokens(
                tokens, batch, config=config, aspects=ASPECTS
            )[0]

        compute = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
        loss, gradients = compute(jnp.asarray(data.policy), jnp.asarray(data.kl))
        assert loss.dtype == jnp.float64
        return Values(float(loss), *(np.asarray(g) for g in gradients))


def theirs(case: Case, data: Scene) -> Values:
    """Return the source's values."""
    leaves = [torch.tensor(x, requires_grad=True) for x in (data.policy, data.kl)]
    examples = reference.examples_of(
        leaves[0], torch.tensor(data.reference), leaves[1], data.batch
    )
    config = case.config
    options = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    if case.source == "formula":
        loss = formula(config, examples)
    else:
        loss = from_trl(case.source, config, examples, options)
    loss.backward()
    gradients = [
        np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
        for leaf in leaves
    ]
    return Values(float(loss.detach()), *gradients)


def from_trl(source: str, config: Any, examples: Any, options: Any) -> Any:
    """Call TRL."""
    from tests.objectives import trl_source

    if source == "kto_loss":
        return trl_source.kto_loss(examples, options)
    if source == "orpo_loss":
        return trl_source.orpo_loss(examples, options)
    if source == "cpo_loss":
        return trl_source.cpo_loss(config.name, examples, options)
    if isinstance(config, MixConfig):
        weights = config.mix
        merged = {"beta": 0.1}
        for _, part in objective.members(config):
            merged.update(
                (k, v) for k, v in dataclasses.asdict(part).items() if v is not None
            )
        return trl_source.dpo_loss(examples, weights, merged)
    if isinstance(config, SFTConfig):
        return trl_source.dpo_loss(examples, {"sft": 1.0}, {"beta": 0.1})
    name = config.name if config.name in trl_source.LOSS_TYPES else "sigmoid"
    if config.name == "ld_dpo":
        options = {**options, "ld_alpha": options["alpha"]}
    return trl_source.dpo_loss(examples, {name: 1.0}, options)


def formula(config: Any, examples: list[reference.Example]) -> Any:
    """Call the references, member by member for a mix."""
    total = torch.zeros((), dtype=torch.float64)
    for weight, part in objective.members(config):
        options = dataclasses.asdict(part)
        if isinstance(part, DPO2DConfig):
            losses = [e.weight * dpo2d_reference(e, options) for e in examples]
            value = torch.stack(losses).mean()
        else:
            value = reference.reference_loss(part.name, examples, options)
        total = total + weight * value
    return total


def dpo2d_reference(example: reference.Example, options: dict[str, Any]) -> Any:
    """Make the numpy reference of 2D-DPO differentiable, by differences."""
    options = {k: v for k, v in options.items() if k not in ("name", "aspect_weights")}
    values = [example.chosen.policy, example.rejected.policy]
    plain = [value.detach().numpy() for value in values]

    def loss(chosen: np.ndarray, rejected: np.ndarray) -> float:
        sides = []
        for i, (side, policy_logps) in enumerate(
            zip((example.chosen, example.rejected), (chosen, rejected), strict=True)
        ):
            h = policy_logps - side.reference.numpy()
            owner = np.array(side.segment_of)
            segments = [
                {
                    "tokens": int((owner == k).sum()) if there else 0,
                    "logratio": float(h[owner == k].sum()),
                    "score": float(np.nanmean(example.scores[i, k])) if there else 0.0,
                }
                for k, there in enumerate(side.segments)
            ]
            sides.append(
                {
                    "segments": segments,
                    "logratio": float(h.sum()),
                    "logp": float(policy_logps.sum()),
                    "tokens": len(h),
                }
            )
        return reference_dpo2d(sides[0], sides[1], options)

    result = torch.tensor(loss(*plain), dtype=torch.float64)
    step = 1e-4
    for i, value in enumerate(values):
        for t in range(len(value)):
            moved = [[x.copy() for x in plain] for _ in range(4)]
            for k, by in enumerate((-2, -1, 1, 2)):
                moved[k][i][t] += by * step
            f = [loss(*m) for m in moved]
            slope = (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * step)
            result = result + slope * (value[t] - value[t].detach())
    return result


class Errors(NamedTuple):
    """The largest absolute errors."""

    loss: float
    gradient: float


def errors(case: Case) -> Errors:
    """Compare the library with the source."""
    data = scene(case.weighted)
    got, want = ours(case.config, data), theirs(case, data)
    assert np.abs(got.gradient).max() > 0
    return Errors(
        abs(got.loss - want.loss),
        max(
            np.abs(got.gradient - want.gradient).max(),
            np.abs(got.kl_gradient - want.kl_gradient).max(),
        ),
    )


def ids(case: Case) -> str:
    return case.label.replace(" ", ",")


def check(case: Case) -> None:
    found = errors(case)
    # 2D-DPO has float32 aspect weights and a gradient by differences.
    tolerance = 1e-8 if "dpo2d" in case.label else case.tolerance
    assert found.loss <= tolerance and found.gradient <= tolerance, found


@pytest.mark.parametrize("case", FORMULA_CASES, ids=ids)
def test_agrees_with_the_formula(case) -> None:
    check(case)


@pytest.mark.parametrize("case", TRL_CASES, ids=ids)
def test_agrees_with_trl(case) -> None:
    pytest.importorskip("trl")
    check(case)


def test_every_objective_has_a_source() -> None:
    compared = {c.config.name for c in FORMULA_CASES}
    assert compared == set(objective.CONFIGS)

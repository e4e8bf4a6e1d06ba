"""Every objective against its source: TRL's own code, or a float64 reference.

Losses and gradients towards the policy's token log-probabilities, on batches with
several pairs a row, unused places, one-token completions and unequal lengths.
"""

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

from jaxalign.errors import UserError
from jaxalign.objectives import dpo2d, logps, objective, policy
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.objectives.objective import MixConfig
from jaxalign.objectives.pairwise import LOSSES, PairwiseConfig, names
from jaxalign.objectives.policy import TokenLogps
from jaxalign.objectives.sft import SFTConfig
from jaxalign.objectives.stepwise import SDPOConfig, StepDPOConfig
from jaxalign.objectives.token_level import TDPOConfig
from jaxalign.objectives.token_weights import (
    SePOConfig,
    TISConfig,
    select_tokens,
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


def make_batch(
    response: Any, segment: Any, *pairs: Any, **options: Any
) -> PreferenceBatch:
    """Make a batch; tokens do not matter where log-probabilities are given."""
    make: Any = PreferenceBatch
    zeros: Any = np.zeros_like(response)
    completions: Any = (zeros, zeros, response, segment)
    return make(
        ModelInputs(zeros, zeros, zeros, zeros),
        Completions(*completions),
        *pairs,
        **options,
    )


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
                count = int(rng.integers(1, max(1, min(SEGMENTS, length)) + 1))
                owner = np.arange(length) * count // max(length, 1)
                later = owner[count:]
                later[rng.random(len(later)) < 0.2] = -1
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
    return Scene(
        make_batch(
            response,
            segment,
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

    config: objective.ObjectiveConfig
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
            _short(v) if k == "mix" else f"{k.rstrip('_')}={_short(v)}"
            for k, v in dataclasses.asdict(self.config).items()
            if v != getattr(fresh, k)
        ]
        return " ".join([self.config.name, *given])


def _name(config: objective.ObjectiveConfig) -> dict[str, Any]:
    if isinstance(config, MixConfig):
        return {"mix": {"sft": 0.5}}
    return {"name": config.name}


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "+".join(f"{v:g}*{k}" for k, v in value.items())
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


def pairwise(name: str, **options: Any) -> PairwiseConfig:
    config: Any = PairwiseConfig
    return config(name=name, **options)


def trl_configs() -> Iterator[objective.ObjectiveConfig]:
    """Yield what TRL's DPO and KTO can compute too."""
    yield PairwiseConfig(name="dpo")
    for name in DIVERGENT:
        for options in DIVERGENCES:
            yield pairwise(name, beta=0.5, **options)
    for name in PLAIN:
        yield pairwise(name)
    for name in (*DIVERGENT, *PLAIN):
        yield pairwise(name, ld_alpha=0.3)
    for alpha in (0.0, 1.0):
        yield PairwiseConfig(name="sigmoid", ld_alpha=alpha)
    for name in SMOOTHED:
        for smoothing in (0.1, 0.4):
            yield pairwise(name, label_smoothing=smoothing, beta=0.7)
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


def other_configs() -> Iterator[objective.ObjectiveConfig]:
    """Yield what TRL has not, or not as a whole."""
    yield PairwiseConfig(name="sigmoid", label_smoothing=0.2, beta=0.5)
    yield PairwiseConfig(name="cdpo")
    yield PairwiseConfig(name="cdpo", beta=0.9, label_smoothing=0.3, ld_alpha=0.5)
    yield PairwiseConfig(name="cdpo", f_divergence_type="js_divergence")
    for name in ("dpop", "rpo", "r_dpo", "simpo", "orpo", "cpo"):
        yield pairwise(name)
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
    yield KTOConfig()
    yield SFTConfig()
    yield pairwise("aot", beta=0.6)
    yield pairwise("aot_unpaired", beta=0.6)
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


def trl_source_of(config: objective.ObjectiveConfig) -> tuple[str, float]:
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


def ours(config: objective.ObjectiveConfig, data: Scene) -> Values:
    """Return the library's values in float64."""
    known = repr(config), id(data)
    if known not in _OURS:
        _OURS[known] = _compute(config, data)
    return _OURS[known]


_OURS: dict[tuple[str, int], Values] = {}


def _compute(config: objective.ObjectiveConfig, data: Scene) -> Values:
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


def test_every_pairwise_loss_has_its_own_options_and_source() -> None:
    for name, loss in LOSSES.items():
        keywords = {
            key: parameter.default is inspect.Parameter.empty
            for key, parameter in inspect.signature(loss.fn).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        needed = {key for key, required in keywords.items() if required} - {"mask"}
        assert needed <= set(loss.options) <= set(keywords), name
        assert ("mask" in keywords) == loss.ranked, name
        assert re.search(r"\]\(https://\S+\)", loss.fn.__doc__ or ""), name


def test_segments_are_compared_once_for_loss_and_metrics(monkeypatch) -> None:
    calls = []
    details = dpo2d.pair_details
    monkeypatch.setattr(
        dpo2d, "pair_details", lambda *args: calls.append(1) or details(*args)
    )
    data = scene(False)
    batch = jax.tree.map(jnp.asarray, data.batch)
    config = MixConfig(mix={"dpo2d": 1.0, "sft": 0.1})
    _, metrics = objective.loss_of_tokens(
        data.tokens(jnp.float32), batch, config=config, aspects=ASPECTS
    )
    assert "segments/accuracy" in metrics and len(calls) == 1


# Gradients.

ONE_EACH: list[objective.ObjectiveConfig] = [
    *(pairwise(name) for name in names()),
    PairwiseConfig(name="aot_unpaired", label_smoothing=0.2, ld_alpha=0.3),
    TDPOConfig(name="tdpo1"),
    TDPOConfig(name="tdpo2"),
    TISConfig(),
    SePOConfig(),
    StepDPOConfig(),
    SDPOConfig(),
    KTOConfig(undesirable_weight=1.5),
    BCOConfig(),
    SFTConfig(),
    DPO2DConfig(),
    DPO2DConfig(form="vanilla", normalize="mean1", rejected_weight="centred"),
    MixConfig(mix={"sigmoid": 1.0, "sft": 0.2, "aot": 0.5}, beta=0.3),
]


def name_of(config: objective.ObjectiveConfig) -> str:
    return Case(config, "").label.replace(" ", ",")


@pytest.mark.parametrize(
    "config",
    # The reward shift of bco is a constant that depends on all values.
    [config for config in ONE_EACH if not isinstance(config, BCOConfig)],
    ids=name_of,
)
def test_gradients_are_those_of_the_loss(config) -> None:
    data = scene(True)
    fixed = np.zeros(data.policy.shape, bool)
    if isinstance(config, KTOConfig):
        # z0 is a constant: its derivative is left out on purpose.
        fixed = np.asarray(data.batch.completions.response) % 2 == 1
    with jax.enable_x64(True):
        batch = jax.tree.map(jnp.asarray, data.batch)

        @jax.jit
        def total(values: Any) -> Any:
            values = jnp.where(fixed, data.policy, values)
            tokens = data.tokens()._replace(policy=values)
            return objective.loss_of_tokens(
                tokens, batch, config=config, aspects=ASPECTS
            )[0]

        check_grads(total, (jnp.asarray(data.policy),), order=1, modes=("rev",))


def test_the_constants_of_kto_and_tdpo2_get_no_gradient() -> None:
    data = scene(False)
    response = np.asarray(data.batch.completions.response)
    chosen, rejected = (
        (response >= 0) & (response % 2 == 0),
        (response >= 0) & (response % 2 == 1),
    )
    got = ours(KTOConfig(beta=0.3), data).gradient
    assert np.abs(got[chosen]).min() > 0
    np.testing.assert_array_equal(got[rejected], 0.0)
    got = ours(TDPOConfig(name="tdpo2"), data).kl_gradient
    assert np.abs(got[rejected]).min() > 0
    np.testing.assert_array_equal(got[chosen], 0.0)
    got = ours(TDPOConfig(name="tdpo1"), data).kl_gradient
    assert np.abs(got[chosen | rejected]).min() > 0


# Layout.


@pytest.mark.parametrize("config", ONE_EACH, ids=name_of)
def test_padding_pairs_and_layout_change_nothing(config) -> None:
    pairs = [pair for row in LAYOUT for pair in row if pair is not None]
    spread = make_scene((*((pair, None) for pair in pairs), (None, None)), wanted=11)
    got, want = ours(config, spread), ours(config, scene(True))
    assert got.loss == pytest.approx(want.loss, rel=1e-12)
    there = [
        np.asarray(x.batch.completions.response) >= 0 for x in (spread, scene(True))
    ]
    for a, b in ((got.gradient, want.gradient), (got.kl_gradient, want.kl_gradient)):
        np.testing.assert_allclose(a[there[0]], b[there[1]], rtol=1e-10, atol=1e-14)
        np.testing.assert_array_equal(a[~there[0]], 0.0)
        np.testing.assert_array_equal(b[~there[1]], 0.0)


def test_aot_compares_ranks_of_the_whole_batch() -> None:
    # Margins 1, -3, 2 against the reference's 0, 0.5, -1, in two rows with one unused
    # place: sorted -3, 1, 2 against -1, 0, 0.5 gives differences -2, 1, 1.5.
    response = np.array([[0, 2], [0, -1]], np.int32)
    batch = make_batch(
        response,
        np.full_like(response, -1),
        np.zeros((2, 2, 2, 1, 1)),
        np.zeros((2, 2, 2, 1), bool),
        np.array([[True, True], [True, False]]),
    )
    tokens = TokenLogps(
        jnp.array([[1.0, -3], [2, 0]]), jnp.array([[0.0, 0.5], [-1, 0]])
    )
    batch = jax.tree.map(jnp.asarray, batch)
    losses = objective.pair_losses(tokens, batch, PairwiseConfig(name="aot", beta=1.0))
    want = [math.log1p(math.exp(-d)) for d in (1.0, -2.0, 1.5)]
    np.testing.assert_allclose(losses[np.asarray(batch.pair_mask)], want, rtol=1e-6)
    loss, _ = objective.loss_of_tokens(
        tokens, batch, config=PairwiseConfig(name="aot", beta=1.0)
    )
    assert float(loss) == pytest.approx(sum(want) / 3, rel=1e-6)


# Numbers that a person can redo.


def tiny_batch(response: list[int], labels: list[bool] | None = None) -> Any:
    """Make one row whose places are all used, without segments."""
    given = np.array([response])
    places = max(response) // 2 + 1
    batch = make_batch(
        given,
        np.full_like(given, -1),
        np.zeros((1, places, 2, 1, 1)),
        np.zeros((1, places, 2, 1), bool),
        np.ones((1, places), bool),
        labels=None if labels is None else np.array([labels]),
    )
    return jax.tree.map(jnp.asarray, batch)


def test_tail_weights_are_one_as_far_as_the_shorter_response() -> None:
    batch = tiny_batch([0, 0, 0, 1, 2, 3, 3, 4, 5, -1])
    got = policy.tail_weights(batch, 0.25)
    want = [1, 0.25, 0.25, 1, 1, 1, 0.25, 1, 1]
    np.testing.assert_array_equal(got[0, :9], want)
    ones = jnp.ones((1, 10)).at[0, 9].set(0.0)
    sums = policy.pair_logps(TokenLogps(ones, 0 * ones), batch, got).logps
    np.testing.assert_array_equal(sums[0], [[1.5, 1], [1, 1.25], [1, 1]])


def test_kto_z0_is_cut_at_zero_and_is_a_constant() -> None:
    batch = tiny_batch([0, 1, 2, 3], [True, False])
    config = KTOConfig(beta=1.0, undesirable_weight=2.0)

    def loss(mismatched: float) -> tuple[Any, Any]:
        def total(values: Any) -> Any:
            tokens = TokenLogps(values, jnp.zeros((1, 4)))
            return objective.loss_of_tokens(tokens, batch, config=config)[0]

        return jax.value_and_grad(total)(
            jnp.array([[1.0, mismatched - 1, -2.0, mismatched + 1]])
        )

    def want(z0: float) -> float:
        good = 1 - 1 / (1 + math.exp(-(1.0 - z0)))
        bad = 1 - 1 / (1 + math.exp(-(z0 + 2.0)))
        return (good + 2 * bad) / 2

    for mismatched, z0 in ((-7.0, 0.0), (0.5, 0.5), (3.0, 3.0)):
        value, gradient = loss(mismatched)
        assert float(value) == pytest.approx(want(z0), rel=1e-5)
        np.testing.assert_array_equal(gradient[0, [1, 3]], 0.0)
        assert np.abs(np.asarray(gradient[0, [0, 2]])).min() > 0


def test_kto_and_bco_work_with_labels_of_one_kind_and_no_mismatched_completion() -> (
    None
):
    batch = tiny_batch([0, 2], [True, True])
    tokens = TokenLogps(jnp.array([[1.0, 3.0]]), jnp.zeros((1, 2)))
    loss, _ = objective.loss_of_tokens(tokens, batch, config=KTOConfig(beta=1.0))
    want = (1 / (1 + math.exp(1)) + 1 / (1 + math.exp(3))) / 2
    assert float(loss) == pytest.approx(want, rel=1e-6)
    # The reward shift is the mean of the one kind there is: 2.
    loss, _ = objective.loss_of_tokens(tokens, batch, config=BCOConfig(beta=1.0))
    want = (math.log1p(math.exp(1)) + math.log1p(math.exp(-1))) / 2
    assert float(loss) == pytest.approx(want, rel=1e-6)


def test_tis_weights() -> None:
    config = TISConfig(
        positive_model="p", negative_model="n", mu=2.0, lower=-1.0, upper=0.5, scale=3.0
    )
    ratios = jnp.array([-4.0, 0.25, 2.0])
    for chosen, sign in ((True, 1), (False, -1)):
        want = [3 * math.exp(sign * 2 * h) for h in (-1, 0.25, 0.5)]
        got = tis_weights(ratios, chosen=chosen, config=config)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_sepo_keeps_the_best_chosen_and_the_worst_rejected_tokens() -> None:
    scores = jnp.array([[5.0, 1, 7, 5, 2, 9, 2, 4, 3, 99]])
    response = jnp.array([[0, 0, 0, 0, 1, 1, 1, 1, 1, -1]])
    config = SePOConfig(chosen_share=0.5, rejected_share=0.2)
    got = select_tokens(scores, response, config)
    # Two of four: 7 and the first of the two 5; one of five: the first 2.
    assert np.flatnonzero(got[0]).tolist() == [0, 2, 4]


def test_sft_is_a_mean_over_tokens_and_a_mix_adds_weighted_means() -> None:
    batch = tiny_batch([0, 1, 2, 2, 2, 3])
    tokens = TokenLogps(jnp.array([[-1.0, -9, -2, -3, -6, -9]]), jnp.zeros((1, 6)))
    loss, _ = objective.loss_of_tokens(tokens, batch, config=SFTConfig())
    assert float(loss) == pytest.approx(3.0)
    config = MixConfig(mix={"sft": 0.5, "hinge": 2.0}, beta=0.1)
    loss, metrics = objective.loss_of_tokens(tokens, batch, config=config)
    # D = 8 and -2: hinge 0.2 and 1.2.
    assert float(loss) == pytest.approx(0.5 * 3 + 2 * 0.7, rel=1e-6)
    assert float(metrics["loss"].value) == pytest.approx(float(loss))
    assert float(metrics["loss/sft"].value) == pytest.approx(3.0)
    assert float(metrics["loss/hinge"].value) == pytest.approx(0.7)


# Values that must stay finite, in float32.

HARD: list[objective.ObjectiveConfig] = [
    *ONE_EACH,
    *(pairwise(name, **options) for name in DIVERGENT for options in DIVERGENCES[1:]),
    PairwiseConfig(name="discopop", discopop_tau=1.0, beta=10.0),
    PairwiseConfig(name="exo_pair", beta=10.0),
    PairwiseConfig(name="orpo", beta=10.0),
    PairwiseConfig(name="cdpo", beta=10.0),
    SePOConfig(chosen_share=1.0, rejected_share=1.0),
    SePOConfig(chosen_share=1e-5, rejected_share=1e-5),
    # Just above 1, the coefficient divides a large exponential by next to nothing.
    *(
        PairwiseConfig(
            name="ipo",
            f_divergence_type="alpha_divergence",
            f_alpha_divergence_coef=coefficient,
        )
        for coefficient in (1.001, 1.01, 2.0)
    ),
]


@functools.cache
def hard_scenes() -> dict[str, Scene]:
    shape: Layout = ((None, None, None),) * len(LAYOUT)
    base = make_scene()
    masked = base._replace(
        batch=base.batch._replace(pair_mask=np.zeros_like(base.batch.pair_mask))
    )
    empty: Layout = (((0, 3), (4, 0), None), ((0, 0), (2, 2), None), *shape[2:])
    found = {
        "no pair": make_scene(shape),
        "only pairs that do not count": masked,
        "empty responses": make_scene(empty),
        "nothing but empty responses": make_scene((((0, 0),) * 3,) * len(LAYOUT)),
        "one token each": make_scene((((1, 1),) * 3,) * len(LAYOUT)),
    }
    response = np.asarray(base.batch.completions.response)
    for side in (0, 1):
        mine = (response >= 0) & (response % 2 == side)
        far = np.where(mine, -1e4, base.policy), np.where(mine, -1e4, base.reference)
        found[f"policy far below, side {side}"] = base._replace(policy=far[0])
        found[f"reference far below, side {side}"] = base._replace(reference=far[1])
        found[f"policy certain, side {side}"] = base._replace(
            policy=np.where(mine, 0.0, base.policy)
        )
        found[f"divergence large, side {side}"] = base._replace(
            kl=np.where(mine, 1e4, base.kl)
        )
    found["both far below"] = base._replace(
        policy=np.where(response % 2 == 0, -1e4, 0.0) * (response >= 0),
        reference=np.where(response % 2 == 1, -1e4, 0.0) * (response >= 0),
    )
    found["equal"] = base._replace(reference=base.policy)
    return found


@pytest.mark.parametrize("config", HARD, ids=name_of)
def test_stays_finite(config) -> None:
    @jax.jit
    def compute(policy: Any, reference: Any, kl: Any, batch: Any) -> Any:
        return jax.value_and_grad(
            lambda p, k: objective.loss_of_tokens(
                TokenLogps(p, reference, k), batch, config=config, aspects=ASPECTS
            ),
            argnums=(0, 1),
            has_aux=True,
        )(policy, kl)

    for title, data in hard_scenes().items():
        values = compute(*data.tokens(jnp.float32)[:3], data.batch)
        for leaf in jax.tree.leaves(values):
            assert leaf.dtype == jnp.float32
            assert np.isfinite(leaf).all(), title
        if not data.batch.pair_mask.any():
            for leaf in jax.tree.leaves(values[1]):
                np.testing.assert_array_equal(leaf, 0.0)
            assert float(values[0][0]) == 0.0


# The divergence of whole distributions.


def dense(
    hidden: np.ndarray, head: np.ndarray, source: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the states [b c d] and log-probabilities [b c v] in float64."""
    states = np.stack([h[s] for h, s in zip(hidden, source, strict=True)])
    logits = states @ head
    top = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
    return states, logits - total


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_divergences_agree_with_dense_float64(chunk, trained) -> None:
    rng = np.random.default_rng(5)
    rows, length, wanted, width, vocabulary = 2, 9, 7, 5, 11
    hidden, ref_hidden = rng.normal(size=(2, rows, length, width))
    head, ref_head = rng.normal(size=(2, width, vocabulary))
    source = rng.integers(0, length, (rows, wanted))
    target = rng.integers(0, vocabulary, (rows, wanted))
    response = np.array([[0, 0, 1, 1, 2, 3, -1], [0, 1, 1, -1, -1, -1, -1]])
    by_logp, by_kl = rng.normal(size=(2, rows, wanted))

    there = (response >= 0)[..., None]
    states, full = dense(hidden, head, source)
    _, ref_full = dense(ref_hidden, ref_head, source)
    picked = np.eye(vocabulary)[target]
    want = (
        (there * picked * full).sum(-1),
        (there * picked * ref_full).sum(-1),
        (there * np.exp(ref_full) * (ref_full - full)).sum(-1),
    )
    # d logp / d logits = onehot - p and d KL / d logits = p - p_ref.
    p, p_ref = np.exp(full), np.exp(ref_full)
    slope = there * (by_logp[..., None] * (picked - p) + by_kl[..., None] * (p - p_ref))
    hidden_gradient = np.zeros_like(hidden)
    for row in range(rows):
        np.add.at(hidden_gradient[row], source[row], slope[row] @ head.T)
    head_gradient = np.einsum("bcd,bcv->dv", states, slope)

    completions = Completions(
        *(jnp.asarray(x) for x in (source, target, response, response * 0))
    )

    def scored(head: Any, hidden: Any, ref_head: Any, ref_hidden: Any) -> Any:
        return logps.token_logps_and_kl(
            lambda v, h: h @ v["head"],
            *({"head": head}, hidden, {"head": ref_head}, ref_hidden, completions),
            chunk_size=chunk,
        )

    def total(*values: Any) -> Any:
        logp, ref_logp, kl = scored(*values)
        return (by_logp * logp + by_kl * kl + ref_logp).sum()

    given = [jnp.asarray(x, jnp.float32) for x in (head, hidden, ref_head, ref_hidden)]
    for got, wanted_values in zip(scored(*given), want, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted_values, rtol=1e-5, atol=3e-6)
    arguments = (0, 1) if trained else (1,)
    found = jax.grad(total, argnums=arguments)(*given)
    if trained:
        np.testing.assert_allclose(found[0], head_gradient, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[-1], hidden_gradient, rtol=1e-4, atol=1e-5)


def test_divergence_is_zero_where_the_models_agree_and_never_negative() -> None:
    rng = np.random.default_rng(6)
    hidden = jnp.asarray(rng.normal(0, 30, (2, 4, 5)), jnp.float32)
    head = jnp.asarray(rng.normal(0, 3, (5, 50)), jnp.float32)
    other = hidden + jnp.asarray(rng.normal(0, 1, hidden.shape), jnp.float32)
    zeros = jnp.zeros((2, 4), jnp.int32)
    source = jnp.tile(jnp.arange(4), (2, 1))
    completions = Completions(source, zeros, zeros, zeros)
    variables = {"head": head}

    def kl(ref_hidden: Any) -> Any:
        return logps.token_logps_and_kl(
            lambda v, h: h @ v["head"],
            *(variables, hidden, variables, ref_hidden, completions),
        )[2]

    np.testing.assert_array_equal(kl(hidden), 0.0)
    assert float(kl(other).min()) >= -1e-5


# Refusals.


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PairwiseConfig(gamma=0.5), "gamma has no effect for sigmoid: got 0.5"),
        (lambda: PairwiseConfig(name="hinge", label_smoothing=0.1), "label_smoothing"),
        (lambda: PairwiseConfig(name="simpo", ld_alpha=0.5), "ld_alpha has no effect"),
        (
            lambda: PairwiseConfig(name="aot", f_divergence_type="js_divergence"),
            "f_divergence_type has no effect for aot",
        ),
        (lambda: TDPOConfig(name="tdpo1", alpha=0.5), "alpha has no effect for tdpo1"),
        (lambda: TDPOConfig(alpha=-1.0), "alpha must be at least 0"),
        (
            lambda: PairwiseConfig(f_alpha_divergence_coef=0.7),
            "f_alpha_divergence_coef has no effect without",
        ),
        (
            lambda: MixConfig(mix={"sigmiod": 1.0}),
            "cannot hold 'sigmiod'.*sigmoid",
        ),
        (lambda: MixConfig(mix={"kto": 1.0}), "cannot hold 'kto'"),
        (lambda: MixConfig(mix={}), "mix is empty"),
        (lambda: MixConfig(mix={"sft": 0.0}), "weight of sft must be positive"),
        (
            lambda: MixConfig(mix={"sigmoid": 1.0, "sft": 0.1}, gamma=0.5),
            "gamma has no effect: no member of the mix sigmoid, sft",
        ),
        (
            lambda: MixConfig(mix={"tdpo1": 1.0}, alpha=0.5),
            "alpha has no effect: no member",
        ),
        (
            lambda: MixConfig(mix={"robust": 1.0}, label_smoothing=0.5),
            "below 0.5 for robust",
        ),
        (
            lambda: PairwiseConfig(name="robust", label_smoothing=0.5),
            "below 0.5 for robust",
        ),
        (
            lambda: PairwiseConfig(name="exo_pair", label_smoothing=0.0),
            "above 0 for exo_pair",
        ),
        (lambda: PairwiseConfig(name="cdpo", label_smoothing=0.7), "must lie in"),
        (lambda: PairwiseConfig(beta=-0.1), "beta must be a positive number"),
        (lambda: PairwiseConfig(beta=float("inf")), "beta must be a positive number"),
        (lambda: PairwiseConfig(name="ld_dpo", alpha=1.5), "alpha must lie between 0"),
        (lambda: PairwiseConfig(ld_alpha=-0.1), "ld_alpha must lie between 0 and 1"),
        (lambda: PairwiseConfig(name="dpop", lambda_=-1.0), "lambda_ must lie between"),
        (
            lambda: PairwiseConfig(name="discopop", discopop_tau=0.0),
            "discopop_tau must lie in",
        ),
        (lambda: TISConfig(mu=1.0), "mu has no effect without objective.positive_mod"),
        (lambda: TISConfig(positive_model="p"), "negative_model is missing"),
        (lambda: SePOConfig(negative_model="n"), "positive_model is missing"),
        (lambda: SePOConfig(chosen_share=0.0), "chosen_share must lie in"),
        (
            lambda: TISConfig(
                positive_model="p", negative_model="n", lower=1.0, upper=0.0
            ),
            "lower and upper must lie between",
        ),
        (lambda: KTOConfig(desirable_weight=-1.0), "desirable_weight must be at least"),
        (lambda: BCOConfig(beta=0.0), "beta must be a positive number"),
    ],
)
def test_bad_options_are_refused_by_name(make, match) -> None:
    with pytest.raises(UserError, match=match):
        make()

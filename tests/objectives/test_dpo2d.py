"""2D-DPO: the ten identities, numbers a person can redo, an independent reference."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign.errors import UserError
from jaxalign.objectives import dpo2d, pairwise
from jaxalign.objectives.dpo2d import DPO2DConfig
from tests.objectives.reference_dpo2d import (
    reference_dpo2d,
    reference_selection,
    reference_weights,
)


LN2 = math.log(2)


def loss(
    chosen, rejected, scores_w, scores_l, config=None, mask_w=None, mask_l=None, **kw
):
    chosen, rejected, scores_w, scores_l = (
        jnp.asarray(x, jnp.float32) for x in (chosen, rejected, scores_w, scores_l)
    )
    return dpo2d.dpo2d_loss(
        chosen,
        rejected,
        scores_w,
        scores_l,
        chosen_mask=jnp.ones(chosen.shape, bool) if mask_w is None else mask_w,
        rejected_mask=jnp.ones(chosen.shape, bool) if mask_l is None else mask_l,
        config=config or DPO2DConfig(),
        **kw,
    )


def random_pair(rng, size=5, top=4):
    """One pair with at least one scored segment a side, ties included."""
    masks = [rng.random(size) < 0.8 for _ in range(2)]
    for mask in masks:
        mask[rng.integers(size)] = True
    return {
        "ratios": [rng.normal(0, 3, size) for _ in range(2)],
        "scores": [rng.integers(0, top + 1, size).astype(float) for _ in range(2)],
        "tokens": [np.where(m, rng.integers(1, 9, size), 0) for m in masks],
        "masks": masks,
    }


def sides(pair):
    return [
        {
            "segments": [
                {"tokens": int(t), "logratio": float(h), "score": float(r)}
                for t, h, r in zip(
                    pair["tokens"][i], pair["ratios"][i], pair["scores"][i], strict=True
                )
            ],
            "logratio": float(pair["ratios"][i].sum()),
            "logp": -10.0,
            "tokens": int(pair["tokens"][i].sum()),
        }
        for i in (0, 1)
    ]


def details(pair, config):
    chosen, rejected = (
        dpo2d.Side(
            jnp.asarray(pair["ratios"][i], jnp.float32),
            jnp.asarray(pair["scores"][i], jnp.float32),
            jnp.asarray(pair["masks"][i]),
            jnp.asarray(pair["tokens"][i], jnp.float32),
        )
        for i in (0, 1)
    )
    return dpo2d.pair_details(chosen, rejected, config)


GRID = [
    dict(zip(("form", "normalize", "rejected_weight", "top_k"), values, strict=True))
    for values in itertools.product(
        ("group", "vanilla"),
        ("max", "none", "mean1"),
        ("score", "inverted", "uniform", "centred"),
        (None, 1, 3),
    )
] + [
    {"pairing": "order"},
    {"pairing": "order", "top_k": 2, "rejected_weight": "inverted"},
    {"reduction": "mean"},
    {"label_smoothing": 0.2},
    {"form": "vanilla", "label_smoothing": 0.2},
    {"skip_contradictory": True},
    {"skip_contradictory": True, "reduction": "mean", "pairing": "order"},
    {"beta": 0.7, "max_score": 5.0},
]


@pytest.mark.parametrize("options", GRID, ids=lambda o: ",".join(map(str, o.values())))
def test_agrees_with_the_float64_reference(options) -> None:
    rng = np.random.default_rng(0)
    config = DPO2DConfig(**options)
    for _ in range(25):
        pair = random_pair(rng)
        chosen, rejected = sides(pair)
        got = details(pair, config)
        want = reference_dpo2d(chosen, rejected, options)
        np.testing.assert_allclose(got.losses, want, rtol=2e-5, atol=2e-6)
        for i, side in enumerate((chosen, rejected)):
            weights = reference_weights(side, options, rejected=bool(i))
            np.testing.assert_allclose(got.weights[i], weights, rtol=1e-5, atol=1e-6)


def test_selects_what_the_reference_selects() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        pair = random_pair(rng)
        chosen, rejected = sides(pair)
        for options in ({}, {"top_k": 2}, {"pairing": "order"}):
            got = details(pair, DPO2DConfig(**options)).selected
            couples = reference_selection(chosen, rejected, options)
            for i in (0, 1):
                want = sorted(couple[i] for couple in couples)
                assert np.flatnonzero(got[i]).tolist() == want


# The ten identities of spec/objectives.md 1.4.


@pytest.mark.parametrize("form", ["group", "vanilla"])
def test_1_one_segment_of_weight_one_is_dpo(form) -> None:
    config = DPO2DConfig(form=form, beta=0.3)
    got = loss([[2.0]], [[-1.5]], [[4.0]], [[4.0]], config)
    want = pairwise.dpo_loss(jnp.array([2.0]), jnp.array([-1.5]), beta=0.3)
    np.testing.assert_array_equal(got, want)


def test_2_vanilla_with_weights_one_is_dpo_however_segmented() -> None:
    config = DPO2DConfig(form="vanilla")
    chosen, rejected = np.array([1.0, -2.0, 4.0]), np.array([0.5, 0.25, 3.0])
    got = loss(chosen, rejected, [4.0] * 3, [4.0] * 3, config)
    want = pairwise.dpo_loss(jnp.array(3.0), jnp.array(3.75), beta=0.1)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("form", ["group", "vanilla"])
def test_3_scaling_scores_is_scaling_beta(form) -> None:
    rng = np.random.default_rng(2)
    h = rng.normal(size=(2, 4))
    r = rng.uniform(0, 4, size=(2, 4))
    scaled = loss(*h, *(2.5 * r), DPO2DConfig(form=form, normalize="none"))
    config = DPO2DConfig(form=form, normalize="none", beta=0.25)
    np.testing.assert_allclose(scaled, loss(*h, *r, config), rtol=1e-5)


def test_4_policy_equal_to_reference_gives_n_ln_2() -> None:
    zero = np.zeros(3)
    scores = np.array([3.0, 1.0, 2.0])
    assert float(loss(zero, zero, scores, scores)) == pytest.approx(3 * LN2)
    config = DPO2DConfig(form="vanilla")
    assert float(loss(zero, zero, scores, scores, config)) == pytest.approx(LN2)
    config = DPO2DConfig(reduction="mean")
    assert float(loss(zero, zero, scores, scores, config)) == pytest.approx(LN2)


def test_5_group_is_never_below_vanilla_on_equal_coverage() -> None:
    rng = np.random.default_rng(3)
    h = rng.normal(0, 20, size=(2, 500, 4))
    r = rng.uniform(0, 4, size=(2, 500, 4))
    group = loss(*h, *r)
    vanilla = loss(*h, *r, DPO2DConfig(form="vanilla"))
    assert bool((group >= vanilla - 1e-5).all())


def test_6_gradients_at_the_reference_are_equal() -> None:
    scores = jnp.array([4.0, 2.0, 1.0])
    zero = jnp.zeros(3)

    def gradient(form):
        config = DPO2DConfig(form=form)
        return jax.grad(lambda h: loss(h[0], h[1], scores, scores, config).sum())(
            jnp.stack([zero, zero])
        )

    np.testing.assert_allclose(gradient("group"), gradient("vanilla"), rtol=1e-6)
    # d/dH_k = -0.5 beta r_k / 4 on the chosen side.
    np.testing.assert_allclose(
        gradient("group")[0], [-0.05, -0.025, -0.0125], rtol=1e-6
    )


def test_7_unselected_segments_get_exactly_no_gradient() -> None:
    mask_w, mask_l = jnp.array([True] * 4), jnp.array([True, True, False, False])
    gradient = jax.grad(
        lambda h: loss(
            h[0], h[1], [1.0, 4, 2, 3], [0.0, 4, 1, 1], mask_w=mask_w, mask_l=mask_l
        ).sum()
    )(jnp.ones((2, 4)))
    # Two best chosen: 1 and 3. Both rejected, but a score of 0 weighs nothing.
    assert (np.asarray(gradient) != 0).tolist() == [
        [False, True, False, True],
        [False, True, False, False],
    ]


def test_8_one_hot_aspects_and_mean_one_weights() -> None:
    scores = jnp.array([[1.0, 4.0], [3.0, 0.0]])
    one_hot = dpo2d.resolve_aspect_weights({"b": 2.0}, ("a", "b"))
    np.testing.assert_array_equal(
        dpo2d.aggregate_aspects(scores, jnp.asarray(one_hot)), scores[:, 1]
    )
    # Equal scores with mean-one weights: all weights 1, so vanilla is DPO.
    config = DPO2DConfig(form="vanilla", normalize="mean1")
    tokens = jnp.array([2.0, 5.0])
    got = loss(
        [1.0, 2],
        [3.0, -1],
        [3.0, 3],
        [1.0, 1],
        config,
        chosen_tokens=tokens,
        rejected_tokens=tokens,
    )
    want = pairwise.dpo_loss(jnp.array(3.0), jnp.array(2.0), beta=0.1)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_10_padding_segments_change_nothing_and_ties_keep_text_order() -> None:
    chosen, rejected = np.array([1.0, 2.0]), np.array([-1.0, 0.5])
    padded = loss(
        np.append(chosen, [99.0, -99.0]),
        np.append(rejected, [np.nan, 7.0]),
        [3.0, 2, 4, np.nan],
        [1.0, 2, 0, np.nan],
        mask_w=jnp.array([True, True, False, False]),
        mask_l=jnp.array([True, True, False, False]),
    )
    np.testing.assert_array_equal(padded, loss(chosen, rejected, [3.0, 2], [1.0, 2]))
    pair = {
        "ratios": [np.zeros(3)] * 2,
        "scores": [np.array([2.0, 2, 2]), np.array([1.0, 1, 1])],
        "tokens": [np.ones(3)] * 2,
        "masks": [np.ones(3, bool), np.array([True, False, False])],
    }
    assert details(pair, DPO2DConfig()).selected[0].tolist() == [True, False, False]


# Numbers worked out by hand.


def test_literal_group_loss() -> None:
    # beta 0.1, scores / 4. Chosen sorted: r = 4 (H 2), 2 (H -1); rejected sorted:
    # r = 1 (H 4), 3 (H 1). z = 0.1 (1 * 2 - 0.25 * 4) = 0.1 and
    # 0.1 (0.5 * -1 - 0.75 * 1) = -0.125: log1p(e^-0.1) + log1p(e^0.125).
    want = math.log1p(math.exp(-0.1)) + math.log1p(math.exp(0.125))
    got = loss([-1.0, 2.0], [1.0, 4.0], [2.0, 4.0], [3.0, 1.0])
    assert float(got) == pytest.approx(want, rel=1e-6)


def test_literal_rejected_weights() -> None:
    scores, mask = jnp.array([0.0, 1.0, 4.0, 9.0]), jnp.array([True] * 3 + [False])

    def weights(**options):
        config = DPO2DConfig(**options)
        tokens = jnp.array([1.0, 2.0, 1.0, 5.0])
        return dpo2d.segment_weights(
            scores, mask, rejected=True, config=config, tokens=tokens
        ).tolist()

    assert weights() == [0, 0.25, 1, 0]
    assert weights(rejected_weight="inverted") == [1, 0.75, 0, 0]
    assert weights(rejected_weight="inverted", normalize="none") == [4, 3, 0, 0]
    assert weights(rejected_weight="uniform") == [1, 1, 1, 0]
    # mean(0, 1/4, 1) = 5/12
    np.testing.assert_allclose(
        weights(rejected_weight="centred"), [5 / 12, 2 / 12, -7 / 12, 0], atol=1e-7
    )
    # raw 0, 1, 4 with tokens 1, 2, 1: mean 6/4, so 0, 2/3, 8/3
    np.testing.assert_allclose(weights(normalize="mean1"), [0, 2 / 3, 8 / 3, 0])


def test_centred_mean_one_of_equal_scores_is_one() -> None:
    config = DPO2DConfig(normalize="mean1", rejected_weight="centred")
    for score in (0.7, 1.1, 3.3):
        weights = dpo2d.segment_weights(
            jnp.full(3, score),
            jnp.ones(3, bool),
            rejected=True,
            config=config,
            tokens=jnp.array([1.0, 3.0, 2.0]),
        )
        assert weights.tolist() == [1.0, 1.0, 1.0]


def test_aspects_not_judged_drop_out_of_the_mean() -> None:
    scores = jnp.array([[4.0, jnp.nan], [jnp.nan, jnp.nan]])
    got = dpo2d.aggregate_aspects(scores, jnp.array([0.25, 0.75]))
    assert float(got[0]) == 4.0 and bool(jnp.isnan(got[1]))


# Gradients.


@pytest.mark.parametrize("options", [{}, {"form": "vanilla"}, {"label_smoothing": 0.1}])
def test_gradients_are_right(options) -> None:
    rng = np.random.default_rng(4)
    h = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    scores = jnp.array([4.0, 1.0, 2.0])
    config = DPO2DConfig(**options)
    check_grads(
        lambda h: loss(h[0], h[1], scores, scores, config),
        (h,),
        order=1,
        modes=("rev",),
        atol=1e-2,
        rtol=1e-2,
    )


@pytest.mark.parametrize("form", ["group", "vanilla"])
@pytest.mark.parametrize("normalize", ["max", "mean1"])
def test_gradients_stay_finite_where_nothing_is_scored(form, normalize) -> None:
    nothing = jnp.zeros((2, 3), bool)
    config = DPO2DConfig(form=form, normalize=normalize)

    def total(h):
        return loss(
            h[0],
            h[1],
            jnp.full((2, 3), jnp.nan),
            jnp.full((2, 3), jnp.nan),
            config,
            mask_w=nothing,
            mask_l=nothing,
            chosen_tokens=jnp.zeros((2, 3)),
            rejected_tokens=jnp.zeros((2, 3)),
        ).sum()

    value, gradient = jax.value_and_grad(total)(jnp.ones((2, 2, 3)))
    assert float(value) == pytest.approx(0.0 if form == "group" else 2 * LN2)
    np.testing.assert_array_equal(gradient, np.zeros((2, 2, 3)))


def test_extreme_logratios_stay_finite() -> None:
    value, gradient = jax.value_and_grad(
        lambda h: loss(h[0], h[1], [4.0], [4.0], DPO2DConfig(beta=10.0)).sum()
    )(jnp.array([[-1e4], [1e4]]))
    assert np.isfinite(value) and np.isfinite(gradient).all()


# Refusals.


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"beta": 0.0}, "beta must be a positive"),
        ({"beta": float("nan")}, "beta must be a positive"),
        ({"label_smoothing": 0.6}, "label_smoothing must lie"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"max_score": 0.0}, "max_score must be a positive"),
        ({"sft_weight": -1.0}, "sft_weight must be 0"),
        ({"form": "vanilla", "pairing": "order"}, "pairing='order' has no effect"),
        ({"form": "vanilla", "skip_contradictory": True}, "has no effect"),
        ({"aspect_weights": {"a": -1.0}}, "aspect_weights.a must be"),
        ({"aspect_weights": {"a": 0.0}}, "must not all be 0"),
    ],
)
def test_bad_options_are_refused(options, match) -> None:
    with pytest.raises(UserError, match=match):
        DPO2DConfig(**options)


def test_an_aspect_the_data_lacks_is_refused_with_the_near_names() -> None:
    with pytest.raises(
        UserError, match="'saftey', which no record has. Did you mean saf"
    ):
        dpo2d.resolve_aspect_weights({"saftey": 1.0}, ("clarity", "safety"))
    with pytest.raises(UserError, match="no scored segments"):
        dpo2d.resolve_aspect_weights(None, ())

"""The training step: exact accumulation, the three references, what is left alone."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import trees
from jaxalign.adapters import adapter, lora
from jaxalign.checkpoints import load as load_lib
from jaxalign.data import loader
from jaxalign.objectives import dpo2d, objective, pairwise, policy
from jaxalign.training import step as step_lib
from jaxalign.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from tests import scenes


LN2 = math.log(2)


@pytest.fixture(scope="module")
def scene(tiny_llama):
    data = scenes.dataset(tiny_llama, 7)
    loaded = load_lib.load(tiny_llama)
    adapters = scenes.random_lora(loaded.variables["params"])
    variables = {**loaded.variables, "lora": adapters}
    trainable, frozen = trees.partition(variables, adapter.trained(variables))
    loss_fn = functools.partial(
        objective.loss_fn,
        model=loaded.model,
        config=dpo2d.DPO2DConfig(),
        aspects=data.aspects,
    )
    return data, loaded, trainable, frozen, loss_fn


def source(data, rows, accumulation, **options):
    shape = loader.batch_shape([data], row_length=int(data.lengths.max()) + 20)
    plan = loader.BatchPlan(rows, accumulation, 0)
    return loader.StepSource(data, shape, plan, num_epochs=1, **options)


def one_step(scene, batch, loss_fn=None, **optimizer):
    _, _, trainable, frozen, default = scene
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-2, **optimizer), 10)
    state = step_lib.init(trainable, tx, key=jax.random.key(0))
    step = jax.jit(step_lib.make_train_step(loss_fn or default, tx))
    return step(state, frozen, jax.tree.map(jnp.asarray, batch))


def close(left, right, **tolerance):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def test_accumulation_is_one_large_batch(scene) -> None:
    data = scene[0]
    large = source(data, 8, 1)
    assert len(large) == 1
    # Adam's first step is g / (|g| + eps): beside a small eps the noise of a gradient
    # near 0 grows to any size, and one of the wrong scale is not seen.
    options = {"eps": 0.1, "max_grad_norm": 0.0}
    # 7 pairs in 8 rows: the micro-batches hold different numbers of pairs.
    state, metrics = one_step(scene, large[0], **options)
    for rows, accumulation in ((4, 2), (2, 4), (1, 8)):
        batch = source(data, rows, accumulation)[0]
        other, seen = one_step(scene, batch, **options)
        close(other.trainable, state.trainable, rtol=1e-4, atol=1e-6)
        assert float(seen["loss"].value) == pytest.approx(
            float(metrics["loss"].value), rel=1e-5
        )
        assert float(seen["pairs"].value) == 7


def test_the_three_references_are_equal(scene) -> None:
    data, loaded, trainable, frozen, loss_fn = scene
    batch = scenes.batch(data)
    base = {"params": loaded.variables["params"]}
    separate = {**frozen, policy.REFERENCE: base}
    cached = policy.policy_token_logps(base, batch, model=loaded.model)

    def run(frozen, batch):
        return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
            trainable, frozen, batch, None
        )

    want = run(frozen, batch)
    for got in (run(separate, batch), run(frozen, batch._replace(ref_logps=cached))):
        close(got, want, rtol=1e-4, atol=1e-5)


def test_loss_at_step_0_is_ln_2(tiny_llama) -> None:
    """With B = 0 policy and reference are one: ln 2, and N ln 2 in the group form."""
    data = scenes.dataset(tiny_llama, 7)
    loaded = load_lib.load(tiny_llama)
    adapters = lora.init(
        jax.random.key(0), loaded.variables["params"], lora.LoRAConfig()
    )
    variables = {**loaded.variables, "lora": adapters}
    split = trees.partition(variables, adapter.trained(variables))
    batch = scenes.batch(data)
    pairs = [
        min(len(pair.chosen.scored), len(pair.rejected.scored)) for pair in data.pairs
    ]
    for config, want in (
        (pairwise.PairwiseConfig(), LN2),
        (dpo2d.DPO2DConfig(form="vanilla"), LN2),
        (dpo2d.DPO2DConfig(), np.mean(pairs) * LN2),
    ):
        loss, metrics = objective.loss_fn(
            *split, batch, None, model=loaded.model, config=config, aspects=data.aspects
        )
        assert float(loss) == pytest.approx(want, rel=1e-6)
        assert float(metrics["rewards/accuracies"].value) == 0  # a tie is no success
    assert float(metrics["segments/accuracy"].value) == 0.5
    assert float(metrics["segments/pairs_per_example"].value) == pytest.approx(
        np.mean(pairs)
    )
    assert float(metrics["segments/loss_per_pair"].value) == pytest.approx(LN2)


def test_base_weights_need_a_reference(scene) -> None:
    data, loaded, *_ = scene
    loss_fn = functools.partial(
        objective.loss_fn, model=loaded.model, config=pairwise.PairwiseConfig()
    )
    mask = trees.mask_from_patterns(loaded.variables, [".*norm.*"])
    trainable, frozen = trees.partition(loaded.variables, mask)
    batch = scenes.batch(data)
    with pytest.raises(ValueError, match="frozen\\['reference'\\]"):
        loss_fn(trainable, frozen, batch, None)
    frozen = {**frozen, policy.REFERENCE: {"params": trainable["params"]}}
    loss, _ = loss_fn(trainable, frozen, batch, None)
    assert float(loss) == pytest.approx(LN2, rel=1e-6)


def test_only_trained_leaves_have_gradients_and_optimiser_state(scene) -> None:
    data, _, trainable, frozen, loss_fn = scene
    batch = scenes.batch(data)
    grads = jax.grad(lambda t: loss_fn(t, frozen, batch, None)[0])(trainable)
    assert {path.split("/")[-1] for path in trees.paths(grads)} == {"a", "b"}
    tx = make_optimizer(OptimizerConfig(), 10)
    state = step_lib.init(trainable, tx, key=jax.random.key(0))
    # Two moments and two counters.
    size = trees.num_params(state.opt_state)
    assert size <= 2 * trees.num_params(trainable) + 4


def test_dropout_is_for_the_policy_in_training_alone(tiny_llama) -> None:
    data = scenes.dataset(tiny_llama, 4)
    loaded = load_lib.load(tiny_llama, lora_dropout=0.5)
    adapters = scenes.random_lora(loaded.variables["params"])
    variables = {**loaded.variables, "lora": adapters}
    split = trees.partition(variables, adapter.trained(variables))
    batch = scenes.batch(data)

    def pair(key):
        return policy.score_tokens(*split, batch, key, model=loaded.model)

    calm, one, again, two = (
        pair(key)
        for key in (None, jax.random.key(1), jax.random.key(1), jax.random.key(2))
    )
    np.testing.assert_array_equal(one.policy, again.policy)
    assert not np.allclose(one.policy, two.policy)
    assert not np.allclose(one.policy, calm.policy)
    np.testing.assert_array_equal(one.reference, calm.reference)


def test_an_update_that_is_not_finite_is_left_out_and_counted(scene) -> None:
    def broken(trainable, frozen, batch, key):
        loss, metrics = scene[4](trainable, frozen, batch, key)
        return loss * jnp.nan, metrics

    batch = source(scene[0], 8, 1)[0]
    state, metrics = one_step(scene, batch, broken)
    close(state.trainable, scene[2], atol=0)
    assert float(metrics["nonfinite"].value) == 1
    assert int(state.step) == 1


def test_a_group_below_the_lowest_adapter_has_no_backward_pass(make_llama) -> None:
    directory = make_llama(num_hidden_layers=8)
    loaded = load_lib.load(directory, groups=((0, 7), (7, 8)))
    adapters = scenes.random_lora(loaded.variables["params"], layers="7")
    assert list(adapters) == ["layers_7_8"]
    data = scenes.dataset(directory, 3)
    batch = scenes.batch(data)

    def total(adapters):
        variables = {**loaded.variables, "lora": adapters}
        return policy.policy_token_logps(variables, batch, model=loaded.model).sum()

    def scans(jaxpr, found):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "scan":
                found.append(eqn.params["length"])
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns") and eqn.primitive.name != "scan":
                    scans(inner, found)
        return found

    lengths = scans(jax.make_jaxpr(jax.grad(total))(adapters).jaxpr, [])
    # The group of layers 0 to 6 is scanned once, forward.
    assert lengths.count(7) == 1


def test_schedules() -> None:
    def rates(schedule, steps, **options):
        config = OptimizerConfig(learning_rate=1.0, schedule=schedule, **options)
        return [float(make_schedule(config, 8)(step)) for step in steps]

    assert rates("linear", (0, 4, 8)) == [1.0, 0.5, 0.0]
    assert rates("linear", (0, 1, 2, 5, 8), warmup_steps=2) == [0, 0.5, 1, 0.5, 0]
    np.testing.assert_allclose(rates("cosine", (0, 4, 8)), [1, 0.5, 0], atol=1e-7)
    assert rates("constant", (0, 1, 7), warmup_steps=2) == [0, 0.5, 1]


def test_weight_decay_leaves_biases_and_scales_alone() -> None:
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), 4)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05)
    assert not updates["bias"].any() and not updates["scale"].any()

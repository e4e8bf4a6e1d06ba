"""Every objective gives the same loss and gradients however the pairs are laid out.

Packed or one pair a row, prompts shared or repeated, reference live or cached, on one
device or eight, in one batch or accumulated.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import trees
from jaxalign.adapters import adapter
from jaxalign.checkpoints import load as load_lib
from jaxalign.data import chat, loader, packing, pairs, records
from jaxalign.models.families import llama
from jaxalign.objectives import objective, policy
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.objectives.pairwise import PairwiseConfig, names
from jaxalign.objectives.policy import TokenLogps
from jaxalign.objectives.sft import SFTConfig
from jaxalign.objectives.stepwise import SDPOConfig, StepDPOConfig
from jaxalign.objectives.token_level import TDPOConfig
from jaxalign.objectives.token_weights import SePOConfig, TISConfig
from jaxalign.objectives.unpaired import BCOConfig, KTOConfig
from jaxalign.parallel import sharding
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from jaxalign.training import step as step_lib
from tests import scenes, synthetic


CONFIGS: list[objective.ObjectiveConfig] = [
    *(PairwiseConfig(name=name) for name in names() if name != "sigmoid"),
    PairwiseConfig(name="ipo", ld_alpha=0.4, f_divergence_type="js_divergence"),
    DPO2DConfig(),
    DPO2DConfig(
        form="vanilla", normalize="mean1", rejected_weight="inverted", sft_weight=0.3
    ),
    TDPOConfig(name="tdpo1"),
    TDPOConfig(name="tdpo2"),
    TISConfig(),
    SePOConfig(),
    SDPOConfig(),
    StepDPOConfig(),
    KTOConfig(undesirable_weight=1.5),
    BCOConfig(),
    SFTConfig(),
    SFTConfig(completion_only_loss=False),
    objective.MixConfig(mix={"sigmoid": 1.0, "sft": 0.2, "aot": 0.5}, beta=0.3),
]


ON_A_MESH = ("dpo", "dpo2d", "aot", "aot_unpaired", "tdpo2", "sepo", "kto", "mix")
"""Those whose arithmetic is more than one number a pair."""


def label(config: objective.ObjectiveConfig) -> str:
    completions = isinstance(config, SFTConfig) and not config.completion_only_loss
    return config.name + ("_with_prompt" if completions else "")


class Scored(NamedTuple):
    """The tokens of a layout's batch, and the chain rule from them to the adapters."""

    batch: Any
    tokens: TokenLogps
    pull: Any


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama, load_lib.load(tiny_llama)


@functools.cache
def dataset(directory: str, asked: objective.Needs) -> pairs.PairDataset:
    """Tokenise records in the form that an objective asks for, with weights."""
    rng = np.random.default_rng(0)
    raw = synthetic.feedback_records(7)
    found = [
        records.parse({**record, "weight": 1.0 if i % 3 else 0.25})
        for i, record in enumerate(raw)
    ]
    data = pairs.prepare(
        found,
        chat.load_tokenizer(directory),
        max_length=None,
        form=asked.form,
        end_of_turn=asked.end_of_turn,
        learn_prompt=asked.prompt,
    )
    if not asked.token_weights:
        return data
    # As if the records had them; that they are read is tested with the data.
    return data._replace(pairs=[_weighted(pair, rng) for pair in data.pairs])


def _weighted(pair: chat.TokenizedPair, rng: np.random.Generator) -> chat.TokenizedPair:
    def side(branch: chat.Branch) -> chat.Branch:
        size = branch.num_completion_tokens
        return branch._replace(weights=rng.normal(1, 1, size).astype(np.float32))

    return pair._replace(chosen=side(pair.chosen), rejected=side(pair.rejected))


def repeated_prompts(data: pairs.PairDataset, batch: Any) -> Any:
    """Lay the same pairs out with a prompt of its own before every response."""
    longest = 2 * max(pair.longest for pair in data.pairs)
    rows = len(data.pairs)

    def full(value: int) -> np.ndarray:
        return np.full((rows, longest), value, np.int32)

    tokens, positions, ids = full(0), full(0), full(0)
    source, target, response, segment = full(0), full(0), full(-1), full(-1)
    for r, pair in enumerate(data.pairs):
        place = wanted = 0
        for side, branch in enumerate((pair.chosen, pair.rejected)):
            if not len(branch.tokens):
                continue
            whole = np.concatenate([pair.prompt, branch.tokens])
            size, first = len(whole), len(pair.prompt) + branch.lead
            if pair.learn_prompt and side == 0:
                first = 1
            tokens[r, place : place + size] = whole
            positions[r, place : place + size] = np.arange(size)
            ids[r, place : place + size] = side + 1
            out = slice(wanted, wanted + size - first)
            source[r, out] = place + np.arange(first, size) - 1
            target[r, out] = whole[first:]
            response[r, out] = side
            known = size - first - branch.num_completion_tokens
            segment[r, out] = np.concatenate([np.full(known, -1), branch.segments])
            place, wanted = place + size, wanted + size - first
    inputs = type(batch.inputs)(tokens, positions, ids, full(0))
    completions = type(batch.completions)(source, target, response, segment)
    weights = None
    if data.pairs[0].chosen.weights is not None:
        weights = np.zeros((rows, longest), np.float32)
        for r, pair in enumerate(data.pairs):
            own = packing._weights_of(pair)
            weights[r, : len(own)] = own
    return batch._replace(inputs=inputs, completions=completions, token_weights=weights)


@functools.cache
def layouts(directory: str, asked: objective.Needs) -> dict[str, Scored]:
    """Score the same data in every layout; compiled once for all objectives."""
    data = dataset(directory, asked)
    loaded = load_lib.load(directory)
    single = loader.single_batch(data, row_length=int(data.lengths.max()))
    longest = int(data.lengths.max())
    alone = packing.build_rows(
        data.pairs,
        [(i,) for i in range(len(data.pairs))],
        packing.BatchShape(longest, 1, single.scores.shape[3], single.scores.shape[4]),
    )
    packed = loader.single_batch(data, row_length=2 * longest + 40)
    assert packed.pair_mask.shape[1] > 1
    batches = {"alone": alone, "packed": packed}
    batches["repeated"] = repeated_prompts(data, alone)
    found = {
        name: _score(loaded, batch, asked, None) for name, batch in batches.items()
    }
    if asked.form not in ("pairs", "labelled_kl") or not asked.end_of_turn:
        return found
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    rows = packing.build_rows(
        data.pairs,
        [(i,) for i in range(len(data.pairs))] + [()] * (-len(data.pairs) % 8),
        packing.BatchShape(longest, 1, single.scores.shape[3], single.scores.shape[4]),
    )
    found["eight devices"] = _score(
        load_lib.load(directory, mesh=mesh), rows, asked, mesh
    )
    return found


def _score(loaded: Any, batch: Any, asked: objective.Needs, mesh: Any) -> Scored:
    adapters = scenes.random_lora(loaded.variables["params"])
    if mesh is not None:
        where = sharding.param_shardings(adapters, mesh, llama.FAMILY.sharding)
        adapters = jax.tree.map(jax.device_put, adapters, where)
        batch = sharding.put_batch(batch, mesh)
    else:
        batch = jax.tree.map(jnp.asarray, batch)
    variables = {**loaded.variables, "lora": adapters}
    trainable, frozen = trees.partition(variables, adapter.trained(variables))

    def score(trainable: Any) -> TokenLogps:
        # With a reference for all, so that the same scores serve every objective.
        return policy.score_tokens(
            trainable, frozen, batch, None, model=loaded.model, kl=asked.kl
        )

    def pull(trainable: Any, slopes: TokenLogps) -> Any:
        return jax.vjp(score, trainable)[1](slopes)[0]

    tokens = jax.jit(score)(trainable)
    return Scored(batch, tokens, functools.partial(jax.jit(pull), trainable))


def loss_and_gradient(
    scored: Scored, config: objective.ObjectiveConfig, aspects: tuple[str, ...]
) -> tuple[float, Any]:
    def run(tokens: TokenLogps) -> Any:
        return objective.loss_of_tokens(
            tokens, scored.batch, config=config, aspects=aspects
        )[0]

    loss, slopes = jax.jit(jax.value_and_grad(run))(scored.tokens)
    return float(loss), jax.device_get(scored.pull(slopes))


def data_needs(config: objective.ObjectiveConfig) -> objective.Needs:
    """What the data of an objective depends on, so that objectives share layouts."""
    asked = objective.needs(config)
    pairs_form = asked.form == "pairs"
    return asked._replace(
        coupled=False,
        ranked=False,
        segments=False,
        max_score=None,
        reference=True,
        kl=pairs_form,
        token_weights=pairs_form,
    )


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_the_layout_changes_nothing(model, config) -> None:
    directory = str(model[0])
    asked = data_needs(config)
    aspects = dataset(directory, asked).aspects
    found = layouts(directory, asked)
    want, gradient = loss_and_gradient(found["alone"], config, aspects)
    assert np.isfinite(want)
    size = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    assert size > 0
    for name in set(found) - {"alone"}:
        if name == "eight devices" and config.name not in ON_A_MESH:
            continue
        loss, other = loss_and_gradient(found[name], config, aspects)
        assert loss == pytest.approx(want, rel=1e-5, abs=1e-6), name
        for left, right in zip(
            jax.tree.leaves(other), jax.tree.leaves(gradient), strict=True
        ):
            np.testing.assert_allclose(
                left, right, rtol=2e-3, atol=2e-4 * size, err_msg=name
            )


def test_a_cached_reference_is_the_live_one(model) -> None:
    """Every objective starts from the same token log-probabilities."""
    directory, loaded = str(model[0]), model[1]
    for config in (DPO2DConfig(), KTOConfig(), BCOConfig(), StepDPOConfig()):
        asked = objective.needs(config)
        batch = scenes.batch(dataset(directory, asked))
        split = {"params": None}, {"params": loaded.variables["params"]}
        live = policy.score_tokens(*split, batch, None, model=loaded.model)
        cached = policy.score_tokens(
            *split, batch._replace(ref_logps=live.reference), None, model=loaded.model
        )
        np.testing.assert_array_equal(cached.reference, live.reference)
        np.testing.assert_array_equal(cached.policy, live.policy)
        there = batch.completions.response >= 0
        assert np.all(np.asarray(live.reference)[there] < 0)


@pytest.mark.parametrize(
    "config",
    [
        PairwiseConfig(name="hinge"),
        PairwiseConfig(name="aot"),
        PairwiseConfig(name="aot_unpaired"),
        KTOConfig(),
        BCOConfig(),
        SFTConfig(),
        TDPOConfig(),
        objective.MixConfig(mix={"sigmoid": 1.0, "sft": 0.2, "aot": 0.5}),
    ],
    ids=label,
)
def test_accumulation_is_one_large_batch(model, config) -> None:
    """Also where the loss is of the whole batch: the rows of a step are one batch."""
    directory, loaded = model
    asked = objective.needs(config)
    data = dataset(str(directory), data_needs(config))
    adapters = scenes.random_lora(loaded.variables["params"])
    variables = {**loaded.variables, "lora": adapters}
    trainable, frozen = trees.partition(variables, adapter.trained(variables))
    options: dict[str, Any] = {"model": loaded.model, "config": config}
    loss_fn: Any = functools.partial(objective.loss_fn, **options, aspects=data.aspects)
    if asked.coupled:
        loss_fn = step_lib.Coupled(
            functools.partial(objective.score, **options),
            functools.partial(
                objective.loss_of_tokens, config=config, aspects=data.aspects
            ),
        )
    tx = optax.sgd(1.0)
    shape = loader.batch_shape([data], row_length=int(data.lengths.max()) + 20)
    results = []
    for rows, accumulation in ((16, 1), (4, 4)):
        plan = loader.BatchPlan(rows, accumulation, 0)
        source = loader.StepSource(data, shape, plan, num_epochs=1)
        assert len(source) == 1
        state = step_lib.init(trainable, tx, key=jax.random.key(0))
        step = jax.jit(step_lib.make_train_step(loss_fn, tx))
        results.append(step(state, frozen, jax.tree.map(jnp.asarray, source[0])))
    (one, first), (many, second) = results
    assert float(second["loss"].value) == pytest.approx(
        float(first["loss"].value), rel=1e-5
    )
    moved = 0.0
    for left, right, start in zip(
        *(jax.tree.leaves(t) for t in (many.trainable, one.trainable, trainable)),
        strict=True,
    ):
        size = float(np.abs(np.asarray(right) - np.asarray(start)).max())
        moved = max(moved, size)
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4 * size + 1e-7)
    assert moved > 0

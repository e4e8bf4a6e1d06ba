"""Objects in the place of names: objective, model, rows, optimiser, no directory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxalign import trees
from jaxalign.adapters.adapter import NoAdapter
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints import load
from jaxalign.data import records
from jaxalign.errors import UserError
from jaxalign.objectives import policy
from jaxalign.objectives.own import own
from jaxalign.objectives.pairwise import PairwiseConfig
from jaxalign.objectives.record import Losses, Needs, Objective, Term
from jaxalign.parallel.mesh import MeshConfig
from jaxalign.training import publish, run_directory
from jaxalign.training.config import TrainConfig
from jaxalign.training.loop import fit
from jaxalign.training.objects import OwnModel
from jaxalign.training.optimizer import OptimizerConfig
from jaxalign.training.setup import setup
from jaxalign.types import Model
from tests import synthetic


ROWS = synthetic.feedback_records(12)
HELD_OUT = synthetic.feedback_records(4, seed=1)


def config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": "",
        "data": "",
        "out": "",
        "max_steps": 3,
        "batch_rows": 2,
        "row_length": 192,
        "max_length": 96,
        "logging_steps": 1,
        "adapter": LoRAConfig(rank=2, alpha=4.0),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "report_to": "none",
    }
    return TrainConfig(**{**values, **changes})


def dpo(tokens: Any, batch: Any) -> Any:
    """DPO again, by hand."""
    ratio = policy.pair_logps(tokens, batch).logratios
    return jnp.logaddexp(0.0, -0.1 * (ratio[..., 0] - ratio[..., 1]))


def run(settings: TrainConfig, **objects: Any) -> tuple[Any, list[dict[str, float]]]:
    lines: list[dict[str, float]] = []
    with setup(settings, **objects) as session:
        state = fit(session, report=lambda step, line: lines.append(dict(line)))
    return state, lines


def of_names(**changes: Any) -> TrainConfig:
    return config(objective=PairwiseConfig(name="sigmoid"), **changes)


@pytest.fixture(scope="module")
def built_in(tiny_llama) -> tuple[Any, list[dict[str, float]]]:
    return run(of_names(model=str(tiny_llama)), rows=ROWS, eval_rows=HELD_OUT)


def same(state: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, state.trainable, other.trainable)


def test_an_own_loss_and_a_loaded_checkpoint_train_as_the_built_in(
    tiny_llama, built_in, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = load.load(tiny_llama)
    before = jax.tree.map(np.array, checkpoint.variables)
    state, lines = run(
        config(),
        objective=dpo,
        model=checkpoint,
        rows=[records.parse(row) for row in ROWS],
        eval_rows=HELD_OUT,
    )
    theirs = built_in[1]
    assert [line["loss"] for line in lines[1:]] == pytest.approx(
        [line["loss"] for line in theirs[1:]], rel=1e-6
    )
    assert lines[0]["eval_loss"] == pytest.approx(float(np.log(2)), rel=1e-6)
    assert lines[-1]["eval_loss"] == pytest.approx(theirs[-1]["eval_loss"], rel=1e-6)
    assert lines[-1]["loss"] < lines[1]["loss"]
    assert "rewards/margins" in lines[-1]
    jax.tree.map(np.testing.assert_array_equal, before, checkpoint.variables)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        state.trainable,
        built_in[0].trainable,
    )
    assert list(tmp_path.iterdir()) == []  # no file of any kind


def test_an_own_optimiser_is_what_steps(tiny_llama) -> None:
    still, lines = run(of_names(model=str(tiny_llama)), rows=ROWS, tx=optax.sgd(0.0))
    assert "learning_rate" not in lines[-1]
    assert all(
        not leaf.any() for path, leaf in synthetic_paths(still) if path.endswith("b']")
    )
    theirs = OptimizerConfig(learning_rate=1e-2)
    moved, _ = run(
        of_names(model=str(tiny_llama), optimizer=theirs),
        rows=ROWS,
        tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    )
    assert any(leaf.any() for path, leaf in synthetic_paths(moved) if "'b'" in path)


def synthetic_paths(state: Any) -> list[tuple[str, np.ndarray]]:
    leaves = jax.tree_util.tree_leaves_with_path(state.trainable)
    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves]


def test_accumulation_and_a_mesh_do_as_for_the_built_in(tiny_llama, built_in) -> None:
    settings = config(
        batch_rows=4, mesh=MeshConfig(data=2, fsdp=2), model=str(tiny_llama)
    )
    _, lines = run(settings, objective=dpo, rows=ROWS)
    halves = config(gradient_accumulation_steps=2, model=str(tiny_llama))
    _, others = run(halves, objective=dpo, rows=ROWS)
    assert [line["loss"] for line in lines] == pytest.approx(
        [line["loss"] for line in others], rel=1e-5
    )


def test_an_objective_of_two_terms_and_a_reference_free_one(tiny_llama) -> None:
    def likelihood(tokens: Any, batch: Any) -> Losses:
        return Losses(-policy.pair_logps(tokens, batch).logps[..., 0])

    mixed = Objective(
        Needs(),
        (
            Term(lambda t, b: Losses(dpo(t, b)), weight=1.0, name="mine"),
            Term(likelihood, weight=0.5, name="nll"),
        ),
        beta=0.1,
    )
    _, lines = run(config(model=str(tiny_llama)), objective=mixed, rows=ROWS)
    first = lines[0]
    assert first["loss"] == pytest.approx(
        first["loss/mine"] + 0.5 * first["loss/nll"], rel=1e-5
    )
    free = own(likelihood, needs=Needs(reference=False))
    _, lines = run(config(model=str(tiny_llama)), objective=free, rows=ROWS)
    assert lines[0]["loss"] == pytest.approx(first["loss/nll"], rel=1e-5)


def test_a_model_of_another_kind_trains_by_pattern(tiny_llama) -> None:
    checkpoint = load.load(tiny_llama)
    model = OwnModel(checkpoint.model, checkpoint.variables)
    settings = config(
        model=str(tiny_llama), adapter=NoAdapter(), trainable=("norm/scale",)
    )
    state, lines = run(settings, objective=dpo, model=model, rows=ROWS)
    _, theirs = run(settings, objective=PairwiseConfig(name="sigmoid"), rows=ROWS)
    assert [line["loss"] for line in lines] == pytest.approx(
        [line["loss"] for line in theirs], rel=1e-5
    )
    assert len(jax.tree.leaves(state.trainable)) == 1
    with pytest.raises(UserError, match="adapter.name lora is for the library's own"):
        setup(config(model=str(tiny_llama)), model=model, rows=ROWS)


class Bigrams(nnx.Module):
    """The next token's logits by the last one, and a counter."""

    def __init__(self, vocabulary: int, rngs: nnx.Rngs) -> None:
        self.table = nnx.Embed(vocabulary, 8, rngs=rngs)
        self.head = nnx.Linear(8, vocabulary, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


@pytest.fixture(scope="module")
def bigrams(tiny_llama) -> tuple[Any, OwnModel]:
    size = load.open_config(tiny_llama)[0].text.vocab_size
    graph, state = nnx.split(Bigrams(size, nnx.Rngs(0)))
    model = Model(
        lambda state, inputs: nnx.merge(graph, state).table(inputs.tokens),
        lambda state, hidden: nnx.merge(graph, state).head(hidden),
    )
    return graph, OwnModel(model, state)


@pytest.mark.parametrize("trainable", ["(table|head)/.*", "head/.*"])
def test_an_nnx_state_trains_as_plain_optax_would(
    tiny_llama, bigrams, trainable
) -> None:
    _, given = bigrams
    before = jax.tree.map(jnp.copy, given.variables)
    settings = of_names(
        model=str(tiny_llama), adapter=NoAdapter(), trainable=(trainable,), max_steps=2
    )
    lines: list[Any] = []
    session = setup(settings, model=given, rows=ROWS, eval_rows=HELD_OUT, tx=SGD)
    batches = [jax.tree.map(jnp.asarray, session.source[step]) for step in (0, 1)]
    fit(session, report=lambda step, line: lines.append(dict(line)))
    assert lines[0]["eval_loss"] == pytest.approx(float(np.log(2)), rel=1e-6)
    assert lines[-1]["eval_loss"] < float(np.log(2))

    mask = trees.mask_from_patterns(before, [trainable])
    trained, rest = trees.partition(before, mask)
    opt_state = SGD.init(trained)
    for batch in batches:
        one = jax.tree.map(lambda leaf: leaf[0], batch)
        frozen = policy.WithReference(rest, before)

        def loss_fn(trained: Any, frozen: Any = frozen, one: Any = one) -> Any:
            tokens = policy.score_tokens(trained, frozen, one, None, model=given.model)
            return (dpo(tokens, one) * one.pair_mask).sum() / one.pair_mask.sum()

        updates, opt_state = SGD.update(jax.grad(loss_fn)(trained), opt_state, trained)
        trained = optax.apply_updates(trained, updates)

    found = session.variables["params"]
    assert isinstance(found, nnx.State)
    want = trees.combine(trained, rest)
    for path, leaf in trees.by_path(found).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            np.testing.assert_allclose(leaf, trees.by_path(want)[path], atol=1e-6)
    moved = trees.by_path(found)["table/embedding/value"]
    still = trees.by_path(before)["table/embedding/value"]
    assert bool(jnp.all(moved == still)) == trainable.startswith("head")
    # What was given is still there, and the session's model takes its variables.
    np.testing.assert_array_equal(
        trees.by_path(given.variables)["head/kernel/value"],
        trees.by_path(before)["head/kernel/value"],
    )
    logps = [
        policy.policy_token_logps(variables, one, model=model)
        for variables, model in (
            (session.variables, session.model),
            (found, given.model),
        )
    ]
    np.testing.assert_array_equal(*logps)


SGD = optax.sgd(0.5)


def test_a_run_of_an_nnx_state_goes_on(tiny_llama, bigrams, tmp_path) -> None:
    _, given = bigrams
    settings = of_names(
        model=str(tiny_llama), adapter=NoAdapter(), trainable=("head/.*",), max_steps=2
    )
    whole, _ = run(settings, model=given, rows=ROWS)
    kept = dataclasses.replace(settings, out=str(tmp_path / "run"), save_steps=1)

    def stop(step: int, line: Any) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with setup(kept, model=given, rows=ROWS) as session:
        with pytest.raises(KeyboardInterrupt):
            fit(session, report=stop)
    with setup(kept, model=given, rows=ROWS) as session:
        assert session.step == 1
        same(fit(session), whole)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (optax.sgd(1e-2), r"0/count \(\(\) there, none now\); 0/mu/lora/"),
        (optax.lion(1e-2), r"0/nu/lora/.* there, none now\)"),
        (
            optax.chain(optax.clip(1.0), optax.adam(1e-2)),
            r"0/mu/lora/layers_0_3/mlp/down_proj/a \(\(3, 56, 2\) there, none now\)",
        ),
    ],
    ids=["sgd", "lion", "clipped"],
)
def test_another_optimiser_cannot_go_on(interrupted, other, match) -> None:
    settings = interrupted
    words = f"was trained with another optimiser: its state at step 1 .*{match}"
    with pytest.raises(UserError, match=words):
        setup(settings, rows=ROWS, tx=other)
    # Its numbers may change: a rate is nothing that is saved.
    with setup(settings, rows=ROWS, tx=optax.adam(1e-3)) as session:
        assert session.step == 1


@pytest.fixture(scope="module")
def interrupted(tiny_llama, tmp_path_factory) -> TrainConfig:
    """A run of one step of Adam."""
    out = tmp_path_factory.mktemp("interrupted") / "run"
    settings = of_names(model=str(tiny_llama), out=str(out), save_steps=1)

    def stop(step: int, line: Any) -> None:
        raise KeyboardInterrupt

    with setup(settings, rows=ROWS, tx=optax.adam(1e-2)) as session:
        with pytest.raises(KeyboardInterrupt):
            fit(session, report=lambda step, line: step and stop(step, line))
    return settings


def test_what_of_a_state_cannot_be_trained_is_said(tiny_llama, bigrams) -> None:
    _, given = bigrams
    everything = of_names(
        model=str(tiny_llama), adapter=NoAdapter(), trainable=(".*",), max_steps=2
    )
    with pytest.raises(UserError, match="rngs/count/value': uint32 has no gradient"):
        setup(everything, model=given, rows=ROWS)
    lora = of_names(model=str(tiny_llama))
    with pytest.raises(UserError, match="adapter=NoAdapter"):
        setup(lora, model=given, rows=ROWS)
    parameters = OwnModel(given.model, {"head": jnp.ones(2)})
    with pytest.raises(UserError, match="OwnModel: got a mapping of head: expected"):
        setup(everything, model=parameters, rows=ROWS)


def test_a_run_of_own_parts_goes_on_and_knows_another_objective(
    tiny_llama, tmp_path
) -> None:
    settings = config(model=str(tiny_llama), out=str(tmp_path / "run"), save_steps=1)
    whole, _ = run(config(model=str(tiny_llama)), objective=dpo, rows=ROWS)

    def stop(step: int, line: Any) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with setup(settings, objective=dpo, rows=ROWS) as session:
        with pytest.raises(KeyboardInterrupt):
            fit(session, report=stop)
    with setup(settings, objective=dpo, rows=ROWS) as session:
        assert session.step == 1
        same(fit(session), whole)
    kept = (tmp_path / "run/config.yaml").read_text()
    assert "name: dpo" in kept and "code: " in kept
    # Its files can be read without the function, but its loss cannot be computed.
    read = run_directory.read_config(tmp_path / "run")
    assert read.objective == own(dpo)
    publish.publish_run(tmp_path / "run", tmp_path / "adapter", form="peft")
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    again = dataclasses.replace(read, out="")
    with pytest.raises(UserError, match="'dpo' was a function given in Python"):
        setup(again, rows=ROWS)
    with pytest.raises(UserError, match="objective.code"):
        setup(settings, objective=lambda t, b: dpo(t, b), rows=ROWS)
    with pytest.raises(UserError, match="the data has changed"):
        setup(settings, objective=dpo, rows=ROWS[:-1])


@pytest.mark.parametrize(
    ("objects", "match"),
    [
        ({}, "there is no data: give rows="),
        ({"rows": ROWS}, "there is no model: give model="),
        ({"rows": [], "model": "tiny"}, "rows: there is none"),
        ({"rows": [{"prompt": "p"}], "model": "tiny"}, "list row 1: .*chosen"),
    ],
)
def test_what_is_missing_is_said(tiny_llama, objects, match) -> None:
    objects = dict(objects)
    model = str(tiny_llama) if objects.pop("model", None) else ""
    with pytest.raises(UserError, match=match):
        setup(config(model=model), objective=dpo, **objects)


def test_evaluations_of_nothing_are_said(tiny_llama, capsys) -> None:
    settings = config(model=str(tiny_llama), eval_steps=2)
    setup(settings, objective=dpo, rows=ROWS)
    assert "eval_steps 2 has no effect without data" in capsys.readouterr().err


def test_a_mean_is_no_loss_of_pairs(tiny_llama) -> None:
    with pytest.raises(ValueError, match="one loss for each pair"):
        setup(
            config(model=str(tiny_llama)),
            objective=lambda t, b: dpo(t, b).mean(),
            rows=ROWS,
        )


def test_groups_that_the_adapter_cuts_are_said_with_their_cure(tiny_llama) -> None:
    settings = config(adapter=LoRAConfig(rank=2, layers="0"))
    with pytest.raises(UserError, match=r"load_hf\(PATH, groups="):
        setup(settings, objective=dpo, model=load.load(tiny_llama), rows=ROWS)

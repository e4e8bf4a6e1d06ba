"""Models are values: what is loaded twice finds the programs of the first time."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.checkpoints import load as load_lib
from jaxalign.evaluation import score
from jaxalign.generation import answer_logps, engine, text_model
from jaxalign.models import decoder
from jaxalign.objectives import policy
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.objectives.objective import MixConfig
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from tests import scenes


@pytest.fixture
def compiled(caplog: pytest.LogCaptureFixture):
    """Return a context in which compiled programs are listed by name."""

    @contextmanager
    def listing() -> Iterator[list[str]]:
        names: list[str] = []
        caplog.clear()
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            yield names
        names += [
            record.getMessage()
            for record in caplog.records
            if record.getMessage().startswith("Compiling")
        ]

    return listing


def test_equal_arguments_give_equal_models(tiny_llama) -> None:
    config = load_lib.open_config(tiny_llama)[0].text
    again = load_lib.open_config(tiny_llama)[0].text
    mesh, other_mesh = (make_mesh(MeshConfig(data=n, fsdp=8 // n)) for n in (8, 4))
    options = {"groups": ((0, 1), (1, 3)), "dtype": jnp.bfloat16, "mesh": mesh}
    made = decoder.make_model(config, **options)
    # A dtype and the groups may be spelled in several ways.
    same = {
        "groups": [(0, 1), (1, 3)],
        "dtype": "bfloat16",
        "mesh": make_mesh(MeshConfig(data=8)),
    }
    for options_again in (
        options,
        options | same,
        options | {"dtype": np.dtype("bfloat16")},
    ):
        equal = decoder.make_model(again, **options_again)
        assert equal == made and hash(equal) == hash(made)
    others = (
        {"groups": None},
        {"dtype": jnp.float32},
        {"mesh": other_mesh},
        {"mesh": None},
        {"remat": "dots"},
        {"lora_dropout": 0.1},
        {"attention_implementation": "dense"},
        {"attention_block": 32},
        {"attention_sequences": 4},
    )
    for changed in others:
        assert decoder.make_model(config, **options | changed) != made, changed


def test_a_second_load_traces_nothing(tiny_llama) -> None:
    batch = scenes.batch(scenes.dataset(tiny_llama, 2))
    traced = []

    @functools.partial(jax.jit, static_argnames="model")
    def run(variables, batch, *, model):
        traced.append(model)
        return policy.policy_token_logps(variables, batch, model=model)

    first, second = load_lib.load(tiny_llama), load_lib.load(tiny_llama)
    assert first.model == second.model and hash(first.model) == hash(second.model)
    values = [run(each.variables, batch, model=each.model) for each in (first, second)]
    np.testing.assert_array_equal(*values)
    assert len(traced) == 1
    # Its functions alone are found again too.
    inputs = batch.inputs
    lowered = [
        jax.jit(x.model.hidden_fn).trace(x.variables, inputs) for x in (first, second)
    ]
    assert lowered[0].jaxpr is lowered[1].jaxpr


def test_dropout_is_drawn_anew_from_an_equal_model(tiny_llama) -> None:
    loaded = load_lib.load(tiny_llama, lora_dropout=0.5)
    adapters = scenes.random_lora(loaded.variables["params"])
    inputs = scenes.batch(scenes.dataset(tiny_llama, 1)).inputs
    variables = {**loaded.variables, "lora": adapters}
    model = load_lib.load(tiny_llama, lora_dropout=0.5).model
    keys = (None, None, *jax.random.split(jax.random.key(0), 2))
    run = jax.jit(model.hidden_fn)
    plain, again, one, other = (
        np.asarray(run(variables, inputs, key=key)) for key in keys
    )
    np.testing.assert_array_equal(plain, again)
    assert np.abs(plain - one).max() > 0.01 < np.abs(one - other).max()


@pytest.mark.parametrize(
    "objective",
    [
        DPO2DConfig(aspect_weights={"correctness": 2.0, "helpfulness": 1.0}),
        MixConfig(mix={"sigmoid": 1.0, "sft": 0.5}),
    ],
    ids=["dpo2d", "mix"],
)
def test_a_second_score_compiles_nothing(tiny_llama, compiled, objective) -> None:
    data = scenes.dataset(tiny_llama, 3)

    def scored():
        one = load_lib.load(tiny_llama)
        scorer = score.PolicyAndReference(*(one.model, one.variables) * 2)
        return list(score.score_records(data, scorer, objective=objective))

    first = scored()
    with compiled() as names:
        assert scored() == first
    assert not names


def test_a_second_engine_compiles_nothing(tiny_llama, compiled) -> None:
    def texts():
        made = text_model.load(str(tiny_llama))
        request = engine.Request([5, 6, 7], engine.Sampling(max_new_tokens=4))
        found = engine.generate(made.model, made.variables, [request], slots=2)
        return found[0][0].tokens

    first = texts()
    with compiled() as names:
        assert texts() == first
    assert not names


def test_a_second_judge_compiles_nothing(tiny_llama, compiled) -> None:
    asked = [answer_logps.PromptWithAnswers([5, 6, 7], [[8], [9, 10]])]

    def values():
        one = load_lib.load(tiny_llama)
        return answer_logps.choose(one.model, one.variables, asked, row_length=32)

    first = values()
    with compiled() as names:
        np.testing.assert_array_equal(values()[0].logps, first[0].logps)
    assert not names

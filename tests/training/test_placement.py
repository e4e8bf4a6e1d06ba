"""One placement: a step is compiled once, by hand, in ``fit`` and on a mesh."""

import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import optax
import pytest

from jaxalign import trees
from jaxalign.adapters import adapter, lora
from jaxalign.checkpoints import adapter_start, load
from jaxalign.data import chat, loader, pairs, records
from jaxalign.objectives import objective
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.parallel import sharding
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from jaxalign.training import compilation
from jaxalign.training import step as step_lib
from jaxalign.training.loop import fit
from jaxalign.training.setup import setup
from tests import synthetic
from tests.training.test_own_parts import config, dpo


ROWS = synthetic.feedback_records(8)


class Compilations(logging.Handler):
    """What JAX says that it compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def of(self, name: str) -> int:
        """Return how often a function was compiled."""
        found = [f"Compiling jit({name})", f"Compiling {name} "]
        return sum(any(line.startswith(f) for f in found) for line in self.lines)


@pytest.fixture
def compilations() -> Iterator[Compilations]:
    seen = Compilations()
    logger = logging.getLogger("jax")
    logger.addHandler(seen)
    with jax.log_compiles():
        yield seen
    logger.removeHandler(seen)


def parts(model: Any, mesh: Any = None) -> tuple[Any, Any, Any, Any]:
    """Do as the README's recipe does."""
    base = load.load(model, mesh=mesh)
    config = lora.LoRAConfig(rank=2)
    own = {"lora": lora.init(jax.random.key(0), base.variables["params"], config)}
    if mesh is not None:
        own = adapter_start.place(own, mesh, base.family)
    variables = {**base.variables, **own}
    trainable, frozen = trees.partition(variables, adapter.trained(variables))
    data = pairs.prepare(
        [records.parse(row) for row in ROWS],
        chat.load_tokenizer(str(model)),
        max_length=96,
    )
    loss_fn = functools.partial(
        objective.loss_fn,
        model=base.model,
        config=DPO2DConfig(),
        aspects=data.aspects,
    )
    return loss_fn, trainable, frozen, loader.single_batch(data, rows=8)


def test_the_recipe_compiles_once(tiny_llama, compilations) -> None:
    loss_fn, trainable, frozen, batch = parts(tiny_llama)

    def by_hand(trainable: Any, frozen: Any, batch: Any) -> Any:
        return jax.value_and_grad(loss_fn, has_aux=True)(trainable, frozen, batch, None)

    step = jax.jit(by_hand)
    tx = optax.adamw(1e-4)
    opt_state = tx.init(trainable)
    for _ in range(3):
        _, grads = step(trainable, frozen, batch)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    assert compilations.of("by_hand") == 1


def test_a_whole_step_compiles_once_with_the_optimiser_in_it(
    tiny_llama, compilations
) -> None:
    loss_fn, trainable, frozen, batch = parts(tiny_llama)
    tx = optax.adamw(1e-4)
    state = step_lib.init(trainable, tx, key=jax.random.key(0))
    step = jax.jit(step_lib.make_train_step(loss_fn, tx))
    batch = jax.tree.map(lambda leaf: leaf[None], batch)
    for _ in range(3):
        state, _ = step(state, frozen, batch)
    assert compilations.of("train_step") == 1


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2)])
def test_on_a_mesh_it_compiles_once_too(tiny_llama, compilations, mesh) -> None:
    devices = make_mesh(mesh)
    loss_fn, trainable, frozen, batch = parts(tiny_llama, devices)
    tx = optax.adamw(1e-4)
    state = step_lib.init(trainable, tx, key=jax.random.key(0), mesh=devices)
    step = compilation.jit_step(step_lib.make_train_step(loss_fn, tx), state)
    stacked = jax.tree.map(lambda leaf: leaf[None], batch)
    on_devices = sharding.put_batch(stacked, devices, leading=1)
    for _ in range(3):
        state, _ = step(state, frozen, on_devices)
    assert compilations.of("train_step") == 1


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_fit_compiles_once(tiny_llama, compilations, mesh) -> None:
    settings = config(model=str(tiny_llama), mesh=mesh, batch_rows=4)
    fit(setup(settings, objective=dpo, rows=ROWS))
    assert compilations.of("train_step") == 1


def test_loaded_weights_are_tied_to_no_device(tiny_llama) -> None:
    loaded = load.load(tiny_llama).variables
    assert not any(leaf.committed for leaf in jax.tree.leaves(loaded))
    codes = load.load(tiny_llama, quantize="int8").variables
    assert not any(leaf.committed for leaf in jax.tree.leaves(codes))

"""What must not change a number: other pairs' pictures, order, budgets, packing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import trees
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.renderer import open_renderer
from jaxalign.data import loader, packing, pairs, records
from jaxalign.data.image_rows import Seeing
from jaxalign.objectives import objective, policy
from jaxalign.objectives.pairwise import PairwiseConfig


KINDS = ("llava", "smolvlm", "qwen2_5_vl")

_logps = jax.jit(policy.policy_token_logps, static_argnames="model")


@pytest.fixture(scope="module", params=KINDS)
def told(request: Any, scene: Any) -> tuple[Any, load_lib.Checkpoint, Any]:
    """Return a scene, its checkpoint and its pairs."""
    made = scene(request.param)
    data = pairs.prepare(
        records.read(made.data), open_renderer(made.model), max_length=None
    )
    return made, load_lib.load(made.model), data


def logps_of(
    loaded: Any, data: pairs.PairDataset, rows: Any, shape: packing.BatchShape
) -> list[np.ndarray]:
    """Return the log-probabilities of every pair's completions, laid out as told."""
    assert data.patcher is not None
    batch = packing.build_rows(data.pairs, rows, shape, seeing=Seeing(data.patcher))
    values = np.asarray(_logps(loaded.variables, batch, model=loaded.model))
    found = {}
    for r, row in enumerate(rows):
        for slot, index in enumerate(row):
            mine = batch.completions.response[r] // 2 == slot
            found[index] = values[r][mine & (batch.completions.response[r] >= 0)]
    return [found[index] for index in range(len(data.pairs))]


def test_another_picture_changes_its_own_pair_alone(told) -> None:
    made, loaded, data = told
    row = (0, 1, 2, 3)
    part = data._replace(pairs=data.pairs[:4])
    shape = loader.batch_shape([part], row_length=int(part.lengths.sum()) + 3)
    assert packing.pairs_per_row(part.lengths, shape.row_length) >= 4
    before = logps_of(loaded, part, [row], shape)
    mine = part.pairs[2]
    other = mine.images[0]._replace(source=made.data.parent / "picture 5.png")
    # Of the same size, so that the text stays as it is.
    width, height = mine.images[0].size()
    changed = made.data.parent / "changed.png"
    other.open().resize((width, height)).save(changed)
    shown = (mine.images[0]._replace(source=changed), *mine.images[1:])
    part.pairs[2] = mine._replace(images=shown)
    after = logps_of(loaded, part, [row], shape)
    for index in (0, 1, 3):
        np.testing.assert_array_equal(before[index], after[index])
    assert np.abs(before[2] - after[2]).max() > 1e-4


def test_order_budgets_and_packing_change_nothing(told) -> None:
    _, loaded, data = told
    expected = None
    longest, most = int(data.lengths.max()), int(data.units.max())
    assert data.patcher is not None
    unit = data.patcher.merge**2
    layouts = (
        (longest, None, False, 0),
        (2 * longest + 11, None, True, 1),
        (2 * longest + 11, most * unit, True, 2),
        (3 * longest, 2 * most * unit + 1, True, 3),
    )
    for length, patches, pack, seed in layouts:
        shape = loader.batch_shape(
            [data], row_length=length, pack=pack, row_patches=patches
        )
        plan = loader.BatchPlan(1, 1, seed)
        rows = loader.StepSource(data, shape, plan, num_epochs=1).rows_of_epoch(0)
        assert max(map(len, rows)) > 1 or not pack
        found = logps_of(loaded, data, rows, shape)
        # And the pairs of a row in another order.
        turned = [tuple(reversed(row)) for row in reversed(rows)]
        again = logps_of(loaded, data, turned, shape)
        expected = found if expected is None else expected
        for one, two, three in zip(expected, found, again, strict=True):
            np.testing.assert_allclose(two, one, rtol=0, atol=2e-5)
            np.testing.assert_allclose(three, one, rtol=0, atol=2e-5)


@pytest.mark.parametrize("trained", ["decoder", "connector", "tower"])
def test_a_frozen_tower_is_run_once(told, trained) -> None:
    """Counted by a model that says what it is asked for, and by its gradients."""
    _, loaded, data = told
    calls: list[Any] = []
    assert loaded.model.image_fn is not None

    def counted(variables: Any, images: Any, states: bool = False) -> Any:
        assert loaded.model.image_fn is not None
        if images.patches is not None:  # else the tower's states are there already
            calls.append(variables)
        return loaded.model.image_fn(variables, images, states=states)

    def hidden(variables: Any, inputs: Any, key: Any = None, features: Any = None):
        if features is None:
            features = counted(variables, inputs.images)
        return loaded.model.hidden_fn(variables, inputs, key=key, features=features)

    model = loaded.model._replace(image_fn=counted, hidden_fn=hidden)
    params = loaded.variables["params"]
    begin = {"decoder": "layers_", "connector": "connector/", "tower": "vision/"}[
        trained
    ]
    mask = trees.mask_from_patterns(params, [f"{begin}.*"])
    trainable, rest = trees.partition(params, mask)
    # As training has it: the starting values of what is trained are the reference's.
    start = jax.tree.map(lambda leaf: leaf * 1.1, trainable)
    frozen = {"params": rest, policy.REFERENCE: {"params": start}}
    batch = jax.tree.map(jnp.asarray, loader.single_batch(data))

    def loss_of(trainable: Any) -> Any:
        return objective.loss_fn(
            *({"params": trainable}, frozen, batch, None),
            model=model,
            config=PairwiseConfig(name="sigmoid"),
        )[0]

    shapes = jax.eval_shape(jax.value_and_grad(loss_of), trainable)
    assert len(calls) == (2 if trained == "tower" else 1)
    gradients = jax.tree.leaves_with_path(shapes[1])
    assert gradients
    assert all(trees.path_string(path).startswith(begin) for path, _ in gradients)
    if trained == "decoder":
        return
    # The reference sees by its own tower or connector.
    alone = policy.policy_token_logps(
        {"params": trees.combine(start, rest)}, batch, model=loaded.model
    )
    tokens = policy.score_tokens(
        {"params": trainable}, frozen, batch, None, model=loaded.model
    )
    np.testing.assert_allclose(tokens.reference, alone, rtol=0, atol=1e-5)
    assert np.abs(np.asarray(tokens.logratios)).max() > 1e-3

"""Gradients of tower, connector and decoder beside torch's."""

import copy
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import trees
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.renderer import open_renderer
from jaxalign.data import loader, pairs, records
from jaxalign.objectives import objective, policy
from jaxalign.objectives.pairwise import PairwiseConfig
from jaxalign.objectives.sft import SFTConfig
from tests import vision_models, vision_records


BETA = 0.05

LOSSES = {
    "dpo": PairwiseConfig(name="sigmoid", beta=BETA),
    "sft": SFTConfig(),
}


def torch_gradients(scene: Any, reference: Path, name: str) -> tuple[float, Any]:
    """Return transformers' loss of all records, and the model with its gradients."""
    import torch

    mine, base = scene.theirs(), vision_records.reference(reference)
    model, place = copy.deepcopy(mine.model), scene.data.parent
    sums = []
    for row in scene.rows:
        answers = [mine.answer(row, side, place) for side in ("chosen", "rejected")]
        logps = [answer.log_probs(model) for answer in answers]
        with torch.no_grad():
            fixed = [answer.log_probs(base.model).sum() for answer in answers]
        if name == "sft":
            sums.append((-logps[0].sum(), len(logps[0])))
            continue
        ratios = [one.sum() - other for one, other in zip(logps, fixed, strict=True)]
        margin = BETA * (ratios[0] - ratios[1])
        sums.append((-torch.nn.functional.logsigmoid(margin), 1))
    values, weights = zip(*sums, strict=True)
    loss = torch.stack(values).sum() / sum(weights)
    loss.backward()
    return loss.item(), model


def as_checkpoint(model: Any, like: Path, place: Path) -> Any:
    """Return gradients in the place of the weights, as the library lays these out."""
    import torch

    shutil.copytree(like, place)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.zeros(()) if weight.grad is None else weight.grad)
    model.save_pretrained(place)
    return load_lib.load(place).variables["params"]


@pytest.mark.parametrize("kind", vision_models.KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_all_weights_are_torchs(scene, kind, name, tmp_path) -> None:
    made, config = scene(kind), LOSSES[name]
    other = vision_models.write(kind, tmp_path / "reference", seed=1)
    value, model = torch_gradients(made, other, name)
    expected = as_checkpoint(model, made.model, tmp_path / "gradients")
    loaded, base = load_lib.load(made.model), load_lib.load(other)
    needs = objective.needs(config)
    data = pairs.prepare(
        *(records.read(made.data), open_renderer(made.model)),
        max_length=None,
        form=needs.form,
    )
    batch = loader.single_batch(data, row_length=420)
    assert batch.pair_mask.shape[1] > 1

    def loss_of(params: Any) -> Any:
        return objective.loss_fn(
            {"params": params},
            {policy.REFERENCE: {"params": base.variables["params"]}},
            *(jax.tree.map(jnp.asarray, batch), None),
            model=loaded.model,
            config=config,
            aspects=data.aspects,
        )[0]

    loss, found = jax.jit(jax.value_and_grad(loss_of))(loaded.variables["params"])
    assert float(loss) == pytest.approx(value, rel=1e-5)
    found = trees.by_path(found)
    expected = trees.by_path(expected)
    assert found.keys() == expected.keys()
    for part in ("vision/", "connector/", "layers_"):
        mine = {k: np.abs(v).max() for k, v in expected.items() if k.startswith(part)}
        assert max(mine.values()) > 0
        for path in mine:
            # What a key's bias adds is the same for all keys: its gradient is rounding.
            largest = mine[path.replace("k_proj/bias", "q_proj/bias")]
            np.testing.assert_allclose(
                found[path],
                expected[path],
                rtol=0,
                atol=1e-4 * largest,
                err_msg=path,
            )

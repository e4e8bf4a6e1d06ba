"""From text to loss: the library against transformers and the float64 formulas.

A tiny Llama with random adapters is compared with its merged export in transformers,
its reference with the untouched checkpoint; nothing between the text and the loss is
shared.
"""

from typing import Any

import jax
import numpy as np
import pytest

from jaxalign import trees
from jaxalign.adapters import adapter
from jaxalign.checkpoints import export
from jaxalign.checkpoints import load as load_lib
from jaxalign.objectives import objective, pairwise
from jaxalign.objectives.policy import score_tokens
from jaxalign.objectives.stepwise import SDPOConfig, StepDPOConfig
from jaxalign.objectives.token_level import TDPOConfig
from tests import scenes


torch = pytest.importorskip("torch")

from tests.objectives import reference_objectives  # noqa: E402


CONFIGS: list[objective.ObjectiveConfig] = [
    *(pairwise.PairwiseConfig(name=name) for name in pairwise.names()),
    TDPOConfig(name="tdpo1"),
    TDPOConfig(name="tdpo2"),
    SDPOConfig(),
    StepDPOConfig(),
]


@pytest.fixture(scope="module")
def scene(tiny_llama, tmp_path_factory):
    data = scenes.dataset(tiny_llama, 5)
    batch = scenes.batch(data, row_length=2 * int(data.lengths.max()))
    loaded = load_lib.load(tiny_llama)
    variables = {
        **loaded.variables,
        "lora": scenes.random_lora(loaded.variables["params"]),
    }
    split = trees.partition(variables, adapter.trained(variables))
    tokens = jax.jit(
        lambda: score_tokens(*split, batch, None, model=loaded.model, kl=True)
    )()
    merged = export.save_hf(
        variables, tmp_path_factory.mktemp("x") / "merged", like=loaded
    )
    values = torch_values(
        scenes.torch_model(merged), scenes.torch_model(tiny_llama), data
    )
    return batch, tokens, to_rows(batch, values)


def torch_values(policy: Any, reference: Any, data: Any) -> dict[Any, np.ndarray]:
    """Return for every response its [policy, reference, KL] by token, unpacked."""
    found = {}
    for pair in data.pairs:
        for side, branch in enumerate((pair.chosen, pair.rejected)):
            ids = np.concatenate([pair.prompt, branch.tokens]).astype(np.int64)
            with torch.no_grad():
                mine, ref = (
                    torch.log_softmax(
                        model(torch.from_numpy(ids[None])).logits[0].double(), -1
                    )
                    for model in (policy, reference)
                )
            begin = len(pair.prompt) + branch.lead
            at, target = np.arange(begin - 1, len(ids) - 1), ids[begin:]
            kl = (ref.exp() * (ref - mine)).sum(-1).numpy()[at]
            key = (*pair.prompt.tolist(), -1, side, *target.tolist())
            found[key] = np.stack(
                [mine.numpy()[at, target], ref.numpy()[at, target], kl]
            )
    return found


def to_rows(batch: Any, values: dict[Any, np.ndarray]) -> list[Any]:
    """Put values by response where the batch has their tokens."""
    response = np.asarray(batch.completions.response)
    target = np.asarray(batch.completions.target)
    rows = np.zeros((3, *response.shape))
    for row in range(len(response)):
        for which in range(2 * batch.pair_mask.shape[1]):
            mine = response[row] == which
            if mine.any():
                slot, side = divmod(which, 2)
                prompt = scenes._prompt(batch, row, slot)
                key = (*prompt, -1, side, *target[row][mine].tolist())
                rows[:, row, mine] = values[key]
    return [torch.from_numpy(part) for part in rows]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_loss_of_a_batch(scene, config) -> None:
    batch, tokens, (policy, reference, kl) = scene
    loss, metrics = objective.loss_of_tokens(tokens, batch, config=config)
    options = {name: value for name, value in vars(config).items() if value is not None}
    examples = reference_objectives.examples_of(policy, reference, kl, batch)
    want = float(reference_objectives.reference_loss(config.name, examples, options))
    assert float(loss) == pytest.approx(want, rel=1e-3, abs=1e-5)
    assert float(metrics["loss"].value) == pytest.approx(want, rel=1e-3, abs=1e-5)

"""What several tests need: tokenised pairs, batches, log-probs by transformers."""

import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import trees
from jaxalign.adapters import lora
from jaxalign.data import chat, loader, pairs, records
from jaxalign.data.pairs import PairDataset
from jaxalign.objectives import policy
from jaxalign.types import PreferenceBatch
from tests import synthetic


token_logps = jax.jit(policy.policy_token_logps, static_argnames="model")
"""Compiled once for all equal models and shapes of a process."""


def dataset(
    directory: Path, n: int = 6, *, seed: int = 0, **options: Any
) -> PairDataset:
    """Tokenise n synthetic records with a checkpoint's tokenizer."""
    found = [
        records.parse(record)
        for record in synthetic.feedback_records(n, seed=seed, **options)
    ]
    tokenizer = chat.load_tokenizer(str(directory))
    return pairs.prepare(found, tokenizer, max_length=None)


def batch(data: PairDataset, **options: Any) -> PreferenceBatch:
    """Pack a data set into one batch of JAX arrays."""
    return jax.tree.map(jnp.asarray, loader.single_batch(data, **options))


def responses(batch: PreferenceBatch, values: Any) -> dict[tuple[int, ...], np.ndarray]:
    """Map the token ids of every response of a batch to its values."""
    values = np.asarray(values)
    response, target = (np.asarray(x) for x in batch.completions[2:0:-1])
    found = {}
    for row in range(len(values)):
        for which in range(2 * batch.pair_mask.shape[1]):
            mine = response[row] == which
            if mine.any():
                slot, side = divmod(which, 2)
                prompt = _prompt(batch, row, slot)
                key = (*prompt, -1, side, *target[row][mine].tolist())
                found[key] = values[row][mine]
    return found


def _prompt(batch: PreferenceBatch, row: int, slot: int) -> tuple[int, ...]:
    inputs = batch.inputs
    mine = (np.asarray(inputs.sequence_ids[row]) == slot + 1) & (
        np.asarray(inputs.branch_ids[row]) == 0
    )
    return tuple(np.asarray(inputs.tokens[row])[mine].tolist())


def torch_model(directory: Path) -> Any:
    """Load a checkpoint with transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def cache_name() -> str:
    """Return what transformers' models call their cache; it has changed (5.24)."""
    from transformers import LlamaForCausalLM

    names = inspect.signature(LlamaForCausalLM.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def torch_logps(model: Any, data: PairDataset) -> dict[tuple[int, ...], np.ndarray]:
    """Score every response on its own, unpacked, with transformers."""
    import torch

    found = {}
    for pair in data.pairs:
        for side, branch in enumerate((pair.chosen, pair.rejected)):
            ids = np.concatenate([pair.prompt, branch.tokens]).astype(np.int64)
            with torch.no_grad():
                logits = model(torch.from_numpy(ids[None])).logits[0].double()
            logps = torch.log_softmax(logits, -1).numpy()
            begin = len(pair.prompt) + branch.lead
            target = ids[begin:]
            key = (*pair.prompt.tolist(), -1, side, *target.tolist())
            found[key] = logps[np.arange(begin - 1, len(ids) - 1), target]
    return found


def assert_same(
    got: dict[tuple[int, ...], np.ndarray],
    want: dict[tuple[int, ...], np.ndarray],
    **tolerance: float,
) -> None:
    """Compare the values of all responses."""
    assert got.keys() == want.keys() and got
    for key, values in want.items():
        np.testing.assert_allclose(got[key], values, **tolerance)


def random_lora(params: Any, *, seed: int = 0, **options: Any) -> Any:
    """Make adapters that change the model: B is random too."""
    options = {"rank": 3, "alpha": 7.0, **options}
    adapters = lora.init(jax.random.key(seed), params, lora.LoRAConfig(**options))

    def fill(path: str, leaf: Any) -> Any:
        if not path.endswith("/b"):
            return leaf
        key = jax.random.fold_in(jax.random.key(seed + 1), len(path))
        return 0.3 * jax.random.normal(key, leaf.shape)

    return trees.map_with_paths(fill, adapters)

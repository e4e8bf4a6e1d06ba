"""jaxalign's side of ``dpo_vs_trl.py``: DPO with LoRA on a file of pairs, timed.

Run by ``dpo_vs_trl.py`` in a fresh process; prints nothing but errors and writes
JSON: pairs and tokens a second over one whole pass of the measured pairs after a
warm-up step, seconds of compilation, and the peak memory of the process.
"""

import argparse
import functools
import json
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import trees
from jaxalign.adapters import adapter, lora
from jaxalign.checkpoints.load import load
from jaxalign.data import chat, loader, packing, pairs, records
from jaxalign.objectives import objective, pairwise, policy
from jaxalign.training import optimizer
from jaxalign.training import step as step_lib


def peak_gb() -> float:
    """Return the process's own peak of resident memory, in 10^9 bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise OSError("/proc/self/status has no VmHWM")


def main() -> None:
    """Time the pairs that remain after the first ``--skip``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--row_length", type=int, default=1024)
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--lora_alpha", type=float, default=32.0)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    found = records.read(args.data)[args.skip : args.skip + args.count]
    tokenizer = chat.load_tokenizer(args.model)
    data = pairs.prepare(found, tokenizer, max_length=args.max_length)
    shape = loader.batch_shape([data], row_length=args.row_length)
    source = loader.StepSource(data, shape, loader.BatchPlan(1, 1, 0), num_epochs=1)
    checkpoint = load(args.model, remat=args.remat)
    config = lora.LoRAConfig(rank=args.lora_rank, alpha=args.lora_alpha)
    base = checkpoint.variables
    variables = {**base, "lora": lora.init(jax.random.key(0), base["params"], config)}
    mask = adapter.trained(variables)
    trainable, frozen = trees.partition(variables, mask)
    reference_seconds = 0.0
    if args.cached:
        began = time.perf_counter()
        source.ref_logps = _reference(checkpoint.model, base, source, data)
        reference_seconds = time.perf_counter() - began

    settings = optimizer.OptimizerConfig(
        learning_rate=args.learning_rate, schedule="constant"
    )
    tx = optimizer.make_optimizer(settings, 1000)
    state = step_lib.init(trainable, tx, key=jax.random.key(1))
    loss_fn = functools.partial(
        objective.loss_fn, model=checkpoint.model, config=pairwise.PairwiseConfig()
    )
    batches = [jax.tree.map(jnp.asarray, source[i]) for i in range(len(source))]
    began = time.perf_counter()
    step = (
        jax.jit(step_lib.make_train_step(loss_fn, tx), donate_argnums=0)
        .lower(state, frozen, batches[0])
        .compile()
    )
    compile_seconds = time.perf_counter() - began
    state, _ = step(state, frozen, batches[0])
    jax.block_until_ready(state)
    seconds, losses = [], []
    for batch in batches:
        began = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
        losses.append(float(metrics["loss"].value))
    # Tokens as a padded trainer counts them: the prompt once for each response.
    tokens = sum(
        2 * len(pair.prompt) + len(pair.chosen.tokens) + len(pair.rejected.tokens)
        for pair in data.pairs
    )
    rows = source.rows_of_epoch(0)
    result = {
        "pairs": len(data.pairs),
        "pairs_per_second": len(data.pairs) / sum(seconds),
        "tokens_per_second": tokens / sum(seconds),
        "peak_gb": peak_gb(),
        "compile_seconds": compile_seconds,
        "reference_seconds": reference_seconds,
        "row_fill": packing.fill(rows, data.lengths, args.row_length),
        "seconds_per_step": seconds,
        "losses": losses,
        "versions": {name: version(name) for name in ("jaxalign", "jax", "flax")},
    }
    Path(args.out).write_text(json.dumps(result, indent=2) + "\n")


def _reference(model, variables, source, data) -> list[np.ndarray]:
    score = jax.jit(functools.partial(policy.policy_token_logps, model=model))
    found = {}
    for index in range(len(source)):
        batch = jax.tree.map(lambda leaf: leaf[0], source[index])
        values = np.asarray(score(variables, jax.tree.map(jnp.asarray, batch)))
        for row, members in enumerate(source.rows_of_step(index)):
            for slot, pair in enumerate(members):
                response = batch.completions.response[row]
                found[pair] = values[row][(response >= 0) & (response // 2 == slot)]
    return [found[index] for index in range(len(data.pairs))]


if __name__ == "__main__":
    main()

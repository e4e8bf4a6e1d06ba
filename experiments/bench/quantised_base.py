"""What int8 and nf4 base weights save and what they change, against float32.

    jaxalign fetch smollm2-135m --out smollm2
    python experiments/bench/quantised_base.py --model smollm2 --data hh/pairs.jsonl \
        --out experiments/bench/quantised_base.md

Bytes of the weights on the device, of the whole model and of its layers alone; the mean
absolute difference of a completion token's log-probability from float32's, over the
records' chosen and rejected completions; and the time of a training step (LoRA of rank
16, DPO, adapter-off reference) over that of float32. The steps of all four alternate on
the same rows, so that a slow minute falls on each. bfloat16 is computed in bfloat16,
which CPUs are slow at; int8 and nf4 are turned back into float32 and computed in it.
Some ten minutes on two cores. Expected: experiments/bench/quantised_base.md.
"""

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import trees
from jaxalign.adapters import adapter, lora
from jaxalign.checkpoints.load import load
from jaxalign.data import chat, loader, pairs, records
from jaxalign.data.pairs import PairDataset
from jaxalign.objectives import objective, policy
from jaxalign.objectives.pairwise import PairwiseConfig
from jaxalign.stacks import group_of_name
from jaxalign.training import step as step_lib
from jaxalign.training.optimizer import OptimizerConfig, make_optimizer


BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": jnp.bfloat16},
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
}


class Measured(NamedTuple):
    """One base."""

    megabytes: float
    layers_megabytes: float
    logps: np.ndarray
    step: Any
    """Makes one training step and waits for it."""


def measure(options: dict[str, Any], args: Any, data: PairDataset) -> Measured:
    """Load the model in one way, score all records and compile a step."""
    loaded = load(args.model, remat="dots", **options)
    params = loaded.variables["params"]
    layers = {name: part for name, part in params.items() if group_of_name(name)}
    shape = loader.batch_shape([data], row_length=args.row_length)
    plan = loader.BatchPlan(1, 1, 0, shuffle=False)
    source = loader.StepSource(data, shape, plan, num_epochs=1)
    score = jax.jit(functools.partial(policy.policy_token_logps, model=loaded.model))
    found = []
    for step in range(len(source)):
        batch = jax.tree.map(lambda leaf: leaf[0], source[step])
        there = batch.completions.response >= 0
        found.append(np.asarray(score(loaded.variables, batch))[there])
    made = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=16))
    variables = {**loaded.variables, "lora": made}
    trainable, frozen = trees.partition(variables, adapter.trained(variables))
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-5), 100)
    state = step_lib.init(trainable, tx, key=jax.random.key(0))
    loss_fn = functools.partial(
        objective.loss_fn, model=loaded.model, config=PairwiseConfig()
    )
    train_step = jax.jit(step_lib.make_train_step(loss_fn, tx))
    run = functools.partial(train_step, state, frozen, source[0])
    jax.block_until_ready(run())
    return Measured(
        trees.num_bytes(params) / 1e6,
        trees.num_bytes(layers) / 1e6,
        np.concatenate(found),
        lambda: jax.block_until_ready(run()),
    )


def table(found: dict[str, Measured], times: dict[str, list[float]]) -> list[str]:
    """Return the lines of a Markdown table."""
    exact = found["float32"]
    lines = [
        "| base | weights, MB | layers, MB | log-prob difference a token | step time |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, base in found.items():
        difference = np.abs(base.logps - exact.logps).mean()
        # Of one round each, so that the machine's load cancels.
        ratios = [a / b for a, b in zip(times[name], times["float32"], strict=True)]
        lines.append(
            f"| {name} | {base.megabytes:.0f} | {base.layers_megabytes:.0f} "
            f"({base.layers_megabytes / exact.layers_megabytes:.3f}) | "
            f"{difference:.4f} | {statistics.median(ratios):.2f} |"
        )
    return lines


def main() -> None:
    """Measure all bases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--row_length", type=int, default=1024)
    args = parser.parse_args()
    data = pairs.prepare(
        records.read(args.data)[: args.pairs],
        chat.load_tokenizer(args.model),
        max_length=args.row_length // 2,
        overflow="truncate",
    )
    found = {name: measure(options, args, data) for name, options in BASES.items()}
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(args.rounds):
        for name, base in found.items():
            began = time.perf_counter()
            base.step()
            times[name].append(time.perf_counter() - began)
    tokens = len(found["float32"].logps)
    lines = [
        f"`{Path(__file__).name}`: {Path(args.model).name}, {len(data.pairs)} pairs of "
        f"{Path(args.data).name}, {tokens} completion tokens; steps of one row of "
        f"{args.row_length}, {jax.devices()[0].platform}.",
        "",
        *table(found, times),
    ]
    print("\n".join(lines))
    Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

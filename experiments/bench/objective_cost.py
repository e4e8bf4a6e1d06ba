"""What each objective costs: seconds and temporary memory of a step, against sigmoid.

    python experiments/bench/objective_cost.py --model smollm2 --data hh \
        --out experiments/bench/objective_cost.md

``hh`` is a file of pairs, see ``hh_pairs.py``; each pair gets segments and token
weights that mean nothing but cost what real ones cost. The steps of an objective
alternate with those of sigmoid on the same rows, so that a slow minute falls on both.
About 12 minutes on two cores; expected: within 10 % of sigmoid, tdpo within 60 %; less
without a reference.
Objectives over single completions see other rows, so theirs is the time a token.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import trees
from jaxalign.adapters import adapter, lora
from jaxalign.checkpoints.load import load
from jaxalign.data import chat, loader, pairs, records
from jaxalign.data.records import Record, Segment
from jaxalign.objectives import objective, pairwise
from jaxalign.training import optimizer
from jaxalign.training import step as step_lib


CONFIGS: list[objective.ObjectiveConfig] = [
    *(pairwise.PairwiseConfig(name=n) for n in pairwise.names() if n != "sigmoid"),
    *(
        objective.CONFIGS[name](**({"name": name} if "tdpo" in name else {}))
        for name in (
            *("dpo2d", "step_dpo", "sdpo", "tis_dpo", "sepo", "tdpo1", "tdpo2"),
            *("kto", "bco", "sft"),
        )
    ),
    objective.MixConfig(mix={"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}),
]


@dataclasses.dataclass
class Side:
    """A compiled step with what it works on."""

    step: Any
    state: Any
    batch: Any
    tokens: int
    temporary: int

    def seconds(self, frozen: Any) -> float:
        """Make one step and return the time it took."""
        began = time.perf_counter()
        self.state, _ = self.step(self.state, frozen, self.batch)
        jax.block_until_ready(self.state)
        return time.perf_counter() - began


def main() -> None:
    """Measure every objective and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--row_length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--names", default="", help="only these, with commas")
    parser.add_argument("--out")
    args = parser.parse_args()
    checkpoint = load(args.model, remat="dots")
    tokenizer = chat.load_tokenizer(args.model)
    base = checkpoint.variables
    variables = {
        **base,
        "lora": lora.init(jax.random.key(0), base["params"], lora.LoRAConfig()),
    }
    trainable, frozen = trees.partition(variables, adapter.trained(variables))
    found = [_halved(r) for r in records.read(args.data)[: args.pairs]]
    make = functools.partial(
        _side, args, checkpoint.model, tokenizer, found, trainable, frozen
    )
    plain = make(pairwise.PairwiseConfig())
    plain.seconds(frozen)
    lines = ["| objective | time of a step | temporary memory |", "|---|---:|---:|"]
    print("\n".join(lines))
    for config in CONFIGS:
        if args.names and config.name not in args.names.split(","):
            continue
        side = make(config)
        side.seconds(frozen)
        ratios = [
            (side.seconds(frozen) / side.tokens)
            / (plain.seconds(frozen) / plain.tokens)
            for _ in range(args.steps)
        ]
        memory = side.temporary / plain.temporary
        lines.append(
            f"| {config.name} | {statistics.median(ratios):.2f} × | {memory:.2f} × |"
        )
        print(lines[-1], flush=True)
    if args.out:
        Path(args.out).write_text("\n".join(lines) + "\n")


def _side(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    found: list[Record],
    trainable: Any,
    frozen: Any,
    config: objective.ObjectiveConfig,
) -> Side:
    asked = objective.needs(config)
    data = pairs.prepare(
        found,
        tokenizer,
        max_length=args.row_length // 2,
        form=asked.form,
        end_of_turn=asked.end_of_turn,
    )
    if asked.token_weights:
        data = data._replace(pairs=[_weighted(pair) for pair in data.pairs])
    shape = loader.batch_shape([data], row_length=args.row_length)
    source = loader.StepSource(data, shape, loader.BatchPlan(1, 1, 0), num_epochs=1)
    batch = jax.tree.map(jnp.asarray, source[0])
    options: dict[str, Any] = {"model": model, "config": config}
    loss_fn = functools.partial(objective.loss_fn, **options, aspects=data.aspects)
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(), 1000)
    # A copy, as the state is donated.
    state = step_lib.init(jax.tree.map(jnp.copy, trainable), tx, key=jax.random.key(0))
    step = (
        jax.jit(step_lib.make_train_step(loss_fn, tx), donate_argnums=0)
        .lower(state, frozen, batch)
        .compile()
    )
    tokens = int((np.asarray(batch.inputs.sequence_ids) > 0).sum())
    memory: Any = step.memory_analysis()
    return Side(step, state, batch, tokens, memory.temp_size_in_bytes)


def _halved(record: Record) -> Record:
    """Give each response two segments with scores."""

    def segments(text: str | None) -> tuple[Segment, ...]:
        size = len(text or "")
        cuts = [0, size // 2, size] if size > 1 else [0, size]
        return tuple(
            Segment(start=a, end=b, scores={"x": float(i + 1), "y": 2.0})
            for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False))
            if b > a
        )

    return record._replace(
        chosen_segments=segments(record.chosen),
        rejected_segments=segments(record.rejected),
    )


def _weighted(pair: chat.TokenizedPair) -> chat.TokenizedPair:
    def side(branch: chat.Branch) -> chat.Branch:
        weights = np.linspace(0, 1, branch.num_completion_tokens, dtype=np.float32)
        return branch._replace(weights=weights)

    return pair._replace(chosen=side(pair.chosen), rejected=side(pair.rejected))


if __name__ == "__main__":
    main()

"""HLPT by the protocol and on the data of its paper, beside LoRA and prefixes.

    jaxalign fetch smollm2-135m --out smollm2
    python experiments/hlpt_math.py --model smollm2 --data hlpt_math/math_data.json \
        --out hlpt --picture docs/hlpt_math.png
    python experiments/hlpt_math.py --model smollm2 --data hlpt_math/math_data.json \
        --out hlpt --picture docs/hlpt_math.png --sweep \
        --sweep_picture docs/hlpt_share.png

``math_data.json`` is that of https://github.com/ello0211/HLPT: 3,260 arithmetic
problems with worked answers, of which those without an answer are left out, and all but
the first with the same question. As in the paper the loss covers the question too, the
rate is 3e-3 for every adapter, and some problems are held out. Smaller than there: the
model (SmolLM2-135M), the steps and the held-out problems. Different: nothing is cut at
256 tokens, LoRA has no dropout, and the last weights are measured, not the best ones.

Every method sees the same batches in the same order. A seed changes that order, how
adapters start, and which layers are drawn at random. About 60 minutes on two quiet
cores and 28 more for the sweep over shares of layers; give the same command again to go
on after a stop. Expected: the table in the README.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from jaxalign import trees
from jaxalign.adapters import adapter, selection
from jaxalign.adapters.adapter import Adapter, NoAdapter
from jaxalign.adapters.hybrid import H2LPTConfig, HLPTConfig
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.adapters.prefix import PrefixConfig
from jaxalign.checkpoints import adapter_start
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.configs import to_dict
from jaxalign.data import chat, loader, pairs, records
from jaxalign.data.packing import BatchShape
from jaxalign.data.pairs import PairDataset
from jaxalign.models import decoder
from jaxalign.objectives import objective
from jaxalign.objectives.sft import SFTConfig
from jaxalign.training import optimizer
from jaxalign.training import step as step_lib
from jaxalign.training.optimizer import OptimizerConfig
from jaxalign.whole_file import write_text


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


OBJECTIVE = SFTConfig(completion_only_loss=False)


class Method(NamedTuple):
    """A way to fine-tune."""

    name: str
    adapter: Adapter
    """``NoAdapter`` trains all weights."""
    drawn: bool = False
    """Whether a hybrid's layers are drawn at random, as many as it has."""
    curve: bool = True
    """Whether it is evaluated on the way, or at the end only."""

    def config(self, seed: int, num_layers: int) -> Adapter:
        """Return the adapter of a seed."""
        if not self.drawn or not isinstance(self.adapter, HLPTConfig):
            return self.adapter
        count = len(selection.parse_layers(self.adapter.layers, num_layers))
        chosen = np.random.default_rng(seed).permutation(num_layers)[:count]
        layers = ",".join(map(str, sorted(chosen.tolist())))
        return dataclasses.replace(self.adapter, layers=layers)


LORA = LoRAConfig(rank=8, alpha=16.0, targets=("down_proj",))

METHODS = [
    Method("full", NoAdapter()),
    Method("LoRA", LORA),
    Method("prefix", PrefixConfig(prefix_length=20)),
    Method("HLPT", HLPTConfig()),
    Method("HLPT as published", HLPTConfig(faithful=True)),
    Method("H2LPT", H2LPTConfig()),
    Method("random layers", HLPTConfig(), drawn=True),
]

SHARES = [
    Method("HLPT", HLPTConfig())
    if count == 24
    else Method(
        f"share {count} of 32", HLPTConfig(layers=f"bottom:{count / 32}"), curve=False
    )
    for count in (5, 8, 11, 16, 21, 24, 27)
]
"""The paper's sweep: LoRA in a share of the layers, prefixes in the others. That of 24
is HLPT itself, so it is trained once."""


def prompt(instruction: str) -> str:
    """Return what the model is given before the answer."""
    return (
        "Below is a problem. Write a response that solves it step by step.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


def main() -> None:
    """Run what is missing; print the tables and draw the pictures."""
    args = _arguments()
    methods = [m for m in METHODS if not args.methods or m.name in args.methods]
    found = run(args, methods, args.seeds)
    _publish(table(found), Path(args.out) / "table.md")
    if args.picture:
        draw(found, args.picture)
    if args.sweep:
        swept = run(args, SHARES, args.sweep_seeds)
        _publish(sweep_table(swept), Path(args.out) / "sweep.md")
        if args.sweep_picture:
            draw_sweep(swept, found, args.sweep_picture)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--data", required=True, help="math_data.json")
    parser.add_argument("--out", required=True, help="directory of the results")
    parser.add_argument("--picture", help="where to draw the losses")
    parser.add_argument("--sweep", action="store_true", help="sweep over shares too")
    parser.add_argument("--sweep_picture", help="where to draw the sweep")
    names = [method.name for method in METHODS]
    parser.add_argument("--methods", nargs="+", choices=names, help="default all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sweep_seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--eval_steps", type=int, default=10)
    parser.add_argument("--eval_items", type=int, default=24, help="paper: 120")
    parser.add_argument("--row_length", type=int, default=512)
    parser.add_argument("--batch_rows", type=int, default=1)
    parser.add_argument("--warmup_steps", type=int, default=5)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--prefix_learning_rate", type=float, help="default the same")
    parser.add_argument("--full_learning_rate", type=float, default=5e-5)
    return parser.parse_args()


def _publish(text: str, path: Path) -> None:
    print(text, flush=True)
    path.write_text(text + "\n")


class _Data(NamedTuple):
    train: PairDataset
    evaluation: PairDataset
    shape: BatchShape


class _Ready(NamedTuple):
    """A model that is loaded and compiled for an adapter."""

    config: Adapter
    checkpoint: Checkpoint
    step: Callable[..., Any]
    evaluate: Callable[..., Any]
    memory: int
    """Bytes that the step needs, weights and optimiser included."""


def run(
    args: argparse.Namespace, methods: Sequence[Method], seeds: int
) -> dict[str, list[Any]]:
    """Train every method with every seed, or read what was trained before.

    Returns:
      ``{method: [result of each seed]}``.
    """
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    num_layers = load_lib.open_config(args.model)[0].text.num_layers
    data: _Data | None = None
    ready: _Ready | None = None
    found: dict[str, list[Any]] = {}
    for method in methods:
        found[method.name] = []
        for seed in range(seeds):
            config = method.config(seed, num_layers)
            key = json.loads(json.dumps(_key(args, method, config)))
            path = out / f"{method.name}_seed{seed}.json"
            weights = path.with_suffix(".npz")
            done = json.loads(path.read_text()) if path.is_file() else None
            if done is None or done["key"] != key or not weights.is_file():
                data = data or _prepare(args)
                if ready is None or ready.config != config:
                    ready = _load(args, config, data, ready)
                trained, measured = _train(args, method, ready, data, seed)
                leaves = jax.tree.leaves(trained)
                np.savez(
                    weights, **dict(zip(trees.paths(trained), leaves, strict=True))
                )
                done = {"key": key, **measured}
                write_text(path, json.dumps(done, indent=2) + "\n")
                shown = " ".join(f"{loss:.4f}" for loss in done["losses"])
                print(f"{method.name} seed {seed}: {shown}", flush=True)
            found[method.name].append(done)
    return found


def _key(args: argparse.Namespace, method: Method, config: Adapter) -> dict[str, Any]:
    """Return all that decides a result."""
    names = ("model", "data", "steps", "eval_items", "row_length", "batch_rows")
    return {
        **{name: getattr(args, name) for name in names},
        "evaluated": _evaluated(args, method),
        "optimizer": to_dict(_optimizer_config(args, config)),
        "adapter": to_dict(config),
    }


def _evaluated(args: argparse.Namespace, method: Method) -> list[int]:
    """Return after how many steps a method is evaluated."""
    every = range(0, args.steps, args.eval_steps) if method.curve else ()
    return [*every, args.steps]


def _optimizer_config(args: argparse.Namespace, config: Adapter) -> OptimizerConfig:
    full = isinstance(config, NoAdapter)
    options: dict[str, Any] = {}
    has_prefix = isinstance(config, PrefixConfig | HLPTConfig)
    if has_prefix and args.prefix_learning_rate is not None:
        options["prefix_learning_rate"] = args.prefix_learning_rate
    return OptimizerConfig(
        learning_rate=args.full_learning_rate if full else args.learning_rate,
        schedule="linear",
        warmup_steps=args.warmup_steps,
        **options,
    )


def _prepare(args: argparse.Namespace) -> _Data:
    """Tokenise the problems and hold some out, the same for all runs."""
    with open(args.data, encoding="utf-8") as file:
        items = [item for item in json.load(file) if item["output"].strip()]
    # Some questions are there twice: none may be on both sides.
    items = list({item["instruction"]: item for item in reversed(items)}.values())
    parsed = [
        records.parse(
            {
                "prompt": prompt(items[i]["instruction"]),
                "completion": items[i]["output"],
                "label": True,
            },
            f"item {i}",
        )
        for i in np.random.default_rng(0).permutation(len(items))
    ]
    asked = objective.needs(OBJECTIVE)
    tokenizer = chat.load_tokenizer(args.model)
    evaluation, train = (
        pairs.prepare(
            part,
            tokenizer,
            max_length=args.row_length,
            form=asked.form,
            learn_prompt=asked.prompt,
        )
        for part in (parsed[: args.eval_items], parsed[args.eval_items :])
    )
    shape = loader.batch_shape([train, evaluation], row_length=args.row_length)
    return _Data(train, evaluation, shape)


def _source(
    args: argparse.Namespace, data: _Data, seed: int | None
) -> loader.StepSource:
    """Return the batches of a seed, those of the evaluation for None."""
    if seed is None:
        plan = loader.BatchPlan(args.batch_rows, 1, 0, shuffle=False)
        return loader.StepSource(data.evaluation, data.shape, plan, num_epochs=1)
    plan = loader.BatchPlan(args.batch_rows, 1, seed)
    return loader.StepSource(data.train, data.shape, plan, num_steps=args.steps)


def _load(
    args: argparse.Namespace, config: Adapter, data: _Data, before: _Ready | None
) -> _Ready:
    """Load the model cut for an adapter, unless it is, and compile its step."""
    model_config = load_lib.open_config(args.model)[0].text
    groups = adapter.groups(
        config, decoder.param_shapes(model_config), model_config.num_layers
    )
    if before is not None and before.checkpoint.groups == groups:
        checkpoint = before.checkpoint
    else:
        checkpoint = load_lib.load(args.model, groups=groups, remat="dots")
    loss_fn = functools.partial(
        objective.loss_fn, model=checkpoint.model, config=OBJECTIVE, aspects=()
    )
    tx = _optimizer(args, config)
    trainable, frozen = _split(config, checkpoint, seed=0)
    state = step_lib.init(trainable, tx, key=jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, _source(args, data, 0)[0])
    step = (
        jax.jit(step_lib.make_train_step(loss_fn, tx), donate_argnums=0)
        .lower(state, frozen, batch)
        .compile()
    )
    sizes = step.memory_analysis()
    return _Ready(
        config,
        checkpoint,
        step,
        jax.jit(step_lib.make_eval_step(loss_fn)),
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes,
    )


def _optimizer(args: argparse.Namespace, config: Adapter) -> Any:
    return optimizer.make_optimizer(_optimizer_config(args, config), args.steps)


def _split(config: Adapter, checkpoint: Checkpoint, *, seed: int) -> tuple[Any, Any]:
    """Return what is trained, a copy that may be donated, and what is not."""
    variables = dict(checkpoint.variables)
    if isinstance(config, NoAdapter):
        mask = jax.tree.map(lambda _: True, variables)
    else:
        variables |= adapter_start.make(jax.random.key(seed), config, checkpoint)
        mask = adapter.trained(variables)
    trainable, frozen = trees.partition(variables, mask)
    return jax.tree.map(jnp.copy, trainable), frozen


def _train(
    args: argparse.Namespace, method: Method, ready: _Ready, data: _Data, seed: int
) -> tuple[Any, dict[str, Any]]:
    """Train one method with one seed and measure it on the way.

    Returns:
      The trained weights, and the measures.
    """
    trainable, frozen = _split(ready.config, ready.checkpoint, seed=seed)
    weights = trees.num_params(trainable)
    tx = _optimizer(args, ready.config)
    state = step_lib.init(trainable, tx, key=jax.random.key(seed))
    source, held_out = _source(args, data, seed), _source(args, data, None)

    def evaluate(state: step_lib.TrainState) -> float:
        parts = [
            ready.evaluate(state.trainable, frozen, held_out[index])["loss"]
            for index in range(len(held_out))
        ]
        return float(functools.reduce(lambda a, b: a.merge(b), parts).value)

    evaluated = _evaluated(args, method)
    losses, seconds, train_losses = [], [], []
    for index in range(args.steps + 1):
        if index in evaluated:
            losses.append(evaluate(state))
        if index == args.steps:
            break
        batch = jax.tree.map(jnp.asarray, source[index])
        began = time.monotonic()
        state, metrics = jax.block_until_ready(ready.step(state, frozen, batch))
        seconds.append(time.monotonic() - began)
        train_losses.append(float(metrics["loss"].value))
    measured = {
        "steps": evaluated,
        "losses": losses,
        "train_losses": train_losses,
        "trained": weights,
        "seconds": min(seconds),
        "memory": ready.memory,
    }
    return jax.device_get(state.trainable), measured


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Return a mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def _last(results: Sequence[Mapping[str, Any]]) -> list[float]:
    return [result["losses"][-1] for result in results]


def table(found: Mapping[str, Any]) -> str:
    """Return a Markdown table of means ± standard errors over the seeds.

    The difference from LoRA is taken seed by seed, as batches are the same in both.
    """
    lines = [
        "| method | trained weights | loss before | evaluation loss | against LoRA | "
        "fastest step (s) | memory |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, results in found.items():
        against = ""
        if "LoRA" in found and name != "LoRA":
            both = zip(_last(results), _last(found["LoRA"]), strict=True)
            against = "{:+.4f} ± {:.4f}".format(*_mean([a - b for a, b in both]))
        cells = [
            name,
            f"{results[0]['trained']:,}",
            f"{statistics.mean(r['losses'][0] for r in results):.3f}",
            "{:.4f} ± {:.4f}".format(*_mean(_last(results))),
            against,
            f"{min(r['seconds'] for r in results):.2f}",
            f"{max(r['memory'] for r in results) / 2**30:.2f} GiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(results: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of the layers that got LoRA."""
    key = results[0]["key"]
    num_layers = load_lib.open_config(key["model"])[0].text.num_layers
    layers = selection.parse_layers(key["adapter"]["layers"], num_layers)
    return len(layers) / num_layers


def sweep_table(swept: Mapping[str, Any]) -> str:
    """Return a Markdown table of means ± standard errors over the seeds."""
    lines = [
        "| layers with LoRA | trained weights | evaluation loss |",
        "|---:|---:|---:|",
    ]
    for results in swept.values():
        loss, error = _mean(_last(results))
        trained = f"{results[0]['trained']:,}"
        share = f"{_share(results):.0%}"
        spread = f" ± {error:.4f}" if len(results) > 1 else ""
        lines.append(f"| {share} | {trained} | {loss:.4f}{spread} |")
    return "\n".join(lines)


COLOURS = dict(
    zip(
        (method.name for method in METHODS),
        ("#555555", "#1f5fa8", "#d08a1d", "#228b6e", "#c8423e", "#7a4fa3", "#8c6d46"),
        strict=True,
    )
)


def draw(found: Mapping[str, Any], path: str) -> None:
    """Draw the losses on the way, and where they end, with standard errors."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=150)
    steps: list[int] = []
    for name, results in found.items():
        steps = results[0]["steps"]
        columns = zip(*(result["losses"] for result in results), strict=True)
        means, errors = np.array([_mean(column) for column in columns]).T
        colour = COLOURS[name]
        left.plot(steps, means, "o-", markersize=3, color=colour, label=name)
        left.fill_between(
            steps, means - errors, means + errors, color=colour, alpha=0.2, linewidth=0
        )
        right.errorbar(
            means[-1], name, xerr=errors[-1], fmt="o", color=colour, capsize=3
        )
    left.set_xlabel("steps")
    left.set_title("evaluation loss (nats a token)", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    right.invert_yaxis()
    right.set_title(f"evaluation loss after {steps[-1]} steps", fontsize=10)
    right.grid(axis="x", alpha=0.3)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def draw_sweep(swept: Mapping[str, Any], found: Mapping[str, Any], path: str) -> None:
    """Draw the final loss against the share of layers, with standard errors."""
    figure, axis = plt.subplots(figsize=(6, 4), dpi=150)
    shares = [_share(results) for results in swept.values()]
    means, errors = np.array([_mean(_last(r)) for r in swept.values()]).T
    axis.errorbar(shares, means, yerr=errors, fmt="o-", color="#228b6e", capsize=3)
    if "LoRA" in found:
        # Of the seeds that the sweep has, so that they compare.
        seeds = len(next(iter(swept.values())))
        axis.axhline(
            _mean(_last(found["LoRA"][:seeds]))[0],
            color=COLOURS["LoRA"],
            linestyle=":",
            label="LoRA in all layers",
        )
        axis.legend(frameon=False)
    axis.set_xlabel("share of the layers with LoRA (the others have prefixes)")
    axis.set_ylabel("evaluation loss (nats a token)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()

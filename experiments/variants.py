"""Trains the same model on the same data under many objectives, and compares them.

The engine of ``granularity.py`` and ``aspects.py``: the model is loaded, the data
tokenised and the reference computed once; every objective is compiled once and its
seeds run one after the other. The result of each run is a file of its own, so that a
study that was stopped goes on where it was.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import trees
from jaxalign.adapters import adapter, lora, selection
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints import tensors
from jaxalign.configs import to_dict
from jaxalign.data import chat, loader, pairs, records, reference_cache
from jaxalign.data.pairs import PairDataset
from jaxalign.data.records import Record, Segment
from jaxalign.objectives import objective, policy
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from jaxalign.training import optimizer, reference
from jaxalign.training import step as step_lib
from jaxalign.whole_file import write_text


METRICS = {
    "accuracy": "held-out pairs whose chosen response has the higher reward",
    "segment_auc": "faulty segments ranked below good ones of the same response",
    "chosen_drop": "nats that held-out chosen responses fell below the reference",
    "margin": "mean reward margin of held-out pairs",
}

FAULTY = 2.0
"""A segment whose lowest score is at most this is covered by a human error span."""


class Variant(NamedTuple):
    """An objective to compare."""

    name: str
    config: objective.ObjectiveConfig
    whole: bool = False
    """Whether each response is made one segment with the mean of its scores."""


def parser(description: str) -> argparse.ArgumentParser:
    """Return the options that all comparisons have; their defaults suit two cores."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", required=True, help="checkpoint directory")
    made.add_argument("--data", required=True, help="feedback records")
    made.add_argument("--out", required=True, help="directory of the results")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--train_pairs", type=int, default=64)
    made.add_argument("--eval_pairs", type=int, default=48)
    made.add_argument("--epochs", type=int, default=1)
    made.add_argument("--max_length", type=int, default=256)
    made.add_argument("--row_length", type=int, default=1024)
    made.add_argument("--batch_rows", type=int, default=1)
    made.add_argument("--accumulation", type=int, default=2)
    made.add_argument("--learning_rate", type=float, default=5e-4)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--layers", default="15-29", help="layers that get LoRA")
    return made


class _Data(NamedTuple):
    train: PairDataset
    evaluation: PairDataset
    train_refs: list[np.ndarray]
    eval_refs: list[np.ndarray]


def run(args: argparse.Namespace, variants: Sequence[Variant]) -> dict[str, Any]:
    """Train every variant with every seed, or read what was trained before.

    Returns:
      ``{variant: {metric: [value of each seed]}}``.
    """
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "seeds")}
    bench: _Bench | None = None
    found: dict[str, Any] = {}
    for variant in variants:
        per_seed = []
        step: Any = None
        for seed in range(args.seeds):
            path = out / f"{variant.name}_seed{seed}.json"
            key = {
                "settings": settings,
                "objective": to_dict(variant.config),
                "whole": variant.whole,
            }
            done = json.loads(path.read_text()) if path.is_file() else None
            if done is None or done["key"] != json.loads(json.dumps(key)):
                bench = bench or _Bench(args)
                step = step or bench.step(variant)
                done = {"key": key, **bench.train(variant, step, seed)}
                write_text(path, json.dumps(done, indent=2) + "\n")
                shown = ", ".join(f"{m} {done['metrics'][m]:.3f}" for m in METRICS)
                print(f"{variant.name} seed {seed}: {shown}", flush=True)
            per_seed.append(done["metrics"])
        found[variant.name] = {
            name: [metrics[name] for metrics in per_seed] for name in METRICS
        }
    return found


def table(found: Mapping[str, Any]) -> str:
    """Return a Markdown table of means ± standard deviations over the seeds."""
    names = [name for name in METRICS if name != "margin"]
    lines = [f"| objective | {' | '.join(n.replace('_', ' ') for n in names)} |"]
    lines.append("|---|" + "---:|" * len(names))
    for variant, metrics in found.items():
        cells = []
        for name in names:
            values = metrics[name]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


class _Bench:
    """The model, the data and the reference that all variants share."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.mesh = make_mesh(MeshConfig())
        found = records.read(args.data)
        order = np.random.default_rng(0).permutation(len(found))
        need = args.train_pairs + args.eval_pairs
        if len(found) < need:
            raise SystemExit(f"{args.data} has {len(found)} records: {need} are needed")
        self.records = [found[i] for i in order[:need]]
        self.tokenizer = chat.load_tokenizer(args.model)
        self.aspects = records.aspects_of(self.records)
        layers = load_lib.open_config(args.model)[0].text.num_layers
        chosen = selection.parse_layers(args.layers, layers)
        self.checkpoint = load_lib.load(
            args.model,
            remat="dots",
            groups=selection.cut_groups(layers, [chosen]),
        )
        self.data = {False: self._prepare(False)}
        data = self.data[False]
        self.shape = loader.batch_shape(
            [data.train, data.evaluation], row_length=args.row_length
        )
        self.score = jax.jit(
            functools.partial(policy.policy_token_logps, model=self.checkpoint.model)
        )

    def _prepare(self, whole: bool) -> _Data:
        args = self.args
        given = [_as_one(r) for r in self.records] if whole else self.records
        train, evaluation = (
            pairs.prepare(
                part,
                self.tokenizer,
                max_length=args.max_length,
                overflow="truncate",
                aspects=self.aspects,
            )
            for part in (given[: args.train_pairs], given[args.train_pairs :])
        )
        shape = loader.batch_shape([train, evaluation], row_length=args.row_length)
        refs = [
            reference.reference_logps(
                self.checkpoint,
                self.checkpoint.variables,
                data,
                shape,
                path=Path(args.out) / "reference" / f"{name}.npz",
                key=reference_cache.cache_key(
                    data.pairs, tensors.fingerprint(Path(args.model)), "float32"
                ),
                batch_rows=1,
                mesh=self.mesh,
            )
            for name, data in (("train", train), ("eval", evaluation))
        ]
        return _Data(train, evaluation, *refs)

    def _split(self, seed: int) -> tuple[Any, Any]:
        config = lora.LoRAConfig(
            rank=self.args.rank, alpha=2.0 * self.args.rank, layers=self.args.layers
        )
        base = self.checkpoint.variables
        adapters = lora.init(jax.random.key(seed), base["params"], config)
        variables = {**base, "lora": adapters}
        return trees.partition(variables, adapter.trained(variables))

    def step(self, variant: Variant) -> Callable[..., Any]:
        """Return the training step of an objective; jit compiles it once."""
        loss_fn = functools.partial(
            objective.loss_fn,
            model=self.checkpoint.model,
            config=variant.config,
            aspects=self.aspects,
        )
        return jax.jit(
            step_lib.make_train_step(loss_fn, self._optimizer()), donate_argnums=0
        )

    def _optimizer(self) -> Any:
        return optimizer.make_optimizer(
            optimizer.OptimizerConfig(
                learning_rate=self.args.learning_rate, schedule="constant"
            ),
            1000,
        )

    def train(self, variant: Variant, step: Any, seed: int) -> dict[str, Any]:
        """Train one variant with one seed and measure it on the held-out pairs."""
        began = time.monotonic()
        if variant.whole not in self.data:
            self.data[variant.whole] = self._prepare(variant.whole)
        data, args = self.data[variant.whole], self.args
        source = loader.StepSource(
            data.train,
            self.shape,
            loader.BatchPlan(args.batch_rows, args.accumulation, seed),
            num_epochs=args.epochs,
            ref_logps=data.train_refs,
        )
        trainable, frozen = self._split(seed)
        state = step_lib.init(trainable, self._optimizer(), key=jax.random.key(seed))
        losses = []
        for index in range(len(source)):
            batch = jax.tree.map(jnp.asarray, source[index])
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"].value))
        variables = trees.combine(state.trainable, frozen)
        return {
            "metrics": self._measure(variables),
            "losses": losses,
            "seconds": round(time.monotonic() - began, 1),
        }

    def _measure(self, variables: Any, beta: float = 0.1) -> dict[str, float]:
        """Compare what the policy learned with what people said, segment by segment."""
        data = self.data[False]
        source = loader.StepSource(
            data.evaluation,
            self.shape,
            loader.BatchPlan(1, 1, 0, shuffle=False),
            num_epochs=1,
            ref_logps=data.eval_refs,
        )
        margins, drops, couples = [], [], []
        for index in range(len(source)):
            batch = jax.tree.map(lambda leaf: leaf[0], source[index])
            ratios = np.asarray(self.score(variables, batch)) - batch.ref_logps
            for row, members in enumerate(source.rows_of_step(index)):
                response = batch.completions.response[row]
                for slot, pair_index in enumerate(members):
                    pair = data.evaluation.pairs[pair_index]
                    mine = [ratios[row][response == 2 * slot + side] for side in (0, 1)]
                    margins.append(float(mine[0].sum() - mine[1].sum()))
                    drops.append(float(-mine[0].sum()))
                    couples += _couples(pair.rejected, mine[1])
        return {
            "accuracy": float(np.mean(np.array(margins) > 0)),
            "segment_auc": float(np.mean(couples)),
            "chosen_drop": float(np.mean(drops)),
            "margin": float(beta * np.mean(margins)),
        }


def _couples(branch: chat.Branch, ratios: np.ndarray) -> list[float]:
    """Compare each good segment of a response with each faulty one: 1 is right."""
    rewards, faulty = [], []
    for segment, scored in enumerate(branch.scored):
        if scored:
            rewards.append(float(ratios[branch.segments == segment].mean()))
            faulty.append(float(np.nanmin(branch.scores[segment])) <= FAULTY)
    return [
        0.5 if good == bad else float(good > bad)
        for good, is_bad in zip(rewards, faulty, strict=True)
        if not is_bad
        for bad, bad_too in zip(rewards, faulty, strict=True)
        if bad_too
    ]


def _as_one(record: Record) -> Record:
    """Make each response one segment that has the mean of its segments' scores."""

    def one(text: str | None, segments: Any) -> tuple[Segment, ...]:
        names = sorted({name for segment in segments for name in segment.scores})
        scores = {
            name: statistics.mean(s.scores[name] for s in segments if name in s.scores)
            for name in names
        }
        return (Segment(start=0, end=len(text or ""), scores=scores),)

    return record._replace(
        chosen_segments=one(record.chosen, record.chosen_segments),
        rejected_segments=one(record.rejected, record.rejected_segments),
    )

"""What a training step needs beside the weights, by adapter.

    python experiments/bench/adapter_memory.py --out experiments/bench/adapter_memory.md

Compiles (never runs) the step of a random decoder on the CPU and asks the compiler for
its temporaries and outputs: 16 layers, width 512, MLP 1408, 2048 tokens, float32. All
rows clip gradients, count updates that are not finite and use Adam; "accumulated" adds
four micro-batches. A copy of the 198 MiB of layers would show in either column. About
five minutes on two cores. Expected: experiments/bench/adapter_memory.md.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import trees
from jaxalign.adapters import adapter
from jaxalign.adapters.hybrid import H2LPTConfig, HLPTConfig
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.adapters.prefix import PrefixConfig
from jaxalign.checkpoints import adapter_start
from jaxalign.models import decoder
from jaxalign.models.config import DecoderConfig
from jaxalign.models.rotary import Rotary
from jaxalign.objectives import objective
from jaxalign.objectives.sft import SFTConfig
from jaxalign.training import step as step_lib
from jaxalign.training.optimizer import OptimizerConfig, make_optimizer
from jaxalign.types import Completions, ModelInputs, PreferenceBatch


MODEL = DecoderConfig(
    vocab_size=512,
    width=512,
    mlp_width=1408,
    num_layers=16,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    norm_eps=1e-5,
    rotaries=(Rotary(theta=10000.0, dims=64),),
    tie_embeddings=True,
)

ADAPTERS: dict[str, Any] = {
    "LoRA on all 16": LoRAConfig(rank=8),
    "HLPT 12 + 4": HLPTConfig(),
    "H2LPT 6 + 2": H2LPTConfig(),
    "prefix on the top 4": PrefixConfig(prefix_layers="top:4"),
    "prefix on all 16": PrefixConfig(),
}


def batch(accumulation: int, rows: int = 4, length: int = 512) -> PreferenceBatch:
    """Return the shapes of micro-batches whose every token is learned."""

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((accumulation, *shape), jnp.int32)

    def other(kind: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((accumulation, *shape), kind)

    row: Any = ints(rows, length)
    return PreferenceBatch(
        inputs=ModelInputs(row, row, row, row),
        completions=Completions(row, row, row, row),
        scores=other(jnp.float32, rows, 1, 2, 1, 1),  # pyright: ignore[reportArgumentType]
        segment_mask=other(bool, rows, 1, 2, 1),  # pyright: ignore[reportArgumentType]
        pair_mask=other(bool, rows, 1),  # pyright: ignore[reportArgumentType]
    )


def measure(config: Any, remat: decoder.Remat, accumulation: int) -> tuple[float, ...]:
    """Return temporaries and outputs of a compiled step, in MiB."""
    params, made = adapter_start.shapes(config, MODEL)
    groups = adapter.groups(config, params, MODEL.num_layers)
    model = decoder.make_model(MODEL, groups=groups, remat=remat)
    variables = {"params": params, **made}
    trainable, frozen = trees.partition(variables, adapter.trained(variables))
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-3, max_grad_norm=1.0), 10)
    state = jax.eval_shape(
        lambda trainable: step_lib.init(trainable, tx, key=jax.random.key(0)), trainable
    )
    loss_fn = functools.partial(
        objective.loss_fn, model=model, config=SFTConfig(), aspects=("overall",)
    )
    step = jax.jit(step_lib.make_train_step(loss_fn, tx), donate_argnums=0)
    compiled = step.lower(state, frozen, batch(accumulation)).compile()
    found: Any = compiled.memory_analysis()
    return found.temp_size_in_bytes / 2**20, found.output_size_in_bytes / 2**20


def main() -> None:
    """Measure all adapters and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    params = decoder.param_shapes(MODEL)
    lines = [
        f"`{Path(__file__).name}`: {trees.num_bytes(params) / 2**20:.0f} MiB of frozen "
        "weights; MiB of temporaries and of outputs of a step.",
        "",
        "| adapter | remat full | accumulated × 4 | remat none | outputs |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, config in ADAPTERS.items():
        full, outputs = measure(config, "full", 1)
        split = measure(config, "full", 4)[0]
        none = measure(config, "none", 1)[0]
        row = f"| {name} | {full:.1f} | {split:.1f} | {none:.1f} | {outputs:.1f} |"
        print(row, flush=True)
        lines.append(row)
    Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

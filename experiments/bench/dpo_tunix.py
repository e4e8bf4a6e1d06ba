"""tunix' side of ``dpo_vs_trl.py``: DPO with LoRA by google-tunix and qwix, timed.

It needs an environment of its own, with no part of ours in it:

    python -m venv tunix-venv
    tunix-venv/bin/pip install google-tunix==0.1.7 qwix==0.1.8
    tunix-venv/bin/python experiments/bench/dpo_tunix.py --model smollm2 --data hh \
        --count 8 --batch_size 2 --out tunix.json
    python experiments/bench/dpo_vs_trl.py --model smollm2 --data hh \
        --tunix tunix-venv/bin/python

The same weights (its Llama3, from the safetensors file), the same pairs through the
same chat template with the end of turn, LoRA of rank 16 on q and v, AdamW at a constant
rate, beta 0.1; the reference is the same base arrays without adapters. Its trainer
takes one shape: prompts are padded on the left to the longest, responses on the right
to theirs, by us, as its own tokenising puts a BOS into responses and forgets their end.
Everything else is its default: no rematerialisation, which is its fastest.

Its Llama3 never passes its config's ``rope_theta`` on, and rotates as if it were a
million, which SmolLM2's is not. We mend that, else it would train another model.

Time runs from the end of the first step to the end of the last, compiling (it compiles
its step twice) apart.
Expected, in float32 on two AVX2 cores: 0.060 pairs/s and 15.2 GB; about 20 minutes.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import peak_gb


os.environ.update(HF_HUB_OFFLINE="1", JAX_PLATFORMS="cpu")

import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
import qwix  # noqa: E402
from flax import nnx  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from tunix.models.llama3 import model as llama3  # noqa: E402
from tunix.models.llama3 import params  # noqa: E402
from tunix.rl import common  # noqa: E402
from tunix.sft import hooks  # noqa: E402
from tunix.sft.dpo import dpo_trainer  # noqa: E402


PACKAGES = ("google-tunix", "qwix", "jax", "jaxlib", "flax")

# Bound once: a second model must not wrap the first one's.
ROTATE = llama3.apply_rope

Pairs = list[tuple[list[int], list[int], list[int]]]
"""Tokens of prompt, chosen, rejected."""


class StepClock(hooks.TrainingHooks):
    """When the result of each step was there."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_train_step_end(self, train_ctx: Any, train_step: int, loss: float) -> None:
        del train_ctx, train_step
        self.ends.append(time.perf_counter())
        self.losses.append(float(loss))

    def on_train_start(self, train_ctx: Any) -> None: ...

    def on_train_end(self, train_ctx: Any) -> None: ...

    def on_train_step_start(self, train_ctx: Any) -> None: ...

    def on_eval_step_start(self, train_ctx: Any) -> None: ...

    def on_eval_step_end(self, train_ctx: Any, eval_loss: float) -> None: ...


def load(path: Path, dtype: Any) -> llama3.Llama3:
    """Return tunix' Llama3 with a checkpoint's weights and its rotation."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    llama3.apply_rope = functools.partial(ROTATE, rope_theta=config["rope_theta"])
    made = llama3.ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
        weight_tying=config["tie_word_embeddings"],
    )
    return params.create_model_from_safe_tensors(str(path), made, dtype=dtype)


def tokens_of(args: argparse.Namespace) -> Pairs:
    """Render pairs as the others do: the end of turn counts, what follows does not."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def rendered(messages: list[dict[str, str]], **options: Any) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    pairs = []
    with args.data.open(encoding="utf-8") as lines:
        for line in islice(lines, args.skip, args.skip + args.count):
            record = json.loads(line)
            before = rendered(record["prompt"], add_generation_prompt=True)
            replies = []
            for side in ("chosen", "rejected"):
                whole = rendered(record["prompt"] + record[side])
                end = whole.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
                replies.append(ids(whole[len(before) : end]))
            pairs.append((ids(before), *replies))
    longest = max(len(p) + max(len(c), len(r)) for p, c, r in pairs)
    if longest > args.max_length:
        raise SystemExit(
            f"a pair has {longest} tokens, above --max_length {args.max_length}: make "
            "the data with hh_pairs.py --max_length"
        )
    return pairs


def batches(pairs: Pairs, size: int) -> Iterator[dpo_trainer.TrainingInput]:
    """Yield batches of one shape: the longest prompt and the longest response."""
    prompt = max(len(p) for p, _, _ in pairs)
    reply = max(max(len(c), len(r)) for _, c, r in pairs)

    def padded(rows: list[list[int]], length: int, left: bool) -> tuple[Any, Any]:
        found = np.zeros((2, len(rows), length), np.int32)
        for number, row in enumerate(rows):
            place = slice(length - len(row), None) if left else slice(len(row))
            found[:, number, place] = row, [1] * len(row)
        return found[0], found[1]

    for begin in range(0, len(pairs) - size + 1, size):
        prompts, chosen, rejected = zip(*pairs[begin : begin + size], strict=True)
        yield dpo_trainer.TrainingInput(
            *padded(list(prompts), prompt, left=True),
            *padded(list(chosen), reply, left=False),
            *padded(list(rejected), reply, left=False),
        )


def train(base: llama3.Llama3, pairs: Pairs, args: argparse.Namespace) -> StepClock:
    """Run its trainer over the pairs once, in file order."""
    targets = "|".join(args.targets.split(","))
    provider = qwix.LoraProvider(
        module_path=f".*({targets})", rank=args.lora_rank, alpha=args.lora_alpha
    )
    policy = qwix.apply_lora_to_model(
        base, provider, rngs=nnx.Rngs(0), **base.get_model_input()
    )
    clock = StepClock()
    trainer = dpo_trainer.DPOTrainer(
        policy,
        base,
        optax.adamw(args.learning_rate, weight_decay=0.0),
        dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, beta=0.1),
    )
    trainer.with_training_hooks(clock)
    trainer.train(batches(pairs, args.batch_size))
    return clock


def logps(model: llama3.Llama3, batch: dpo_trainer.TrainingInput) -> np.ndarray:
    """Return the log-probability of each token of the responses, by its own code."""
    found = []
    for reply, there in (
        (batch.chosen_ids, batch.chosen_mask),
        (batch.rejected_ids, batch.rejected_mask),
    ):
        mask = jnp.concatenate([batch.prompt_mask, there], axis=1)
        values = common.get_per_token_logps(
            model,
            input_tokens=jnp.concatenate([batch.prompt_ids, reply], axis=1),
            positions=common.build_positions_from_mask(mask),
            attn_mask=common.make_causal_attn_mask(mask),
            logits_to_keep=reply.shape[1],
        )
        found.append(np.asarray(values, np.float64)[there == 1])
    return np.concatenate(found)


def error(base: llama3.Llama3, pairs: Pairs, args: argparse.Namespace) -> dict:
    """Compare the base model's log-probabilities with its own in float32."""
    few = list(batches(pairs[: args.error_pairs], 1))
    mine = np.concatenate([logps(base, batch) for batch in few])
    exact = load(args.model, jnp.float32) if args.dtype != "float32" else base
    truth = np.concatenate([logps(exact, batch) for batch in few])
    return {"error": float(abs(mine - truth).mean()), "logp": float(mine.mean())}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=2, help="pairs")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--targets", default="q_proj,v_proj")
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--lora_alpha", type=float, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--error_pairs", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.count < 2 * args.batch_size:
        parser.error("--count must be two steps of --batch_size or more")
    return args


def main() -> None:
    """Train, measure, then find the error."""
    args = arguments()
    pairs = tokens_of(args)
    base = load(args.model, jnp.dtype(args.dtype))
    began = time.perf_counter()
    clock = train(base, pairs, args)
    seconds = [end - start for start, end in pairwise(clock.ends)]
    result = {
        "rate": args.batch_size * len(seconds) / sum(seconds),
        "peak_gb": peak_gb(),
        "first_step_seconds": clock.ends[0] - began,
        "seconds_per_step": seconds,
        "losses": clock.losses,
        "places": [max(map(len, side)) for side in zip(*pairs, strict=True)],
        "versions": {name: version(name) for name in PACKAGES},
    }
    if args.error_pairs:
        result |= error(base, pairs, args)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

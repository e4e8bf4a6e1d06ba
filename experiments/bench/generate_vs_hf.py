"""New tokens a second and memory against transformers' batched ``generate``.

    jaxalign fetch smollm2-135m --out smollm2
    python experiments/bench/generate_vs_hf.py --model smollm2 \
        --prompts mt_bench/question.jsonl --out experiments/bench/generate_vs_hf.md

The first turns of MT-Bench, each with 1, 4 and 10 samples at temperature 1 and
``--top_p``, up to ``--max_new_tokens``. Both sides run in fresh processes, one after
the other, on the same prompts, in float32, with all cores. transformers gets batches
padded on the left, of several sizes; its best is what counts. jaxalign's compiling is
left out of the rate (and shown), its prefill, scheduling and text are in. Tokens are
those up to the end of a text: what transformers computes for texts that have ended
counts for nothing, as in use.

``--parity`` instead compares greedy texts of all prompts token by token.

On two quiet cores about 20 minutes; ``--parity`` 10.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Measure both sides and print a table."""
    args = _arguments()
    if args.side:
        print("RESULT " + json.dumps(SIDES[args.side](args)), flush=True)
        return
    text = _parity_table(args) if args.parity else _table(args)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True, help="MT-Bench's question.jsonl")
    parser.add_argument("--out", help="Markdown file")
    parser.add_argument("--num_prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4, 10])
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--batch_slots", type=int, default=64)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--hf_rows", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--parity", action="store_true")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--num_samples", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=16, help=argparse.SUPPRESS)
    return parser.parse_args()


def _texts(args: argparse.Namespace, tokenizer: Any) -> list[str]:
    lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["turns"][0] for line in lines][: args.num_prompts]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": turn}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for turn in turns
    ]


def _result(tokens: int, seconds: float, compiling: float = 0.0) -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"tokens": tokens, "seconds": seconds, "compile": compiling, "gb": peak}


def _jaxalign(args: argparse.Namespace, greedy: bool = False) -> dict[str, Any]:
    from jaxalign.generation import text_model
    from jaxalign.generation.engine import Engine, Request, Sampling, completed

    made = text_model.load(args.model)
    requests = [
        Request(
            made.tokenizer(text, add_special_tokens=False)["input_ids"],
            Sampling(
                num_samples=args.num_samples,
                max_new_tokens=args.max_new_tokens,
                temperature=0.0 if greedy else 1.0,
                top_p=args.top_p,
                seed=seed,
            ),
            made.stop_tokens,
        )
        for seed, text in enumerate(_texts(args, made.tokenizer))
    ]
    began = time.monotonic()
    longest = max(len(r.tokens) for r in requests) + args.max_new_tokens
    engine = Engine(
        made.model,
        made.variables,
        slots=min(args.batch_slots, len(requests) * args.num_samples),
        length=longest,
        text_of=text_model.text_with(made.tokenizer),
    )
    found = dict(completed(engine, requests))
    seconds = time.monotonic() - began - engine.compile_seconds
    count = sum(len(c.tokens) for made in found.values() for c in made)
    result: dict[str, Any] = _result(count, seconds, engine.compile_seconds)
    if greedy:
        result["texts"] = [found[n][0].tokens for n in range(len(requests))]
    return result


def _transformers(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.eval()
    texts = _texts(args, tokenizer)
    size = max(1, args.rows // args.num_samples)
    torch.manual_seed(0)
    count, began = 0, time.monotonic()
    for begin in range(0, len(texts), size):
        batch = tokenizer(
            texts[begin : begin + size],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        )
        with torch.inference_mode():
            out = model.generate(
                **batch,
                max_new_tokens=args.max_new_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=args.top_p,
                num_return_sequences=args.num_samples,
                pad_token_id=tokenizer.pad_token_id,
            )
        end = model.generation_config.eos_token_id
        for row in out[:, batch["input_ids"].shape[1] :].tolist():
            tokens = row[: row.index(end) + 1] if end in row else row
            tokenizer.decode(tokens, skip_special_tokens=True)
            count += len(tokens)
    return _result(count, time.monotonic() - began)


def _greedy_jaxalign(args: argparse.Namespace) -> dict[str, Any]:
    return _jaxalign(args, greedy=True)


def _greedy_transformers(args: argparse.Namespace) -> dict[str, Any]:
    """One prompt at a time; with each token the gap of the best two logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.eval()
    texts, gaps, began = [], [], time.monotonic()
    for text in _texts(args, tokenizer):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.inference_mode():
            out = model.generate(
                ids,
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts.append(out.sequences[0, ids.shape[1] :].tolist())
        best = [step[0].topk(2).values for step in out.logits]
        gaps.append([float(one - other) for one, other in best])
    count = sum(map(len, texts))
    return {
        **_result(count, time.monotonic() - began),
        "texts": texts,
        "gaps": gaps,
    }


SIDES = {
    "jaxalign": _jaxalign,
    "transformers": _transformers,
    "greedy_jaxalign": _greedy_jaxalign,
    "greedy_transformers": _greedy_transformers,
}


def _measure(args: argparse.Namespace, side: str, **options: Any) -> dict[str, Any]:
    """Run a side in a process of its own."""
    names = "model prompts num_prompts max_new_tokens batch_slots top_p".split()
    given = {name: getattr(args, name) for name in names} | options
    flags = [f"--{name}={value}" for name, value in given.items()]
    out = subprocess.run(
        [sys.executable, __file__, f"--side={side}", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    ).stdout
    line = next(x for x in out.splitlines() if x.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def _table(args: argparse.Namespace) -> str:
    lines = [
        f"{args.num_prompts} first turns of MT-Bench, up to {args.max_new_tokens} new "
        f"tokens, temperature 1, top_p {args.top_p}, float32, "
        f"{args.batch_slots} slots.",
        "",
        "| samples | side | tokens | tokens/s | ratio | peak GB | compiling s |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]

    def add(samples: int, side: str, found: dict[str, Any], best: float) -> None:
        rate = found["tokens"] / found["seconds"]
        lines.append(
            f"| {samples} | {side} | {found['tokens']} | {rate:.1f} | "
            f"{rate / best:.2f} × | {found['gb']:.2f} | {found['compile']:.0f} |"
        )
        print(lines[-1], flush=True)

    for samples in args.samples:
        theirs = {
            rows: _measure(args, "transformers", num_samples=samples, rows=rows)
            for rows in args.hf_rows
            if rows >= samples
        }
        ours = _measure(args, "jaxalign", num_samples=samples)
        best = max(found["tokens"] / found["seconds"] for found in theirs.values())
        for rows, found in theirs.items():
            add(samples, f"transformers, {rows // samples * samples} rows", found, best)
        add(samples, "jaxalign", ours, best)
    return "\n".join(lines)


def _parity_table(args: argparse.Namespace) -> str:
    ours = _measure(args, "greedy_jaxalign")
    theirs = _measure(args, "greedy_transformers")
    same, close, apart = 0, [], []
    for number, (one, other) in enumerate(
        zip(ours["texts"], theirs["texts"], strict=True)
    ):
        pairs = zip(one, other, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if first is None and len(one) == len(other):
            same += 1
            continue
        gap = theirs["gaps"][number][
            min(len(one), len(other)) - 1 if first is None else first
        ]
        (close if gap < 1e-3 else apart).append((number, first, gap))
    return "\n".join(
        [
            f"Greedy, {len(ours['texts'])} first turns of MT-Bench, up to "
            f"{args.max_new_tokens} tokens: {same} texts equal token for token, "
            f"{len(close)} differ first where the best two logits are within 1e-3, "
            f"{len(apart)} differ elsewhere.",
            *(
                f"- prompt {n}, token {at}, gap {gap:.2e}"
                for n, at, gap in close + apart
            ),
        ]
    )


if __name__ == "__main__":
    main()

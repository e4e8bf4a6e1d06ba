"""transformers' side of ``generate_vs_hf.py``: batches through its ``generate``, timed.

Run by ``generate_vs_hf.py`` in a fresh process; writes JSON, see ``side_by_side.py``.
Prompts are padded on the left, ``--rows`` texts are made at once. ``--temperature 0``
is greedy and takes one prompt at a time, with the gap of the best two logits of each
token.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from side_by_side import peak_gb
from transformers import AutoModelForCausalLM, AutoTokenizer


PACKAGES = ("transformers", "torch")


def load(args: argparse.Namespace, dtype: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, dtype)
    )
    return model.eval()


def texts_of(args: argparse.Namespace, tokenizer: Any) -> list[str]:
    lines = Path(args.data).read_text(encoding="utf-8").splitlines()
    return [
        tokenizer.apply_chat_template(
            json.loads(line)["prompt"], add_generation_prompt=True, tokenize=False
        )
        for line in lines
    ]


@torch.inference_mode()
def sample(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Sample every prompt; keep the prompt's tokens beside those of a first sample."""
    texts = texts_of(args, tokenizer)
    size = max(1, args.rows // args.num_samples)
    end = model.generation_config.eos_token_id
    torch.manual_seed(0)
    made: list[tuple[list[int], list[int]]] = []
    count, began = 0, time.monotonic()
    for begin in range(0, len(texts), size):
        batch = tokenizer(
            texts[begin : begin + size],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        )
        out = model.generate(
            **batch,
            max_new_tokens=args.max_new_tokens,
            do_sample=True,
            temperature=args.temperature,
            top_k=0,
            top_p=args.top_p,
            num_return_sequences=args.num_samples,
            pad_token_id=tokenizer.pad_token_id,
        )
        width = batch["input_ids"].shape[1]
        for number, row in enumerate(out[:, width:].tolist()):
            tokens = row[: row.index(end) + 1] if end in row else row
            tokenizer.decode(tokens, skip_special_tokens=True)
            count += len(tokens)
            if number % args.num_samples == 0:
                place = number // args.num_samples
                there = batch["attention_mask"][place].bool()
                made.append((batch["input_ids"][place][there].tolist(), tokens))
    seconds = time.monotonic() - began
    return {"rate": count / seconds, "tokens": count, "seconds": seconds, "made": made}


@torch.inference_mode()
def greedy(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """One prompt at a time; with each token the gap of the best two logits."""
    texts, gaps, began = [], [], time.monotonic()
    for text in texts_of(args, tokenizer):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
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
    rate = sum(map(len, texts)) / (time.monotonic() - began)
    return {"rate": rate, "texts": texts, "gaps": gaps}


@torch.inference_mode()
def logps(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Return the log-probability of each token behind the prompt."""
    ids = torch.tensor([prompt + tokens])
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    chosen = ids[0, len(prompt) :, None]
    return logits.float().log_softmax(-1).gather(1, chosen)[:, 0]


def error(args: argparse.Namespace, model: Any, made: Any) -> dict[str, float]:
    """Compare the log-probabilities of its own texts with those of float32."""
    exact = model if args.dtype == "float32" else load(args, "float32")
    few = made[: args.error_pairs]
    mine = torch.cat([logps(model, *each) for each in few])
    truth = torch.cat([logps(exact, *each) for each in few])
    return {"error": (mine - truth).abs().mean().item(), "logp": mine.mean().item()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="prompts, messages")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--num_samples", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--error_pairs", type=int, default=0, help="prompts; 0: none")
    return parser.parse_args()


def main() -> None:
    """Measure, then find the error, then write both."""
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = load(args, args.dtype)
    result = (sample if args.temperature else greedy)(args, model, tokenizer)
    result["peak_gb"] = peak_gb()
    made = result.pop("made", [])
    if args.error_pairs and made:
        result |= error(args, model, made)
    result["versions"] = {name: version(name) for name in PACKAGES}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Accuracy on the six arithmetic sets of what ``hlpt_math.py`` trained.

    python experiments/hlpt_accuracy.py --model smollm2 --tests hlpt_math --runs hlpt

``hlpt_math`` has the paper's ``<set>.test_20.json`` files, ``hlpt`` the results and
weights of ``hlpt_math.py``. The first ``--items`` problems of each set are asked;
answers are greedy (the paper: a beam of 4), of at most 128 tokens. HLPT as published
reads later tokens: it cannot decode token by token and is left out.

A number is right, as in the paper's code, if the last one in the answer is within 0.001
of it. A choice (AQuA) is the last letter in brackets, as the training answers end: the
paper's code takes the first letter from A to E, which is the A of "A:" that most
answers begin with.

About two minutes a run on two cores for 20 problems a set; give the same command
again to go on after a stop.
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
from hlpt_math import METHODS, Method, prompt

from jaxalign import trees
from jaxalign.adapters import adapter
from jaxalign.adapters.adapter import NoAdapter
from jaxalign.checkpoints import adapter_start
from jaxalign.checkpoints import load as load_lib
from jaxalign.data import chat
from jaxalign.data.rendering import Renderer
from jaxalign.generation import text_model
from jaxalign.generation.engine import Request, Sampling, generate
from jaxalign.models import decoder
from jaxalign.whole_file import write_text


SETS = ("AQuA", "AddSub", "MultiArith", "SVAMP", "SingleEq", "gsm8k")


def main() -> None:
    """Answer what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--tests", required=True, help="directory of *.test_20.json")
    parser.add_argument("--runs", required=True, help="--out of hlpt_math.py")
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    problems = {
        name: json.loads((Path(args.tests) / f"{name}.test_20.json").read_text())
        for name in SETS
    }
    problems = {name: items[: args.items] for name, items in problems.items()}
    rows = []
    for method in METHODS:
        if adapter.averages_ahead(method.adapter):
            continue
        texts = [_run(args, method, seed, problems) for seed in range(args.seeds)]
        rows.append((method.name, [_shares(mine, problems) for mine in texts]))
        print(method.name, rows[-1][1], flush=True)
    text = table(rows, {name: len(items) for name, items in problems.items()})
    print(text)
    (Path(args.runs) / "accuracy.md").write_text(text + "\n")


def _run(
    args: argparse.Namespace, method: Method, seed: int, problems: dict[str, Any]
) -> list[str]:
    """Answer all problems with one run's weights, or read what was answered."""
    path = Path(args.runs) / f"{method.name}_seed{seed}.accuracy.json"
    asked = [args.items, args.max_new_tokens]
    if path.is_file():
        done = json.loads(path.read_text())
        if done["asked"] == asked:
            return done["texts"]
    model, variables = _load(args, method, seed)
    tokenizer = chat.load_tokenizer(args.model)
    greedy = Sampling(max_new_tokens=args.max_new_tokens, temperature=0.0)
    stops = Renderer(tokenizer).stop_tokens()
    flat = [(name, item) for name, items in problems.items() for item in items]
    requests = [
        Request(tokenizer(prompt(item["instruction"]))["input_ids"], greedy, stops)
        for _, item in flat
    ]
    texts = generate(
        model, variables, requests, slots=64, text_of=text_model.text_with(tokenizer)
    )
    done = {"asked": asked, "texts": [completion.text for (completion,) in texts]}
    write_text(path, json.dumps(done, indent=2) + "\n")
    return done["texts"]


def _shares(texts: list[str], problems: dict[str, Any]) -> dict[str, float]:
    """Return which share of each set was answered right."""
    left, shares = iter(texts), {}
    for name, items in problems.items():
        marks = [is_right(next(left), item["answer"], name) for item in items]
        shares[name] = statistics.mean(marks)
    return shares


def _load(args: argparse.Namespace, method: Method, seed: int) -> tuple[Any, Any]:
    """Return a model and its variables with what a run trained, cut by layer."""
    config = load_lib.open_config(args.model)[0].text
    chosen = method.config(seed, config.num_layers)
    groups = adapter.groups(chosen, decoder.param_shapes(config), config.num_layers)
    checkpoint = load_lib.load(args.model, groups=groups)
    variables = dict(checkpoint.variables)
    if not isinstance(chosen, NoAdapter):
        variables |= adapter_start.make(jax.random.key(seed), chosen, checkpoint)
    with np.load(Path(args.runs) / f"{method.name}_seed{seed}.npz") as trained:
        left = set(trained.files)

        def put(path: str, leaf: Any) -> Any:
            left.discard(path)
            return trained[path] if path in trained.files else leaf

        variables = jax.device_put(trees.map_with_paths(put, variables))
    assert not left, left
    return text_model.cut(checkpoint, variables, donate=True)


def is_right(text: str, answer: Any, name: str) -> bool:
    """Tell whether an answer is right, by the rules that the file begins with.

    >>> is_right("so he has 12 - 4 = 8.", 8, "AddSub")
    True
    >>> is_right("A: Not (B). The answer is (C).", "C", "AQuA")
    True
    """
    if name == "AQuA":
        return re.findall(r"\(([A-E])\)", text)[-1:] == [answer]
    numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return bool(numbers) and abs(float(numbers[-1]) - float(answer)) <= 0.001


def table(rows: list[tuple[str, list[dict[str, float]]]], sizes: dict[str, int]) -> str:
    """Return a Markdown table: means over seeds, and the overall mean's standard error.

    Over problems, of one seed's answers: seeds answer the same ones.
    """
    lines = [
        f"| method | {' | '.join(SETS)} | mean |",
        f"|---|{'---:|' * (len(SETS) + 1)}",
    ]
    for name, found in rows:
        cells = [statistics.mean(shares[s] for shares in found) for s in SETS]
        spread = [p * (1 - p) / sizes[s] for p, s in zip(cells, SETS, strict=True)]
        mean, error = statistics.mean(cells), sum(spread) ** 0.5 / len(SETS)
        shown = " | ".join(f"{100 * cell:.1f}" for cell in cells)
        lines.append(f"| {name} | {shown} | {100 * mean:.1f} ± {100 * error:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""New tokens a second and memory against transformers' batched ``generate``.

    jaxalign fetch smollm2-135m --out smollm2
    python experiments/bench/generate_vs_hf.py --model smollm2 \
        --prompts mt_bench/question.jsonl --out experiments/bench/generate_vs_hf.md

The first turns of MT-Bench with 4 samples each (``--samples`` for other numbers) at
temperature 1 and ``--top_p``, up to ``--max_new_tokens``. Each side is at its best:
transformers with weights in float32 and in bfloat16 (where the CPU multiplies it, or
``--without_units``) and with batches of ``--hf_rows``, padded on the left; jaxalign in
float32, bfloat16 and what ``--dtype fastest`` takes. Every setting runs in a fresh
process, in turn, in ``--rounds`` rounds on the same prompts with all cores;
transformers' settings that the first round shows far from its best run once. Figures
are medians. jaxalign's compiling is left out of the rate, its prefill, scheduling, text
and file are in. Tokens are those up to the end of a text: what transformers computes
for texts that have ended counts for nothing, as in use.

The error is the mean difference of a token's log-probability from the same library's
float32, over texts that the side itself made from the first ``--error_prompts``
prompts. The texts differ, so the last column does too, a little (ours also counts the
end of turn, put behind the texts that were cut short).

``--parity`` instead compares greedy texts of all prompts token by token.

On two quiet cores about 25 minutes; ``--parity`` 10.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import (
    NO_UNITS,
    Result,
    Side,
    alternate,
    head_line,
    multiplies_bf16,
    run_side,
    script,
    table,
)


DTYPES = ("float32", "bfloat16", "fastest")
HF_DTYPES = ("float32", "bfloat16")


def main() -> None:
    """Measure both sides and print a table."""
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text(_first_turns(args), encoding="utf-8")
        text = (_parity if args.parity else _speed)(args, prompts)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True, help="MT-Bench's question.jsonl")
    parser.add_argument("--out", help="Markdown file")
    parser.add_argument("--num_prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, nargs="+", default=[4])
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--batch_slots", type=int, default=64)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--hf_rows", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--error_prompts", type=int, default=8)
    parser.add_argument("--without_units", action="store_true")
    parser.add_argument("--parity", action="store_true")
    return parser.parse_args()


def _first_turns(args: argparse.Namespace) -> str:
    lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["turns"][0] for line in lines][: args.num_prompts]
    return "".join(
        json.dumps({"prompt": [{"role": "user", "content": turn}]}) + "\n"
        for turn in turns
    )


def _common(args: argparse.Namespace, prompts: Path, samples: int) -> tuple[str, ...]:
    return (
        *(f"--model={args.model}", f"--data={prompts}", f"--num_samples={samples}"),
        *(f"--max_new_tokens={args.max_new_tokens}", f"--top_p={args.top_p}"),
    )


def _sides(args: argparse.Namespace, prompts: Path, samples: int) -> list[Side]:
    """Return transformers' settings and ours in turn."""
    common = _common(args, prompts, samples)
    lacks = "" if args.without_units or multiplies_bf16() else NO_UNITS
    theirs = [
        Side(
            f"transformers, {dtype}, {rows // samples * samples} rows",
            "transformers",
            script("hf_side.py", *common, f"--rows={rows}", f"--dtype={dtype}"),
            lacks if dtype == "bfloat16" else "",
        )
        for dtype in HF_DTYPES
        for rows in args.hf_rows
        if rows >= samples
    ]
    slots = f"--batch_slots={args.batch_slots}"
    ours = [
        Side(
            f"jaxalign, {dtype}",
            "ours",
            script(
                *("jaxalign_side.py", "generate", *common, slots, f"--dtype={dtype}")
            ),
        )
        for dtype in DTYPES
    ]
    return [
        side
        for index in range(max(len(theirs), len(ours)))
        for side in (*theirs[index : index + 1], *ours[index : index + 1])
    ]


def _speed(args: argparse.Namespace, prompts: Path) -> str:
    tables: list[str] = []
    runs: list[Result] = []
    for samples in args.samples:
        sides = _sides(args, prompts, samples)
        errors = (f"--error_pairs={args.error_prompts}",)
        results, skipped = alternate(sides, args.rounds, first=errors)
        runs += [run for some in results.values() for run in some]
        shown = table(sides, results, skipped, unit="tokens/s", peer="transformers")
        tables += [f"{samples} samples of each prompt:", "", shown, ""]
    return "\n".join(
        [
            head_line(runs),
            "",
            f"{args.num_prompts} first turns of MT-Bench, up to {args.max_new_tokens} "
            f"new tokens, temperature 1, top_p {args.top_p}, {args.batch_slots} slots.",
            "",
            *tables[:-1],
        ]
    )


def _parity(args: argparse.Namespace, prompts: Path) -> str:
    common = (*_common(args, prompts, 1), "--temperature=0")
    slots = f"--batch_slots={args.batch_slots}"
    ours = _result(script("jaxalign_side.py", "generate", *common, slots))
    theirs = _result(script("hf_side.py", *common))
    same, close, apart = 0, [], []
    for number, (one, other) in enumerate(
        zip(ours["texts"], theirs["texts"], strict=True)
    ):
        pairs = zip(one, other, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if first is None and len(one) == len(other):
            same += 1
            continue
        at = min(len(one), len(other)) - 1 if first is None else first
        gap = theirs["gaps"][number][at]
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


def _result(command: tuple[str, ...]) -> dict[str, Any]:
    found = run_side(command)
    if isinstance(found, str):
        raise SystemExit(f"{command[1]}: {found}")
    return found


if __name__ == "__main__":
    main()

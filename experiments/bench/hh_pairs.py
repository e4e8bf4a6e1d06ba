"""Make the file of preference pairs that the TRL comparison trains on.

    python experiments/bench/hh_pairs.py --data harmless_base_test.jsonl.gz \
        --model DIR --max_length 512 --count 200 --out hh_pairs.jsonl

Reads Anthropic's HH-RLHF dialogues and writes, in file order, the first `--count` pairs
whose two renderings fit in `--max_length` tokens of the model's chat template, as
{"prompt": [...], "chosen": [...], "rejected": [...]} chat messages. Takes a few
seconds. The dialogues are offensive in places: only counts are printed, and the output
must never be committed.
"""

import argparse
import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any


# Before transformers is imported: the bench never talks to a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402


ANSWER = "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}

Record = dict[str, list[dict[str, str]]]


def parse_pair(chosen: str, rejected: str) -> Record | str:
    """Return the pair as chat messages, or the reason why it has to be left out."""
    chosen_prompt, _, chosen_reply = chosen.rpartition(ANSWER)
    rejected_prompt, _, rejected_reply = rejected.rpartition(ANSWER)
    if chosen_prompt != rejected_prompt:
        return "the two dialogues differ before the last reply"
    if not chosen_reply.strip() or not rejected_reply.strip():
        return "a reply is empty"
    before, *turns = TURN.split(chosen_prompt)
    speakers, texts = turns[0::2], turns[1::2]
    # Some chat templates refuse anything but user and assistant in turn.
    expected = ["Human", "Assistant"] * (len(speakers) // 2) + ["Human"]
    if before.strip() or speakers != expected:
        return "the turns do not alternate"
    prompt = [
        {"role": ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(speakers, texts, strict=True)
    ]
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen_reply.strip()}],
        "rejected": [{"role": "assistant", "content": rejected_reply.strip()}],
    }


def token_counts(record: Record, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Count the tokens of the prompt and of the two whole renderings."""

    def count(messages: list[dict[str, str]], *, generation_prompt: bool) -> int:
        text: Any = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt
        )
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompt = record["prompt"]
    return {
        "prompt": count(prompt, generation_prompt=True),
        "chosen": count(prompt + record["chosen"], generation_prompt=False),
        "rejected": count(prompt + record["rejected"], generation_prompt=False),
    }


def read_dialogues(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    left_out: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    kept = 0
    with arguments.out.open("w", encoding="utf-8") as out:
        for dialogue in read_dialogues(arguments.data):
            record = parse_pair(dialogue["chosen"], dialogue["rejected"])
            if isinstance(record, str):
                left_out[record] += 1
                continue
            counts = token_counts(record, tokenizer)
            if max(counts["chosen"], counts["rejected"]) > arguments.max_length:
                left_out[f"longer than {arguments.max_length} tokens"] += 1
                continue
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            totals.update(counts)
            kept += 1
            if kept == arguments.count:
                break

    if kept < arguments.count:
        parser.error(f"{arguments.data}: {kept} pairs fit, {arguments.count} wanted")
    unshared = (totals["chosen"] + totals["rejected"]) / kept
    # Each rendering repeats the prompt; storing it once saves one copy.
    shared = unshared - totals["prompt"] / kept
    print(f"{kept} pairs in {arguments.out}; left out: {dict(left_out)}")
    print(f"tokens a pair: {unshared:.1f}, with the prompt stored once {shared:.1f}")


if __name__ == "__main__":
    main()

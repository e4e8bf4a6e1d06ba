"""What masks cost: tokens a second of the engine, steered by a schema and not.

    python experiments/bench/structured_output.py --model runs/smollm2

Sixty-four slots of SmolLM2-135M (``jaxalign fetch smollm2-135m``) write answers of 128
tokens at temperature 1, once as they come and once under a JSON schema of texts and
numbers that no answer ends before; the two are alternated, so that what else the
machine does touches both, and the ratio is of the medians. Compiling is not counted.
On a CPU the processor's own seconds are told too, which a busy machine changes less.

Takes about six minutes on two cores of a CPU. Expected: a ratio of at least 0.85.
"""

import argparse
import json
import statistics
import time
from typing import Any

from jaxalign.data.records import Message, Prompt
from jaxalign.data.rendering import Renderer
from jaxalign.generation import text_model
from jaxalign.generation.engine import Engine, Request, Sampling
from jaxalign.generation.steering import Steering
from jaxalign.generation.structure import json_schema


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "people": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "age": {"type": "integer", "minimum": 0, "maximum": 120},
                    "likes": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["name", "age", "likes"],
                "additionalProperties": False,
            },
            "minItems": 50,
        }
    },
    "required": ["people"],
    "additionalProperties": False,
}
"""Too long to be complete, so that both kinds make the same number of tokens."""


def seconds(engine: Engine, request: Request, tokens: int) -> tuple[float, float]:
    """Return what a batch of answers takes: by the clock, and of the processors."""
    before = engine.compile_seconds
    began, used = time.monotonic(), time.process_time()
    engine.submit(request)
    made = 0
    while engine.busy:
        made += len(engine.step())
    assert made == tokens, (made, tokens)
    taken = time.monotonic() - began - (engine.compile_seconds - before)
    return taken, time.process_time() - used


def main() -> None:
    """Measure, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    made = text_model.load(options.model)
    engine = Engine(
        made.model,
        made.variables,
        slots=options.slots,
        length=512,
        text_of=text_model.text_with(made.tokenizer),
        tokenizer=made.tokenizer,
    )
    turns = (Message(role="user", content="List fifty people as JSON."),)
    prompt = Renderer(made.tokenizer).prompt_tokens(Prompt(turns, None, "the bench"))
    sampling = Sampling(num_samples=options.slots, max_new_tokens=options.tokens)
    free = Request(prompt, sampling)
    steered = free._replace(steering=Steering(structure=json_schema(SCHEMA)))
    total = options.slots * options.tokens
    times: dict[str, list[float]] = {"free": [], "steered": []}
    processors: dict[str, list[float]] = {"free": [], "steered": []}
    for number in range(options.rounds + 1):
        for name, request in (("free", free), ("steered", steered)):
            taken, used = seconds(engine, request, total)
            if number:  # the first round warms up
                times[name].append(taken)
                processors[name].append(used)
    medians = {name: statistics.median(some) for name, some in times.items()}
    spent = {name: statistics.median(some) for name, some in processors.items()}
    print(
        json.dumps(
            {
                "slots": options.slots,
                "tokens_per_second": {
                    name: round(total / median, 1) for name, median in medians.items()
                },
                "ratio": round(medians["free"] / medians["steered"], 3),
                "processor_ratio": round(spent["free"] / spent["steered"], 3),
                "seconds": {
                    n: [round(t, 2) for t in some] for n, some in times.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()

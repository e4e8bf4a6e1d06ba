"""Rows from anywhere: dicts, datasets, a stream, TFDS, a DataFrame, a file.

python experiments/notebooks/09_rows.py    # seconds
"""

# %%
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxalign
from jaxalign.data import loader, pairs, records, sample, tokenizer
from jaxalign.objectives import policy


MODEL = os.environ.get("JAXALIGN_NOTEBOOK_MODEL", "smollm2")

# %% The packaged feedback, as a start
feedback = sample.read()
print(f"{len(feedback)} records on {', '.join(records.aspects_of(feedback))}")

# %% A list of dicts, or a generator of them; None is no value
rows = [
    {
        "prompt": f"Is {n} even?",
        "chosen": f"It is {'even' if n % 2 == 0 else 'odd'}.",
        "rejected": "Who knows.",
        "chosen_segments": [{"start": 0, "end": 5, "scores": {"help": 3.0}}],
        "rejected_segments": [{"start": 0, "end": 10, "scores": {"help": 0.0}}],
        "weight": None,
    }
    for n in range(4)
]
want = [record._replace(where="") for record in records.from_rows(rows)]


def check(name: str, source: object) -> None:
    """Say that a source gives the same records as the list."""
    got = [record._replace(where="") for record in records.from_rows(source)]
    assert got == want, name
    print(f"{name}: {len(got)} records")


check("a generator", (row for row in rows))

# %% datasets, whole and streamed
try:
    import datasets
except ImportError:
    print("datasets is not installed")
else:

    def stream() -> Iterator[dict]:
        """Yield rows for ever."""
        while True:
            yield from rows

    check("datasets.Dataset", datasets.Dataset.from_list(rows))
    endless = datasets.IterableDataset.from_generator(stream)
    check("datasets.IterableDataset", endless.take(4))

# %% A DataFrame
try:
    import pandas as pd
except ImportError:
    print("pandas is not installed")
else:
    check("pandas.DataFrame", pd.DataFrame(rows))


# %% What tensorflow-datasets gives: bytes, numpy, sequences as dicts of arrays
def of_tfds(row: dict) -> dict:
    """Return a row as ``tfds.data_source`` has it."""
    made = {k: v.encode() for k, v in row.items() if isinstance(v, str)}
    for name in ("chosen_segments", "rejected_segments"):
        made[name] = {
            "start": np.array([s["start"] for s in row[name]]),
            "end": np.array([s["end"] for s in row[name]]),
            "scores": {"help": np.float32([s["scores"]["help"] for s in row[name]])},
        }
    return made


check("rows of TFDS", [of_tfds(row) for row in rows])

# %% A file
file = Path(tempfile.mkdtemp()) / "rows.jsonl"
file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
check("a file", file)

# %% What takes records takes rows: tokenised, packed, summed by segment
data = pairs.prepare(iter(rows), tokenizer.load_tokenizer(MODEL), max_length=None)
batch = jax.tree.map(jnp.asarray, loader.single_batch(data))
base = jaxalign.load_hf(MODEL)
logps = policy.policy_token_logps(base.variables, batch, model=base.model)
shape = batch.segment_mask.shape[1], batch.segment_mask.shape[3]
sums = jaxalign.objectives.logps.segment_sums(logps, batch.completions, shape)
print(f"log-probabilities of segments {sums.shape}: {np.asarray(sums)[0, 0, :, 0]}")

# %% And what is no row is said
for wrong in (rows[0], "not a file", [{**rows[0], "chosen": None}]):
    try:
        records.from_rows(wrong)
    except jaxalign.errors.UserError as error:
        print(error)
    else:
        raise AssertionError(wrong)

"""Go on with a run, read its metrics, and open its checkpoints with Orbax alone.

``python experiments/notebooks/08_resume.py``; MODEL as in ``01_score.py``. A run of
four updates is stopped after two and ends with the bits of an undisturbed one. A
minute.
"""

# %%
import json
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints.policy import open_run
from jaxalign.objectives.pairwise import PairwiseConfig
from jaxalign.training import metrics
from jaxalign.training.config import TrainConfig
from jaxalign.training.loop import fit
from jaxalign.training.setup import setup


MODEL = os.environ.get("JAXALIGN_NOTEBOOK_MODEL", "smollm2")
folder = Path(tempfile.mkdtemp())
rows = [
    {"prompt": f"Count to {n}.", "chosen": "One, two.", "rejected": "No, never."}
    for n in range(2, 10)
]


def begun(out):
    config = TrainConfig(
        model=MODEL,
        data="",
        out=out and str(folder / out),
        objective=PairwiseConfig(name="sigmoid"),
        adapter=LoRAConfig(rank=4),
        max_steps=4,
        batch_rows=1,
        row_length=128,
        max_length=64,
        logging_steps=1,
        save_steps=2,
        report_to="none",
    )
    return setup(config, rows=rows)


# %% Without a directory, undisturbed
undisturbed = fit(begun(""))


# %% With one: stopped while its third step is on the way, and begun again
def stop(step, line):
    if step == 2:
        raise KeyboardInterrupt  # as Ctrl-C does


with begun("run") as session:
    try:
        fit(session, report=stop)
    except KeyboardInterrupt:
        print("stopped after step", session.step, "saved:", session.store.steps())
with begun("run") as session:
    print("going on after step", session.step)
    resumed = fit(session)
jax.tree.map(np.testing.assert_array_equal, resumed.trainable, undisturbed.trainable)

# %% Metrics are JSON Lines: one object a step, once each
lines = metrics.read(folder / "run" / "metrics.jsonl")
print("loss by step:", {step: round(line["loss"], 4) for step, line in lines.items()})
assert [step for step in lines if step] == [1, 2, 3, 4]
plain = (folder / "run" / "metrics.jsonl").read_text().splitlines()
print("columns:", sorted(json.loads(plain[-1])))

# %% What was trained, by the library and by Orbax alone
policy = open_run(folder / "run")
saved = folder / "run" / "checkpoints" / "4" / "trainable"
with ocp.StandardCheckpointer() as checkpointer:
    by_hand = checkpointer.restore(saved.absolute())
ours = jax.tree.leaves(resumed.trainable)
theirs = [leaf for leaf in jax.tree.leaves(by_hand) if leaf is not None]
assert policy.step == 4 and len(ours) == len(theirs)
for one, other in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(one, other)

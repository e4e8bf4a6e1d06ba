"""Ctrl-C and go on, two runs side by side, and another dtype.

``python experiments/notebooks/10_interrupt.py``; MODEL as in ``01_score.py``. A minute.
"""

# %%
import os
import signal
import threading

import jax
import numpy as np

from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints import load
from jaxalign.objectives.pairwise import PairwiseConfig
from jaxalign.training.config import TrainConfig
from jaxalign.training.loop import fit
from jaxalign.training.optimizer import OptimizerConfig
from jaxalign.training.setup import setup


MODEL = os.environ.get("JAXALIGN_NOTEBOOK_MODEL", "smollm2")
rows = [
    {"prompt": f"Is {n} even?", "chosen": f"{n % 2 == 0}", "rejected": "Perhaps."}
    for n in range(8)
]


def ready(model, **changes):
    sizes = {"max_steps": 4, "batch_rows": 1, "row_length": 128, "max_length": 64}
    config = TrainConfig(
        model="",
        data="",
        out="",
        objective=PairwiseConfig(name="sigmoid"),
        adapter=LoRAConfig(rank=4),
        logging_steps=1,
        **sizes,
        **changes,
    )
    return setup(config, model=model, rows=rows)


base = load.load(MODEL)

# %% Two runs from one model, which both leave as it was
sessions = [
    ready(base, optimizer=OptimizerConfig(learning_rate=rate)) for rate in (1e-3, 1e-4)
]
fast, slow = [fit(session) for session in sessions]


def distance(state):
    return sum(float(abs(leaf).sum()) for leaf in jax.tree.leaves(state.trainable))


print("sums of weights:", distance(fast), distance(slow))

# %% Ctrl-C in the second step: the session has the last whole step, and goes on
session = ready(base, optimizer=OptimizerConfig(learning_rate=1e-3))


def ctrl_c(step, line):
    if step == 1:
        signal.raise_signal(signal.SIGINT)


try:
    fit(session, report=ctrl_c)
except KeyboardInterrupt:
    print("stopped after step", session.step, "of", session.source.num_steps)
assert 0 < session.step < 4
again = fit(session)
jax.tree.map(np.testing.assert_array_equal, again.trainable, fast.trainable)
print("threads left:", [t.name for t in threading.enumerate() if "grain" in t.name])

# %% Another dtype of weights and computation; what is trained stays float32
half = load.load(MODEL, dtype="bfloat16")
state = fit(ready(half, optimizer=OptimizerConfig(learning_rate=1e-3)))
kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(state.trainable)}
print("frozen", half.dtype, "trained", kinds)
assert kinds == {"float32"}

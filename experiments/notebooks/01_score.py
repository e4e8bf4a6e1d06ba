"""Load a model, score feedback, look at segments of one's own and at learned rewards.

``python experiments/notebooks/01_score.py``, or cell by cell in an editor; MODEL is
SmolLM2-135M-Instruct as ``jaxalign fetch smollm2-135m --out smollm2`` leaves it. Prints
for each response its log-probability, that of every segment, and the reward that two
updates of DPO taught: 0 before, and higher for the chosen one after. A minute.
"""

# %%
import os

import jax
import numpy as np

from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints import load
from jaxalign.data import chat, loader, pairs, records
from jaxalign.evaluation.score import PolicyAndReference, score_records
from jaxalign.objectives import logps, policy
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.objectives.pairwise import PairwiseConfig
from jaxalign.training.config import TrainConfig
from jaxalign.training.loop import fit
from jaxalign.training.optimizer import OptimizerConfig
from jaxalign.training.setup import setup


MODEL = os.environ.get("JAXALIGN_NOTEBOOK_MODEL", "smollm2")

# %% Segments of one's own: any spans of the text, scored or not.
good, bad = "Air scatters blue light most. Red passes.", "Good one! It mirrors the sea."
rows = [
    {
        "prompt": [{"role": "user", "content": "Why is the sky blue?"}],
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad}],
        "chosen_segments": [
            {"start": 0, "end": 29, "scores": {"correct": 4}},
            {"start": 29, "end": 41, "scores": {"correct": 3}},
        ],
        "rejected_segments": [
            {"start": 0, "end": 9, "scores": {"correct": 2}},
            {"start": 9, "end": 29, "scores": {"correct": 0}},
        ],
    }
]

# %%
base = load.load(MODEL)
tokenizer = chat.load_tokenizer(MODEL)
parsed = [records.parse(row) for row in rows]
data = pairs.prepare(parsed, tokenizer, max_length=128)
batch = loader.single_batch(data)
score_tokens = jax.jit(policy.policy_token_logps, static_argnames="model")
token_logps = score_tokens(base.variables, batch, model=base.model)
_, in_row, _, most = batch.segment_mask.shape  # rows, pairs, sides, segments
segments = logps.segment_sums(token_logps, batch.completions, (in_row, most))
print("log-probability of each segment:", np.asarray(segments)[0, 0])

# %% What training teaches: rewards are beta times the log-ratio to the start.
config = TrainConfig(
    model="",
    data="",
    out="",
    objective=PairwiseConfig(name="sigmoid"),
    adapter=LoRAConfig(rank=4),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    max_steps=2,
    batch_rows=1,
    row_length=256,
    max_length=128,
)
session = setup(config, model=base, rows=rows)
fit(session)

# %%
scorer = PolicyAndReference(
    model=session.model,
    variables=session.variables,
    ref_model=base.model,
    ref_variables=base.variables,
)
(result,) = score_records(data, scorer, objective=DPO2DConfig())
print("log-probability of chosen:", result["chosen"]["logp"])
print("learned rewards:", result["rewards"])
assert result["rewards"]["margin"] > 0

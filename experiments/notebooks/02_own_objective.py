"""An objective of one's own: with plain Optax, and in the library's loop.

``python experiments/notebooks/02_own_objective.py``; MODEL as in ``01_score.py``. The
loss is IPO, written in three lines; packing, the shared prompt and the reference (the
adapter switched off) come with the tokens. Both ways print a loss that falls from 25.
A minute.
"""

# %% With plain Optax
import os

import jax
import optax

from jaxalign import trees
from jaxalign.adapters import adapter, lora
from jaxalign.checkpoints import load
from jaxalign.data import chat, loader, pairs, records
from jaxalign.objectives import policy


MODEL = os.environ.get("JAXALIGN_NOTEBOOK_MODEL", "smollm2")
rows = [
    {"prompt": f"What is {n} plus {n}?", "chosen": f"It is {2 * n}.", "rejected": "No."}
    for n in range(1, 9)
]


def ipo(tokens, batch):
    ratio = policy.pair_logps(tokens, batch).logratios  # [b p 2]: chosen, rejected
    return (ratio[..., 0] - ratio[..., 1] - 1 / (2 * 0.1)) ** 2  # [b p]


base = load.load(MODEL)
adapters = lora.init(
    jax.random.key(0), base.variables["params"], lora.LoRAConfig(rank=4)
)
variables = {**base.variables, "lora": adapters}
trainable, frozen = trees.partition(variables, adapter.trained(variables))
parsed = [records.parse(row) for row in rows]
data = pairs.prepare(parsed, chat.load_tokenizer(MODEL), max_length=64)
batch = loader.single_batch(data)


@jax.jit
def loss_fn(trainable, frozen, batch):
    tokens = policy.score_tokens(trainable, frozen, batch, None, model=base.model)
    mask = batch.pair_mask
    return (ipo(tokens, batch) * mask).sum() / mask.sum()


tx = optax.adamw(1e-3)
opt_state = tx.init(trainable)
gradient = jax.jit(jax.value_and_grad(loss_fn))
for _ in range(3):
    loss, grads = gradient(trainable, frozen, batch)
    updates, opt_state = tx.update(grads, opt_state, trainable)
    trainable = optax.apply_updates(trainable, updates)
    print("by hand", float(loss))

# %% In fit: evaluation, metrics, accumulation and meshes as for built-in objectives
from jaxalign.training.config import TrainConfig  # noqa: E402
from jaxalign.training.loop import fit  # noqa: E402
from jaxalign.training.setup import setup  # noqa: E402


config = TrainConfig(
    model="",
    data="",
    out="",
    adapter=lora.LoRAConfig(rank=4),
    max_steps=3,
    batch_rows=1,
    row_length=512,
    max_length=64,
    gradient_accumulation_steps=2,
    logging_steps=1,
)
losses = []
session = setup(config, objective=ipo, model=base, rows=rows, eval_rows=rows[:2], tx=tx)
fit(session, report=lambda step, line: losses.append(line.get("loss")))
print("in fit", losses)
assert losses[-1] < losses[1]

"""Train what one chooses: a mask of one's own over the leaves, by hand and by pattern.

``python experiments/notebooks/03_own_mask.py``; MODEL as in ``01_score.py``. Only the
norms of the upper half of the layers are trained by hand; in the loop the same kind of
leaf is named by a pattern. Prints how many weights, and that the others stay. A minute.
"""

# %%
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import trees
from jaxalign.adapters.adapter import NoAdapter
from jaxalign.checkpoints import load
from jaxalign.data import chat, loader, pairs, records
from jaxalign.objectives import objective
from jaxalign.objectives.pairwise import PairwiseConfig
from jaxalign.training.config import TrainConfig
from jaxalign.training.loop import fit
from jaxalign.training.setup import setup


MODEL = os.environ.get("JAXALIGN_NOTEBOOK_MODEL", "smollm2")
rows = [
    {"prompt": f"Name a number above {n}.", "chosen": f"{n + 1}", "rejected": f"{n}"}
    for n in range(1, 9)
]
base = load.load(MODEL)

# %% A mask is a tree of booleans, made from the paths.
mask = trees.map_with_paths(
    lambda path, leaf: path.endswith("scale") and "layers" in path, base.variables
)
trainable, frozen = trees.partition(base.variables, mask)
# What is trained has moved away from the reference, so its start is kept as that.
frozen["reference"] = {"params": trainable["params"]}
print(
    f"{trees.num_params(trainable):,} of {trees.num_params(base.variables):,} weights"
)

# %% Some layers of a stack: a mask of numbers on the updates.
num_layers = base.config.text.num_layers
upper = jnp.arange(num_layers) >= num_layers // 2
data = pairs.prepare(
    [records.parse(row) for row in rows], chat.load_tokenizer(MODEL), max_length=64
)
batch = loader.single_batch(data)


@jax.jit
@jax.grad
def gradient(trainable, frozen, batch):
    config = PairwiseConfig(name="sigmoid")
    return objective.loss_fn(
        trainable, frozen, batch, None, model=base.model, config=config
    )[0]


tx = optax.adam(1e-3)
opt_state = tx.init(trainable)
now = trainable
for _ in range(2):
    grads = gradient(now, frozen, batch)
    updates, opt_state = tx.update(grads, opt_state, now)
    updates = jax.tree.map(lambda u: u * upper[:, None], updates)
    now = optax.apply_updates(now, updates)
for old, new in zip(jax.tree.leaves(trainable), jax.tree.leaves(now), strict=True):
    moved = np.any(np.asarray(old != new), axis=1)
    assert not moved[: num_layers // 2].any() and moved[num_layers // 2 :].all()

# %% The same kind of leaf in the loop: patterns of base weights, no adapter.
config = TrainConfig(
    model="",
    data="",
    out="",
    objective=PairwiseConfig(name="sigmoid"),
    adapter=NoAdapter(),
    trainable=("layers.*scale",),
    max_steps=2,
    batch_rows=1,
    row_length=512,
    max_length=64,
)
session = setup(config, model=base, rows=rows)
fit(session)
changed = [
    path
    for path, leaf in trees.by_path(session.variables["params"]).items()
    if not np.array_equal(leaf, trees.by_path(base.variables["params"])[path])
]
print("trained:", changed)
assert changed and all(path.endswith("scale") for path in changed)

"""Edit a tensor of a checkpoint and export it; what does not fit is refused.

python experiments/notebooks/06_edit_and_export.py    # seconds, and the disk's time
"""

# %%
import os
import tempfile
from pathlib import Path

import jax
import numpy as np

import jaxalign
from jaxalign import trees
from jaxalign.errors import UserError


MODEL = os.environ.get("JAXALIGN_NOTEBOOK_MODEL", "smollm2")
OUT = Path(tempfile.mkdtemp())

# %% Load: variables are {"params": ...}, nested dicts of arrays, layers in one stack
base = jaxalign.load_hf(MODEL, dtype="auto")
for path, leaf in trees.by_path(base.variables["params"]).items():
    print(f"{path:50} {leaf.dtype} {list(leaf.shape)}")


# %% Edit: a tree is a value, so an edit is a new tree that shares all other leaves
def edited(pattern: str, fn) -> dict:  # noqa: ANN001
    """Return the variables with a function of the leaves that match in their place."""
    mask = trees.mask_from_patterns(base.variables, [pattern])
    return jax.tree.map(lambda m, x: fn(x) if m else x, mask, base.variables)


louder = edited("params/norm/scale", lambda x: 2 * x)
out = jaxalign.save_hf(louder, OUT / "louder", like=base)
again = jaxalign.load_hf(out, dtype="auto")
got, want = (v["params"]["norm"]["scale"] for v in (again.variables, louder))
np.testing.assert_array_equal(got, want)
print(f"written: {sorted(p.name for p in out.iterdir())}")

# %% What is unchanged comes out as it went in, byte for byte
same = jaxalign.save_hf(base.variables, OUT / "same", like=base)
for file in sorted(same.glob("*.safetensors")):
    assert file.read_bytes() == (base.path / file.name).read_bytes()

# %% What does not fit is refused: by path, with what was got and what was expected
SLIPS = {
    "transposed": ("params/.*/down_proj/kernel", lambda x: x.swapaxes(-1, -2)),
    "a row more": ("params/embed_tokens/.*", lambda x: jax.numpy.append(x, x[:1], 0)),
    "not a number": ("params/norm/scale", lambda x: x.at[0].set(np.nan)),
}
for name, (pattern, fn) in SLIPS.items():
    try:
        jaxalign.save_hf(edited(pattern, fn), OUT / "wrong", like=base)
    except UserError as error:
        print(f"{name}: {error}\n")
    else:
        raise AssertionError(name)
    assert not (OUT / "wrong").exists()

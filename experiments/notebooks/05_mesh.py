"""Eight devices, here eight fake ones of a CPU: the very same loss as on one.

python experiments/notebooks/05_mesh.py    # a minute on a laptop
"""

# %%
import os


# Before JAX is imported; real devices need nothing of this.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import jaxalign  # noqa: E402
from jaxalign import trees  # noqa: E402
from jaxalign.adapters import adapter, lora  # noqa: E402
from jaxalign.objectives import objective  # noqa: E402
from jaxalign.objectives.dpo2d import DPO2DConfig  # noqa: E402
from jaxalign.parallel.mesh import MeshConfig, make_mesh  # noqa: E402
from jaxalign.parallel.sharding import param_shardings, put_batch  # noqa: E402
from jaxalign.types import PreferenceBatch  # noqa: E402


MODEL = os.environ.get("JAXALIGN_NOTEBOOK_MODEL", "smollm2")

# %% A batch of eight rows, which divide over data × fsdp
rows = [
    {
        "prompt": f"Is {n} even?",
        "chosen": f"It is {'even' if n % 2 == 0 else 'odd'}. Sure.",
        "rejected": "Who knows. Or not.",
        "chosen_segments": [
            {"start": 0, "end": 5, "scores": {"help": 4}},
            {"start": 6, "end": 15, "scores": {"help": 2}},
        ],
        "rejected_segments": [{"start": 0, "end": 10, "scores": {"help": 0}}],
    }
    for n in range(8)
]
tokenizer = jaxalign.data.tokenizer.load_tokenizer(MODEL)
data = jaxalign.data.pairs.prepare(rows, tokenizer, max_length=None)
batch = jaxalign.data.loader.single_batch(data, rows=8)


# %% Loss and gradients, on one device and on a mesh
def loss_and_gradients(mesh: jax.sharding.Mesh | None) -> tuple:
    """Return the loss and the norm of LoRA's gradient."""
    base = jaxalign.load_hf(MODEL, mesh=mesh)
    params = base.variables["params"]
    made = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=4))
    # Away from the base, as after some steps: B starts as zero.
    made = trees.map_with_paths(
        lambda path, x: x + 0.02 if path.endswith("/b") else x, made
    )
    if mesh is not None:
        made = jax.device_put(made, param_shardings(made, mesh, base.family.sharding))
    variables = {**base.variables, "lora": made}
    trainable, frozen = trees.partition(variables, adapter.trained(variables))

    @jax.jit
    def run(trainable: dict, frozen: dict, batch: PreferenceBatch) -> tuple:
        return jax.value_and_grad(
            lambda t: objective.loss_fn(
                *(t, frozen, batch, None),
                model=base.model,
                config=DPO2DConfig(),
                aspects=data.aspects,
            )[0]
        )(trainable)

    loss, grads = run(trainable, frozen, put_batch(batch, mesh))
    squares = [jnp.square(g).sum() for g in jax.tree.leaves(grads)]
    return float(loss), float(jnp.sqrt(sum(squares)))


one = loss_and_gradients(None)
sizes = MeshConfig(data=2, fsdp=2, tensor=2)
if len(jax.devices()) < sizes.size:
    print(f"only {len(jax.devices())} device(s) here: run this file on its own")
    sizes = MeshConfig()
many = loss_and_gradients(make_mesh(sizes))
print(f"one device: loss {one[0]:.6f}, gradient {one[1]:.6f}")
print(f"{sizes.size} devices: loss {many[0]:.6f}, gradient {many[1]:.6f}")
assert abs(one[0] - many[0]) < 1e-4 * abs(one[0])
assert abs(one[1] - many[1]) < 1e-3 * one[1]

# %% Rows that do not divide are refused in words
if sizes.size > 1:
    six = jax.tree.map(lambda x: x[:6], batch)
    try:
        put_batch(six, make_mesh(sizes))
    except jaxalign.errors.UserError as error:
        print(error)
    else:
        raise AssertionError("six rows over four shards")

"""All kernels of attention against the plain formula, values and gradients.

Splash runs step by step here, and of cuDNN everything but the kernel: its place is
taken by the same arithmetic on the same arguments, which leaves NaN wherever cuDNN
writes nothing. What only a device can say is tested there, by ``pytest -k own_kernel``
with ``JAXALIGN_TEST_PLATFORMS=cuda,cpu``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.models import attention
from jaxalign.models.attention import choice, cudnn, mask
from jaxalign.parallel.mesh import BATCH_AXES, MeshConfig, make_mesh
from jaxalign.types import ModelInputs


# Rows of (prompt, responses ...), the last two of which end in padding.
ROWS = [
    [(40, 20, 70), (5, 3, 60), (10, 7), (0, 15, 20), (50,)],
    [(1, 80, 20), (0, 9), (30, 1, 1), (100, 0, 30)],
    [(130, 20, 25)],
    [],
]
LENGTH = 300


def layout_of(rows=ROWS, length=LENGTH, window=None):
    """Lay rows out as the loader does."""
    ids, branches, positions = np.zeros((3, len(rows), length), np.int32)
    for row, sequences in enumerate(rows):
        at = 0
        for sequence, (prompt, *responses) in enumerate(sequences, 1):
            for branch, size in enumerate((prompt, *responses)):
                place = slice(at, at + size)
                ids[row, place], branches[row, place] = sequence, branch
                positions[row, place] = np.arange(size) + prompt * (branch > 0)
                at += size
    inputs = ModelInputs(*map(jnp.asarray, (ids, positions, ids, branches)))
    window = None if window is None else jnp.int32(window)
    return mask.row_layout(inputs)._replace(window=window)


def tensors(rows=4, length=LENGTH, heads=4, groups=2, width=16):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.normal(size=(rows, length, n, width)), jnp.float32)
        for n in (heads, groups, groups)
    ]


def packed_kernel(q, k, v, lengths, offsets, scale):
    """What cuDNN computes of a packed layout, NaN where it writes nothing."""
    index = jnp.arange(q.shape[1])[None, None]
    begin, size = offsets[:, :-1, None], lengths[:, :, None]
    inside = (begin >= 0) & (index >= begin) & (index < begin + size)
    used = inside.any(1)
    same = (inside.argmax(1)[:, :, None] == inside.argmax(1)[:, None]) & used[:, None]
    mask = (same & (index <= index.swapaxes(1, 2)))[:, None]
    q, k, v = (_unwritten_gradient(x, used[..., None, None]) for x in (q, k, v))
    scores = jnp.einsum("bqnh,bknh->bnqk", q * scale, k)
    scores = jnp.where(mask, scores, -1e30)
    out = jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores, axis=-1), v)
    return jnp.where(used[..., None, None], out, jnp.nan)


@jax.custom_vjp
def _unwritten_gradient(x, used):
    return x


_unwritten_gradient.defvjp(
    lambda x, used: (x, used),
    lambda used, grad: (jnp.where(used, grad, jnp.nan), None),
)


def results(inputs, layout, softcap=None, with_lse=True, **options):
    """Return output, log-sum-exp and the gradients of a random sum of both."""
    rng = np.random.default_rng(1)
    shape = inputs[0].shape
    for_out, for_lse = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, shape[:3])
    )

    def value(q, k, v):
        out, lse = attention.attention(
            q, k, v, layout, scale=0.3, softcap=softcap, **options
        )
        total = (out.astype(jnp.float32) * for_out).sum()
        if with_lse:
            total += (lse * for_lse).sum()
        return total, (out, lse)

    grad = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))
    (_, (out, lse)), grads = grad(*inputs)
    return [out, *([lse] if with_lse else []), *grads]


def close(got, want, atol):
    for name, a, b in zip(
        ["dv", "dk", "dq", "lse", "out"], got[::-1], want[::-1], strict=False
    ):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=atol, err_msg=name)


KERNELS = {
    "xla": {},
    "splash": {"interpret": True},
    "cudnn": {"sequences": 5},
}

CASES = [
    ("xla", None, None),
    ("xla", 7, 5.0),
    ("splash", None, None),
    ("splash", 7, None),
    ("splash", None, 5.0),
    ("splash", 150, 2.0),
    ("cudnn", None, None),
]


@pytest.mark.parametrize(("name", "window", "softcap"), CASES)
def test_a_kernel_gives_the_plain_formula_s_values_and_gradients(
    name, window, softcap, monkeypatch
) -> None:
    """Grouped heads, shared prompts, no prompt, no response, padding, an empty row."""
    monkeypatch.setattr(cudnn, "_kernel", packed_kernel)
    layout, inputs = layout_of(window=window), tensors()
    both = functools.partial(results, inputs, layout, softcap, with_lse=name != "cudnn")
    got = both(implementation=name, **KERNELS[name])
    close(got, both(implementation="dense"), atol=2e-5)
    padding = np.asarray(layout.sequence_ids) == 0
    assert not np.asarray(got[0])[padding].any()


@pytest.mark.parametrize("groups", [1, 4])
def test_splash_with_one_head_of_keys_and_with_all(groups) -> None:
    rows, inputs = ROWS[:1], tensors(1, groups=groups)
    layout = layout_of(rows)
    got = results(inputs, layout, implementation="splash", interpret=True)
    close(got, results(inputs, layout, implementation="dense"), atol=2e-5)


@pytest.mark.parametrize("name", ["xla", "splash"])
def test_bfloat16_stays_close_to_float32(name) -> None:
    layout, inputs = layout_of(ROWS[:1]), tensors(1)
    small = [x.astype(jnp.bfloat16) for x in inputs]
    got = results(small, layout, implementation=name, **KERNELS[name])
    want = results([x.astype(jnp.float32) for x in small], layout, implementation="xla")
    for a, b in zip(got, want, strict=True):
        size = float(jnp.abs(b).max())
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.02 * size)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("splash", {"data": 2, "fsdp": 2}),
        ("splash", {"data": 2, "tensor": 4}),  # more than the two heads of keys
        ("cudnn", {"fsdp": 4, "tensor": 2}),
    ],
    ids=str,
)
def test_kernels_are_split_over_a_mesh(name, mesh, monkeypatch) -> None:
    monkeypatch.setattr(cudnn, "_kernel", packed_kernel)
    mesh = make_mesh(MeshConfig(**mesh))
    layout, inputs = layout_of(window=9 if name == "splash" else None), tensors()
    both = functools.partial(results, with_lse=name != "cudnn")
    want = both(inputs, layout, implementation="dense")
    rows = NamedSharding(mesh, P(BATCH_AXES))
    placed = [jax.device_put(x, rows) for x in inputs]
    got = both(placed, layout, implementation=name, mesh=mesh, **KERNELS[name])
    close(got, want, atol=2e-5)


def test_more_sequences_than_cudnn_was_told_of_come_out_as_nan(monkeypatch) -> None:
    monkeypatch.setattr(cudnn, "_kernel", packed_kernel)
    inputs = tensors()
    out, lse = attention.attention(
        *inputs, layout_of(), scale=0.3, implementation="cudnn", sequences=4
    )
    # 8 segments: three of the first row's five sequences have two.
    assert np.isfinite(out).all()
    assert np.isnan(lse).all()
    out, _ = attention.attention(
        *inputs, layout_of(), scale=0.3, implementation="cudnn", sequences=3
    )
    assert np.isnan(out[:2]).all()
    assert np.isfinite(out[2:]).all()
    third = layout_of([[(5, 3, 3, 3)], *ROWS[1:]])
    out, _ = attention.attention(
        *inputs, third, scale=0.3, implementation="cudnn", sequences=5
    )
    assert np.isnan(out[0]).all()


def test_segments_worked_out_by_hand() -> None:
    """Prompt of 3, responses of 2 and 2; prompt of 1, response of 2; padding."""
    cut = cudnn.segments(layout_of([[(3, 2, 2), (1, 2)]], 12), 4)
    #              prompt+first  second   prompt+first  padding
    # index        0 1 2 3 4     5 6      7 8 9         10 11
    # copies at 12: 0 1 2 5 6 (the prompt, then the second response)
    np.testing.assert_array_equal(cut.offsets[0], [0, 7, 12, -1, -1])
    np.testing.assert_array_equal(cut.lengths[0], [5, 3, 5, -1])
    np.testing.assert_array_equal(cut.source[0, 12:17], [0, 1, 2, 5, 6])
    np.testing.assert_array_equal(cut.place[0, :10], [0, 1, 2, 3, 4, 15, 16, 7, 8, 9])
    assert cut.used[0].sum() == 13 and not cut.used[0, 5:7].any()


def test_cudnn_s_calls_are_made_for_a_gpu(monkeypatch) -> None:
    """Lowered for CUDA without one: the arguments are those that the kernels take."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 90600)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    layout = layout_of()
    inputs = [x.astype(jnp.bfloat16) for x in tensors()]

    def total(q, k, v):
        out, _ = attention.attention(
            q, k, v, layout, scale=0.3, implementation="cudnn", sequences=5
        )
        return out.astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(*inputs)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for call in ("@__cudnn$fmhaSoftmax(", "@__cudnn$fmhaSoftmaxBackward("):
        assert text.count(call) == 1
    assert text.count("PADDING_CAUSAL") == 2
    assert r"max_seg_per_batch\22: 10" in text


def device_of(platform):
    """Return such a device, or skip."""
    try:
        return jax.devices(platform)[0]
    except RuntimeError:
        pytest.skip(f"there is no {platform} here")


@pytest.mark.parametrize(
    ("platform", "name"), [("gpu", "cudnn"), ("tpu", "splash")], ids=str
)
def test_a_device_s_own_kernel_gives_the_plain_formula_s_values(platform, name) -> None:
    device = device_of(platform)
    work = choice.Work(
        dtype=jnp.bfloat16, heads=4, kv_heads=2, head_dim=64, rows=4, row_length=LENGTH
    )
    try:
        choice.choose(name, choice.machine_of(device), work)
    except ValueError as error:
        pytest.skip(str(error))
    with jax.default_device(device):
        inputs = [x.astype(jnp.bfloat16) for x in tensors(width=64)]
        both = functools.partial(results, inputs, layout_of(), with_lse=name != "cudnn")
        got = both(implementation=name, sequences=5)
        for a, b in zip(got, both(implementation="dense"), strict=True):
            a, b = (np.asarray(x, np.float32) for x in (a, b))
            np.testing.assert_allclose(a, b, atol=0.03 * np.abs(b).max())


def test_memory_of_blocks_grows_with_the_row_and_not_with_its_square() -> None:
    """Temporary bytes of forward and backward, at t and at 2 t, in one sequence."""

    def temporary(length, implementation):
        layout = layout_of([[(length,)]], length)

        def total(q, k, v):
            out, _ = attention.attention(
                q, k, v, layout, scale=0.3, implementation=implementation
            )
            return out.sum()

        # One head, narrow: what is not [t, t] is small beside it.
        inputs = tensors(1, length, heads=1, groups=1, width=8)
        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*inputs).compile()
        found = compiled.memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    one, two = (temporary(length, "xla") for length in (1024, 2048))
    # Twice the row: twice the bytes. The plain formula takes four times as many.
    assert two < 2.3 * one
    assert two < 0.1 * temporary(2048, "dense")


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_cache_read_in_blocks_is_the_plain_formula(blocks, window, softcap) -> None:
    """Pieces of prompts and single tokens of texts that end in different blocks."""
    from jaxalign.models.attention import cached
    from jaxalign.models.attention.mask import CacheLayout

    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 3, 2, 192, 8)).astype(np.float32)
    cut = [np.split(k.swapaxes(2, 3), blocks, axis=3), np.split(v, blocks, axis=2)]
    for begin, count in ((np.array([0, 63, 64]), 1), (np.array([90, 0, 30]), 7)):
        q = rng.standard_normal((3, count, 4, 8)).astype(np.float32)
        places = begin[:, None] + np.arange(count)[None]
        valid = np.ones(places.shape, bool)
        valid[1, 4:] = False
        far = None if window is None else jnp.asarray(window)
        layout = CacheLayout(jnp.asarray(places), jnp.asarray(valid), far)
        out, lse = jax.jit(
            lambda *x: cached.attend(*x, layout, scale=0.4, softcap=softcap)  # noqa: B023
        )(q, *cut)
        for b, t, n in np.ndindex(3, count, 4):
            if not valid[b, t]:
                continue
            place = places[b, t]
            first = 0 if window is None else max(0, place - window + 1)
            keys, values = (x[b, n // 2, first : place + 1] for x in (k, v))
            scores = 0.4 * keys @ q[b, t, n]
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores)
            want = weights @ values / weights.sum()
            np.testing.assert_allclose(out[b, t, n], want, atol=1e-5)
            np.testing.assert_allclose(lse[b, t, n], np.log(weights.sum()), atol=1e-5)

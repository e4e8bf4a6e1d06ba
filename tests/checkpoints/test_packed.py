"""Weights that others stored as codes: the formats by hand, and whole checkpoints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.checkpoints import convert, export, packed, weights
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.packed import Layout
from jaxalign.cli.main import main
from jaxalign.errors import UserError
from jaxalign.models import quantised
from tests import scenes, synthetic


Parts = dict[str, np.ndarray]


def words(*values: int) -> np.ndarray:
    """Return 32-bit integers with these bits, whatever their sign."""
    return np.array(values, np.uint32).view(np.int32)


# --- by hand ----------------------------------------------------------------------


def test_awq_by_hand() -> None:
    # One input, eight outputs with the codes 8, 9, 10, 11, 12, 13, 14, 15. From the
    # lowest four bits up an integer has those of outputs 0 2 4 6 1 3 5 7:
    # 8, a, c, e, 9, b, d, f, which read from the left is fdb9eca8.
    # The zeros of outputs 0 to 7 are 0, 1, 2, ... 7: 0 2 4 6 1 3 5 7, so 75316420.
    # All differences are 8; scales 1 to 8 give 8, 16, ... 64.
    parts = {
        "qweight": words(0xFDB9ECA8)[None],
        "qzeros": words(0x75316420)[None],
        "scales": np.arange(1, 9, dtype=np.float16)[None],
    }
    made = packed.decode(Layout("awq", 4, 1), "w", parts)
    np.testing.assert_array_equal(made, 8.0 * np.arange(1, 9)[:, None])


def test_gptq_by_hand() -> None:
    # Eight inputs of one output: the codes 0 to 7 from the lowest four bits up are
    # 76543210. Groups of 4 inputs; scales 1 and 10; zeros 3 and 5. Columns of zeros go
    # together by eight: output 0 is the lowest four bits, 3 and 5 in gptq_v2; in gptq
    # one less in all eight, where the other seven are 1 here (0 when stored).
    # (0..3 - 3) * 1 = -3 -2 -1 0, (4..7 - 5) * 10 = -10 0 10 20.
    want = [[-3, -2, -1, 0, -10, 0, 10, 20]]
    # Of eight outputs just the first has other codes than 0.
    qweight = words(0x76543210, *[0] * 7)[None]
    scales = np.ones((2, 8), np.float16) * np.array([[1], [10]], np.float16)
    for form, zeros in (
        ("gptq_v2", words(0x11111113, 0x11111115)),
        ("gptq", words(0x00000002, 0x00000004)),
    ):
        layout = Layout("gptq", 4, 4, zeros_less_one=form == "gptq")
        parts = {"qweight": qweight, "qzeros": zeros[:, None], "scales": scales}
        made = packed.decode(layout, "w", parts)
        np.testing.assert_array_equal(made[:1], want, err_msg=form)
        # desc_act: inputs 0, 2, 4, 6 are of the second group.
        # (0 2 4 6 - 5) * 10 = -50 -30 -10 10 and (1 3 5 7 - 3) = -2 0 2 4.
        parts["g_idx"] = np.array([1, 0] * 4, np.int32)
        made = packed.decode(layout, "w", parts)
        np.testing.assert_array_equal(made[:1], [[-50, -2, -30, 0, -10, 2, 10, 4]])


def test_gptq_of_8_bits_by_hand() -> None:
    # Codes 1, 2, 254, 255 of one output are ff fe 02 01; the zero 128 is stored as 127,
    # as those of three more outputs: 7f7f7f7f. -127, -126, 126, 127 times .5.
    parts = {
        "qweight": words(0xFFFE0201, 0x80808080, 0x80808080, 0x80808080)[None],
        "qzeros": words(0x7F7F7F7F)[None],
        "scales": np.full((1, 4), 0.5, np.float16),
    }
    made = packed.decode(Layout("gptq", 8, None, zeros_less_one=True), "w", parts)
    np.testing.assert_array_equal(made[0], [-63.5, -63, 63, 63.5])
    np.testing.assert_array_equal(made[1:], np.zeros((3, 4)))


def test_gptq_zeros_that_borrowed() -> None:
    # Zeros 0, 5, 1 and 1 of the rest are 11111150. One less in every code, taken from
    # the whole integer: 11111150 - 11111111 = 0000003f. So they are written by
    # GPTQModel, and so they come back.
    parts = {
        "qweight": words(*[0x00000007] * 8)[None],
        "qzeros": words(0x0000003F)[None],
        "scales": np.ones((1, 8), np.float32),
    }
    made = packed.decode(Layout("gptq", 4, None, zeros_less_one=True), "w", parts)
    np.testing.assert_array_equal(made[:, 0], [7, 2, 6, 6, 6, 6, 6, 6])


def test_compressed_tensors_by_hand() -> None:
    # Codes are 8 above: 0, 8, 15, 9 and four 8s are -8, 0, 7, 1, 0, 0, 0, 0, from the
    # lowest bits up 8888 9f80. The zero point of output 0, 2, is stored as 10: a.
    qweight = words(0x88889F80)[None]
    scale = np.array([[2.0, 3.0]], np.float32)
    parts = {"weight_packed": qweight, "weight_scale": scale}
    made = packed.decode(Layout("packed", 4, 4), "w", parts)
    np.testing.assert_array_equal(made, [[-16, 0, 14, 2, 0, 0, 0, 0]])
    scales = np.ones((8, 1), np.float32)
    parts = {
        "weight_packed": np.repeat(qweight, 8, 0),
        "weight_scale": scales,
        "weight_zero_point": words(0x8888888A)[None],
    }
    made = packed.decode(Layout("packed", 4, None), "w", parts)
    np.testing.assert_array_equal(made[0], [-10, -2, 5, -1, -2, -2, -2, -2])
    np.testing.assert_array_equal(made[1], [-8, 0, 7, 1, 0, 0, 0, 0])


def test_fp8_by_hand() -> None:
    # e4m3: 0x38 = 0 0111 000 is 2^0 = 1; 0x3c = 0 0111 100 is 1.5; 0xc0 = 1 1000 000 is
    # -2; 0x7e = 0 1111 110 is 2^8 * 1.75 = 448; 0x01 is 2^-9. Blocks of 2 by 2 with
    # scales 1, 10 / 100, 1000, the last ones cut off by the edges.
    codes = np.array(
        [[0x38, 0x3C, 0xC0], [0x7E, 1, 0x38], [0x38, 0x38, 0xC0]], np.uint8
    )
    parts = {
        "weight": codes.view(ml_dtypes.float8_e4m3fn),
        "weight_scale_inv": np.array([[1, 10], [100, 1000]], np.float32),
    }
    made = packed.decode(Layout("scaled", block=(2, 2)), "w", parts)
    want = [[1, 1.5, -20], [448, 2**-9, 10], [100, 100, -2000]]
    np.testing.assert_array_equal(made, want)


def test_every_fp8_number_is_torchs() -> None:
    import torch

    codes = np.arange(256, dtype=np.uint8)[None]
    for ours, theirs in (
        (ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn),
        (ml_dtypes.float8_e5m2, torch.float8_e5m2),
    ):
        scale = np.array([3.0], np.float32)
        parts = {"weight": codes.view(ours), "weight_scale": scale}
        made = packed.decode(Layout("scaled"), "w", parts)
        want = torch.from_numpy(codes.copy()).view(theirs).float().numpy() * 3
        np.testing.assert_array_equal(made, want)


# --- a second unpacking, in float64 from the formats ------------------------------


def bits_of(word: int, begin: int, count: int) -> int:
    return (int(word) % 2**32 >> begin) % 2**count


def code_at(packed: np.ndarray, row: int, column: int, bits: int, along: int) -> int:
    """Return one code of integers that hold consecutive rows or columns."""
    many = 32 // bits
    if along == 0:
        return bits_of(packed[row // many, column], bits * (row % many), bits)
    return bits_of(packed[row, column // many], bits * (column % many), bits)


def awq_code(packed: np.ndarray, row: int, column: int) -> int:
    place = [0, 4, 1, 5, 2, 6, 3, 7][column % 8]
    return bits_of(packed[row, column // 8], 4 * place, 4)


def by_formula(
    shape: tuple[int, int],
    code: Callable[[int, int], int],
    zero: Callable[[int, int], int],
    scale: Callable[[int, int], float],
    group: Callable[[int], int],
) -> np.ndarray:
    """Return the weight [out, in], number by number."""
    made = np.zeros(shape, np.float64)
    for o in range(shape[0]):
        for i in range(shape[1]):
            made[o, i] = (code(i, o) - zero(group(i), o)) * scale(group(i), o)
    return made


def random_words(rng: Any, *shape: int) -> np.ndarray:
    return rng.integers(0, 2**32, shape, np.uint32).view(np.int32)


def make_awq(rng: Any, out: int, fan_in: int, size: int) -> tuple[Parts, np.ndarray]:
    groups = fan_in // size
    parts = {
        "qweight": random_words(rng, fan_in, out // 8),
        "qzeros": random_words(rng, groups, out // 8),
        "scales": rng.uniform(0.01, 0.03, (groups, out)).astype(np.float16),
    }
    return parts, by_formula(
        (out, fan_in),
        lambda i, o: awq_code(parts["qweight"], i, o),
        lambda g, o: awq_code(parts["qzeros"], g, o),
        lambda g, o: float(parts["scales"][g, o]),
        lambda i: i // size,
    )


def make_gptq(
    rng: Any,
    out: int,
    fan_in: int,
    size: int,
    *,
    bits: int = 4,
    act: bool = False,
    less: bool = True,
) -> tuple[Parts, np.ndarray]:
    groups = -(-fan_in // size)
    zeros = random_words(rng, groups, out * bits // 32)
    ones = int(("0" * (bits - 1) + "1") * (32 // bits), 2)
    g_idx = np.arange(fan_in, dtype=np.int32) // size
    if act:
        g_idx = rng.permutation(g_idx)
    stored = [[(int(word) - ones) % 2**32 for word in row] for row in zeros]
    parts = {
        "qweight": random_words(rng, fan_in * bits // 32, out),
        "qzeros": np.array(stored, np.uint32).view(np.int32) if less else zeros,
        "scales": rng.uniform(0.5, 1, (groups, out)).astype(np.float16),
        "g_idx": g_idx,
    }
    parts["scales"] *= np.float16(0.03 if bits == 4 else 0.002)
    return parts, by_formula(
        (out, fan_in),
        lambda i, o: code_at(parts["qweight"], i, o, bits, 0),
        lambda g, o: code_at(zeros, g, o, bits, 1),
        lambda g, o: float(parts["scales"][g, o]),
        lambda i: int(g_idx[i]),
    )


def make_packed(
    rng: Any, out: int, fan_in: int, size: int, *, zeros: bool = False
) -> tuple[Parts, np.ndarray]:
    groups = fan_in // size
    scale = rng.uniform(0.01, 0.03, (out, groups)).astype(ml_dtypes.bfloat16)
    parts = {
        "weight_packed": random_words(rng, out, fan_in // 8),
        "weight_scale": scale,
        "weight_shape": np.array([out, fan_in], np.int64),
    }
    if zeros:
        parts["weight_zero_point"] = random_words(rng, out // 8, groups)
    return parts, by_formula(
        (out, fan_in),
        lambda i, o: code_at(parts["weight_packed"], o, i, 4, 1) - 8,
        lambda g, o: (
            code_at(parts["weight_zero_point"], o, g, 4, 0) - 8 if zeros else 0
        ),
        lambda g, o: float(scale[o, g]),
        lambda i: i // size,
    )


def make_fp8(
    rng: Any, out: int, fan_in: int, scales: str, block: int = 128
) -> tuple[Parts, np.ndarray]:
    codes = rng.normal(size=(out, fan_in)).astype(ml_dtypes.float8_e4m3fn)
    shape = {
        "block": (-(-out // block), -(-fan_in // block)),
        "channel": (out, 1),
        "tensor": (1,),
    }[scales]
    scale = rng.uniform(0.1, 0.3, shape).astype(np.float32)
    made = np.zeros((out, fan_in))
    for o in range(out):
        for i in range(fan_in):
            at = {"block": (o // block, i // block), "channel": (o, 0), "tensor": (0,)}
            made[o, i] = float(codes[o, i]) * float(scale[at[scales]])
    name = "weight_scale_inv" if scales == "block" else "weight_scale"
    return {"weight": codes, name: scale}, made


def compressed(form: str, **scheme: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        "ignore": ["lm_head"],
    }


AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "sym": False}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}

SCHEMES: dict[str, tuple[dict[str, Any], Callable[..., tuple[Parts, np.ndarray]]]] = {
    "fp8 blocks": (
        {"quant_method": "fp8", "weight_block_size": [32, 16]},
        lambda rng, out, fan_in: _fp8_of(rng, out, fan_in),
    ),
    "fp8 channel": (
        compressed("float-quantized", strategy="channel", **FLOAT8),
        lambda rng, out, fan_in: make_fp8(rng, out, fan_in, "channel"),
    ),
    "fp8 tensor": (
        compressed("float-quantized", strategy="tensor", **FLOAT8),
        lambda rng, out, fan_in: make_fp8(rng, out, fan_in, "tensor"),
    ),
    "packed": (
        compressed("pack-quantized", group_size=16, **INT4),
        lambda rng, out, fan_in: make_packed(rng, out, fan_in, 16),
    ),
    "packed zeros": (
        compressed("pack-quantized", group_size=32, symmetric=False, **INT4),
        lambda rng, out, fan_in: make_packed(rng, out, fan_in, 32, zeros=True),
    ),
    "awq": (
        {**AWQ, "group_size": 32},
        lambda rng, out, fan_in: make_awq(rng, out, fan_in, 32),
    ),
    "gptq": (
        {**GPTQ, "group_size": 32, "desc_act": False},
        lambda rng, out, fan_in: make_gptq(rng, out, fan_in, 32),
    ),
    "gptq act order": (
        {**GPTQ, "group_size": 16, "desc_act": True},
        lambda rng, out, fan_in: make_gptq(rng, out, fan_in, 16, act=True),
    ),
    "gptq v2": (
        {**GPTQ, "group_size": -1, "checkpoint_format": "gptq_v2"},
        lambda rng, out, fan_in: make_gptq(rng, out, fan_in, fan_in, less=False),
    ),
    "gptq 8 bits": (
        {**GPTQ, "bits": 8, "group_size": 32},
        lambda rng, out, fan_in: make_gptq(rng, out, fan_in, 32, bits=8),
    ),
}


def _fp8_of(rng: Any, out: int, fan_in: int) -> tuple[Parts, np.ndarray]:
    codes = rng.normal(size=(out, fan_in)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.1, 0.3, (-(-out // 32), -(-fan_in // 16))).astype(np.float32)
    made = np.zeros((out, fan_in))
    for o in range(out):
        for i in range(fan_in):
            made[o, i] = float(codes[o, i]) * float(scale[o // 32, i // 16])
    return {"weight": codes, "weight_scale_inv": scale}, made


@pytest.mark.parametrize("name", SCHEMES)
def test_all_codes_are_as_the_format_says(name) -> None:
    from jaxalign.checkpoints import quantisation

    config, make = SCHEMES[name]
    layout = quantisation.read_layout(config, "config.json")
    for seed, (out, fan_in) in enumerate(((40, 64), (72, 96))):
        parts, want = make(np.random.default_rng(seed), out, fan_in)
        made = packed.decode(layout, "w", parts)
        assert made.dtype == np.float32 and made.shape == (out, fan_in)
        np.testing.assert_allclose(made, want, rtol=1e-6)


# --- whole checkpoints ------------------------------------------------------------

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
PLAIN = "model.layers.1.mlp.down_proj"
"""A layer that was not converted."""


def make_checkpoint(directory: Path, name: str) -> tuple[Path, Path]:
    """Write a checkpoint of codes in two files, and one of what they stand for."""
    config, make = SCHEMES[name]
    plain = synthetic.make_checkpoint(
        directory / "plain", "llama", tie_word_embeddings=False, **SIZES
    )
    coded = directory / "coded"
    shutil.copytree(plain, coded)
    (coded / "model.safetensors").unlink()
    tensors = load_file(plain / "model.safetensors")
    stored: Parts = {}
    rng = np.random.default_rng(7)
    for tensor, value in sorted(tensors.items()):
        module = tensor.removesuffix(".weight")
        if not module.endswith("_proj") or module == PLAIN:
            stored[tensor] = value
            continue
        parts, made = make(rng, *value.shape)
        stored |= {f"{module}.{part}": array for part, array in parts.items()}
        tensors[tensor] = made.astype(np.float32)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    names = sorted(stored)
    index = {}
    for number, chosen in enumerate((names[::2], names[1::2])):
        file = f"part-{number}.safetensors"
        save_file({n: np.ascontiguousarray(stored[n]) for n in chosen}, coded / file)
        index |= dict.fromkeys(chosen, file)
    (coded / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    change(coded, quantization_config={**config, "modules_to_not_convert": [PLAIN]})
    return coded, plain


def change(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def logps(loaded: load_lib.Checkpoint, data: Any) -> dict[tuple[int, ...], np.ndarray]:
    batch = scenes.batch(data, row_length=int(data.lengths.max()))
    values = scenes.token_logps(loaded.variables, batch, model=loaded.model)
    return scenes.responses(batch, values)


@pytest.mark.parametrize("name", SCHEMES)
def test_log_probs_are_those_of_the_plain_weights(tmp_path, capsys, name) -> None:
    coded, plain = make_checkpoint(tmp_path, name)
    data = scenes.dataset(plain)
    want = scenes.torch_logps(scenes.torch_model(plain), data)
    load_lib.load(coded)
    loaded = load_lib.load(coded)
    scenes.assert_same(logps(loaded, data), want, atol=1e-4)
    method = SCHEMES[name][0]["quant_method"]
    said = f"weights stored as {method} codes are read as plain numbers"
    assert capsys.readouterr().err.count(said) == 1
    auto = load_lib.load(coded, dtype="auto")
    kernels = auto.variables["params"]["layers_0_2"]["self_attn"]["q_proj"]["kernel"]
    assert kernels.dtype == auto.dtype == "bfloat16"


@pytest.mark.parametrize("name", ["fp8 blocks", "awq", "gptq act order"])
def test_they_go_out_and_are_converted_as_bfloat16(tmp_path, name) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    coded, plain = make_checkpoint(tmp_path, name)
    for command, out in (("export", "out"), ("convert", "copy")):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--model", str(coded), "--out", str(tmp_path / out)])
    # A converted copy goes out in the same form.
    copy = load_lib.load(tmp_path / "copy", dtype="auto")
    export.save_hf(copy.variables, tmp_path / "again", like=copy)
    tensors = load_file(plain / "model.safetensors")
    for out in ("out", "again"):
        config = json.loads((tmp_path / out / "config.json").read_text())
        assert "quantization_config" not in config
        assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
        model = AutoModelForCausalLM.from_pretrained(tmp_path / out, dtype="auto")
        state = model.state_dict()
        for tensor, value in tensors.items():
            if tensor.removesuffix(".weight").endswith("_proj") and PLAIN not in tensor:
                wide = torch.from_numpy(value).to(torch.bfloat16).float().numpy()
                np.testing.assert_array_equal(state[tensor].float().numpy(), wide)


@pytest.mark.parametrize(("name", "kind"), [("awq", "int8"), ("fp8 channel", "nf4")])
def test_they_are_held_as_our_codes(tmp_path, name, kind) -> None:
    coded, plain = make_checkpoint(tmp_path, name)
    made, want = (load_lib.load(path, quantize=kind) for path in (coded, plain))
    leaves, others = (jax.tree.leaves(found.variables) for found in (made, want))
    assert any("int8" in str(leaf.dtype) for leaf in leaves)
    for leaf, other in zip(leaves, others, strict=True):
        np.testing.assert_allclose(
            np.asarray(leaf, np.float32), np.asarray(other, np.float32), rtol=1e-5
        )
    assert quantised.holds_codes("layers_0_2/mlp/up_proj/kernel")


def test_progress_ends_at_all(tmp_path) -> None:
    coded, _ = make_checkpoint(tmp_path, "awq")
    seen: list[tuple[int, int]] = []
    load_lib.load(coded, progress=lambda *now: seen.append(now))
    done = [now for now, _ in seen]
    assert done == sorted(done) and seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    "config", [{"quant_method": "fp8"}, {"quant_method": "bitsandbytes"}]
)
def test_plain_weights_with_such_a_config_are_said(tmp_path, capsys, config) -> None:
    directory = synthetic.make_checkpoint(tmp_path, "llama")
    want = load_lib.load(directory)
    change(directory, quantization_config=config)
    load_lib.load(directory)
    loaded = load_lib.load(directory)
    said = "has a quantization_config, but the weights are plain numbers"
    assert capsys.readouterr().err.count(said) == 1
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, want.variables)


@pytest.mark.parametrize(
    ("name", "fields", "match"),
    [
        ("awq", {"quant_method": "bitsandbytes"}, r"'bitsandbytes' (.|\n)*dequantize"),
        (
            "awq",
            {"quant_method": "aqlm"},
            "'aqlm' are not supported.*quantize int8",
        ),
        ("awq", {"quant_method": "hqq"}, "quant_method 'hqq' are not supported"),
        ("awq", {"quant_method": None}, "quant_method None are not supported"),
        ("awq", {"version": "gemv"}, "AWQ with version 'gemv' is not supported"),
        ("awq", {"bits": 3}, "AWQ with bits 3 is not supported: expected 4"),
        ("awq", {"group_size": "x"}, "group_size must be a positive integer or -1"),
        ("awq", {"group_size": 16}, r"groups of 16 need .* \[2, .* got \[1, "),
        ("gptq", {"bits": 2}, "GPTQ with bits 2 is not supported: expected 4 or 8"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not"),
        ("fp8 blocks", {"weight_block_size": [64]}, "must be two positive integers"),
        ("fp8 blocks", {"weight_block_size": [16, 16]}, "need weight_scale_inv"),
        ("fp8 tensor", {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-qua"),
        ("fp8 tensor", {"config_groups": None}, "config_groups must be an object"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, name, fields, match) -> None:
    coded, _ = make_checkpoint(tmp_path, name)
    config = json.loads((coded / "config.json").read_text())["quantization_config"]
    change(coded, quantization_config={**config, **fields})
    with pytest.raises(UserError, match=match) as caught:
        load_lib.load(coded)
    assert str(coded) in str(caught.value)


@pytest.mark.parametrize(("name", "part"), [("awq", "scales"), ("gptq", "qzeros")])
def test_a_missing_part_is_named(tmp_path, name, part) -> None:
    coded, _ = make_checkpoint(tmp_path, name)
    gone = f"model.layers.0.self_attn.q_proj.{part}"
    index = json.loads((coded / "model.safetensors.index.json").read_text())
    file = coded / index["weight_map"].pop(gone)
    tensors = load_file(file)
    del tensors[gone]
    save_file(tensors, file)
    (coded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"q_proj has codes but no {part}\."):
        load_lib.load(coded)


def test_what_is_there_is_found_by_headers(tmp_path) -> None:
    coded, plain = make_checkpoint(tmp_path, "gptq act order")
    names = {n for file in weights.list_weights(coded) for n in file.tensors}
    assert names == set(load_file(plain / "model.safetensors"))
    assert weights.is_packed(coded) and not weights.is_packed(plain)
    with pytest.raises(UserError, match="is converted already"):
        convert.convert(convert.convert(coded, tmp_path / "copy"), tmp_path / "more")


def test_describe_says_what_they_are(tmp_path, capsys) -> None:
    coded, _ = make_checkpoint(tmp_path, "awq")
    with pytest.raises(SystemExit, match="0"):
        main(["describe", "--model", str(coded)])
    assert "coded (stored as awq codes), lora: " in capsys.readouterr().out

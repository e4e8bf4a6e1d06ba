"""Adapters out: a PEFT directory where that can say them, else a hybrid of two parts.

What such directories hold is said in :mod:`jaxalign.checkpoints.adapter_files`, which
reads them.
"""

import functools
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxalign.adapters import (
    lora,
    peft_format,
    peft_names,
    peft_saved,
    prefix_format,
    saved,
)
from jaxalign.checkpoints import export, outputs, peft_files
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.errors import UserError
from jaxalign.types import Variables


__all__ = ["CONFIG", "LOADER", "PREFIX_CONFIG", "is_stock", "save_adapter"]

LOADER = "jaxalign_torch_loader.py"

CONFIG = "adapter_config.json"
PREFIX_CONFIG = "prefix_config.json"


def save_adapter(
    checkpoint: Checkpoint,
    collections: Variables,
    out: str | Path,
    *,
    dropout: float = 0.0,
    card: str | None = None,
) -> Path:
    """Write an adapter so that torch users get the same logits.

    LoRA, and a prefix of all layers as PEFT has it, become a directory that ``peft``
    loads unchanged; everything else a hybrid directory with its loader. So does a
    prefix on a model with sliding windows, which PEFT's would soon fall out of.

    Args:
      checkpoint: the base model.
      collections: ``lora`` and ``prefix``, or one of them.
      out: new directory; appears only when complete.
      dropout: of LoRA, recorded for whoever trains on.
      card: text of README.md.
    Raises:
      UserError: ``out`` is not empty, or there is no adapter.
    Example::

      save_adapter(base, {"lora": adapters}, "adapter")
    """
    parts = _to_files(checkpoint, collections, dropout)
    if parts.lora is None and parts.prefix is None:
        raise UserError(
            "there is no adapter to write, base weights were trained: use --format "
            "merged"
        )
    with outputs.whole_directory(Path(out)) as directory:
        if card is not None:
            (directory / "README.md").write_text(card, encoding="utf-8")
        if parts.stock is not None:
            _write_peft(directory, *parts.stock)
        else:
            _write_hybrid(directory, parts)
    return Path(out)


def is_stock(checkpoint: Checkpoint, collections: Variables) -> bool:
    """Tell whether ``peft`` alone can load what :func:`save_adapter` writes.

    Example::

      is_stock(base, {"lora": adapters, "prefix": prefix})  # False
    """
    return _to_files(checkpoint, collections, 0.0).stock is not None


class _Files(NamedTuple):
    lora: peft_format.PeftLoRA | None
    prefix: prefix_format.PrefixFiles | None
    stock: tuple[dict[str, Any], dict[str, np.ndarray]] | None
    """Config and tensors of a PEFT directory that says it all."""


def _to_files(checkpoint: Checkpoint, collections: Variables, dropout: float) -> _Files:
    base, layers = checkpoint.name, checkpoint.config.text.num_layers
    stored = files = stock = None
    if collections.get("lora"):
        stored = peft_format.to_peft(
            collections["lora"],
            module_name=functools.partial(peft_files.module_name, checkpoint),
            num_layers=layers,
            dropout=dropout,
            base_model=base,
            whole_names=checkpoint.config.sees,
        )
    if whole := collections.get(saved.COLLECTION):
        stored = _with_saved(checkpoint, stored, whole)
    if own := collections.get("prefix"):
        files = prefix_format.to_files(own, num_layers=layers, base_model=base)
    if stored is not None and files is None and not stored.gates:
        stock = stored.config, stored.tensors
    elif stored is None and own and not any(checkpoint.config.text.windows):
        # With sliding windows PEFT's prefix drops out of sight; ours never does.
        stock = prefix_format.to_peft(own, num_layers=layers, base_model=base)
    return _Files(stored, files, stock)


def _with_saved(
    checkpoint: Checkpoint, stored: peft_format.PeftLoRA | None, whole: Any
) -> peft_format.PeftLoRA:
    """Put what stands for base weights beside the LoRA that PEFT wants with it."""
    if stored is None:
        raise UserError(
            "the adapter has weights in the place of the base's and no LoRA, which "
            "PEFT has no files for: use --format merged"
        )
    extra = peft_saved.to_peft(
        whole,
        tensor_form=functools.partial(peft_files.tensor_form, checkpoint),
        adapted=peft_names.modules(stored.tensors),
    )
    config = dict(sorted((stored.config | extra.config).items()))
    tensors = stored.tensors | extra.tensors
    rest = peft_files.rest_of_modules(
        checkpoint, extra.config.get("modules_to_save", ())
    )
    return stored._replace(config=config, tensors={**rest, **tensors})


def _write_peft(
    directory: Path, config: dict[str, Any], values: dict[str, np.ndarray]
) -> None:
    directory.mkdir(exist_ok=True)
    _write_json(config, directory / CONFIG)
    export.write(values, directory / "adapter_model.safetensors")


def _write_hybrid(directory: Path, parts: _Files) -> None:
    if parts.lora is not None:
        part = directory / "lora"
        _write_peft(part, parts.lora.config, parts.lora.tensors)
        if parts.lora.gates:
            export.write(parts.lora.gates, part / "gates.safetensors")
    if parts.prefix is not None:
        part = directory / "prefix"
        part.mkdir()
        _write_json(parts.prefix.config, part / PREFIX_CONFIG)
        export.write(parts.prefix.tensors, part / "prefix.safetensors")
    loader = Path(lora.__file__).with_name("torch_loader.py")
    shutil.copyfile(loader, directory / LOADER)


def _write_json(values: dict[str, Any], path: Path) -> None:
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")

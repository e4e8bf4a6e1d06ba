"""Adapters as directories: PEFT's where it can say them, else a hybrid of two parts.

A hybrid directory has ``lora/``, a stock PEFT adapter (with gates that PEFT lacks in
``gates.safetensors`` beside it), and ``prefix/`` (``prefix_config.json`` and
``prefix.safetensors``); either may be absent. ``jaxalign_torch_loader.py`` beside them
puts both on a transformers model.
"""

import functools
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError

from jaxalign import stacks, trees
from jaxalign.adapters import (
    lora,
    peft_format,
    peft_names,
    peft_saved,
    prefix_format,
    saved,
    selection,
)
from jaxalign.adapters.peft_names import PeftTensors
from jaxalign.checkpoints import export, outputs, peft_files
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints import tensors as tensor_files
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.errors import UserError
from jaxalign.models import decoder
from jaxalign.models.config import ModelConfig
from jaxalign.stacks import Group
from jaxalign.types import Variables


__all__ = [
    "LOADER",
    "AdapterFiles",
    "fingerprint",
    "groups_of",
    "is_stock",
    "read_start",
    "save_adapter",
    "vision_groups_of",
    "write_start",
]

LOADER = "jaxalign_torch_loader.py"

_CONFIG = "adapter_config.json"
_PREFIX_CONFIG = "prefix_config.json"


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
    """Tell whether ``peft`` alone can load what :func:`save_adapter` writes."""
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
    _write_json(config, directory / _CONFIG)
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
        _write_json(parts.prefix.config, part / _PREFIX_CONFIG)
        export.write(parts.prefix.tensors, part / "prefix.safetensors")
    loader = Path(lora.__file__).with_name("torch_loader.py")
    shutil.copyfile(loader, directory / LOADER)


def _write_json(values: dict[str, Any], path: Path) -> None:
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")


def _is_hybrid(path: Path) -> bool:
    return (path / "lora" / _CONFIG).is_file() or (
        path / "prefix" / _PREFIX_CONFIG
    ).is_file()


class AdapterFiles:
    """An adapter's directory, read in two steps: what it adapts, then the weights.

    The layers have to be cut into groups, which the model is loaded with, before the
    adapter's weights can be stacked to fit.

    Raises:
      UserError: no adapter, another kind of it, or one for another model.
    """

    def __init__(self, directory: Path, model: str | Path):
        config, self._family = load_lib.open_config(model)
        self._whole, self._model = config, config.text
        self._base = model
        self._lora: peft_format.PeftLoRA | None = None
        self._saved = PeftTensors({}, {}, {}, {})
        self._prefix: prefix_format.PrefixFiles | None = None
        if (directory / _CONFIG).is_file():
            config = tensor_files.read_json(directory / _CONFIG)
            if config.get("peft_type") == "PREFIX_TUNING":
                if any(self._model.windows):
                    raise UserError(
                        f"{directory} is a PEFT prefix, and {model} has sliding "
                        "windows, which such a prefix falls out of: jaxalign's prefix "
                        "is seen by all tokens. Train one with --adapter.name prefix"
                    )
                self._prefix = prefix_format.from_peft(
                    prefix_format.PrefixFiles(
                        config, peft_files.read(directory, "adapter_model")
                    ),
                    num_layers=self._model.num_layers,
                    kv_heads=self._model.num_kv_heads,
                )
            else:
                self._lora = self._read_lora(directory)
        elif _is_hybrid(directory):
            if (directory / "lora").is_dir():
                self._lora = self._read_lora(directory / "lora")
            if (directory / "prefix").is_dir():
                part = directory / "prefix"
                self._prefix = prefix_format.PrefixFiles(
                    tensor_files.read_json(part / _PREFIX_CONFIG),
                    peft_files.read(part, "prefix"),
                )
        elif (directory / "config.yaml").is_file():
            raise UserError(
                f"{directory} is a run, not an adapter: write its adapter first, with "
                f"`jaxalign export --run {directory} --format peft --out DIR`"
            )
        else:
            raise UserError(
                f"{directory} is no adapter: expected a PEFT directory "
                "(adapter_config.json), one with lora/ or prefix/, or the --out of "
                "`jaxalign train` (config.yaml)"
            )

    def groups(self) -> tuple[Group, ...]:
        """Return how the adapter cuts the layers."""
        choices = self._choices("")
        if self._prefix is not None:
            choices.append(prefix_format.layers_of(self._prefix))
        return selection.cut_groups(self._model.num_layers, choices)

    def vision_groups(self) -> tuple[Group, ...] | None:
        """Return how the adapter cuts a tower's layers, None where it does not."""
        if self._whole.vision is None:
            return None
        count = self._whole.vision.num_layers
        cut = selection.cut_groups(count, self._choices("vision"))
        return cut if len(cut) > 1 else None

    def _choices(self, scope: str) -> list[tuple[int, ...]]:
        choices: list[tuple[int, ...]] = []
        if self._lora is not None:
            tensors = self._lora.tensors
            choices += peft_format.adapted_layers(tensors, self._locate, scope)
        return choices + peft_saved.layer_choices(self._saved, self._place, scope)

    def collections(self) -> Variables:
        """Return the adapter for the model, cut into :meth:`groups`.

        Raises:
          UserError: it does not fit the model's config.json.
        """
        found: Variables = {}
        groups, vision_groups = self.groups(), self.vision_groups()
        if self._lora is not None:
            found["lora"] = peft_format.from_peft(
                self._lora,
                params=decoder.param_shapes(self._whole, groups, vision_groups),
                locate=self._locate,
            )
        if self._saved.saved or self._saved.rows:
            assert self._lora is not None  # as the files are of LoRA
            found[saved.COLLECTION] = peft_saved.from_peft(
                self._saved,
                self._lora.config,
                params=peft_files.saved_shapes(self._whole, groups, vision_groups),
                locate=self._place,
            )
        if not any(found.values()) and self._prefix is None:
            raise UserError("the adapter holds no tensors: save it again")
        found = {name: tree for name, tree in found.items() if tree}
        if self._prefix is not None:
            found["prefix"] = prefix_format.from_files(
                self._prefix,
                groups=groups,
                width=self._model.width,
                kv_heads=self._model.num_kv_heads,
                head_dim=self._model.head_dim,
            )
        return found

    def _read_lora(self, directory: Path) -> peft_format.PeftLoRA:
        own, self._saved = peft_files.read_lora(
            directory, self._base, self._whole, self._family
        )
        return own

    def _place(self, tensor: str) -> peft_saved.Place | None:
        return peft_files.place_of(tensor, self._whole, self._family)

    def _locate(self, module: str) -> peft_format.Module | None:
        place = self._place(f"{module}.weight")
        if place is None or not place.path.endswith(("/kernel", "/embedding")):
            return None
        return place.path.rpartition("/")[0], place.at


def write_start(collections: Variables, path: Path) -> None:
    """Keep an adapter as it is, whole or not at all: one tensor a leaf, by its path.

    What a run starts from: its constants (scales, PiSSA's part of the weights) are in
    no checkpoint, and may come from a directory that is gone later.

    Raises:
      OSError: it cannot be written.
    """
    leaves = trees.by_path(collections).items()
    temporary = path.with_name(f".{path.name}.tmp")
    values = {name: np.array(leaf, order="C") for name, leaf in leaves}
    try:
        export.write(values, temporary)
    except SafetensorError as error:
        raise OSError(f"{temporary}: {error}") from None
    temporary.replace(path)


def read_start(path: Path) -> Variables:
    """Read what :func:`write_start` kept."""
    collections: Variables = {}
    with tensor_files.open_file(path) as handle:
        for name in handle.keys():  # noqa: SIM118 (it is no dict)
            *parts, leaf = name.split("/")
            trees.node_at(collections, parts)[leaf] = handle.get_tensor(name)
    return collections


def groups_of(collections: Variables, num_layers: int) -> tuple[Group, ...]:
    """Return the groups that an adapter's stacks were cut for."""
    found = {
        group
        for tree in collections.values()
        for name in tree
        if (group := stacks.group_of_name(name)) is not None
    }
    return selection.cut_groups(num_layers, [range(*group) for group in sorted(found)])


def vision_groups_of(
    collections: Variables, config: ModelConfig
) -> tuple[Group, ...] | None:
    """Return the groups of a tower's layers that an adapter's stacks were cut for.

    Returns:
      None where it cuts nothing.
    """
    if config.vision is None:
        return None
    towers = {k: tree["vision"] for k, tree in collections.items() if "vision" in tree}
    cut = groups_of(towers, config.vision.num_layers)
    return cut if len(cut) > 1 else None


def fingerprint(path: Path) -> str:
    """Return a hash of an adapter's directory, of every byte of its small files."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.suffix in (".json", ".safetensors") and file.is_file():
            digest.update(file.relative_to(path).as_posix().encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()

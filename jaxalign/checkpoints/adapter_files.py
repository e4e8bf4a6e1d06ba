"""Adapters as directories: PEFT's where it can say them, else a hybrid of two parts.

A hybrid directory has ``lora/``, a stock PEFT adapter (with gates that PEFT lacks in
``gates.safetensors`` beside it), and ``prefix/`` (``prefix_config.json`` and
``prefix.safetensors``); either may be absent. ``jaxalign_torch_loader.py`` beside them
puts both on a transformers model.
"""

import hashlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from jaxalign import stacks, trees
from jaxalign.adapters import (
    peft_format,
    peft_saved,
    prefix_format,
    saved,
    selection,
)
from jaxalign.adapters.peft_names import PeftTensors
from jaxalign.checkpoints import export, peft_files
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints import tensors as tensor_files
from jaxalign.checkpoints.adapter_writing import (
    CONFIG,
    LOADER,
    PREFIX_CONFIG,
    is_stock,
    save_adapter,
)
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


def _is_hybrid(path: Path) -> bool:
    return (path / "lora" / CONFIG).is_file() or (
        path / "prefix" / PREFIX_CONFIG
    ).is_file()


class AdapterFiles:
    """An adapter's directory, read in two steps: what it adapts, then the weights.

    The layers have to be cut into groups, which the model is loaded with, before the
    adapter's weights can be stacked to fit.

    Raises:
      UserError: no adapter, another kind of it, or one for another model.
    Example::

      files = AdapterFiles(Path("adapter"), "smollm2")
      base = load("smollm2", groups=files.groups())
      variables = {**base.variables, **files.collections()}
    """

    def __init__(self, directory: Path, model: str | Path):
        config, self._family = load_lib.open_config(model)
        self._whole, self._model = config, config.text
        self._base = model
        self._lora: peft_format.PeftLoRA | None = None
        self._saved = PeftTensors({}, {}, {}, {})
        self._prefix: prefix_format.PrefixFiles | None = None
        if (directory / CONFIG).is_file():
            config = tensor_files.read_json(directory / CONFIG)
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
                    tensor_files.read_json(part / PREFIX_CONFIG),
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
    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "adapter_start.safetensors"
      >>> write_start({"lora": {"up_proj": {"scale": np.full(1, 2.0)}}}, path)
      >>> [file.name for file in path.parent.iterdir()]
      ['adapter_start.safetensors']
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
    """Read what :func:`write_start` kept.

    Raises:
      UserError: the file is not there, or is none of safetensors.
    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "adapter_start.safetensors"
      >>> write_start({"lora": {"up_proj": {"scale": np.full(1, 2.0)}}}, path)
      >>> read_start(path)
      {'lora': {'up_proj': {'scale': array([2.])}}}
    """
    collections: Variables = {}
    with tensor_files.open_file(path) as handle:
        for name in handle.keys():  # noqa: SIM118 (it is no dict)
            *parts, leaf = name.split("/")
            trees.node_at(collections, parts)[leaf] = handle.get_tensor(name)
    return collections


def groups_of(collections: Variables, num_layers: int) -> tuple[Group, ...]:
    """Return the groups that an adapter's stacks were cut for.

    >>> groups_of({"lora": {"layers_2_4": {"mlp": {}}}}, num_layers=6)
    ((0, 2), (2, 4), (4, 6))
    """
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
    Example:
      >>> from jaxalign.models.config import DecoderConfig, VisionConfig
      >>> sizes = {"width": 8, "mlp_width": 16, "num_layers": 4, "num_heads": 2}
      >>> tower = VisionConfig(**sizes, patch_values=588)
      >>> text = DecoderConfig(**sizes, vocab_size=8, num_kv_heads=1, head_dim=4,
      ...                      norm_eps=1e-6, rotaries=())
      >>> config = ModelConfig(text=text, vision=tower)
      >>> vision_groups_of({"lora": {"vision": {"layers_2_4": {}}}}, config)
      ((0, 2), (2, 4))
    """
    if config.vision is None:
        return None
    towers = {k: tree["vision"] for k, tree in collections.items() if "vision" in tree}
    cut = groups_of(towers, config.vision.num_layers)
    return cut if len(cut) > 1 else None


def fingerprint(path: Path) -> str:
    """Return a hash of an adapter's directory, of every byte of its small files.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> before = fingerprint(folder)
    >>> _ = (folder / "adapter_config.json").write_text('{"r": 8}')
    >>> fingerprint(folder) == before
    False
    """
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.suffix in (".json", ".safetensors") and file.is_file():
            digest.update(file.relative_to(path).as_posix().encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()

"""A PEFT directory of LoRA: what is LoRA, and what stands for base weights."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign import progress, stacks
from jaxalign.adapters import peft_config, peft_format, peft_names
from jaxalign.adapters.peft_format import PeftLoRA
from jaxalign.adapters.peft_names import PeftTensors
from jaxalign.adapters.peft_saved import Place
from jaxalign.checkpoints import contents, places
from jaxalign.checkpoints import tensors as tensor_files
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.models import decoder
from jaxalign.models.config import ModelConfig
from jaxalign.models.families import Family
from jaxalign.models.families.rules import Rule
from jaxalign.stacks import Group


__all__ = [
    "module_name",
    "place_of",
    "read",
    "read_lora",
    "rest_of_modules",
    "saved_shapes",
    "tensor_form",
]


def read(directory: Path, stem: str) -> dict[str, np.ndarray]:
    """Read all tensors of ``<stem>.safetensors``, or of the files of its index.

    Raises:
      UserError: no such file, or a broken one.
    """
    found = {}
    for file in tensor_files.list_files(directory, stem):
        with file.open() as handle:
            for name in file.tensors:
                found[name] = handle.get_tensor(name)
    return found


def read_lora(
    directory: Path, base: str | Path, config: ModelConfig, family: Family
) -> tuple[PeftLoRA, PeftTensors]:
    """Read an adapter of LoRA and what else it has trained.

    Args:
      directory: of PEFT.
      base: checkpoint that it belongs to.
      config: of the checkpoint.
      family: likewise.
    Raises:
      UserError: another kind of adapter, or tensors that are no adapter's.
    """
    settings = tensor_files.read_json(directory / "adapter_config.json")
    peft_config.check_config(settings)
    gates = {}
    if (directory / "gates.safetensors").is_file():
        gates = read(directory, "gates")
    tensors = peft_names.sort(read(directory, "adapter_model"), settings)
    tensors = _without_idle(tensors, directory, config, family)
    saved = dict(tensors.saved) | _changed(tensors, base, config, family)
    aside = len(tensors.copies.keys() - saved.keys())
    if aside:
        progress.say_once(
            f"{directory}: {aside} tensor(s) are copies of the base model's and are "
            "left aside"
        )
    return PeftLoRA(settings, tensors.lora, gates), tensors._replace(saved=saved)


def _without_idle(
    tensors: PeftTensors, directory: Path, config: ModelConfig, family: Family
) -> PeftTensors:
    """Leave out what belongs to parts of a tower that are not run."""
    cut = places.stacks_of(config)

    def idles(name: str) -> bool:
        name = family.canonical(name)
        place = places.locate(name, family.rules, cut)
        ignored = any(rule.match(name) is not None for rule in family.ignored)
        return ignored or (place is not None and place.is_idle)

    kept = tensors._replace(
        lora={
            name: value
            for name, value in tensors.lora.items()
            if not idles(f"{min(peft_names.modules([name]))}.weight")
        },
        saved={name: v for name, v in tensors.saved.items() if not idles(name)},
        copies={name: v for name, v in tensors.copies.items() if not idles(name)},
    )
    count = sum(map(len, tensors)) - sum(map(len, kept))
    if count:
        progress.say_once(
            f"{directory}: {count} tensor(s) are of layers of the tower that are not "
            "run, and are left aside"
        )
    return kept


def _changed(
    tensors: PeftTensors, base: str | Path, config: ModelConfig, family: Family
) -> dict[str, np.ndarray]:
    """Return what of the base weights in an adapter's file is not as the base has it.

    PEFT writes the embeddings into an adapter by itself when it adapts them or the
    vocabulary was resized, and on loading puts them in the place of the base's: of a
    tied head too.
    """
    changed = {}
    tied = (family.rules[0].hf, family.head)
    for name, value in tensors.copies.items():
        both = config.text.tie_embeddings and family.canonical(name) in tied
        own = contents.read_tensor(base, tied[0] if both else name)
        if own is None or not _same(own, value):
            changed |= dict.fromkeys(tied if both else (name,), value)
    return changed


def _same(own: np.ndarray, copy: np.ndarray) -> bool:
    """Tell whether a tensor is the base's, maybe in another kind of numbers."""
    if own.shape != copy.shape:
        return False
    wide = np.asarray(copy, np.float32)
    return any(
        np.array_equal(np.asarray(own.astype(kind), np.float32), wide)
        for kind in (np.float32, copy.dtype)
    )


def place_of(tensor: str, config: ModelConfig, family: Family) -> Place | None:
    """Return which weight a tensor of the model is, None if it is none."""
    own = family.canonical(tensor)
    place = places.locate(own, family.rules, places.stacks_of(config))
    if place is None or place.is_idle:
        return None
    rule = place.rule
    path = stacks.unstacked(place.path)
    return Place(path, place.at, rule.transpose, rule.reshaped)


def saved_shapes(
    config: ModelConfig,
    groups: tuple[Group, ...],
    vision_groups: tuple[Group, ...] | None = None,
) -> Any:
    """Return the shapes of all that an adapter can have in the place of base weights.

    These are the parameters, and a head of its own where it is tied.
    """
    shapes, text = decoder.param_shapes(config, groups, vision_groups), config.text
    head = jax.ShapeDtypeStruct((text.width, text.vocab_size), np.float32)
    shapes.setdefault("lm_head", {"kernel": head})
    return shapes


def module_name(checkpoint: Checkpoint, module: peft_format.Module) -> str:
    """Return the name of a module that LoRA adapts in Hugging Face's files."""
    path, index = module
    kind = "embedding" if path == "embed_tokens" else "kernel"
    rule = _rule(checkpoint, f"{path}/{kind}", index)
    return rule.name(*index).removesuffix(".weight")


def tensor_form(
    checkpoint: Checkpoint, path: str, index: tuple[int, ...]
) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """Return a weight's name in Hugging Face's files, and what brings it in its form.

    Args:
      checkpoint: the base model.
      path: of the weight inside its stack.
      index: layer, and expert.
    """
    rule = _rule(checkpoint, path, index)
    name = rule.name(*index)
    shape: Sequence[int] = ()
    if rule.reshaped:
        known = contents.tensor_infos(checkpoint.path).items()
        canonical = checkpoint.family.canonical
        shape = next(info.shape for stored, info in known if canonical(stored) == name)
    place = places.Place(rule, path)
    return name, functools.partial(place.to_file, shape=shape)


def _rule(checkpoint: Checkpoint, path: str, index: tuple[int, ...]) -> Rule:
    """Return the family's rule of a weight by its path inside its stack."""
    scope = stacks.scope_of(path) if index else ""
    inner = path.removeprefix(f"{scope}/")
    where = "/".join(filter(None, (scope, "layers" if index else "", inner)))
    for rule in checkpoint.family.rules:
        if rule.path == where:
            return rule
    raise ValueError(f"no rule gives {where}")


def rest_of_modules(
    checkpoint: Checkpoint, modules: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the base's tensors of modules, all of which PEFT wants in the file."""
    family, read = checkpoint.family, contents.reader(checkpoint.path)
    found = {}
    for name in contents.tensor_infos(checkpoint.path):
        own = family.canonical(name)
        inside = any(own.startswith(f"{module}.") for module in modules)
        if inside and not own.endswith(".position_ids"):  # which PyTorch does not keep
            value = read(name)
            assert value is not None  # as the headers have it
            found[f"{peft_names.PREFIX}{own}"] = np.asarray(value, np.float32)
    return found

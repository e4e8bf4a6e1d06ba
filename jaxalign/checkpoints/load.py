"""Hugging Face checkpoints in: tensor by tensor, straight to each device's shard."""

import collections
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign import trees
from jaxalign.adapters import adapter as adapter_lib
from jaxalign.adapters.adapter import Adapter, PeftConfig
from jaxalign.checkpoints import arrays, hub, weights
from jaxalign.checkpoints import base as base_lib
from jaxalign.checkpoints import places as places_lib
from jaxalign.checkpoints import tensors as tensor_files
from jaxalign.checkpoints.places import Place, Stacks
from jaxalign.checkpoints.tensors import TensorFile, TensorInfo
from jaxalign.checkpoints.weights import PackedFile
from jaxalign.errors import UserError
from jaxalign.models import decoder, quantised
from jaxalign.models.config import ModelConfig
from jaxalign.models.families import Family, family_of
from jaxalign.models.families.rules import Rule
from jaxalign.models.quantised import Quantize
from jaxalign.parallel import sharding
from jaxalign.stacks import SCOPES, Group, scope_of
from jaxalign.types import Model, Variables


__all__ = [
    "Checkpoint",
    "DType",
    "WHOLE",
    "check",
    "compute_dtype",
    "load",
    "of_scopes",
    "open_config",
]

WHOLE = ("", *SCOPES)
"""All parts of a model: the decoder, and what it sees with."""

DType = Literal["float32", "bfloat16", "float16", "auto", "fastest"]
"""Of weights and computation; ``auto`` keeps every weight as it is stored. ``fastest``
is for commands, which have ``checkpoints.fastest`` choose before anything is loaded."""


class Checkpoint(NamedTuple):
    """A model with its weights, and where they came from."""

    model: Model
    variables: Variables
    config: ModelConfig
    groups: tuple[Group, ...]
    family: Family
    path: Path
    dtype: Any
    """Of the computation."""
    name: str
    """What others call it: its id on the hub, or its directory's name."""
    vision_groups: tuple[Group, ...] | None = None
    """How a tower's layers are stacked; None: in one stack, or there is no tower."""


def open_config(path: str | Path) -> tuple[ModelConfig, Family]:
    """Read config.json alone.

    Raises:
      UserError: it is not there or not understood.
    Example::

      config, family = open_config("smollm2")
    """
    directory = hub.directory_of(path, weights=False)
    if directory.suffix == ".gguf" and directory.is_file():
        raise UserError(
            f"{path} is a GGUF file: make a checkpoint of it first, with `jaxalign "
            f"export --model {path} --out DIR`"
        )
    if not directory.is_dir():
        raise UserError(
            f"{path} is no directory: expected a Hugging Face checkpoint, such as the "
            "one that `jaxalign fetch smollm2-135m --out DIR` writes, or the id of one "
            "on the hub, owner/name"
        )
    config = tensor_files.read_json(directory / "config.json")
    try:
        family = family_of(config)
        return family.read_config(config), family
    except UserError as error:  # which begins with "config.json"
        raise UserError(f"{directory}/{error}") from None


def load(
    path: str | Path,
    *,
    adapter: Adapter | None = None,
    groups: Sequence[Group] | None = None,
    vision_groups: Sequence[Group] | None = None,
    dtype: Any = jnp.float32,
    float32: Callable[[str], bool] = lambda path: False,
    quantize: Quantize = "none",
    mesh: Mesh | None = None,
    headless: bool = False,
    scopes: Collection[str] = WHOLE,
    progress: Callable[[int, int], None] | None = None,
    **model_options: Any,
) -> Checkpoint:
    """Load a Hugging Face checkpoint.

    Tensors are mapped one after the other; every device gets just its shard of each.
    Above the model itself the host holds one tensor.

    Args:
      path: directory with config.json and safetensors files, or what ``jaxalign
        convert`` made of one, or an id on the hub.
      adapter: options of the adapter that is to be made on top: the layers are cut into
        stacks where it needs that, so that ``lora.init(key, variables["params"],
        adapter)`` fits. One that is there already is opened by ``policy.open_policy``.
      groups: how the layers are stacked, see ``selection.cut_groups``; default one.
      vision_groups: how a vision tower's are.
      dtype: of the weights and of the computation. ``auto`` keeps each weight as it is
        stored (of a stack the widest) and computes in the kind that most weights have,
        in float32 where that is float16, whose range activations can leave.
      float32: tells by path which weights stay float32 all the same (trained ones).
      quantize: hold the layers' linear weights as codes, see ``models.quantised``.
      mesh: devices; default the one where JAX puts new arrays.
      headless: leave the head out, and what a classifier has in its place; then the
        model's ``logits_fn`` is none of the checkpoint's.
      scopes: the parts whose weights are read, see ``stacks.scope_of``; of the others
        there are none then. All that the files hold is checked.
      progress: called with (bytes read, bytes in all).
      **model_options: see ``models.decoder.make_model``.
    Raises:
      UserError: the directory, its config or its tensors are not what they should be;
        every tensor without a rule, unexpected or missing is named; a weight too large
        for float16.
    Example::

      base = load("smollm2", adapter=LoRAConfig(rank=8), dtype="bfloat16")
      hidden = base.model.hidden_fn(base.variables, inputs)
    """
    config, family = open_config(path)
    if headless:
        config, family = _without_head(config, family)
    directory = hub.directory_of(path)
    if adapter is not None:
        groups, vision_groups = _groups_for(adapter, groups, vision_groups, config)
    cut = places_lib.stacks_of(config, groups, vision_groups)
    shapes = decoder.param_shapes(config, cut[""], cut.get("vision"))
    source = _open(directory, config, family, cut, shapes)
    shapes = of_scopes(shapes, scopes)
    targets = trees.by_path(shapes)
    if mesh is None:
        # Arrays that are tied to a device are others to jit than those that are made
        # beside them (an adapter's, an optimiser's): a step would be compiled for both.
        layout = dict.fromkeys(targets, None)
    else:
        specs = sharding.param_shardings(shapes, mesh, family.sharding)
        layout = trees.by_path(specs)
    read = [(path, info) for path, info in source.stored if path in targets]
    kinds = _kinds(read, dtype, float32)
    leaves = _read_leaves(source, targets, layout, kinds, quantize, progress)
    compute = _compute_dtype(source.stored, dtype)
    return Checkpoint(
        model=decoder.make_model(
            config,
            groups=cut[""],
            vision_groups=cut.get("vision"),
            dtype=compute,
            mesh=mesh,
            **model_options,
        ),
        variables={
            "params": trees.map_with_paths(lambda path, _: leaves.pop(path), shapes)
        },
        config=config,
        groups=tuple(cut[""]),
        family=family,
        path=directory,
        dtype=compute,
        name=source.name or hub.name_of(path),
        vision_groups=None if vision_groups is None else tuple(vision_groups),
    )


def of_scopes(params: Any, scopes: Collection[str]) -> Any:
    """Return the parts of a model's parameters, or of their shapes, that are wanted.

    >>> of_scopes({"norm": 1, "vision": 2, "connector": 3}, ("", "connector"))
    {'norm': 1, 'connector': 3}
    """
    return {name: part for name, part in params.items() if scope_of(name) in scopes}


def _groups_for(
    adapter: Adapter,
    groups: Sequence[Group] | None,
    vision_groups: Sequence[Group] | None,
    config: ModelConfig,
) -> tuple[Sequence[Group], Sequence[Group] | None]:
    """Return how an adapter to be made cuts the layers, of a tower too."""
    if groups is not None or vision_groups is not None:
        raise UserError("load_hf: give adapter or groups, which it says, not both")
    if isinstance(adapter, PeftConfig):
        raise UserError(
            f"load_hf: the adapter in {adapter.path} is there already: open it with "
            "its base, jaxalign.checkpoints.policy.open_policy(model, adapter=path)"
        )
    shapes = decoder.param_shapes(config)
    cut = adapter_lib.groups(adapter, shapes, config.text.num_layers)
    return cut, adapter_lib.vision_groups(adapter, shapes)


def _read_leaves(
    source: "_Source",
    targets: Mapping[str, Any],
    layout: dict[str, Any],
    kinds: Mapping[str, Any],
    quantize: Quantize,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Read every parameter, each device its shard, stacks layer by layer."""
    leaves: dict[str, Any] = {}
    done, total = 0, sum(i.nbytes for path, i in source.stored if path in targets)

    def is_coded(path: str) -> bool:
        return quantize != "none" and quantised.holds_codes(path)

    for path, at, values, size in source.pieces(is_coded):
        if path not in targets:
            continue
        coded = is_coded(path)
        kind, target = jnp.dtype(jnp.float32) if coded else kinds[path], targets[path]
        if at and path not in leaves:
            of = quantize if coded else "none"
            leaves[path] = arrays.empty_stack(target.shape, kind, layout[path], of)
            if coded and layout[path] is not None:
                # Or the compiler, asked to put a piece in, splits its blocks.
                layout[path] = leaves[path].codes.sharding
        piece = arrays.read_piece(values, path, at, target, layout, kind)
        if at:
            # Or reading runs ahead and pieces heap up.
            whole = arrays.put_piece(leaves.pop(path), piece, at)
            piece = jax.block_until_ready(whole)
        leaves[path] = piece
        done += size
        if progress is not None:
            progress(done, total)
    return leaves


def _without_head(config: ModelConfig, family: Family) -> tuple[ModelConfig, Family]:
    """Return a model without a head of its own, whatever its files have for one."""
    text = dataclasses.replace(config.text, tie_embeddings=True)
    heads = (Rule(family.head, ""), Rule("score.weight", ""))
    # No tensor has the new name: the embeddings are compared with nothing.
    family = family._replace(ignored=(*family.ignored, *heads), head="")
    return dataclasses.replace(config, text=text), family


class _Source(NamedTuple):
    """Where weights come from: a checkpoint's files, or a converted base."""

    name: str | None
    stored: Sequence[tuple[str, TensorInfo]]
    """Path of a parameter, and what is there of it."""
    pieces: Callable[
        [Callable[[str], bool]], Iterator[tuple[str, tuple[int, ...], Any, int]]
    ]
    """Gives path, place in the stack, what a slice of which is read when taken, and how
    many bytes that counts. Its argument tells by path what must come layer by layer."""


def _open(
    directory: Path,
    config: ModelConfig,
    family: Family,
    cut: Stacks,
    shapes: Any,
) -> _Source:
    """Check that a checkpoint has what its config asks for, by headers alone."""
    if base_lib.is_base(directory):
        base = base_lib.read_base(directory)
        return _Source(
            base.name,
            base.stored(shapes, cut),
            lambda by_layer: (
                (*piece, piece[-1].nbytes) for piece in base.pieces(cut, by_layer)
            ),
        )
    files = weights.list_weights(directory)
    places = places_lib.match_tensors(files, family, config, cut, shapes, directory)
    if config.text.tie_embeddings:
        places_lib.check_tied_head(files, family)
    stored = [
        (places[name].path, info)
        for file in files
        for name, info in file.tensors.items()
        if name in places
    ]
    shapes_by_path = trees.by_path(shapes)
    return _Source(None, stored, lambda _: _pieces(files, places, shapes_by_path))


def _pieces(
    files: Sequence[TensorFile | PackedFile],
    places: Mapping[str, Place],
    shapes: Mapping[str, Any],
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray, int]]:
    for file in files:
        with file.open() as handle:
            for name, info in file.tensors.items():
                if (place := places.get(name)) is not None:
                    shape = shapes[place.path].shape
                    values = place.from_file(handle.get_slice(name), shape)
                    # What is made of codes is wider here than it counts.
                    yield place.path, place.at, values, info.nbytes


def _kinds(
    stored: Sequence[tuple[str, TensorInfo]],
    dtype: Any,
    float32: Callable[[str], bool],
) -> dict[str, Any]:
    """Return what kind of numbers each parameter gets."""
    kinds: dict[str, Any] = {}
    for path, info in stored:
        kind = jnp.dtype(info.dtype if dtype == "auto" else dtype)
        kinds[path] = jnp.promote_types(kind, kinds.get(path, kind))
    # JAX has no float64 unless told otherwise.
    return {
        path: jnp.dtype(jnp.float32) if float32(path) or kind.itemsize > 4 else kind
        for path, kind in kinds.items()
    }


def _compute_dtype(stored: Sequence[tuple[str, TensorInfo]], dtype: Any) -> Any:
    if dtype != "auto":
        return jnp.dtype(dtype)
    numbers = collections.Counter[str]()
    for _, info in stored:
        numbers[info.dtype] += math.prod(info.shape)
    most = numbers.most_common(1)[0][0]
    return jnp.dtype(most if most == "bfloat16" else "float32")


def check(
    path: str | Path,
    *,
    groups: Sequence[Group] | None = None,
    headless: bool = False,
) -> Any:
    """Check a checkpoint by its config and the headers of its files alone.

    Args:
      path: as of :func:`load`, and so are the others.
      groups: how the layers are stacked.
      headless: leave the head out.
    Returns:
      The shapes of the parameters, as :func:`load` would stack them.
    Raises:
      UserError: as :func:`load` does.
    Example::

      shapes = check("smollm2", groups=[(0, 15), (15, 30)])
    """
    config, family = open_config(path)
    if headless:
        config, family = _without_head(config, family)
    directory = hub.directory_of(path)
    cut = places_lib.stacks_of(config, groups)
    shapes = decoder.param_shapes(config, cut[""])
    _open(directory, config, family, cut, shapes)
    return shapes


def compute_dtype(path: str | Path, dtype: DType) -> Any:
    """Return what kind of numbers :func:`load` would have the model compute in.

    >>> compute_dtype("smollm2", "bfloat16")  # of auto the files decide
    dtype(bfloat16)
    """
    if dtype != "auto":
        return jnp.dtype(dtype)
    config, family = open_config(path)
    shapes = decoder.param_shapes(config)
    cut = places_lib.stacks_of(config)
    source = _open(hub.directory_of(path), config, family, cut, shapes)
    return _compute_dtype(source.stored, dtype)

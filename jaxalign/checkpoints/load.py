"""Hugging Face checkpoints in: tensor by tensor, straight to each device's shard."""

import collections
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxalign import stacks, trees
from jaxalign.checkpoints import base as base_lib
from jaxalign.checkpoints import hub
from jaxalign.checkpoints import tensors as tensor_files
from jaxalign.checkpoints.tensors import TensorFile, TensorInfo
from jaxalign.errors import UserError
from jaxalign.models import decoder, quantised
from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import family_of
from jaxalign.models.families.rules import Rule
from jaxalign.models.quantised import Quantised, Quantize
from jaxalign.parallel import sharding
from jaxalign.stacks import Group, group_name
from jaxalign.types import Model, Variables


__all__ = [
    "Checkpoint",
    "DType",
    "Place",
    "check",
    "compute_dtype",
    "locate",
    "load",
    "open_config",
]

DType = Literal["float32", "bfloat16", "float16", "auto"]
"""Of weights and computation; ``auto`` keeps every weight as it is stored."""


class Checkpoint(NamedTuple):
    """A model with its weights, and where they came from."""

    model: Model
    variables: Variables
    config: DecoderConfig
    groups: tuple[Group, ...]
    family: ModuleType
    path: Path
    dtype: Any
    """Of the computation."""
    name: str
    """What others call it: its id on the hub, or its directory's name."""


class Place(NamedTuple):
    """Where a Hugging Face tensor lies among the parameters."""

    rule: Rule
    path: str
    at: tuple[int, ...] = ()
    """For a leaf of a layer group its place in the stack, and which expert it is of."""


def open_config(path: str | Path) -> tuple[DecoderConfig, ModuleType]:
    """Read config.json alone.

    Raises:
      UserError: it is not there or not understood.
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
    family = family_of(config)
    return family.read_config(config), family


def load(
    path: str | Path,
    *,
    groups: Sequence[Group] | None = None,
    dtype: Any = jnp.float32,
    float32: Callable[[str], bool] = lambda path: False,
    quantize: Quantize = "none",
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
    **model_options: Any,
) -> Checkpoint:
    """Load a Hugging Face checkpoint.

    Tensors are mapped one after the other; every device gets just its shard of each.
    Above the model itself the host holds one tensor.

    Args:
      path: directory with config.json and safetensors files, or what ``jaxalign
        convert`` made of one, or an id on the hub.
      groups: how the layers are stacked, see ``selection.cut_groups``; default one.
      dtype: of the weights and of the computation. ``auto`` keeps each weight as it is
        stored (of a stack the widest) and computes in the kind that most weights have,
        in float32 where that is float16, whose range activations can leave.
      float32: tells by path which weights stay float32 all the same (trained ones).
      quantize: hold the layers' linear weights as codes, see ``models.quantised``.
      mesh: devices; default the first one.
      progress: called with (bytes read, bytes in all).
      **model_options: see ``models.decoder.make_model``.
    Raises:
      UserError: the directory, its config or its tensors are not what they should be;
        every tensor without a rule, unexpected or missing is named; a weight too large
        for float16.
    """
    config, family = open_config(path)
    directory = hub.directory_of(path)
    groups = tuple(groups or ((0, config.num_layers),))
    shapes = decoder.param_shapes(config, groups)
    source = _open(directory, config, family, groups, shapes)
    kinds = _kinds(source.stored, dtype, float32)
    targets = dict(zip(trees.paths(shapes), jax.tree.leaves(shapes), strict=True))
    if mesh is None:
        layout = dict.fromkeys(targets, SingleDeviceSharding(jax.devices()[0]))
    else:
        specs = sharding.param_shardings(shapes, mesh, family.SHARDING)
        layout = dict(zip(trees.paths(shapes), jax.tree.leaves(specs), strict=True))
    leaves: dict[str, Any] = {}
    done, total = 0, sum(info.nbytes for _, info in source.stored)

    def is_coded(path: str) -> bool:
        return quantize != "none" and quantised.holds_codes(path)

    for place, at, values in source.pieces(is_coded):
        coded = is_coded(place)
        kind, target = jnp.dtype(jnp.float32) if coded else kinds[place], targets[place]
        if at and place not in leaves:
            of = quantize if coded else "none"
            leaves[place] = _stack(target.shape, kind, layout[place], of)
            if coded:  # or the compiler, asked to put a piece in, splits its blocks
                layout[place] = leaves[place].codes.sharding
        piece = _read(values, place, at, target, layout, kind)
        if at:
            # Or reading runs ahead and pieces heap up.
            piece = jax.block_until_ready(_put(leaves.pop(place), piece, at))
        leaves[place] = piece
        done += values.nbytes
        if progress is not None:
            progress(done, total)
    params = trees.map_with_paths(lambda path, _: leaves.pop(path), shapes)
    compute = _compute_dtype(source.stored, dtype)
    model = decoder.make_model(
        config, groups=groups, dtype=compute, mesh=mesh, **model_options
    )
    return Checkpoint(
        model=model,
        variables={"params": params},
        config=config,
        groups=groups,
        family=family,
        path=directory,
        dtype=compute,
        name=source.name or hub.name_of(path),
    )


class _Source(NamedTuple):
    """Where weights come from: a checkpoint's files, or a converted base."""

    name: str | None
    stored: Sequence[tuple[str, TensorInfo]]
    """Path of a parameter, and what is there of it."""
    pieces: Callable[
        [Callable[[str], bool]], Iterator[tuple[str, tuple[int, ...], Any]]
    ]
    """Gives path, place in the stack, and what a slice of which is read when taken. Its
    argument tells by path what must come layer by layer."""


def _open(
    directory: Path,
    config: DecoderConfig,
    family: ModuleType,
    groups: tuple[Group, ...],
    shapes: Any,
) -> _Source:
    """Check that a checkpoint has what its config asks for, by headers alone."""
    if base_lib.is_base(directory):
        base = base_lib.read_base(directory)
        return _Source(
            base.name,
            base.stored(shapes, groups),
            lambda by_layer: base.pieces(groups, by_layer),
        )
    files = tensor_files.list_files(directory)
    places = match_tensors(files, family, config, groups, shapes, directory)
    if config.tie_embeddings:
        _check_tied_head(files, family)
    stored = [
        (places[name].path, info)
        for file in files
        for name, info in file.tensors.items()
        if name in places
    ]
    return _Source(None, stored, lambda _: _pieces(files, places))


def _pieces(
    files: Sequence[TensorFile], places: Mapping[str, Place]
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    for file in files:
        with file.open() as handle:
            for name in file.tensors:
                if (place := places.get(name)) is not None:
                    values = handle.get_slice(name)
                    if place.rule.transpose:
                        values = values.T
                    yield place.path, place.at, values


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


def check(path: str | Path, *, groups: Sequence[Group] | None = None) -> Any:
    """Check a checkpoint by its config and the headers of its files alone.

    Returns:
      The shapes of the parameters, as :func:`load` would stack them.
    Raises:
      UserError: as :func:`load` does.
    """
    config, family = open_config(path)
    directory = hub.directory_of(path)
    groups = tuple(groups or ((0, config.num_layers),))
    shapes = decoder.param_shapes(config, groups)
    _open(directory, config, family, groups, shapes)
    return shapes


def compute_dtype(path: str | Path, dtype: DType) -> Any:
    """Return what kind of numbers :func:`load` would have the model compute in."""
    if dtype != "auto":
        return jnp.dtype(dtype)
    config, family = open_config(path)
    groups = ((0, config.num_layers),)
    shapes = decoder.param_shapes(config, groups)
    source = _open(hub.directory_of(path), config, family, groups, shapes)
    return _compute_dtype(source.stored, dtype)


def match_tensors(
    files: Sequence[TensorFile],
    family: ModuleType,
    config: DecoderConfig,
    groups: Sequence[Group],
    shapes: Any,
    directory: Path,
) -> dict[str, Place]:
    """Find the place of every tensor and check that all places are filled.

    Raises:
      UserError: naming all tensors that no rule knows, that this config does not
        expect or that are missing, and all of the wrong shape.
    """
    targets = dict(zip(trees.paths(shapes), jax.tree.leaves(shapes), strict=True))
    places: dict[str, Place] = {}
    no_rule, unexpected, shape = [], [], []
    for file in files:
        for name, info in file.tensors.items():
            if any(rule.match(name) is not None for rule in family.IGNORED) or (
                config.tie_embeddings and name == family.HEAD
            ):
                continue
            place = locate(name, family.RULES, groups)
            if place is None:
                no_rule.append(name)
            elif (
                place.path not in targets
                or (expected := _expected(place, targets[place.path].shape)) is None
            ):
                unexpected.append(name)
            elif expected != info.shape:
                shape.append(f"{name} {list(info.shape)} instead of {list(expected)}")
            else:
                places[name] = place
    missing = []
    for path, target in targets.items():
        for name in tensor_names(path, target.shape, family.RULES):
            if name not in places and not shape:
                missing.append(name)
    problems = [
        f"{title}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for title, names in (
            (f"{len(no_rule)} tensor(s) that no rule of the family knows", no_rule),
            (
                f"{len(unexpected)} unexpected tensor(s), which config.json leaves no "
                "place for",
                unexpected,
            ),
            (f"{len(missing)} missing tensor(s)", missing),
            (f"{len(shape)} tensor(s) of the wrong shape", shape),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"{directory}: the weights do not fit config.json. {'. '.join(problems)}. "
            "Check that config.json and the weight files are of the same checkpoint"
        )
    return places


def _check_tied_head(files: Sequence[TensorFile], family: ModuleType) -> None:
    """Refuse a stored head that is not the embeddings that it is said to be tied to."""
    names = (family.RULES[0].hf, family.HEAD)
    holders = [file for name in names for file in files if name in file.tensors]
    if len(holders) < 2:
        return
    shapes = [f.tensors[name].shape for f, name in zip(holders, names, strict=True)]
    same = shapes[0] == shapes[1]
    with holders[0].open() as first, holders[1].open() as second:
        embedding, head = first.get_slice(names[0]), second.get_slice(names[1])
        rows = shapes[0][0] if same else 0
        for row in range(0, rows, 4096):
            part = slice(row, min(row + 4096, rows))
            same = same and np.array_equal(embedding[part], head[part])
    if not same:
        raise UserError(
            f"{holders[1].path}: {family.HEAD} differs from {names[0]}, to which "
            "config.json ties it. Set tie_word_embeddings to false there to use both, "
            f"or leave {family.HEAD} out of the file"
        )


def locate(name: str, rules: Sequence[Rule], groups: Sequence[Group]) -> Place | None:
    """Return where a tensor belongs, None if no rule knows its name."""
    for rule in rules:
        index = rule.match(name)
        if index is None:
            continue
        if not index:
            return Place(rule, rule.path)
        layer, *expert = index
        for low, high in groups:
            if low <= layer < high:
                stack = f"{group_name((low, high))}/"
                path = rule.path.replace("layers/", stack, 1)
                return Place(rule, path, (layer - low, *expert))
        return Place(rule, f"(layer {layer})", index)
    return None


def tensor_names(
    path: str, shape: Sequence[int], rules: Sequence[Rule]
) -> Iterator[str]:
    """Yield the Hugging Face names of all tensors that a parameter is made of."""
    group = stacks.split(path).group
    stack = "" if group is None else f"{group_name(group)}/"
    wanted = path.replace(stack, "layers/", 1) if stack else path
    found = [rule for rule in rules if rule.path == wanted]
    if not found:
        raise ValueError(f"no rule gives the parameter {path}")
    if group is None:
        yield found[0].name()
        return
    for index in np.ndindex(*shape[: found[0].axes]):
        yield found[0].name(group[0] + index[0], *index[1:])


def _expected(place: Place, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape that a tensor should have, None if there is no place for it."""
    many = len(place.at)
    if any(i >= n for i, n in zip(place.at, shape, strict=False)):
        return None
    return shape[many:][::-1] if place.rule.transpose else shape[many:]


def _read(
    values: Any, path: str, at: tuple[int, ...], target: Any, layout: Any, dtype: Any
) -> jax.Array:
    """Read a tensor, for each device just the part that it holds."""
    shape, placement = target.shape[len(at) :], layout[path]
    if isinstance(placement, NamedSharding):
        axes = placement.spec[len(at) :]
        placement = NamedSharding(placement.mesh, PartitionSpec(*axes))

    def part(index: Any) -> np.ndarray:
        bounds = tuple(
            slice(*i.indices(n)[:2]) for i, n in zip(index, shape, strict=True)
        )
        # A view of a file must be copied; what a converted base gives is fresh.
        array = np.array if isinstance(values, np.ndarray) else np.asarray
        return _converted(values[bounds], dtype, path, array)

    return jax.make_array_from_callback(shape, placement, part)


def _converted(
    values: np.ndarray, dtype: Any, path: str, array: Callable[..., np.ndarray]
) -> np.ndarray:
    with np.errstate(over="ignore"):
        made = array(values, dtype=dtype, order="C")
    # Only float16 has a smaller range than the kinds that are stored.
    if dtype == np.float16 and np.isinf(made).any() and np.isfinite(values).all():
        raise UserError(
            f"{path} has a weight of {np.abs(values).max():.3g}, above float16's "
            "largest, 65504: use --dtype bfloat16 or float32"
        )
    return made


def _stack(
    shape: tuple[int, ...], dtype: Any, placement: Any, quantize: Quantize
) -> Any:
    """Make an empty stack of layers, of numbers or of codes."""
    if quantize == "none":
        return _zeros_maker(shape, dtype, placement)()
    codes = jax.eval_shape(
        functools.partial(quantised.quantise, kind=quantize),
        jax.ShapeDtypeStruct(shape, dtype),
    )
    if isinstance(placement, NamedSharding):
        where = quantised.place(codes, placement)
    else:
        where = jax.tree.map(lambda _: placement, codes)
    return jax.tree.map(
        lambda c, to: _zeros_maker(c.shape, c.dtype, to)(), codes, where
    )


@functools.lru_cache(maxsize=256)  # as is a compiled function, so that it is made once
def _zeros_maker(shape: tuple[int, ...], dtype: Any, placement: Any) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=placement)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Any, piece: Any, index: tuple[Any, ...]) -> Any:
    if isinstance(stack, Quantised):
        piece = quantised.quantise(piece, stack.kind)

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        begin = (*index, *[0] * part.ndim)
        return jax.lax.dynamic_update_slice(whole, part[(None,) * len(index)], begin)

    return jax.tree.map(put, stack, piece)

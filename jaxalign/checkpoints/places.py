"""Where each Hugging Face tensor belongs among the parameters, and whether all fit."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxalign import stacks, trees
from jaxalign.checkpoints.tensors import TensorFile
from jaxalign.checkpoints.weights import PackedFile
from jaxalign.errors import UserError
from jaxalign.models.config import ModelConfig
from jaxalign.models.families import Family
from jaxalign.models.families.rules import Rule
from jaxalign.stacks import Group, group_name


__all__ = [
    "Place",
    "Stacks",
    "check_tied_head",
    "locate",
    "match_tensors",
    "stacks_of",
    "tensor_names",
]

Stacks = Mapping[str, Sequence[Group]]
"""How the layers of each scope are cut: of "", the decoder, and of ``vision``."""


def stacks_of(
    config: ModelConfig,
    groups: Sequence[Group] | None = None,
    vision_groups: Sequence[Group] | None = None,
) -> Stacks:
    """Return how a model's layers are cut, by default into one stack a scope."""
    found = {"": tuple(groups or ((0, config.text.num_layers),))}
    if config.vision is not None:
        whole = ((0, config.vision.num_layers),)
        found["vision"] = tuple(vision_groups or whole)
    return found


class Place(NamedTuple):
    """Where a Hugging Face tensor lies among the parameters."""

    rule: Rule
    path: str
    at: tuple[int, ...] = ()
    """For a leaf of a layer group its place in the stack, and which expert it is of."""

    @property
    def is_idle(self) -> bool:
        """Whether it is of a tower's layer that is not run."""
        tower = stacks.scope_of(self.rule.path) == "vision"
        return tower and self.path.startswith("(layer")

    def from_file(self, values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Return a stored tensor in the form of a parameter, of a layer if stacked."""
        if self.rule.reshaped:
            want = shape[len(self.at) :]
            values = np.asarray(values[:]).reshape(
                want[:: -1 if self.rule.transpose else 1]
            )
        return values.T if self.rule.transpose else values

    def to_file(self, value: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Return a parameter, of a layer if stacked, in the form of a stored tensor."""
        value = value.T if self.rule.transpose else value
        return value.reshape(shape) if self.rule.reshaped else value


def match_tensors(
    files: Sequence[TensorFile | PackedFile],
    family: Family,
    config: ModelConfig,
    cut: Stacks,
    shapes: Any,
    directory: Path,
) -> dict[str, Place]:
    """Find the place of every tensor and check that all places are filled.

    Raises:
      UserError: naming all tensors that no rule knows, that this config does not
        expect or that are missing, and all of the wrong shape.
    """
    targets = trees.by_path(shapes)
    places: dict[str, Place] = {}
    embeddings = family.rules[0]
    tied = config.text.tie_embeddings
    stored = {family.canonical(name) for file in files for name in file.tensors}
    no_rule, unexpected, shape = [], [], []
    for file in files:
        for name, info in file.tensors.items():
            own = family.canonical(name)
            if any(rule.match(own) is not None for rule in family.ignored):
                continue
            place = locate(own, family.rules, cut)
            if place is not None and place.is_idle:
                continue
            if tied and own == family.head:
                if embeddings.hf in stored:
                    continue
                # The one weight that is both, under its other name.
                place = Place(embeddings, embeddings.path)
            if place is None:
                no_rule.append(name)
            elif (
                place.path not in targets
                or (expected := _expected(place, targets[place.path].shape)) is None
            ):
                unexpected.append(name)
            elif not _fits(place, expected, info.shape):
                shape.append(f"{name} {list(info.shape)} instead of {list(expected)}")
            else:
                places[name] = place
    missing = []
    there = {*map(family.canonical, places)}
    there |= {place.rule.hf for place in places.values() if not place.at}
    for path, target in targets.items():
        for name in tensor_names(path, target.shape, family.rules):
            if name not in there and not shape:
                missing.append(name)
    _refuse(
        directory,
        {
            f"{len(no_rule)} tensor(s) that no rule of the family knows": no_rule,
            (
                f"{len(unexpected)} unexpected tensor(s), which config.json leaves no "
                "place for"
            ): unexpected,
            f"{len(missing)} missing tensor(s)": missing,
            f"{len(shape)} tensor(s) of the wrong shape": shape,
        },
    )
    return places


def _refuse(directory: Path, problems: Mapping[str, Sequence[str]]) -> None:
    """Raise the error of all that does not fit, if there is anything."""
    told = [
        f"{title}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for title, names in problems.items()
        if names
    ]
    if told:
        raise UserError(
            f"{directory}: the weights do not fit config.json. {'. '.join(told)}. "
            "Check that config.json and the weight files are of the same checkpoint"
        )


def check_tied_head(files: Sequence[TensorFile | PackedFile], family: Family) -> None:
    """Refuse a stored head that is not the embeddings that it is said to be tied to."""
    found = {
        family.canonical(name): (name, file) for file in files for name in file.tensors
    }
    wanted = (family.rules[0].hf, family.head)
    if any(name not in found for name in wanted):
        return
    names, holders = zip(*(found[name] for name in wanted), strict=True)
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
            f"{holders[1].path}: {family.head} differs from {names[0]}, to which "
            "config.json ties it. Set tie_word_embeddings to false there to use both, "
            f"or leave {family.head} out of the file"
        )


def locate(name: str, rules: Sequence[Rule], cut: Stacks) -> Place | None:
    """Return where a tensor belongs, None if no rule knows its name.

    Args:
      name: of the tensor, as the rules have it, see ``Family.canonical``.
      rules: of the family.
      cut: how the layers are stacked.
    """
    for rule in rules:
        index = rule.match(name)
        if index is None:
            continue
        if not index:
            return Place(rule, rule.path)
        layer, *expert = index
        for low, high in cut.get(stacks.scope_of(rule.path), ()):
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


def _fits(place: Place, want: Sequence[int], got: Sequence[int]) -> bool:
    if place.rule.reshaped:
        # A convolution's first axis is its outputs, as a linear layer's is.
        same = want[0] == got[0] or not place.rule.transpose
        return same and math.prod(want) == math.prod(got)
    return tuple(want) == tuple(got)

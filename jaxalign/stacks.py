"""Where a weight stands: its scope, its stack of layers, and the rest of its path.

The layers [lo, hi) of a group lie in one stack, a subtree ``layers_<lo>_<hi>`` whose
leaves have hi - lo as their first axis. What stands before it is the scope: nothing for
the decoder's own layers, ``vision`` for those of a tower.
"""

import re
from typing import NamedTuple


__all__ = [
    "SCOPES",
    "Group",
    "ParamPath",
    "group_name",
    "group_of_name",
    "join",
    "scope_of",
    "split",
    "unstacked",
]

SCOPES = ("vision", "connector")
"""The parts of a model beside the decoder, as the paths of their weights begin."""

Group = tuple[int, int]
"""Half-open range of layers that share one stack of weights and one scan."""

_STACK = re.compile(r"layers_(\d+)_(\d+)")


class ParamPath(NamedTuple):
    """The parts of a parameter's path."""

    scope: str
    """What stands before the stack, without the last slash; "" for the decoder's."""
    group: Group | None
    """The layers of its stack; None for a weight that is in none."""
    rest: str
    """The path inside the stack, or the whole path of a weight that is in none."""


def group_name(group: Group) -> str:
    """Return the name of a group's subtree.

    >>> group_name((0, 30))
    'layers_0_30'
    """
    return f"layers_{group[0]}_{group[1]}"


def group_of_name(name: str) -> Group | None:
    """Return the group of a subtree's name, None for any other name."""
    match = _STACK.fullmatch(name)
    return (int(match.group(1)), int(match.group(2))) if match else None


def split(path: str) -> ParamPath:
    """Take a path apart.

    >>> split("layers_0_30/mlp/up_proj/kernel")
    ParamPath(scope='', group=(0, 30), rest='mlp/up_proj/kernel')
    >>> split("vision/layers_0_27/norm1/scale").scope
    'vision'
    >>> split("norm/scale")
    ParamPath(scope='', group=None, rest='norm/scale')
    """
    names = path.split("/")
    for at, name in enumerate(names):
        group = group_of_name(name)
        if group is not None:
            return ParamPath("/".join(names[:at]), group, "/".join(names[at + 1 :]))
    return ParamPath("", None, path)


def scope_of(path: str) -> str:
    """Return which part of a model a weight is of; "" is the decoder.

    >>> scope_of("connector/linear_1/kernel"), scope_of("layers_0_4/mlp/up_proj/kernel")
    ('connector', '')
    """
    first = path.partition("/")[0]
    return first if first in SCOPES else ""


def unstacked(path: str) -> str:
    """Return a path without its stack, as all layers have it.

    >>> unstacked("vision/layers_0_27/attn/qkv"), unstacked("layers_0_2/mlp/up_proj")
    ('vision/attn/qkv', 'mlp/up_proj')
    """
    place = split(path)
    if place.group is None:
        return path
    return "/".join(part for part in (place.scope, place.rest) if part)


def join(place: ParamPath) -> str:
    """Put a path together again.

    >>> join(ParamPath("vision", (0, 27), "norm1/scale"))
    'vision/layers_0_27/norm1/scale'
    """
    if place.group is None:
        return place.rest
    parts = (place.scope, group_name(place.group), place.rest)
    return "/".join(part for part in parts if part)

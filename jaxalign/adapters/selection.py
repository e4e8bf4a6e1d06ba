"""Which layers and modules are adapted, and how that cuts the layers into groups."""

import re
from collections.abc import Iterable, Sequence

from jaxalign.errors import UserError, did_you_mean
from jaxalign.stacks import SCOPES, Group, scope_of


__all__ = [
    "check_regex",
    "check_targets",
    "cut_groups",
    "layers_by_scope",
    "parse_layers",
    "split_target",
]

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_SHARE = re.compile(r"(bottom|top):(\d+(?:\.\d+)?)")


def parse_layers(spec: str, num_layers: int) -> tuple[int, ...]:
    """Read a choice of layers.

    Args:
      spec: ``all``; indices and closed ranges ``0-11,28-31``; ``bottom:8`` or ``top:8``
        for a number of layers, ``bottom:0.75`` for a share of them (rounded, but
        neither none nor all of them, where there are two or more).
      num_layers: layers of the model.
    Raises:
      UserError: the text is no choice, names a layer twice or one that is not there, or
        chooses none.
    Example:
      >>> parse_layers("0-1,5", 6)
      (0, 1, 5)
      >>> parse_layers("top:0.5", 4)
      (2, 3)
    """
    spec = str(spec).strip()
    last = num_layers - 1
    if spec == "all":
        return tuple(range(num_layers))
    if share := _SHARE.fullmatch(spec):
        end, text = share.groups()
        count = int(text) if "." not in text else round(float(text) * num_layers)
        if 0 < float(text) < 1 and "." in text:
            count = max(1, min(count, num_layers - 1))
        if not 1 <= count <= num_layers:
            raise UserError(
                f"layers {spec!r} chooses {count} of {num_layers} layers: expected 1 "
                f"to {num_layers}"
            )
        return tuple(range(count) if end == "bottom" else range(num_layers)[-count:])
    layers: list[int] = []
    for part in spec.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise UserError(
                f"layers {spec!r} is no choice of layers: expected 'all', indices and "
                "ranges such as '0-11,28-31', or 'bottom:0.75', 'top:8'"
            )
        low = int(match.group(1))
        high = int(match.group(2) or low)
        if high < low or high > last:
            raise UserError(
                f"layers {spec!r}: {part.strip()!r} is not within 0-{last}, the layers "
                "of this model (both ends count)"
            )
        layers.extend(range(low, high + 1))
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise UserError(f"layers {spec!r} names layer {twice[0]} twice")
    return tuple(sorted(layers))


def layers_by_scope(spec: str) -> dict[str, str]:
    """Read choices of layers of a decoder and of a tower, separated by ``;``.

    Raises:
      UserError: a scope is named twice, or there is no such one.
    Example:
      >>> layers_by_scope("top:8; vision:bottom:4")
      {'': 'top:8', 'vision': 'bottom:4'}
    """
    found: dict[str, str] = {}
    for part in str(spec).split(";"):
        part = part.strip()
        scope = "vision" if part.startswith("vision:") else ""
        if scope in found or not part:
            raise UserError(
                f"layers {spec!r} names the layers of "
                f"{'the tower' if scope else 'the decoder'} twice or says nothing: "
                "expected one choice each, such as 'top:8; vision:all'"
            )
        found[scope] = part.removeprefix("vision:")
    return found


def split_target(target: str) -> tuple[str, str]:
    """Return the scope that a target is for, and the pattern.

    >>> split_target("vision:q_proj"), split_target("q_proj")
    (('vision', 'q_proj'), ('', 'q_proj'))
    """
    for scope in SCOPES:
        if target.startswith(f"{scope}:"):
            return scope, target.removeprefix(f"{scope}:")
    return "", target


def cut_groups(num_layers: int, choices: Iterable[Sequence[int]]) -> tuple[Group, ...]:
    """Cut the layers where any of the choices begins or ends.

    >>> cut_groups(6, [(0, 1, 2)])
    ((0, 3), (3, 6))
    """
    chosen = [set(choice) for choice in choices]
    cuts = [0]
    for layer in range(1, num_layers):
        if any((layer in choice) != (layer - 1 in choice) for choice in chosen):
            cuts.append(layer)
    return tuple(zip(cuts, [*cuts[1:], num_layers], strict=True))


def check_regex(field: str, pattern: str) -> None:
    """Refuse a pattern that is no regular expression.

    Raises:
      UserError: with the field that it is of.
    Example:
      >>> check_regex("adapter.targets", "q_proj|v_proj")
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"{field}: {pattern!r} is not a regular expression: {error}"
        ) from None


def check_targets(targets: Sequence[str], modules: Iterable[str]) -> None:
    """Refuse a target that matches no layer, or one that another matches too.

    Args:
      targets: regular expressions for a module's whole name or whole path, of a tower
        or a connector with ``vision:`` or ``connector:`` before it.
      modules: paths of the modules, such as ``mlp/down_proj``, ``vision/attn/qkv``.
    Raises:
      UserError: with the near names.
    Example:
      >>> check_targets(["q_proj", "mlp/.*"], ["self_attn/q_proj", "mlp/up_proj"])
    """
    if not targets:
        raise UserError("adapter.targets is empty: name at least one linear layer")
    paths = list(dict.fromkeys(modules))
    names = dict.fromkeys(_named(path) for path in paths)
    by: dict[str, str] = {}
    for target in targets:
        scope, pattern = split_target(target)
        check_regex("adapter.targets", pattern)
        mine = [path for path in paths if _matches(scope, pattern, path)]
        if not mine:
            raise UserError(
                f"the adapter target {target!r} is no linear layer of this model. "
                f"{did_you_mean(target, names)}"
            )
        for path in mine:
            if path in by:
                raise UserError(
                    f"adapter.targets names {path.split('/')[-1]!r} twice, by "
                    f"{by[path]!r} and {target!r}"
                )
            by[path] = target


def _matches(scope: str, pattern: str, path: str) -> bool:
    if scope_of(path) != scope:
        return False
    inner = path.removeprefix(f"{scope}/")
    return any(re.fullmatch(pattern, name) for name in (inner, inner.split("/")[-1]))


def _named(path: str) -> str:
    """Return a module's name as a target would have it."""
    scope = scope_of(path)
    return f"{scope}:{path.split('/')[-1]}" if scope else path.split("/")[-1]

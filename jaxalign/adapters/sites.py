"""The layers that LoRA can sit on, and with what rank and scale it does."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxalign import stacks
from jaxalign.adapters import selection
from jaxalign.errors import UserError, did_you_mean


__all__ = ["Site", "Size", "resolve", "sites_of", "weights"]


_PATCHES = "vision/patch_embedding"


class Site(NamedTuple):
    """A layer that can be adapted."""

    path: str
    """Without its group, such as ``self_attn/q_proj``, ``lm_head`` or
    ``vision/attn/qkv``."""
    layer: int | None

    @property
    def scope(self) -> str:
        """Of the part of the model that it is in."""
        return stacks.scope_of(self.path)

    def matches(self, pattern: str) -> bool:
        """Tell whether a pattern is the site's name, path or path with its layer.

        Patterns for towers and connectors have ``vision:`` or ``connector:`` first.
        """
        scope, inner = selection.split_target(pattern)
        if scope != self.scope:
            return False
        path = self.path.removeprefix(f"{scope}/")
        names = {path, path.rsplit("/", 1)[-1]}
        if self.layer is not None:
            names.add(f"layers/{self.layer}/{path}")
        return any(re.fullmatch(inner, name) for name in names)


class Size(NamedTuple):
    """Rank and scale of the update of one site."""

    rank: int
    scale: float


def weights(params: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield what can be adapted: path, ``kernel`` or ``embedding``, and the weight.

    What makes a tower's patches states is a convolution in other libraries, which LoRA
    has another form for; it is left out, as PEFT's ``all-linear`` does.
    """
    for key, child in params.items():
        path = f"{prefix}{key}"
        if isinstance(child, dict) and path != _PATCHES:
            for name in ("kernel", "embedding"):
                if name in child:
                    yield path, name, child[name]
            yield from weights(child, f"{path}/")


def sites_of(path: str) -> list[Site]:
    """Return the sites of a stack, one for each of its layers, or the one of no stack.

    >>> sites_of("layers_2_4/mlp/up_proj")[1]
    Site(path='mlp/up_proj', layer=3)
    """
    group = stacks.split(path).group
    if group is None:
        return [Site(path, None)]
    return [Site(stacks.unstacked(path), layer) for layer in range(*group)]


def resolve(
    params: Any,
    *,
    targets: Sequence[str],
    layers: str,
    rank: int,
    alpha: float,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, Any],
    rslora: bool,
) -> dict[Site, Size]:
    """Return the sites that are chosen, with rank and scale of each.

    Args:
      params: base weights or their shapes, cut into groups in any way.
      targets: see ``lora.LoRAConfig``, as the others.
      layers: see ``selection.layers_by_scope``.
      rank: where no pattern says another.
      alpha: likewise.
      rank_pattern: ranks by pattern.
      alpha_pattern: alphas by pattern.
      rslora: whether the scale is alpha / sqrt(rank).
    Raises:
      UserError: a target, layer or pattern that is not there or is chosen twice.
    """
    sites = [site for path, *_ in weights(params) for site in sites_of(path)]
    inside = _inside(sites, layers)
    selection.check_targets(targets, dict.fromkeys(site.path for site in sites))
    chosen = [
        site
        for site in sites
        if any(site._replace(layer=None).matches(target) for target in targets)
        and (site.layer is None or site.layer in inside[site.scope])
    ]
    ranks = _per_site("rank_pattern", rank_pattern, chosen)
    alphas = _per_site("alpha_pattern", alpha_pattern, chosen)
    sizes = {}
    for site in chosen:
        own = int(ranks.get(site, rank))
        divisor = own**0.5 if rslora else own
        sizes[site] = Size(own, alphas.get(site, alpha) / divisor)
    return sizes


def _inside(sites: Sequence[Site], layers: str) -> dict[str, set[int]]:
    """Return the layers that are chosen, by scope; all of one that is not named."""
    chosen = selection.layers_by_scope(layers)
    inside: dict[str, set[int]] = {}
    for scope in ("", *stacks.SCOPES):
        of_scope = [s.layer for s in sites if s.scope == scope and s.layer is not None]
        if scope in chosen and not of_scope and scope:
            raise UserError(
                f"layers {layers!r}: the model has no {scope} tower. Leave it out"
            )
        count = 1 + max(of_scope, default=-1)
        spec = chosen.get(scope, "all")
        inside[scope] = set(selection.parse_layers(spec, count)) if of_scope else set()
    return inside


def _per_site(
    field: str, patterns: Mapping[str, Any], sites: list[Site]
) -> dict[Site, Any]:
    found: dict[Site, Any] = {}
    by: dict[Site, str] = {}
    for pattern, value in patterns.items():
        selection.check_regex(f"adapter.{field}", pattern)
        mine = [site for site in sites if site.matches(pattern)]
        if not mine:
            names = dict.fromkeys(site.path for site in sites)
            raise UserError(
                f"adapter.{field}: {pattern!r} matches no adapted layer. "
                f"{did_you_mean(pattern, names)}"
            )
        for site in mine:
            if site in found:
                raise UserError(
                    f"adapter.{field}: both {by[site]!r} and {pattern!r} match "
                    f"{site.path}: narrow one of them"
                )
            found[site], by[site] = value, pattern
    return found

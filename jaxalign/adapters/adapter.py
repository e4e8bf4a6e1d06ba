"""Any adapter of the library by its config: layers, weights, what is trained.

A model's variables hold an adapter as the collections ``lora``, ``prefix`` and
``saved``; leaving them out switches it off.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
from jaxtyping import Array, Key

from jaxalign import stacks, trees
from jaxalign.adapters import gates, hybrid, lora, prefix, saved, selection
from jaxalign.adapters.hybrid import H2LPTConfig, HLPTConfig, Parts
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.adapters.prefix import PrefixConfig
from jaxalign.configs import check_fields
from jaxalign.errors import UserError
from jaxalign.variables import check_params, check_variables


__all__ = [
    "COLLECTIONS",
    "CONFIGS",
    "Adapter",
    "NoAdapter",
    "PeftConfig",
    "averages_ahead",
    "dropout",
    "groups",
    "init",
    "parts",
    "reads_ahead",
    "trained",
    "trained_mask",
    "vision_groups",
]

COLLECTIONS = ("lora", "prefix", saved.COLLECTION)

_FIXED = {
    "lora": ("scale", "a0", "b0"),
    "prefix": ("position",),
    saved.COLLECTION: ("indices",),
}
"""Leaves that make an adapter complete in itself and that training leaves alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoAdapter:
    """No adapter: base weights are trained, chosen by ``trainable``.

    >>> NoAdapter().name
    'none'
    """

    name: Literal["none"] = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """An adapter that is there already, to be trained on.

    Attributes:
      name: the adapter.
      path: PEFT directory of LoRA or a prefix, or a hybrid that jaxalign exported.
      dropout: share of LoRA's inputs that are dropped in training.

    >>> PeftConfig(path="adapter", dropout=0.1).name
    'peft'
    """

    path: str
    name: Literal["peft"] = "peft"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter.dropout must lie in [0, 1): got {self.dropout}")


Adapter = LoRAConfig | PrefixConfig | HLPTConfig | H2LPTConfig | PeftConfig | NoAdapter

CONFIGS: dict[str, type] = {
    "lora": LoRAConfig,
    "prefix": PrefixConfig,
    "hlpt": HLPTConfig,
    "h2lpt": H2LPTConfig,
    "peft": PeftConfig,
    "none": NoAdapter,
}
"""Options by the adapter's name."""


def parts(config: Adapter, num_layers: int) -> Parts:
    """Return the LoRA and the prefix that an adapter to be made consists of.

    >>> parts(LoRAConfig(rank=8), num_layers=4).prefix is None
    True
    """
    if isinstance(config, HLPTConfig):
        return hybrid.parts(config, num_layers)
    return Parts(
        config if isinstance(config, LoRAConfig) else None,
        config if isinstance(config, PrefixConfig) else None,
    )


def averages_ahead(config: Adapter) -> bool:
    """Tell whether an adapter to be made has the gate that reads later tokens.

    >>> averages_ahead(LoRAConfig()), averages_ahead(LoRAConfig(gate="mean"))
    (False, True)
    """
    return getattr(config, "gate", None) == "mean" or getattr(config, "faithful", False)


def dropout(config: Adapter) -> float:
    """Return the share of LoRA's inputs that training drops.

    >>> dropout(LoRAConfig(dropout=0.1)), dropout(NoAdapter())
    (0.1, 0.0)
    """
    return getattr(config, "dropout", 0.0)


def groups(config: Adapter, params: Any, num_layers: int) -> tuple[Any, ...]:
    """Return how an adapter to be made cuts the layers into stacks.

    Args:
      config: options.
      params: shapes of the base weights, cut in any way.
      num_layers: of the model.
    Raises:
      UserError: the adapter chooses what is not there, or something twice.
    Example:
      >>> import jax.numpy as jnp
      >>> up = {"kernel": jnp.ones((4, 2, 3))}
      >>> params = {"layers_0_4": {"mlp": {"up_proj": up}}}
      >>> config = LoRAConfig(targets=("up_proj",), layers="top:1")
      >>> groups(config, params, num_layers=4)
      ((0, 3), (3, 4))
    """
    check_params(params, "adapter.groups")
    made = parts(config, num_layers)
    choices: list[tuple[int, ...]] = []
    if made.lora is not None:
        choices += lora.layer_choices(params, made.lora)
    if made.prefix is not None:
        choices += prefix.layer_choices(made.prefix, num_layers)
    return selection.cut_groups(num_layers, choices)


def vision_groups(config: Adapter, params: Any) -> tuple[Any, ...] | None:
    """Return how an adapter to be made cuts the layers of a vision tower.

    Args:
      config: options.
      params: as of :func:`groups`.
    Returns:
      None where it does not, or where there is no tower.
    Raises:
      UserError: the adapter chooses layers or modules that are not there.
    Example:
      >>> import jax.numpy as jnp
      >>> stack = {"layers_0_4": {"mlp": {"fc1": {"kernel": jnp.ones((4, 2, 3))}}}}
      >>> config = LoRAConfig(targets=("vision:fc1",), layers="vision:top:1")
      >>> vision_groups(config, {**stack, "vision": stack})
      ((0, 3), (3, 4))
    """
    made = parts(config, 1).lora if isinstance(config, LoRAConfig) else None
    groups = [stacks.group_of_name(name) for name in params.get("vision", {})]
    layers = max((group[1] for group in groups if group), default=0)
    if made is None or not layers:
        return None
    cut = selection.cut_groups(layers, lora.layer_choices(params, made, "vision"))
    return cut if len(cut) > 1 else None


def init(
    key: Key[Array, ""],
    params: Any,
    config: Adapter,
    *,
    num_layers: int,
    sizes: Mapping[str, int],
    text: Any = None,
) -> dict[str, Any]:
    """Make an adapter's collections.

    Args:
      key: consumed.
      params: base weights, cut for :func:`groups`.
      config: options.
      num_layers: of the model.
      sizes: ``width``, ``kv_heads`` and ``head_dim``, see ``prefix.init``.
      text: keys and values that a prefix starts from, see ``prefix.init``.
    Returns:
      ``{"lora": ..., "prefix": ..., "saved": ...}``, without what the adapter lacks.
    Example:
      >>> import jax.numpy as jnp
      >>> up = {"kernel": jnp.ones((4, 2, 3))}
      >>> params = {"layers_0_4": {"mlp": {"up_proj": up}}}
      >>> config, sizes = LoRAConfig(targets=("up_proj",)), {}
      >>> list(init(jax.random.key(0), params, config, num_layers=4, sizes=sizes))
      ['lora']
    """
    check_params(params, "adapter.init")
    made = parts(config, num_layers)
    collections: dict[str, Any] = {}
    if made.lora is not None:
        collections["lora"] = lora.init(key, params, made.lora)
        if made.lora.modules_to_save:
            collections[saved.COLLECTION] = saved.init(
                params, made.lora.modules_to_save, collections["lora"]
            )
    if made.prefix is not None:
        collections["prefix"] = prefix.init(
            jax.random.fold_in(key, 2**31), params, made.prefix, text=text, **sizes
        )
    return collections


def trained(variables: Mapping[str, Any]) -> Any:
    """Mark the leaves that training an adapter changes: its own, save constants.

    >>> trained({"params": {"w": 1.0}, "lora": {"a": 1.0, "b": 0.0, "scale": 2.0}})
    {'lora': {'a': True, 'b': True, 'scale': False}, 'params': {'w': False}}
    """

    if not set(variables) <= {"params", *COLLECTIONS}:
        check_variables(variables, "adapter.trained")

    def mine(path: str, _: Any) -> bool:
        names = path.split("/")
        return names[0] in COLLECTIONS and names[-1] not in _FIXED[names[0]]

    return trees.map_with_paths(mine, dict(variables))


def trained_mask(
    variables: Mapping[str, Any], shapes: Any, patterns: Sequence[str] = ()
) -> Any:
    """Mark what a run trains: an adapter's leaves, and base weights by their path.

    Args:
      variables: base weights, held in any way, and the adapter's collections.
      shapes: of the base weights as plain arrays, so that the mask does not depend on
        how they are held.
      patterns: of the base weights, see ``trees.mask_from_patterns``.
    Example:
      >>> variables = {"params": {"norm": 1.0, "up": 2.0}}
      >>> trained_mask(variables, variables["params"], ["up"])
      {'params': {'norm': False, 'up': True}}
    """
    check_variables(variables, "adapter.trained_mask")
    check_params(shapes, "adapter.trained_mask")
    collections = {k: v for k, v in variables.items() if k in COLLECTIONS}
    base = trees.mask_from_patterns(shapes, patterns)
    return {**trained(collections), "params": base}


def reads_ahead(collections: Any) -> bool:
    """Tell whether a gate averages over the whole sequence, later tokens included.

    >>> reads_ahead({"lora": {"gate_token": {"w": 1.0}}})
    False
    """
    name = gates.FEATURE_GATES[-1]
    return any(path.split("/")[-1] == name for path in trees.paths(collections))

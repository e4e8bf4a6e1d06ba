"""LoRA: low-rank updates of linear layers, as a pytree beside the parameters.

[LoRA](https://arxiv.org/abs/2106.09685): ``y = x W + (alpha / rank) (x A) B`` with A
[in, rank] random and B [rank, out] zero. The collection ``lora`` mirrors ``params``;
where the parameters have ``.../q_proj/kernel`` it has ``.../q_proj/{a, b, scale}``, and
a layer that finds none computes its plain product. ``scale`` is not trained: it makes
an adapter complete in itself, whatever rank and alpha each of its layers has.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from jaxalign.adapters import selection
from jaxalign.errors import UserError


__all__ = [
    "SAVED_NAME",
    "TRAINABLE",
    "LoRAConfig",
    "delta",
    "init",
    "linear_layers",
    "merge",
]

TRAINABLE = (r"lora/.*/[ab]",)
"""Patterns of the leaves that training changes."""

SAVED_NAME = "lora_low"
"""Name under which a remat policy may keep x A."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Options of LoRA.

    Attributes:
      name: the adapter.
      rank: width of the bottleneck.
      alpha: the update is scaled by alpha / rank.
      targets: names of the linear layers to adapt, such as ``q_proj``.
      layers: which layers, see ``selection.parse_layers``.
      dropout: share of the adapter's inputs that are dropped in training; never for
        the reference and never in evaluation.
    """

    name: Literal["lora"] = "lora"
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    layers: str = "all"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"adapter.rank must be at least 1: got {self.rank}")
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"adapter.alpha must be positive: got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter.dropout must lie in [0, 1): got {self.dropout}")


@jax.custom_vjp
def delta(
    x: Float[Array, "*n fan_in"],
    a: Float[Array, "fan_in rank"],
    b: Float[Array, "rank fan_out"],
    scale: Float[Array, ""],
) -> Float[Array, "*n fan_out"]:
    """Return ``scale (x A) B``, computed in the dtype of x.

    Its derivative is written out, because the compiler, left to itself, transposes the
    tokens × width arrays instead of the tokens × rank ones.
    """
    return _delta_fwd(x, a, b, scale)[0]


def _delta_fwd(x: Array, a: Array, b: Array, scale: Array) -> tuple[Array, Any]:
    low = checkpoint_name(x @ a.astype(x.dtype), SAVED_NAME)
    out = (low * scale.astype(x.dtype)) @ b.astype(x.dtype)
    return out, (x, low, a, b, scale)


def _delta_bwd(residuals: Any, grad: Array) -> tuple[Array, ...]:
    x, low, a, b, scale = residuals
    d_low = grad @ b.astype(grad.dtype).T
    d_scale = (d_low.astype(jnp.float32) * low.astype(jnp.float32)).sum()
    d_low = d_low * scale.astype(grad.dtype)

    def weight_grad(narrow: Array, wide: Array) -> Array:
        # The barrier keeps the transpose on the narrow side.
        left = jax.lax.optimization_barrier(narrow.reshape(-1, narrow.shape[-1]).T)
        right = wide.reshape(-1, wide.shape[-1])
        return jnp.matmul(left, right, preferred_element_type=jnp.float32)

    d_a = weight_grad(d_low, x).T
    d_b = weight_grad(low, grad) * scale
    d_x = d_low @ a.astype(grad.dtype).T
    return (
        d_x.astype(x.dtype),
        d_a.astype(a.dtype),
        d_b.astype(b.dtype),
        d_scale.astype(scale.dtype),
    )


delta.defvjp(_delta_fwd, _delta_bwd)


def linear_layers(params: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and kernel of every linear layer, stacked ones included."""
    for name, child in params.items():
        path = f"{prefix}{name}"
        if isinstance(child, dict):
            if "kernel" in child:
                yield path, child["kernel"]
            yield from linear_layers(child, f"{path}/")


def init(key: Key[Array, ""], params: Any, config: LoRAConfig) -> dict[str, Any]:
    """Make the adapters of the chosen layers.

    A is uniform within ±1/sqrt(in) (PEFT's default, Kaiming with slope sqrt 5), B is
    zero, both float32: the adapted model starts out equal to the base model.

    Args:
      key: consumed.
      params: base weights (or their shapes) whose layer groups were cut for
        ``config.layers``, see ``selection.cut_groups``.
      config: options.
    Raises:
      UserError: a target or layer that is not there.
      ValueError: the groups were cut elsewhere.
    """
    layers = list(linear_layers(params))
    groups = [selection.group_of_name(path.split("/")[0]) for path, _ in layers]
    num_layers = max((group[1] for group in groups if group), default=0)
    chosen = set(selection.parse_layers(config.layers, num_layers))
    selection.check_targets(config.targets, (path for path, _ in layers))
    adapters: dict[str, Any] = {}
    scale = config.alpha / config.rank
    for index, ((path, kernel), group) in enumerate(zip(layers, groups, strict=True)):
        if path.split("/")[-1] not in config.targets:
            continue
        if group is not None and not chosen & set(range(*group)):
            continue
        if group is not None and not chosen >= set(range(*group)):
            raise ValueError(
                f"layers {config.layers!r} cut through the group {path.split('/')[0]}: "
                "load the checkpoint with groups cut for this choice"
            )
        *stack, fan_in, fan_out = kernel.shape
        bound = fan_in**-0.5
        leaf = {
            "a": jax.random.uniform(
                jax.random.fold_in(key, index),
                (*stack, fan_in, config.rank),
                jnp.float32,
                -bound,
                bound,
            ),
            "b": jnp.zeros((*stack, config.rank, fan_out), jnp.float32),
            "scale": jnp.full(stack, scale, jnp.float32),
        }
        node = adapters
        for part in path.split("/"):
            node = node.setdefault(part, {})
        node.update(leaf)
    return adapters


def merge(params: Any, adapters: Any) -> Any:
    """Return the parameters with ``W + scale A B`` in place of each adapted kernel.

    The sum is taken in float32 and rounded once to the kernel's dtype.
    """
    merged = {}
    for name, child in params.items():
        update = adapters.get(name) if isinstance(adapters, dict) else None
        if isinstance(child, dict) and update is not None:
            merged[name] = merge(child, update)
        elif name == "kernel" and isinstance(adapters, dict) and "a" in adapters:
            merged[name] = _merged_kernel(child, adapters)
        else:
            merged[name] = child
    return merged


def _merged_kernel(kernel: Any, adapter: dict[str, Any]) -> Any:
    xp = np if isinstance(kernel, np.ndarray) else jnp
    scale = xp.asarray(adapter["scale"], dtype=xp.float32)[..., None, None]
    update = xp.matmul(xp.asarray(adapter["a"]), xp.asarray(adapter["b"])) * scale
    return (kernel.astype(xp.float32) + update).astype(kernel.dtype)

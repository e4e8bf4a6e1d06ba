"""LoRA: low-rank updates of linear layers, as a pytree beside the parameters.

[LoRA](https://arxiv.org/abs/2106.09685): ``y = x W + scale g (x A) B`` with A
[in, rank] random and B [rank, out] zero. The collection ``lora`` mirrors ``params``;
where the parameters have ``.../q_proj/kernel`` it has ``.../q_proj/{a, b, scale}``, and
a layer that finds none computes its plain product. An adapter is complete in itself:

* ``scale``, not trained, is alpha / rank, or alpha / sqrt(rank) with
  [rsLoRA](https://arxiv.org/abs/2312.03732);
* a gate g, see ``adapters.gates``;
* ``magnitude`` [out] makes it [DoRA](https://arxiv.org/abs/2402.09353): the columns of
  ``W + scale A B`` are brought to these lengths;
* ``a0``, ``b0``, not trained, are the part of W from which
  [PiSSA](https://arxiv.org/abs/2404.02948) starts: ``W - scale A0 B0 + scale A B``, so
  that W itself, and with it the reference, stay as they are.

The embeddings have ``a`` [vocabulary, rank] (zero) and ``b`` [rank, width] (random).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from jaxalign import trees
from jaxalign.adapters import gates, sites
from jaxalign.errors import UserError


__all__ = [
    "LEAVES",
    "SAVED_NAME",
    "LoRAConfig",
    "apply",
    "apply_experts",
    "delta",
    "embed",
    "init",
    "layer_choices",
    "merge",
    "unmerge",
]

LEAVES = ("a", "b", "scale", "a0", "b0", "magnitude", *gates.GATES)
"""All that the adapter of one layer may have."""

SAVED_NAME = "lora_low"
"""Name under which a remat policy may keep x A, and what DoRA multiplies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Options of LoRA.

    Attributes:
      name: the adapter.
      rank: width of the bottleneck.
      alpha: the update is scaled by alpha / rank.
      targets: layers to adapt: names such as ``q_proj``, ``lm_head``, ``embed_tokens``,
        or regular expressions for a whole name or path, ``mlp/.*``.
      layers: which layers, see ``selection.parse_layers``.
      rank_pattern: other ranks by regular expression for a whole name, path, or
        ``layers/<i>/<path>``.
      alpha_pattern: other alphas, likewise.
      dropout: share of the adapter's inputs that are dropped in training; never for
        the reference and never in evaluation.
      rslora: scale by alpha / sqrt(rank) instead.
      dora: train the lengths of the weight's columns too.
      init: ``zero`` starts B at zero; ``pissa`` starts with the weight's largest
        singular directions, which the base then lacks. Both start as the base model.
      gate: how much each token gets of the update, see ``adapters.gates``.
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
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: Literal["zero", "pissa"] = "zero"
    gate: gates.Gate = "none"

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1:
                raise UserError(f"adapter.rank must be at least 1: got {rank}")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not 0 < alpha < float("inf"):
                raise UserError(f"adapter.alpha must be positive: got {alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter.dropout must lie in [0, 1): got {self.dropout}")
        if self.dora and (self.gate != "none" or self.init != "zero"):
            raise UserError(
                "adapter.dora measures the columns of one weight: it goes with gate "
                f"none and init zero, got gate {self.gate} and init {self.init}"
            )


@jax.custom_vjp
def delta(
    x: Float[Array, "*n fan_in"],
    a: Float[Array, "fan_in rank"],
    b: Float[Array, "rank fan_out"],
    scale: Float[Array, "..."],
) -> Float[Array, "*n fan_out"]:
    """Return ``scale (x A) B``, computed in the dtype of x.

    Its derivative is written out, because the compiler, left to itself, transposes the
    tokens × width arrays instead of the tokens × rank ones.

    Args:
      x: inputs.
      a: factor A.
      b: factor B.
      scale: one number, or one a token, [*n, 1].
    """
    return _delta_fwd(x, a, b, scale)[0]


def _delta_fwd(x: Array, a: Array, b: Array, scale: Array) -> tuple[Array, Any]:
    low = checkpoint_name(x @ a.astype(x.dtype), SAVED_NAME)
    out = _scaled(low, scale) @ b.astype(x.dtype)
    return out, (x, low, a, b, scale)


def _scaled(low: Array, scale: Array) -> Array:
    return low * jnp.broadcast_to(scale.astype(low.dtype), (*low.shape[:-1], 1))


def _delta_bwd(residuals: Any, grad: Array) -> tuple[Array, ...]:
    x, low, a, b, scale = residuals
    d_scaled = grad @ b.astype(grad.dtype).T
    along = d_scaled.astype(jnp.float32) * low.astype(jnp.float32)
    d_scale = along.sum(-1, keepdims=True) if scale.ndim else along.sum()
    d_low = _scaled(d_scaled, scale)

    def weight_grad(narrow: Array, wide: Array) -> Array:
        # The barrier keeps the transpose on the narrow side.
        left = jax.lax.optimization_barrier(narrow.reshape(-1, narrow.shape[-1]).T)
        right = wide.reshape(-1, wide.shape[-1])
        return jnp.matmul(left, right, preferred_element_type=jnp.float32)

    d_a = weight_grad(d_low, x).T
    if scale.ndim:
        d_b = weight_grad(_scaled(low, scale), grad)
    else:
        d_b = weight_grad(low, grad) * scale
    d_x = d_low @ a.astype(grad.dtype).T
    return (
        d_x.astype(x.dtype),
        d_a.astype(a.dtype),
        d_b.astype(b.dtype),
        d_scale.astype(scale.dtype),
    )


delta.defvjp(_delta_fwd, _delta_bwd)


def apply(
    y: Float[Array, "*n fan_out"],
    x: Float[Array, "*n fan_in"],
    leaves: Mapping[str, Array],
    *,
    kernel: Any,
    mean: gates.Mean | None = None,
    dropped: Float[Array, "*n fan_in"] | None = None,
) -> Float[Array, "*n fan_out"]:
    """Return the adapted layer's output from the plain one's.

    Args:
      y: ``x W``, without bias.
      x: inputs, which the gate reads too.
      leaves: of this layer's adapter.
      kernel: W [fan_in, fan_out], or codes of it, which DoRA measures.
      mean: see ``gates.value``.
      dropped: x with dropout, for the update alone.
    """
    a, b = _factors(leaves)
    gate = gates.value(leaves, x, mean)
    scale = leaves["scale"] if gate is None else leaves["scale"] * gate
    y = y + delta(x if dropped is None else dropped, a, b, scale)
    if "magnitude" not in leaves:
        return y
    # The lengths count as constants, as in the paper's section 4.3. What the derivative
    # of the magnitude needs is kept, instead of the layer's output.
    y = checkpoint_name(y, SAVED_NAME)
    lengths = jax.lax.stop_gradient(_lengths(kernel, a, b, leaves["scale"]))
    lengths = checkpoint_name(lengths, SAVED_NAME)
    ratio = (leaves["magnitude"] / _not_zero(lengths)).astype(y.dtype)
    return y * jnp.broadcast_to(ratio, y.shape)


def apply_experts(
    y: Float[Array, "m fan_out"],
    x: Float[Array, "m fan_in"],
    leaves: Mapping[str, Array],
    sizes: Int[Array, " e"],
) -> Float[Array, "m fan_out"]:
    """Return the adapted output of experts that have an A and a B each.

    Args:
      y: each row through its own expert.
      x: inputs, sorted by expert.
      leaves: of the layer's adapter: a [e, fan_in, rank], b [e, rank, fan_out].
      sizes: rows of each expert.
    """
    a, b = _factors(leaves)
    scale = leaves["scale"] * leaves.get("gate", 1.0)
    low = checkpoint_name(jax.lax.ragged_dot(x, a.astype(x.dtype), sizes), SAVED_NAME)
    return y + jax.lax.ragged_dot(_scaled(low, scale), b.astype(x.dtype), sizes)


def _not_zero(lengths: Any, xp: Any = jnp) -> Any:
    """Let a column of zeros, as padded vocabularies have, stay one."""
    return xp.where(lengths == 0, 1.0, lengths)


def embed(
    tokens: Array, leaves: Mapping[str, Array], dtype: Any
) -> Float[Array, "*n d"]:
    """Return the update of the embeddings of tokens, ``scale A[tokens] B``."""
    low = leaves["a"][tokens].astype(dtype) * leaves["scale"].astype(dtype)
    return low @ leaves["b"].astype(dtype)


def _factors(leaves: Mapping[str, Any], xp: Any = jnp) -> tuple[Any, Any]:
    """Return A and B, with the part that PiSSA takes away beside them."""
    a, b = leaves["a"], leaves["b"]
    if "a0" in leaves:
        a = xp.concatenate([a, leaves["a0"]], axis=-1)
        b = xp.concatenate([b, -leaves["b0"]], axis=-2)
    return a, b


def _lengths(kernel: Any, a: Array, b: Array, scale: Array) -> Array:
    """Return |W + scale A B| of every column, without making that matrix."""
    wide = kernel.astype(jnp.float32)
    cross = jnp.einsum("...ir,...io->...ro", a, wide)
    gram = jnp.einsum("...ir,...is->...rs", a, a)
    scale = scale[..., None]
    squares = (
        jnp.square(wide).sum(-2)
        + 2 * scale * (cross * b).sum(-2)
        + jnp.square(scale) * (jnp.einsum("...rs,...so->...ro", gram, b) * b).sum(-2)
    )
    return jnp.sqrt(jnp.maximum(squares, 0.0))


def _sizes(params: Any, config: LoRAConfig) -> dict[sites.Site, sites.Size]:
    return sites.resolve(
        params,
        targets=config.targets,
        layers=config.layers,
        rank=config.rank,
        alpha=config.alpha,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        rslora=config.rslora,
    )


def layer_choices(params: Any, config: LoRAConfig) -> list[tuple[int, ...]]:
    """Return the sets of layers that must not share a stack with others.

    Args:
      params: base weights or their shapes, cut into groups in any way.
      config: options.
    Raises:
      UserError: a target, layer or pattern that is not there or is chosen twice.
    """
    layers: dict[Any, set[int]] = {}
    for site, size in _sizes(params, config).items():
        if site.layer is not None:
            layers.setdefault((site.path, size.rank), set()).add(site.layer)
    return [tuple(sorted(chosen)) for chosen in layers.values()]


def init(key: Key[Array, ""], params: Any, config: LoRAConfig) -> dict[str, Any]:
    """Make the adapters of the chosen layers, all in float32.

    A is uniform within ±1/sqrt(in) (PEFT's default, Kaiming with slope sqrt 5) and B is
    zero; with ``pissa`` both are made of the ``rank`` largest singular values of W,
    ``scale A B = scale A0 B0 = U_r S_r V_r``. Either way the adapted model starts out
    equal to the base model.

    Args:
      key: consumed.
      params: base weights (their shapes do, in ``jax.eval_shape``) whose layer groups
        were cut for :func:`layer_choices`.
      config: options.
    Raises:
      UserError: a target, layer or pattern that is not there or is chosen twice; an
        option that the embeddings cannot have.
      ValueError: the groups were cut elsewhere.
    """
    sizes = _sizes(params, config)
    adapters: dict[str, Any] = {}
    # Linear layers first, whatever their place, so that the embeddings take no key.
    weights = sorted(sites.weights(params), key=lambda found: found[1] == "embedding")
    for index, (path, name, weight) in enumerate(weights):
        mine = [sizes.get(site) for site in sites.sites_of(path)]
        if not any(mine):
            continue
        if len({size and size.rank for size in mine}) > 1:
            raise ValueError(
                f"the adapter's layers cut through the group {path.split('/')[0]}: "
                "load the checkpoint with groups cut for this choice"
            )
        if weight.ndim == 2 and config.gate in ("sequence", "mean"):
            raise UserError(
                f"adapter.gate {config.gate} is a mean over a sequence, which "
                f"{path.split('/')[-1]} does not see: it works on single tokens. Leave "
                "it out of adapter.targets, or use gate static or token"
            )
        if weight.ndim == 2 and name == "kernel" and config.dropout:
            raise UserError(
                f"adapter.dropout does not reach {path.split('/')[-1]}, which has no "
                "random numbers: leave it out of adapter.targets, or set dropout 0"
            )
        if weight.ndim > 3 and (
            config.dora or config.dropout or config.gate not in ("none", "static")
        ):
            raise UserError(
                f"the experts' {path.split('/')[-1]} takes LoRA with gate none or "
                "static: no dora, dropout or other gate. Leave these options out, or "
                "name the layers that adapter.targets means, self_attn/.*"
            )
        scales = np.array([size.scale for size in mine if size], np.float32)
        scale = jnp.asarray(scales if weight.ndim > 2 else scales[0])
        make = _init_embedding if name == "embedding" else _init_linear
        rank = next(size.rank for size in mine if size)
        node = trees.node_at(adapters, path.split("/"))
        node.update(make(jax.random.fold_in(key, index), weight, rank, scale, config))
    return adapters


def _init_linear(
    key: Array, weight: Any, rank: int, scale: Array, config: LoRAConfig
) -> dict[str, Array]:
    *stack, fan_in, fan_out = weight.shape
    for_gate = jax.random.fold_in(key, 1)
    leaves = gates.init(config.gate, tuple(stack[:1]), fan_in, for_gate)
    if config.dora:
        leaves["magnitude"] = _each(_column_lengths, weight)
    if config.init == "pissa":
        a, b = _principal(weight, rank, scale)
        # Copies, as a and b are trained and given away.
        return {**leaves, "a": a, "b": b, "a0": a + 0, "b0": b + 0, "scale": scale}
    bound = fan_in**-0.5
    shape = (*stack, fan_in, rank)
    a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    b = jnp.zeros((*stack, rank, fan_out), jnp.float32)
    return {**leaves, "a": a, "b": b, "scale": scale}


def _principal(weight: Any, rank: int, scale: Array) -> tuple[Array, Array]:
    if rank > min(weight.shape[-2:]):
        raise UserError(
            f"adapter.init pissa: rank {rank} is more than a weight of shape "
            f"{list(weight.shape[-2:])} has singular values: lower adapter.rank"
        )

    def factor(matrix: Any, size: Array) -> tuple[Array, Array]:
        u, s, v = jnp.linalg.svd(matrix.astype(jnp.float32), full_matrices=False)
        root = jnp.sqrt(s[:rank] / size)
        return u[:, :rank] * root[None], root[:, None] * v[:rank]

    stack = weight.shape[:-2]
    scale = scale.reshape(scale.shape + (1,) * (len(stack) - scale.ndim))
    return _each(factor, weight, jnp.broadcast_to(scale, stack))


def _column_lengths(matrix: Any) -> Array:
    # In float32: the norm of a column is what DoRA starts from.
    return jnp.linalg.norm(matrix.astype(jnp.float32), axis=-2)


def _each(fn: Any, weight: Any, *rest: Any) -> Any:
    """Apply a function of one weight, to a stack (of stacks) one after the other."""
    if weight.ndim == 2:
        return fn(weight, *rest)
    return jax.lax.map(lambda layer: _each(fn, *layer), (weight, *rest))


def _init_embedding(
    key: Array, weight: Any, rank: int, scale: Array, config: LoRAConfig
) -> dict[str, Array]:
    if config.dora or config.init != "zero" or config.gate != "none" or config.dropout:
        raise UserError(
            "the embeddings take plain LoRA only: no dora, gate, dropout or init "
            "pissa. Leave embed_tokens out of adapter.targets, or these options"
        )
    rows, width = weight.shape
    return {
        "a": jnp.zeros((rows, rank), jnp.float32),
        "b": jax.random.normal(key, (rank, width), jnp.float32),
        "scale": scale,
    }


def merge(params: Any, adapters: Any) -> Any:
    """Return the parameters with the adapted weight in place of each adapted one.

    ``W + scale g A B``, for DoRA with its columns brought to their lengths. The sum is
    taken in float32 and rounded once to the weight's dtype.

    Raises:
      UserError: a gate that depends on the input, which no one weight can stand for.
    """
    return _map_adapted(_merged, params, adapters)


def unmerge(params: Any, adapters: Any) -> Any:
    """Take the updates out of merged parameters again, up to one rounding of each.

    In a functional library the base weights are still there; this is for weights that
    came merged.

    Raises:
      UserError: an adapter that cannot be merged, or DoRA, whose merged weight no
        longer tells the lengths of the base's columns.
    """
    return _map_adapted(_unmerged, params, adapters)


def _map_adapted(fn: Any, params: Any, adapters: Any) -> Any:
    changed = {}
    for name, child in params.items():
        leaves = adapters.get(name) if isinstance(adapters, dict) else None
        if isinstance(child, dict) and leaves is not None:
            changed[name] = _map_adapted(fn, child, leaves)
        elif name in ("kernel", "embedding") and "a" in (adapters or {}):
            changed[name] = fn(child, adapters)
        else:
            changed[name] = child
    return changed


def _update(weight: Any, leaves: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return ``scale g A B`` in float32 and the array library that made it."""
    for name in gates.FEATURE_GATES:
        if name in leaves:
            raise UserError(
                f"the adapter has a {name}, which depends on the input, so no merged "
                "weight can stand for it: use --format peft, or train with gate static"
            )
    xp = np if isinstance(weight, np.ndarray) else jnp
    wide = {k: xp.asarray(v, dtype=xp.float32) for k, v in leaves.items()}
    update = xp.matmul(*_factors(wide, xp))
    scale = wide["scale"] * wide.get("gate", xp.float32(1))
    return update * scale.reshape(scale.shape + (1,) * (update.ndim - scale.ndim)), xp


def _merged(weight: Any, leaves: Mapping[str, Any]) -> Any:
    update, xp = _update(weight, leaves)
    merged = weight.astype(xp.float32) + update
    if "magnitude" in leaves:
        lengths = _not_zero(xp.linalg.norm(merged, axis=-2), xp)
        ratio = xp.asarray(leaves["magnitude"], dtype=xp.float32) / lengths
        merged = merged * ratio[..., None, :]
    return merged.astype(weight.dtype)


def _unmerged(weight: Any, leaves: Mapping[str, Any]) -> Any:
    if "magnitude" in leaves:
        raise UserError(
            "DoRA cannot be taken out of a merged weight, which no longer tells how "
            "long the base's columns were: load the base model again"
        )
    update, xp = _update(weight, leaves)
    return (weight.astype(xp.float32) - update).astype(weight.dtype)

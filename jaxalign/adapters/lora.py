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
Here is which layers get one, and how it starts; its arithmetic is ``low_rank``.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxalign import stacks, trees
from jaxalign.adapters import gates, sites
from jaxalign.configs import check_fields
from jaxalign.errors import UserError
from jaxalign.variables import check_params


__all__ = ["LoRAConfig", "init", "layer_choices"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Options of LoRA.

    Attributes:
      name: the adapter.
      rank: width of the bottleneck.
      alpha: the update is scaled by alpha / rank.
      targets: layers to adapt: names such as ``q_proj``, ``lm_head``, ``embed_tokens``,
        or regular expressions for a whole name or path, ``mlp/.*``; of a tower and a
        connector ``vision:q_proj``, ``connector:.*``.
      layers: which layers, see ``selection.layers_by_scope``.
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
      modules_to_save: what is trained whole beside the update, as PEFT's field of that
        name: ``lm_head``, ``embed_tokens``, ``norm``, or regular expressions for a
        whole path, ``.*_layernorm``. The base keeps its own, which is the reference.

    >>> LoRAConfig(rank=8, targets=("q_proj", "v_proj"), layers="top:4").alpha
    32.0
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
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
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


def _sizes(params: Any, config: LoRAConfig) -> dict[sites.Site, sites.Size]:
    check_params(params, "lora")
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


def layer_choices(
    params: Any, config: LoRAConfig, scope: str = ""
) -> list[tuple[int, ...]]:
    """Return the sets of layers that must not share a stack with others.

    Args:
      params: base weights or their shapes, cut into groups in any way.
      config: options.
      scope: whose layers: "" the decoder's, ``vision`` the tower's.
    Raises:
      UserError: a target, layer or pattern that is not there or is chosen twice.
    Example:
      >>> up = {"kernel": jnp.ones((4, 2, 3))}
      >>> params = {"layers_0_4": {"mlp": {"up_proj": up}}}
      >>> layer_choices(params, LoRAConfig(targets=("up_proj",), layers="top:2"))
      [(2, 3)]
    """
    layers: dict[Any, set[int]] = {}
    for site, size in _sizes(params, config).items():
        if site.layer is not None and site.scope == scope:
            layers.setdefault((site.path, size.rank), set()).add(site.layer)
    return [tuple(sorted(chosen)) for chosen in layers.values()]


_ORDER = ("", "connector", "vision")


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
      UserError: variables instead of their parameters; groups that were cut elsewhere;
        a target, layer or pattern that is not there or is chosen twice; an option that
        the embeddings cannot have.
    Example:
      >>> up = {"kernel": jnp.ones((4, 2, 3))}
      >>> params = {"layers_0_4": {"mlp": {"up_proj": up}}}
      >>> config = LoRAConfig(rank=1, targets=("up_proj",))
      >>> made = init(jax.random.key(0), params, config)["layers_0_4"]["mlp"]["up_proj"]
      >>> {name: leaf.shape for name, leaf in made.items()}
      {'a': (4, 2, 1), 'b': (4, 1, 3), 'scale': (4,)}
    """
    sizes = _sizes(params, config)
    adapters: dict[str, Any] = {}
    # Linear layers first, whatever their place, so that the embeddings take no key; the
    # tower last, so that the others start the same where it is not loaded.
    weights = sorted(
        sites.weights(params),
        key=lambda w: (_ORDER.index(stacks.scope_of(w[0])), w[1] == "embedding"),
    )
    for index, (path, name, weight) in enumerate(weights):
        mine = [sizes.get(site) for site in sites.sites_of(path)]
        if not any(mine):
            continue
        if len({size and size.rank for size in mine}) > 1:
            raise UserError(
                f"the adapter's layers {config.layers!r} (or its ranks) cut through "
                f"the group {_stack_of(path)}: load the base with its layers cut for "
                "them, load_hf(path, adapter=config)"
            )
        alone = weight.ndim == 2 or stacks.scope_of(path)
        if alone and config.gate in ("sequence", "mean"):
            raise UserError(
                f"adapter.gate {config.gate} is a mean over a sequence, which "
                f"{path.split('/')[-1]} does not see: it works on single tokens. Leave "
                "it out of adapter.targets, or use gate static or token"
            )
        if path == "lm_head" and name == "kernel" and config.dropout:
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


def _stack_of(path: str) -> str:
    return path.removesuffix(f"/{stacks.split(path).rest}")


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

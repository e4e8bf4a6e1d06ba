"""Prefixes: learned keys and values that every token of a layer can attend to.

[Prefix-tuning](https://arxiv.org/abs/2101.00190) without the reparametrising MLP. The
collection ``prefix`` has for every adapted layer ``layers_<lo>_<hi>/self_attn/`` with

* ``key``, ``value`` [kv heads, P, head size];
* ``position``, not trained: where the prefix stands for the rotary positions. The keys
  are kept as they are before rotation. At -P they are where P tokens in front of the
  text would all be at the first one's place, as in PEFT, which lets the text begin at
  position P; at 0 they are at the place of the text's first token;
* ``mix``, for a softmax of its own, see :func:`attend`;
* a gate g, see ``adapters.gates``; a static one is kept as its logarithm.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxalign import products, stacks
from jaxalign.adapters import gates, selection
from jaxalign.configs import check_fields
from jaxalign.errors import UserError
from jaxalign.variables import check_params


__all__ = ["LEAVES", "TEXT", "PrefixConfig", "attend", "init", "layer_choices"]

LEAVES = ("key", "value", "position", "mix", "log_gate", *gates.FEATURE_GATES)
"""All that the prefix of one layer may have."""

TEXT = (
    "Read the request with care. Work out what is asked, think it through step by "
    "step, check each fact and each number, and then give an answer that is correct, "
    "complete, safe and easy to follow. Say so where something is not known."
)
"""What a prefix starts from, unless another text is given."""

Mode = Literal["concat", "separate"]
Positions = Literal["shifted", "unshifted"]
Start = Literal["text", "zero", "normal"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """Options of a prefix.

    Attributes:
      name: the adapter.
      prefix_length: virtual tokens P of each layer.
      prefix_layers: which layers, see ``selection.parse_layers``.
      mode: ``concat`` puts prefix and text in one softmax; ``separate`` adds a second
        softmax over the prefix alone, times tanh of a number that starts at 0.
      prefix_init: ``text`` starts from the keys and values of a real text, ``zero``
        from zeros, ``normal`` from N(0, 1) as PEFT does, which upsets the model.
      prefix_text: the text to start from, repeated until it is long enough.
      positions: ``shifted`` lets the text begin at position P, as PEFT does;
        ``unshifted`` leaves it at 0.
      gate: how much each token gets of the prefix, see ``adapters.gates``.

    >>> PrefixConfig(prefix_length=8, prefix_init="normal").positions
    'shifted'
    """

    name: Literal["prefix"] = "prefix"
    prefix_length: int = 20
    prefix_layers: str = "all"
    mode: Mode = "concat"
    prefix_init: Start = "text"
    prefix_text: str = TEXT
    positions: Positions = "shifted"
    gate: gates.Gate = "none"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.prefix_length < 1:
            raise UserError(
                f"adapter.prefix_length must be at least 1: got {self.prefix_length}"
            )
        if self.mode == "separate" and self.prefix_init == "zero":
            raise UserError(
                "adapter.prefix_init zero never learns in mode separate, where every "
                "derivative is then zero: use prefix_init text or normal"
            )
        if self.prefix_init != "text" and self.prefix_text != TEXT:
            raise UserError(
                f"adapter.prefix_text has no effect with prefix_init "
                f"{self.prefix_init}: leave it out"
            )
        if not self.prefix_text:
            raise UserError(
                "adapter.prefix_text is empty: give some text to start from"
            )


def layer_choices(config: PrefixConfig, num_layers: int) -> list[tuple[int, ...]]:
    """Return the set of layers that must not share a stack with others.

    >>> layer_choices(PrefixConfig(prefix_layers="top:2"), num_layers=4)
    [(2, 3)]
    """
    return [selection.parse_layers(config.prefix_layers, num_layers)]


def init(
    key: Key[Array, ""],
    params: Any,
    config: PrefixConfig,
    *,
    width: int,
    kv_heads: int,
    head_dim: int,
    text: Any = None,
) -> dict[str, Any]:
    """Make the prefixes of the chosen layers, all in float32.

    Args:
      key: consumed.
      params: base weights or shapes whose layer groups were cut for
        :func:`layer_choices`.
      config: options.
      width: of the stream, which a gate reads.
      kv_heads: heads of keys and values.
      head_dim: their size.
      text: for ``prefix_init: text``, keys and values of every group as
        ``models.decoder.keys_and_values`` gives them for P tokens, [l, 1, P, g, h].
    Raises:
      UserError: the groups were cut elsewhere.
      ValueError: the text is missing.
    Example:
      >>> params = {"layers_0_2": {"mlp": {"up_proj": {"kernel": jnp.ones((2, 4, 8))}}}}
      >>> config = PrefixConfig(prefix_length=3, prefix_init="normal")
      >>> sizes = {"width": 4, "kv_heads": 2, "head_dim": 2}
      >>> made = init(jax.random.key(0), params, config, **sizes)
      >>> jax.tree.leaves(made)[0].shape
      (2, 2, 3, 2)
    """
    check_params(params, "prefix.init")
    groups = [g for g in map(stacks.group_of_name, params) if g is not None]
    num_layers = max(high for _, high in groups)
    chosen = set(selection.parse_layers(config.prefix_layers, num_layers))
    adapters: dict[str, Any] = {}
    for index, (low, high) in enumerate(sorted(groups)):
        if not chosen & set(range(low, high)):
            continue
        name = stacks.group_name((low, high))
        if not chosen >= set(range(low, high)):
            raise UserError(
                f"prefix_layers {config.prefix_layers!r} cut through the group {name}: "
                "load the base with its layers cut for them, load_hf(path, "
                "adapter=config)"
            )
        stack = (high - low,)
        shape = (*stack, kv_heads, config.prefix_length, head_dim)
        mine = jax.random.fold_in(key, index)
        for_key, for_value, for_gate = jax.random.split(mine, 3)
        if config.prefix_init == "normal":
            start = {
                "key": jax.random.normal(for_key, shape, jnp.float32),
                "value": jax.random.normal(for_value, shape, jnp.float32),
            }
        elif config.prefix_init == "zero":
            start = {n: jnp.zeros(shape, jnp.float32) for n in ("key", "value")}
        elif text is None:
            raise ValueError("prefix_init text needs the keys and values of a text")
        else:
            start = {n: _heads_first(text[name], n, shape) for n in ("key", "value")}
        place = -float(config.prefix_length) if config.positions == "shifted" else 0.0
        gated = gates.init(config.gate, stack, width, for_gate)
        if "gate" in gated:
            gated = {"log_gate": jnp.zeros(stack, jnp.float32)}
        leaves = {**start, **gated, "position": jnp.full(stack, place, jnp.float32)}
        if config.mode == "separate":
            leaves["mix"] = jnp.zeros(stack, jnp.float32)
        adapters[name] = {"self_attn": leaves}
    return adapters


def _heads_first(text: Any, name: str, shape: tuple[int, ...]) -> Array:
    """[l, 1, P, g, h] -> [l, g, P, h]."""
    values = text["self_attn"][name][0].astype(jnp.float32)[:, 0]
    return values.transpose(0, 2, 1, 3).reshape(shape)


def attend(
    q: Float[Array, "b t n h"],
    own: tuple[Float[Array, "b t n h"], Float[Array, "b t n"]],
    leaves: Mapping[str, Array],
    *,
    key: Float[Array, "g p h"],
    gate: Float[Array, "..."] | None,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "b t n h"]:
    """Return attention over the text and the prefix from that over the text alone.

    ``concat``: one softmax over both. A gate adds ``log g`` to the prefix's scores, so
    that g = 0 takes the prefix away. With the paper's gate, the mean over the whole
    sequence, keys and values are multiplied by g instead.
    ``separate``: ``text + tanh(mix) g softmax(scale q K^T) V`` over the prefix.

    Args:
      q: rotated queries.
      own: attention over the text: its output, and the log of its softmax's
        denominator, log-sum-exp.
      leaves: of this layer's prefix.
      key: its keys, rotated to the prefix's position.
      gate: see ``gates.value``.
      scale: of the scores.
      softcap: scores s become ``softcap * tanh(s / softcap)``, before any gate.
    Returns:
      In q's dtype. Where the prefix's values are zeros, ``concat`` scales the text's
      share down and ``separate`` with ``mix`` 0 changes nothing.
    Example:
      >>> q, lse = jnp.ones((1, 2, 2, 4)), jnp.zeros((1, 2, 2))
      >>> leaves = {"value": jnp.ones((1, 3, 4))}
      >>> key = jnp.zeros((1, 3, 4))  # scores 0, as much as one token of the text each
      >>> out = attend(q, (0 * q, lse), leaves, key=key, gate=None, scale=0.5)
      >>> float(out[0, 0, 0, 0])  # three of four shares
      0.75
    """
    out, lse = own
    rows, length, heads, width = q.shape
    groups = key.shape[0]
    grouped = q.reshape(rows, length, groups, heads // groups, width)
    scores = products.einsum("btgmh,gph->btgmp", grouped * scale, key)
    scores = scores.reshape(rows, length, heads, -1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    strength = jnp.ones((1, 1, 1)) if gate is None else gate
    if strength.ndim:  # [b t 1], to stand beside [b t n p]
        strength = strength[..., None]
    strength = jnp.broadcast_to(strength, (*scores.shape[:2], 1, 1))

    def values(weights: Array) -> Array:
        weights = weights.reshape(rows, length, groups, heads // groups, -1)
        weights = weights.astype(q.dtype)
        found = products.einsum("btgmp,gph->btgmh", weights, leaves["value"])
        return found.reshape(rows, length, heads, width)

    if "mix" in leaves:
        found = values(jax.nn.softmax(scores, axis=-1))
        mix = jnp.tanh(leaves["mix"].astype(jnp.float32)) * strength
        return out + (found * jnp.broadcast_to(mix, found.shape)).astype(q.dtype)
    factor = jnp.ones_like(strength)
    if "mean_gate" in leaves:
        scores, factor = scores * jnp.broadcast_to(strength, scores.shape), strength
    elif gate is not None:
        # 0 stands for "no prefix", whose logarithm must not reach the derivative.
        there = strength > 0
        bias = jnp.where(there, jnp.log(jnp.where(there, strength, 1.0)), -jnp.inf)
        scores = scores + jnp.broadcast_to(bias, scores.shape)
    lse = lse[..., None]
    top = jax.lax.stop_gradient(jnp.maximum(lse, scores.max(-1, keepdims=True)))
    weights, mine = jnp.exp(scores - top), jnp.exp(lse - top)
    total = mine + weights.sum(-1, keepdims=True)
    found = values(weights / total) * jnp.broadcast_to(factor, (*total.shape[:2], 1, 1))
    return (out.astype(jnp.float32) * (mine / total) + found).astype(q.dtype)

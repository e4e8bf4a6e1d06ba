"""Gates: how much of an adapter a token gets.

A gate is one number a token and adapted layer, ``g_t``. Its kind is told by the name of
its weights, so that an adapter is complete in itself:

=================  ========================================================  ==========
leaf               gate                                                      weights
=================  ========================================================  ==========
``gate``           static: the learned number itself                         []
``log_gate``       static: its logarithm, for prefixes                       []
``token_gate``     ``sigmoid(w . x_t)``                                      [features]
``sequence_gate``  mean of ``sigmoid(w . x_s)`` over all s that t can see    [features]
``mean_gate``      the same mean over the whole sequence, later tokens too   [features]
=================  ========================================================  ==========

All but the last are causal: token t changes nothing at earlier ones. ``mean_gate`` is
the formulation of HLPT (Gu et al., EMNLP 2024, https://aclanthology.org/
2024.emnlp-main.204, official code), there for comparison: it sees the answer while it
reads the question. Padding enters none of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


__all__ = ["FEATURE_GATES", "GATES", "Gate", "Mean", "init", "row_means", "value"]

Gate = Literal["none", "static", "token", "sequence", "mean"]

Mean = Callable[[str, Array], Array]
"""Averages the numbers of a gate's leaf over tokens."""

FEATURE_GATES = ("token_gate", "sequence_gate", "mean_gate")
"""Leaves with one weight a feature of the input."""

GATES = ("gate", *FEATURE_GATES)


def init(
    kind: Gate, stack: tuple[int, ...], features: int, key: Key[Array, ""]
) -> dict[str, Array]:
    """Make a gate's weights, ``{}`` for none.

    A static gate starts at 1, token and sequence gates with w = 0, at 1/2 for every
    input. ``mean`` draws w from ±1/sqrt(features), as the paper's code does.

    Args:
      kind: of gate.
      stack: leading axes, those of the layers.
      features: of the input.
      key: consumed.
    Example:
      >>> init("static", (2,), 4, jax.random.key(0))
      {'gate': Array([1., 1.], dtype=float32)}
    """
    if kind == "none":
        return {}
    if kind == "static":
        return {"gate": jnp.ones(stack, jnp.float32)}
    shape = (*stack, features)
    if kind == "mean":
        bound = features**-0.5
        return {"mean_gate": jax.random.uniform(key, shape, jnp.float32, -bound, bound)}
    return {f"{kind}_gate": jnp.zeros(shape, jnp.float32)}


def value(
    leaves: Mapping[str, Array],
    x: Float[Array, "*n features"],
    mean: Mean | None = None,
) -> Float[Array, "..."] | None:
    """Return the gate of every token, in float32; None if there is none.

    Args:
      leaves: an adapter's leaves, of one layer.
      x: the input that the gate reads.
      mean: averages numbers [b t] over what each token can see (or over its whole
        sequence, by the name of the leaf); :func:`row_means` for packed rows.
    Returns:
      A number for a static gate, [*n, 1] for the others.
    Raises:
      ValueError: a mean where rows are not known (the head works on loose tokens).
    Example:
      >>> leaves = init("token", (), 3, jax.random.key(0))
      >>> value(leaves, jnp.ones((2, 3))).tolist()  # starts at a half for every input
      [[0.5], [0.5]]
    """
    if "gate" in leaves:
        return leaves["gate"].astype(jnp.float32)
    if "log_gate" in leaves:
        return jnp.exp(leaves["log_gate"].astype(jnp.float32))
    for name in FEATURE_GATES:
        if name not in leaves:
            continue
        score = x.astype(jnp.float32) @ leaves[name].astype(jnp.float32)
        gate = jax.nn.sigmoid(score)
        if name != "token_gate":
            if mean is None:
                raise ValueError(f"a {name} needs the rows that its tokens stand in")
            gate = mean(name, gate)
        return gate[..., None]
    return None


def row_means(sequence_ids: Int[Array, "b t"], branch_ids: Int[Array, "b t"]) -> Mean:
    """Return what averages over packed rows, see ``types.ModelInputs``.

    >>> mean = row_means(jnp.array([[1, 1, 0]]), jnp.array([[0, 1, 0]]))
    >>> mean("gate_token", jnp.array([[2.0, 4.0, 9.0]])).tolist()
    [[2.0, 3.0, 9.0]]
    """

    def mean(name: str, values: Float[Array, "b t"]) -> Float[Array, "b t"]:
        if name == "mean_gate":
            return _mean_of_sequence(values, sequence_ids)
        return _mean_of_visible(values, sequence_ids, branch_ids)

    return mean


def _mean_of_visible(
    values: Float[Array, "b t"],
    sequence_ids: Int[Array, "b t"],
    branch_ids: Int[Array, "b t"],
) -> Float[Array, "b t"]:
    """Average over what each token can see: its prompt and its own branch up to it."""
    prompt = (branch_ids == 0) & (sequence_ids > 0)
    new_sequence = _changes(sequence_ids)
    new_run = new_sequence | _changes(branch_ids)

    def visible(x: Array) -> Array:
        before = _running_sum(jnp.where(prompt, x, 0.0), new_sequence)
        own = _running_sum(jnp.where(prompt, 0.0, x), new_run)
        return before + own

    return visible(values) / visible(jnp.ones_like(values))


def _changes(ids: Int[Array, "b t"]) -> Array:
    return jnp.concatenate(
        [jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1
    )


def _running_sum(values: Array, restart: Array) -> Array:
    """Sum along the row, anew from every ``restart``."""

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> Any:
        total = jnp.where(right[1], right[0], left[0] + right[0])
        return total, left[1] | right[1]

    return jax.lax.associative_scan(join, (values, restart), axis=1)[0]


def _mean_of_sequence(
    values: Float[Array, "b t"], sequence_ids: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    """Average over all tokens of the sequence, which must have one branch only."""
    rows = jnp.arange(values.shape[0])[:, None]
    most = values.shape[1] + 1  # more sequences than tokens there cannot be

    def totals(x: Array) -> Array:
        sums = jnp.zeros((values.shape[0], most), x.dtype)
        return sums.at[rows, sequence_ids].add(x)[rows, sequence_ids]

    return totals(values) / totals(jnp.ones_like(values))

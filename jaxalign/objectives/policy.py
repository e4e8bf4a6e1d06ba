"""Log-probabilities of a batch under the policy and under its reference."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxalign import trees
from jaxalign.objectives import logps
from jaxalign.types import Model, PreferenceBatch, Variables


__all__ = [
    "PairLogps",
    "pair_logps",
    "policy_token_logps",
    "reference_variables",
]

REFERENCE = "reference"
"""Collection of ``frozen`` that holds reference weights where they differ."""


class PairLogps(NamedTuple):
    """What every preference objective starts from. Padding is 0 everywhere."""

    token_logps: Float[Array, "b c"]
    ref_token_logps: Float[Array, "b c"]
    logps: Float[Array, "b p 2"]
    ref_logps: Float[Array, "b p 2"]
    tokens: Float[Array, "b p 2"]

    @property
    def logratios(self) -> Float[Array, "b p 2"]:
        """log pi(y|x) - log pi_ref(y|x) of whole completions."""
        return self.logps - self.ref_logps


def policy_token_logps(
    variables: Variables,
    batch: PreferenceBatch,
    *,
    model: Model,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "b c"]:
    """Run the model once over the rows and score the completion tokens."""
    if key is None:
        hidden = model.hidden_fn(variables, batch.inputs)
    else:
        hidden = model.hidden_fn(variables, batch.inputs, key=key)
    return logps.token_logps(model.logits_fn, variables, hidden, batch.completions)


def reference_variables(trainable: Variables, frozen: Variables) -> Variables:
    """Return the reference's weights: the base weights with every adapter off.

    Weights under ``frozen["reference"]`` come first (another model, or the starting
    values of base weights that are being trained). Without them no base weight may be
    trainable, because then nothing holds its starting value.

    Raises:
      ValueError: base weights are trained and no reference was given.
    """
    given = frozen.get(REFERENCE)
    if given is not None:
        if frozen.get("params") is None:
            return given
        return {"params": trees.combine(given["params"], frozen["params"])}
    if jax.tree.leaves(trainable.get("params")):
        raise ValueError(
            "base weights are trained, so switching the adapter off does not give the "
            "reference: put the starting values of the trained weights in "
            "frozen['reference'], or give the batch cached ref_logps"
        )
    return {"params": frozen["params"]}


def pair_logps(
    trainable: Any,
    frozen: Any,
    batch: PreferenceBatch,
    key: Key[Array, ""] | None,
    *,
    model: Model,
) -> PairLogps:
    """Score the batch under policy and reference.

    The reference is ``batch.ref_logps`` where given, otherwise
    :func:`reference_variables`; it never gets a gradient and never sees dropout.
    A model whose variables are not a dict (an NNX module, say) needs ``ref_logps``.
    """
    if isinstance(frozen, dict):
        variables = trees.combine(
            trainable, {k: v for k, v in frozen.items() if k != REFERENCE}
        )
    else:
        variables = trees.combine(trainable, frozen)
    policy = policy_token_logps(variables, batch, model=model, key=key)
    if batch.ref_logps is not None:
        reference = batch.ref_logps.astype(jnp.float32)
    else:
        reference = policy_token_logps(
            reference_variables(trainable, frozen), batch, model=model
        )
    reference = jax.lax.stop_gradient(reference)

    pairs = batch.pair_mask.shape[1]
    response = batch.completions.response

    def sums(values: Array) -> Array:
        return logps.response_sums(values, response, pairs)

    return PairLogps(
        token_logps=policy,
        ref_token_logps=reference,
        logps=sums(policy),
        ref_logps=sums(reference),
        tokens=sums((response >= 0).astype(jnp.float32)),
    )

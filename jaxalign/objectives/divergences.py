"""f-divergences in the place of the reverse KL that DPO has.

``H = log pi - log pi_ref`` becomes ``f'(pi / pi_ref)``, up to a constant that cancels.
[f-DPO](https://arxiv.org/abs/2309.16240), table 1.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


__all__ = [
    "Divergence",
    "alpha_divergence",
    "forward_kl",
    "js_divergence",
    "make_divergence",
]

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

_LINEAR_FROM = 30.0


def forward_kl(logratios: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return ``1 - pi_ref / pi``.

    >>> import jax.numpy as jnp
    >>> print(f"{forward_kl(jnp.log(jnp.array(4.0))):.2f}")  # 1 - 1/4
    0.75
    """
    return -_expm1(-logratios)


def js_divergence(logratios: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return ``log(2 u / (1 + u))`` with u = pi / pi_ref.

    >>> import jax.numpy as jnp
    >>> print(f"{js_divergence(jnp.array(0.0)):.4f}")  # policy = reference
    0.0000
    """
    return jnp.log(2.0) + jax.nn.log_sigmoid(logratios)


def alpha_divergence(
    logratios: Float[Array, "*batch"], *, alpha: float
) -> Float[Array, "*batch"]:
    """Return ``(u^(alpha - 1) - 1) / (alpha - 1)``, for alpha = 1 its limit log u.

    >>> import jax.numpy as jnp
    >>> float(alpha_divergence(jnp.log(jnp.array(4.0)), alpha=0.5))  # (1/2 - 1) / -1/2
    1.0
    """
    power = alpha - 1
    if abs(power) < 1e-6:
        return logratios
    return _expm1(power * logratios) / power


def make_divergence(
    name: Divergence | None, alpha: float | None
) -> Callable[[Array], Array] | None:
    """Return the function that a name means; None leaves H as it is.

    >>> make_divergence("forward_kl", None).__name__
    'forward_kl'
    """
    made: dict[str, Callable[[Array], Array]] = {
        "forward_kl": forward_kl,
        "js_divergence": js_divergence,
    }
    if alpha is not None:
        made["alpha_divergence"] = functools.partial(alpha_divergence, alpha=alpha)
    return None if name in (None, "reverse_kl") else made[name]


def _expm1(x: Array) -> Array:
    """Return exp(x) - 1, going on as a straight line where it would grow too large.

    Its square stays a float32, and a response that has fallen that far still gets a
    gradient.
    """
    return jnp.expm1(jnp.minimum(x, _LINEAR_FROM)) + math.exp(
        _LINEAR_FROM
    ) * jax.nn.relu(x - _LINEAR_FROM)

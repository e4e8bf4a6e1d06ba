"""A fresh connector that hands the decoder something like words from the first step.

What the tower makes of drawings lies mostly along a few directions, and a tenth of a
word's size off: told apart are the small rest. A connector started without regard to
that spends its first thousands of pictures on undoing it, more than there are here.
"""

import jax
import numpy as np


__all__ = ["fresh"]


def fresh(
    states: np.ndarray, table: np.ndarray, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return two random layers, fitted to their inputs and to the words beside them.

    The first layer is ``R S (x - m)`` with R of variance 1 / d, m and C the mean and
    covariance of the states, c the mean of C's eigenvalues, ``S = k (C + c I)^-1/2``
    and k such that a coordinate of ``S (x - m)`` has variance 1 on average: large
    directions are made small, noise is not blown up. The second is random, with bias
    and scale such that its outputs have the words' mean, and their spread about it.

    Args:
      states: of the tower, of some pictures' patches [n, d].
      table: embeddings of the words [v, e].
      seed: of the random weights.

    Returns:
      ``linear_1`` and ``linear_2``, ``.weight`` [out, in] and ``.bias`` [out].
    """
    draw = np.random.default_rng(seed)
    depth, width = states.shape[1], table.shape[1]
    states = states.astype(np.float64)
    mean = states.mean(0)
    values, vectors = np.linalg.eigh(np.cov(states.T))
    values = values.clip(0)
    damped = values + values.mean()
    k = np.sqrt(depth / (values / damped).sum())
    evened = (vectors * (k / np.sqrt(damped))) @ vectors.T
    first = draw.normal(scale=depth**-0.5, size=(width, depth)) @ evened
    hidden = np.asarray(jax.nn.gelu((states - mean) @ first.T, approximate=False))
    second = draw.normal(scale=width**-0.5, size=(width, width))
    second *= table.std(0).mean() / (hidden @ second.T).std(0).mean()
    words = table.mean(0, dtype=np.float64)
    tensors = {
        "linear_1.weight": first,
        "linear_1.bias": -first @ mean,
        "linear_2.weight": second,
        "linear_2.bias": words - hidden.mean(0) @ second.T,
    }
    return {name: value.astype(np.float32) for name, value in tensors.items()}

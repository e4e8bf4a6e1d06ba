"""A connector that hands the decoder something like the names' words from the start.

What the tower makes of drawings lies mostly along a few directions: told apart are they
by the small rest. A connector started without regard to that, and taught by the decoder
alone, was no nearer to a name after a thousand conversations. So the first layer evens
the directions out, and the second is fitted by least squares to the names' embeddings:
that a linear map from pictures to words carries what they show is what
[LiMBeR](https://arxiv.org/abs/2209.15162) found. Both are trained from there.
"""

import jax
import numpy as np


__all__ = ["fitted"]

_RIDGE = 0.1  # by the mean eigenvalue


def fitted(
    states: np.ndarray, names: np.ndarray, table: np.ndarray, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return two layers, of which the first is random, for these states and names.

    The first layer is ``R S (x - m)`` with R of variance 1 / d, m and C the mean and
    covariance of the states, c the mean of C's eigenvalues, ``S = k (C + c I)^-1/2``
    and k such that a coordinate of ``S (x - m)`` has variance 1 on average: large
    directions are made small, noise is not blown up. With h what GELU makes of it, the
    second is ``s W (h - mean h) + mean word``, where W minimises the squared error of
    the names, half of it every patch's and half the pictures' means', with a ridge; s
    gives it the words' spread.

    Args:
      states: of the tower, of pictures' patches [n, p, d].
      names: mean embedding of the words of each picture's name [n, e].
      table: embeddings of all words [v, e].
      seed: of the random weights.

    Returns:
      ``linear_1`` and ``linear_2``, ``.weight`` [out, in] and ``.bias`` [out].
    """
    depth, width = states.shape[-1], table.shape[1]
    evened, mean = _evened(states.reshape(-1, depth).astype(np.float64))
    draw = np.random.default_rng(seed)
    first = draw.normal(scale=depth**-0.5, size=(width, depth)) @ evened
    seen = jax.nn.gelu((states - mean) @ first.T, approximate=False)
    hidden = np.asarray(seen, np.float64)
    centre = hidden.mean((0, 1))
    hidden -= centre
    second = _least_squares(hidden, names - names.mean(0))
    second *= table.std(0).mean() / (hidden @ second.T).std((0, 1)).mean()
    words = table.mean(0, dtype=np.float64)
    tensors = {
        "linear_1.weight": first,
        "linear_1.bias": -first @ mean,
        "linear_2.weight": second,
        "linear_2.bias": words - second @ centre,
    }
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def _evened(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix S and the mean m of states [n, d]."""
    values, vectors = np.linalg.eigh(np.cov(states.T))
    values = values.clip(0)
    damped = values + values.mean()
    k = np.sqrt(len(values) / (values / damped).sum())
    return (vectors * (k / np.sqrt(damped))) @ vectors.T, states.mean(0)


def _least_squares(hidden: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Return W [e, h] for centred hidden states [n, p, h] and names [n, e]."""
    whole = hidden.mean(1)
    patches = hidden.reshape(-1, hidden.shape[-1])
    square = (patches.T @ patches / hidden.shape[1] + whole.T @ whole) / 2
    square += _RIDGE * np.trace(square) / len(square) * np.eye(len(square))
    return np.linalg.solve(square, whole.T @ names).T

"""Where the features of pictures go: into the places of tokens that stand for them."""

import jax
from jaxtyping import Array, Float, Int


__all__ = ["put_features"]


def put_features(
    x: Float[Array, "b t d"],
    features: Float[Array, "b u d"],
    features_to: Int[Array, "b u"],
) -> Float[Array, "b t d"]:
    """Return embeddings with features in the places of some tokens.

    Args:
      x: embeddings of a row's tokens.
      features: of the row's pictures, rounded to the dtype of ``x``.
      features_to: the index in the row that each is for; -1 for none.
    """

    def row(x: Array, features: Array, to: Array) -> Array:
        # Behind the row's end, where nothing is written; -1 would be its last token.
        to = jax.numpy.where(to < 0, x.shape[0], to)
        return x.at[to].set(features, mode="drop")

    return jax.vmap(row)(x, features.astype(x.dtype), features_to)

"""The few types that every part shares. Imports nothing else of jaxalign.

Shape letters, the same in the whole project: ``b`` rows, ``t`` tokens a row, ``c``
completion tokens a row, ``p`` pairs a row, 2 responses of a pair (chosen, rejected),
``s`` segments a response, ``a`` aspects, ``v`` vocabulary, ``d`` width; of pictures
``m`` patches a row, ``u`` units of patches that become one feature each.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


__all__ = [
    "Bound",
    "Completions",
    "Form",
    "ImageInputs",
    "Mean",
    "Metrics",
    "Model",
    "ModelInputs",
    "PreferenceBatch",
    "RowShare",
    "RouterSums",
    "Variables",
]

Form = Literal["pairs", "labelled", "labelled_kl", "completions"]
"""What a record becomes for an objective: ``pairs`` as they are; ``labelled`` one
completion at a time, desirable or not; ``labelled_kl`` the same, each beside the
completion of another prompt; ``completions`` desirable ones only."""

Variables = dict[str, Any]
"""Flax collections: ``{"params": ..., "lora": ...}``, plain nested dicts of arrays."""


class ImageInputs(NamedTuple):
    """The pictures of packed rows: patches, or what a frozen tower made of them.

    A row's patches lie one picture behind the other; a picture of several tiles (and a
    thumbnail) is several images here. ``m / u`` patches that lie one behind the other
    are a unit, which becomes one feature: those of a square of the patch grid, row by
    row. An image whose tower has a class token has that first, as the last patch of a
    unit of its own, which is filled up before it.

    Rows of states or features have no patches (``m`` is 0 in ``image_ids`` and
    ``places_in_image``); their features stand in the order of the text.
    """

    image_ids: Int[Array, "b m"]
    """Which image of the row a patch is of, from 1; 0 is padding. A patch sees those of
    its own image in the tower, or of its own window."""
    places_in_image: Int[Array, "b m 2"]
    """Row and column on the image's grid of patches; (-1, -1) is the class token."""
    features_to: Int[Array, "b u"]
    """Index in the row's tokens of the one that a unit's feature takes the place of; -1
    where it takes none (padding, a class token)."""
    patches: Float[Array, "b m patch"] | None = None
    """Values of each patch: channel, row, column, the last fastest."""
    states: Float[Array, "b m width"] | None = None
    """What the tower makes of a unit's patches, in the places of those: where the
    connector is trained."""
    features: Float[Array, "b u d"] | None = None
    """What the connector makes of those, in the place of both: where nothing is."""


class RowShare(NamedTuple):
    """Which of the equal parts of a batch's rows a process builds.

    >>> RowShare().parts
    (0,)
    """

    parts: tuple[int, ...] = (0,)
    """From 0, ascending; they need not lie side by side."""
    of: int = 1
    """How many parts there are."""


class ModelInputs(NamedTuple):
    """Packed rows of tokens in which the prompt of a pair is stored once.

    A query at index q sees a key at index j if and only if ``j <= q``, both have the
    same non-zero ``sequence_ids``, and ``branch_ids[j]`` is 0 or ``branch_ids[q]``.
    """

    tokens: Int[Array, "b t"]
    positions: Int[Array, "b t *axes"]
    """Rotary position; each response restarts after its prompt. ``[b t 3]`` (time, row,
    column) for multimodal rotary, of which a text's three are the same number."""
    sequence_ids: Int[Array, "b t"]
    """Which pair of the row a token is of, from 1; 0 is padding."""
    branch_ids: Int[Array, "b t"]
    """0 for the prompt, seen by all; 1 chosen, 2 rejected, seen by themselves."""
    images: ImageInputs | None = None
    """The pictures of the prompts, if the model sees and there are any."""


class Completions(NamedTuple):
    """The tokens whose log-probabilities are wanted, moved to the front of the row."""

    source: Int[Array, "b c"]
    """Index in the row of the hidden state that predicts the token."""
    target: Int[Array, "b c"]
    """The token."""
    response: Int[Array, "b c"]
    """Which of the row's ``2 p`` responses it is of; -1 is padding."""
    segment: Int[Array, "b c"]
    """Which of that response's segments owns it; -1 is none (unscored)."""


class PreferenceBatch(NamedTuple):
    """Packed preference pairs with their segment × aspect scores.

    The loader makes batches of numpy arrays; on the devices they are JAX arrays.
    """

    inputs: ModelInputs
    completions: Completions
    scores: Float[Array, "b p 2 s a"]
    """Raw scores; NaN where an aspect was not judged."""
    segment_mask: Bool[Array, "b p 2 s"]
    """True for a segment that owns at least one token and was not cut; one that was not
    judged has NaN for all its scores."""
    pair_mask: Bool[Array, "b p"]
    ref_logps: Float[Array, "b c"] | None = None
    """The reference's log-probability of every completion token, where cached."""
    weights: Float[Array, "b p"] | None = None
    """What each pair's loss is multiplied by; None is 1."""
    labels: Bool[Array, "b p"] | None = None
    """One-sided feedback: whether the only completion (in the place of the chosen one)
    is desirable. Then the second response is absent or a mismatched completion."""
    token_weights: Float[Array, "b c"] | None = None
    """A weight of every completion token, where the data or a model gives them."""


class RouterSums(NamedTuple):
    """What the routers of a mixture of experts did with each row, over all layers."""

    counts: Float[Array, "*l b e"]
    """How many of the row's tokens went to each expert."""
    probs: Float[Array, "*l b e"]
    """Sums of the probabilities that the tokens gave each expert."""
    tokens: Float[Array, "*l b"]
    """How many there were; padding does not count."""


class Model(NamedTuple):
    """A language model as pure functions over a nested dict of arrays.

    ``hidden_fn(variables, inputs) -> [b t d]`` runs everything below the head; with
    ``key=`` it also applies dropout, without it is deterministic. Where the rows have
    pictures it calls ``image_fn`` for their features, or takes ``features=``.
    ``logits_fn(variables, hidden) -> [*n v]`` is the head; it is called on chunks.
    ``decode_fn`` and ``cache_fn`` are for generation; training and scoring do without.

    Models compare by their functions; those of ``decoder.make_model`` compare by value.
    """

    hidden_fn: Callable[..., Float[Array, "b t d"]]
    logits_fn: Callable[[Any, Float[Array, "*n d"]], Float[Array, "*n v"]]
    decode_fn: Callable[..., tuple[Float[Array, "b t d"], Any]] | None = None
    """``(variables, cache, tokens, positions, valid, lengths=None) -> (hidden,
    cache)``: new tokens [b t] at consecutive positions after those that the cache
    holds; ``lengths`` [b] of texts read in pieces, which some rotary rules look at."""
    cache_fn: Callable[..., Any] | None = None
    """``(variables, slots, length, dtype=None, block=None) -> cache``, empty; its
    leaves have the slots as their second axis. Keys and values lie in arrays of
    ``block`` places each, by default in one."""
    routed_fn: Callable[..., tuple[Float[Array, "b t d"], RouterSums]] | None = None
    """Of a mixture of experts: as ``hidden_fn``, and what the routers did."""
    image_fn: Callable[..., Float[Array, "b n d"]] | None = None
    """Of a model that sees: ``(variables, images) -> features`` [b u d], tower and
    connector; once for all that look at the same pictures with the same weights. With
    ``states=True`` what the tower alone makes of them [b m width]."""


class Bound:
    """A function with its first argument: equal to another where both parts are.

    A model made of these, passed as a static argument, finds the programs of an equal
    one. A bound method compares its object by identity, a closure itself.

    >>> Bound(divmod, 7)(2), Bound(divmod, 7) == Bound(divmod, 7)
    ((3, 1), True)
    """

    def __init__(self, function: Callable[..., Any], first: Any) -> None:
        self.function = function
        self.first = first
        self.__name__ = function.__name__.strip("_")  # of programs made of it
        # Counted once: a static argument is looked up at every call.
        self._hash = hash((function, first))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.first, *args, **kwargs)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bound):
            return NotImplemented
        return (self.function, self.first) == (other.function, other.first)


class Mean(NamedTuple):
    """A mean kept as its sufficient statistics, so that means merge exactly.

    >>> Mean(6.0, 2.0).merge(Mean(0.0, 1.0)).value
    2.0
    """

    total: Any
    weight: Any

    def merge(self, other: "Mean") -> "Mean":
        """Return the mean over both."""
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> Any:
        """Return total / weight, 0 where nothing was counted."""
        if isinstance(self.weight, int | float):
            return self.total / self.weight if self.weight else 0.0
        return jnp.where(
            self.weight == 0,
            0.0,
            self.total / jnp.where(self.weight == 0, 1, self.weight),
        )


Metrics = dict[str, Mean]

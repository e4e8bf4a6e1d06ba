"""What the nearest neighbour on the tower's own features recognises."""

import json
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxalign.checkpoints import load as load_lib
from jaxalign.data import chat
from jaxalign.data.patchers.square import FixedSquare
from jaxalign.models.linear import Runtime
from jaxalign.models.vision import sight
from jaxalign.types import ImageInputs
from tiny_vlm import pictures
from tiny_vlm.files import KNOWN, OTHER, Data
from tiny_vlm.scoring import Share, is_right, nearest, share


__all__ = ["neighbours", "states"]

_AT_ONCE = 32


def neighbours(data: Data, model: Path) -> list[tuple[str, Share]]:
    """Return how many held-out drawings' neighbours among the known have their name.

    Compared are the states that the connector sees: of all patches in their places,
    and their mean over the picture. They are counted once and kept.
    """
    kept = data.folder / "states.npz"
    if not kept.is_file():
        found = {m: states(model, _drawings(data, m)) for m in (KNOWN, OTHER)}
        np.savez(kept, **found)
    with np.load(kept) as files:
        known, asked = files[KNOWN], files[OTHER]
    flat = nearest(known.reshape(len(known), -1), asked.reshape(len(asked), -1))
    mean = nearest(known.mean(1), asked.mean(1))
    return [
        ("recognition by the nearest neighbour, all patches", _named(data, flat)),
        ("recognition by the nearest neighbour, their mean", _named(data, mean)),
    ]


def states(model: Path, drawings: Iterable[Path]) -> np.ndarray:
    """Return the tower's states of pictures [n, patches, width], no class token's."""
    checkpoint = load_lib.load(model)
    eyes = sight.of_config(checkpoint.config, None, Runtime())
    assert eyes is not None, model
    config = json.loads((model / "config.json").read_text())
    patcher = FixedSquare.from_files(model, config, chat.load_tokenizer(model))
    seen = [patcher.patches(Image.open(path)) for path in drawings]

    @jax.jit
    def see(values: jax.Array, places: jax.Array) -> jax.Array:
        ids = jnp.ones(places.shape[:2], jnp.int32)
        inputs = ImageInputs(ids, places, jnp.zeros_like(ids), values)
        return eyes.apply(checkpoint.variables, inputs, method=sight.Sight.states)

    made = []
    for first in range(0, len(seen), _AT_ONCE):
        some = seen[first : first + _AT_ONCE]
        values = np.zeros((_AT_ONCE, *seen[0].values.shape), np.float32)
        places = np.zeros((_AT_ONCE, *seen[0].places.shape), np.int32)
        for row, patches in enumerate(some):
            values[row], places[row] = patches.values, patches.places
        made.append(np.asarray(see(values, places))[: len(some), 1:])
    return np.concatenate(made)


def _drawings(data: Data, maker: str) -> list[Path]:
    return [data.folder / pictures.path_of(maker, s, 0) for s in data.symbols]


def _named(data: Data, found: np.ndarray) -> Share:
    """Count whose neighbour has an accepted name."""
    return share(
        is_right(data.symbols[other].names[0], symbol.names)
        for symbol, other in zip(data.symbols, found, strict=True)
    )

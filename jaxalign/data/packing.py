"""Packing: which pairs share a row, and how a row is laid out.

A row holds whole pairs, each as prompt, chosen, rejected; the prompt is stored once.
The plan depends on nothing but the lengths, the seed and the epoch.
"""

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.data import filling, image_rows
from jaxalign.data.chat import Branch, TokenizedPair
from jaxalign.data.image_rows import Seeing
from jaxalign.types import Completions, ModelInputs, PreferenceBatch


__all__ = [
    "BatchShape",
    "build_rows",
    "fill",
    "pairs_per_row",
    "plan_rows",
    "units_per_row",
]

Row = tuple[int, ...]


class BatchShape(NamedTuple):
    """The sizes that a run compiles for."""

    row_length: int
    pairs: int
    segments: int
    aspects: int
    patches: int = 0
    """Places of a row for patches, a multiple of those of a unit; 0: no pictures."""


def pairs_per_row(lengths: np.ndarray, row_length: int) -> int:
    """Return a bound on the pairs of a row that almost never binds.

    Twice the pairs of mean length that fit, and no more than the shortest ones that do.

    >>> pairs_per_row(np.array([2, 4]), row_length=12)
    2
    """
    most = int(np.searchsorted(np.cumsum(np.sort(lengths)), row_length, side="right"))
    return max(1, min(most, 2 * -(-row_length // int(max(1, lengths.mean())))))


def plan_rows(
    lengths: np.ndarray,
    *,
    row_length: int,
    pairs: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    window: int = 256,
    units: np.ndarray | None = None,
    row_units: int = 0,
) -> list[Row]:
    """Group pairs into rows so that the rows are as full as they can be.

    Out of a window of pairs drawn in random order, each row takes the longest one and
    then the set of others that fills the rest best (subset sum, exact, by bit sets).
    Where their pictures are more than the row has room for, the set that fills the rest
    best within that room.

    Args:
      lengths: places that each pair takes; none above row_length.
      row_length: places of a row.
      pairs: most pairs of a row.
      seed: of the run.
      epoch: from 0; every epoch has another order and other rows.
      shuffle: False keeps the order of the data as far as packing allows.
      window: pairs to choose from.
      units: units of patches that each pair takes; None: none has pictures.
      row_units: units of a row; none of a pair's above it.
    Returns:
      Indices of the pairs of each row, every pair exactly once.
    Example:
      >>> plan_rows(np.array([5, 3, 6, 2]), row_length=8, pairs=2, seed=0, epoch=0)
      [(0, 1), (2, 3)]
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    if pairs == 1:
        return [(int(i),) for i in order]
    if units is None:
        units = np.zeros(len(lengths), np.int64)
    waiting = iter(order)
    # Ascending by length; the drawn position breaks ties, so that equal lengths mix.
    pool: list[tuple[int, int, int]] = []

    def draw() -> None:
        for index in waiting:
            bisect.insort(pool, (int(lengths[index]), len(pool), int(index)))
            if len(pool) >= window:
                return

    rows: list[Row] = []
    draw()
    while pool:
        longest = pool.pop()
        others = filling.fill_within(
            [length for length, _, _ in pool],
            [int(units[index]) for _, _, index in pool],
            (row_length - longest[0], row_units - int(units[longest[2]])),
            pairs - 1,
        )
        rows.append((longest[2], *(pool[i][2] for i in others)))
        for i in sorted(others, reverse=True):
            del pool[i]
        draw()
    if shuffle:
        return [rows[i] for i in rng.permutation(len(rows))]
    return sorted(rows, key=min)


def units_per_row(
    lengths: np.ndarray, units: np.ndarray, *, row_length: int, pairs: int
) -> int:
    """Return units of patches for a row that few rows would have more of.

    Rows are planned as if there were room for all pictures; those of three rows in four
    fit, and the largest pair's do. Room for nearly all of them would stand empty more
    often: with pictures of 60 to 1300 units in all of 6000 pairs it is 17 % more places
    to run the tower over, for 1.6 % fewer rows.

    >>> tokens, units = np.array([5, 3, 6, 2]), np.array([4, 0, 4, 2])
    >>> units_per_row(tokens, units, row_length=8, pairs=2)
    6
    """
    rows = plan_rows(
        *(lengths,),
        row_length=row_length,
        pairs=pairs,
        seed=0,
        epoch=0,
        units=units,
        row_units=int(units.sum()),
    )
    sums = [int(units[list(row)].sum()) for row in rows]
    usual = int(np.quantile(sums, 0.75, method="higher"))
    return max(usual, int(units.max()))


def fill(rows: Sequence[Row], lengths: np.ndarray, row_length: int) -> float:
    """Return the share of the rows' places that hold a token.

    >>> fill([(0, 1), (2,)], np.array([3, 4, 5]), row_length=8)
    0.75
    """
    used = sum(int(lengths[i]) for row in rows for i in row)
    return used / max(1, len(rows) * row_length)


def build_rows(
    pairs: Sequence[TokenizedPair],
    rows: Sequence[Row],
    shape: BatchShape,
    *,
    ref_logps: Sequence[np.ndarray] | None = None,
    token_weights: Sequence[np.ndarray] | None = None,
    seeing: Seeing | None = None,
) -> PreferenceBatch:
    """Lay out rows as a batch of numpy arrays. An empty row is all padding.

    Args:
      pairs: the data set.
      rows: indices into it, one tuple a row.
      shape: sizes of the arrays.
      ref_logps: for each pair the reference's log-probabilities of its chosen, then
        its rejected completion tokens.
      token_weights: a weight for each of the same tokens; default what the records
        came with.
      seeing: what becomes of pictures; None where the model does not see.
    Returns:
      Leaves [b, ...] of numpy, see ``types.PreferenceBatch``.
    Example:
      >>> def said(*tokens):
      ...     none = np.zeros((0, 1), np.float32)
      ...     owners = np.full(len(tokens), -1, np.int32)
      ...     return Branch(np.array(tokens), 0, owners, none, none[:, 0] > 0, ())
      >>> pair = TokenizedPair(np.array([5, 6]), said(7, 1), said(8, 1))
      >>> batch = build_rows([pair], [(0,)], BatchShape(8, 1, segments=1, aspects=1))
      >>> batch.inputs.tokens.tolist(), batch.inputs.branch_ids.tolist()
      ([[5, 6, 7, 1, 8, 1, 0, 0]], [[0, 0, 1, 1, 2, 2, 0, 0]])
      >>> batch.inputs.positions.tolist()  # each response begins behind the prompt
      [[0, 1, 2, 3, 2, 3, 0, 0]]
    """
    first = pairs[:1]
    batch = _padding(
        len(rows),
        shape,
        labelled=any(pair.label is not None for pair in first),
        weighted=token_weights is not None
        or any(pair.chosen.weights is not None for pair in first),
        referenced=ref_logps is not None,
        seeing=seeing,
    )
    for r, row in enumerate(rows):
        used = _Used()
        for slot, index in enumerate(row):
            pair, before = pairs[index], used
            if seeing is not None and pair.images:
                _lay_pictures(batch, r, pair, before, seeing)
            used = _lay_pair(batch, (r, slot), pair, before)
            wanted = r, slice(before.completions, used.completions)
            if batch.token_weights is not None:
                batch.token_weights[wanted] = (
                    _weights_of(pair) if token_weights is None else token_weights[index]
                )
            if ref_logps is not None:
                batch.ref_logps[wanted] = ref_logps[index]
    return batch


class _Used(NamedTuple):
    """How much of each of a row's budgets is taken."""

    tokens: int = 0
    completions: int = 0
    units: int = 0
    """Of patches."""
    images: int = 0
    """Tiles of pictures count one each."""


def _padding(
    rows: int,
    shape: BatchShape,
    *,
    labelled: bool,
    weighted: bool,
    referenced: bool,
    seeing: Seeing | None,
) -> Any:
    """Return a :class:`PreferenceBatch` of numpy arrays in which nothing is laid."""
    axes: tuple[int, ...] = ()
    images = None
    if seeing is not None:
        axes = () if seeing.patcher.axes == 1 else (seeing.patcher.axes,)
        if shape.patches:
            images = image_rows.no_images(rows, shape.patches, *seeing)
    t, p, s, a = shape.row_length, shape.pairs, shape.segments, shape.aspects

    def full(value: Any, dtype: Any, *sizes: int) -> Any:
        return np.full((rows, *sizes), value, dtype)

    return PreferenceBatch(
        inputs=ModelInputs(
            tokens=full(0, np.int32, t),
            positions=full(0, np.int32, t, *axes),
            sequence_ids=full(0, np.int32, t),
            branch_ids=full(0, np.int32, t),
            images=images,
        ),
        completions=Completions(
            source=full(0, np.int32, t),
            target=full(0, np.int32, t),
            response=full(-1, np.int32, t),
            segment=full(-1, np.int32, t),
        ),
        scores=full(np.nan, np.float32, p, 2, s, a),
        segment_mask=full(False, bool, p, 2, s),
        pair_mask=full(False, bool, p),
        ref_logps=full(0, np.float32, t) if referenced else None,
        weights=full(1.0, np.float32, p),
        labels=full(False, bool, p) if labelled else None,
        token_weights=full(0, np.float32, t) if weighted else None,
    )


def _lay_pictures(
    batch: Any, row: int, pair: TokenizedPair, used: _Used, seeing: Seeing
) -> None:
    """Lay a pair's pictures behind those that a row holds."""
    image_rows.place_pictures(
        *(batch.inputs.images, row, pair, seeing),
        begin=used.tokens,
        units=used.units,
        count=used.images,
    )


def _lay_pair(
    batch: Any, at: tuple[int, int], pair: TokenizedPair, used: _Used
) -> _Used:
    """Lay a pair behind what a row holds: prompt, chosen, rejected.

    Args:
      batch: the arrays, written to.
      at: the row, and which of its pairs this one is.
      pair: the pair.
      used: what the row holds already.
    Returns:
      What it holds then.
    """
    r, slot = at
    inputs, begin = batch.inputs, used.tokens
    length = len(pair.prompt)
    prompt = r, slice(begin, begin + length)
    inputs.tokens[prompt] = pair.prompt
    positions, start = inputs.positions, length
    own = pair.positions
    if own is None:
        own = _from(positions, 0, length)
    else:
        start = int(own.max()) + 1
    positions[prompt] = own
    used = used._replace(
        tokens=begin + length,
        units=used.units + pair.units,
        images=used.images + sum(len(layout.grids) for layout in pair.layouts),
    )
    if pair.learn_prompt:
        used = _want_prompt(batch.completions, at, pair, begin, used)
    for side, branch in enumerate((pair.chosen, pair.rejected)):
        places = r, slice(used.tokens, used.tokens + len(branch.tokens))
        inputs.tokens[places] = branch.tokens
        positions[places] = _from(positions, start, len(branch.tokens))
        inputs.branch_ids[places] = side + 1
        last = begin + length - 1
        used = _want_branch(batch.completions, (*at, side), branch, last, used)
        count = len(branch.scored)
        batch.scores[r, slot, side, :count, : branch.scores.shape[1]] = branch.scores
        batch.segment_mask[r, slot, side, :count] = branch.scored
    inputs.sequence_ids[r, begin : used.tokens] = slot + 1
    batch.pair_mask[r, slot] = True
    batch.weights[r, slot] = pair.weight
    if batch.labels is not None:
        batch.labels[r, slot] = pair.label
    return used


def _want_prompt(
    completions: Any, at: tuple[int, int], pair: TokenizedPair, begin: int, used: _Used
) -> _Used:
    """Ask for a prompt's own tokens, but for the first one, which nothing predicts.

    Nor are features of pictures predicted.
    """
    r, slot = at
    tokens = np.concatenate([pair.prompt, pair.chosen.tokens[: pair.chosen.lead]])
    places = np.setdiff1d(np.arange(1, len(tokens)), pair.feature_places)
    count = len(places)
    wanted = r, slice(used.completions, used.completions + count)
    completions.source[wanted] = begin + places - 1
    completions.target[wanted] = tokens[places]
    completions.response[wanted] = 2 * slot
    return used._replace(completions=used.completions + count)


def _want_branch(
    completions: Any,
    at: tuple[int, int, int],
    branch: Branch,
    last: int,
    used: _Used,
) -> _Used:
    """Ask for a response's completion tokens.

    Args:
      completions: the arrays, written to.
      at: row, pair and response.
      branch: the response.
      last: place in the row of the prompt's last token, which predicts the first one
        of every response.
      used: what the row holds before the response.
    """
    r, slot, side = at
    end, count = used.tokens + len(branch.tokens), branch.num_completion_tokens
    wanted = r, slice(used.completions, used.completions + count)
    completions.source[wanted] = used.tokens + branch.places - 1
    if count and branch.places[0] == 0:
        completions.source[r, used.completions] = last
    completions.target[wanted] = branch.tokens[branch.places]
    completions.response[wanted] = 2 * slot + side
    completions.segment[wanted] = branch.segments
    return used._replace(tokens=end, completions=used.completions + count)


def _from(positions: np.ndarray, start: int, count: int) -> np.ndarray:
    """Return positions of a text, the same on all axes that the array has."""
    one = start + np.arange(count)
    return one if positions.ndim == 2 else one[:, None]


def _weights_of(pair: TokenizedPair) -> np.ndarray:
    """Return the token weights that a record came with, chosen then rejected."""
    sides = [pair.chosen.weights, pair.rejected.weights]
    return np.concatenate([side for side in sides if side is not None])

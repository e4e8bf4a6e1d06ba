"""Packing: which pairs share a row, and how a row is laid out.

A row holds whole pairs, each as prompt, chosen, rejected; the prompt is stored once.
The plan depends on nothing but the lengths, the seed and the epoch.
"""

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.data.chat import TokenizedPair
from jaxalign.types import Completions, ModelInputs, PreferenceBatch


__all__ = ["BatchShape", "build_rows", "fill", "pairs_per_row", "plan_rows"]

Row = tuple[int, ...]


class BatchShape(NamedTuple):
    """The sizes that a run compiles for."""

    row_length: int
    pairs: int
    segments: int
    aspects: int


def pairs_per_row(lengths: np.ndarray, row_length: int) -> int:
    """Return a bound on the pairs of a row that almost never binds.

    Twice the pairs of mean length that fit, and no more than the shortest ones that do.
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
) -> list[Row]:
    """Group pairs into rows so that the rows are as full as they can be.

    Out of a window of pairs drawn in random order, each row takes the longest one and
    then the set of others that fills the rest best (subset sum, exact, by bit sets).

    Args:
      lengths: places that each pair takes; none above row_length.
      row_length: places of a row.
      pairs: most pairs of a row.
      seed: of the run.
      epoch: from 0; every epoch has another order and other rows.
      shuffle: False keeps the order of the data as far as packing allows.
      window: pairs to choose from.
    Returns:
      Indices of the pairs of each row, every pair exactly once.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    if pairs == 1:
        return [(int(i),) for i in order]
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
        others = _best_fill(
            [length for length, _, _ in pool], row_length - longest[0], pairs - 1
        )
        rows.append((longest[2], *(pool[i][2] for i in others)))
        for i in sorted(others, reverse=True):
            del pool[i]
        draw()
    if shuffle:
        return [rows[i] for i in rng.permutation(len(rows))]
    return sorted(rows, key=min)


def _best_fill(lengths: Sequence[int], capacity: int, most: int) -> list[int]:
    """Return the items whose lengths sum to as much of the capacity as possible.

    ``lengths`` ascend. Bit n of a set says that the sum n can be reached with the items
    so far. More than ``most`` items are avoided by leaving out the shortest.
    """
    full = (1 << (capacity + 1)) - 1
    reachable = [1]
    # Longest first, so that a fill made of few items is found before one of many.
    fitting = [i for i in reversed(range(len(lengths))) if lengths[i] <= capacity]
    for i in fitting:
        reachable.append((reachable[-1] | (reachable[-1] << lengths[i])) & full)
        if reachable[-1] >> capacity & 1:
            break
    rest = reachable[-1].bit_length() - 1
    chosen = []
    for step in range(len(reachable) - 1, 0, -1):
        if not reachable[step - 1] >> rest & 1:
            item = fitting[step - 1]
            chosen.append(item)
            rest -= lengths[item]
    chosen.sort(key=lambda i: lengths[i], reverse=True)
    return chosen[:most]


def fill(rows: Sequence[Row], lengths: np.ndarray, row_length: int) -> float:
    """Return the share of the rows' places that hold a token."""
    used = sum(int(lengths[i]) for row in rows for i in row)
    return used / max(1, len(rows) * row_length)


def build_rows(
    pairs: Sequence[TokenizedPair],
    rows: Sequence[Row],
    shape: BatchShape,
    *,
    ref_logps: Sequence[np.ndarray] | None = None,
    token_weights: Sequence[np.ndarray] | None = None,
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
    """
    b, t = len(rows), shape.row_length
    p, s, a = shape.pairs, shape.segments, shape.aspects

    def full(value: Any, dtype: Any, *sizes: int) -> Any:
        return np.full((b, *sizes), value, dtype)

    tokens, positions = full(0, np.int32, t), full(0, np.int32, t)
    sequence_ids, branch_ids = full(0, np.int32, t), full(0, np.int32, t)
    source, target = full(0, np.int32, t), full(0, np.int32, t)
    response, segment = full(-1, np.int32, t), full(-1, np.int32, t)
    labelled = any(pair.label is not None for pair in pairs[:1])
    labels = full(False, bool, p) if labelled else None
    weights = full(1.0, np.float32, p)
    own = any(pair.chosen.weights is not None for pair in pairs[:1])
    weighted = full(0, np.float32, t) if own or token_weights is not None else None
    scores = full(np.nan, np.float32, p, 2, s, a)
    segment_mask, pair_mask = full(False, bool, p, 2, s), full(False, bool, p)
    cached = None if ref_logps is None else full(0, np.float32, t)

    for r, row in enumerate(rows):
        place = wanted = 0
        for slot, index in enumerate(row):
            pair = pairs[index]
            prompt_length, begin = len(pair.prompt), place
            place += prompt_length
            tokens[r, begin:place] = pair.prompt
            positions[r, begin:place] = np.arange(prompt_length)
            first_wanted = wanted
            if pair.learn_prompt:
                known = np.concatenate(
                    [pair.prompt, pair.chosen.tokens[: pair.chosen.lead]]
                )
                out = slice(wanted, wanted + len(known) - 1)
                source[r, out] = begin + np.arange(len(known) - 1)
                target[r, out] = known[1:]
                response[r, out] = 2 * slot
                wanted += len(known) - 1
            for side, branch in enumerate((pair.chosen, pair.rejected)):
                n, m = len(branch.tokens), branch.num_completion_tokens
                where = slice(place, place + n)
                tokens[r, where] = branch.tokens
                positions[r, where] = prompt_length + np.arange(n)
                branch_ids[r, where] = side + 1
                out = slice(wanted, wanted + m)
                source[r, out] = np.arange(place + branch.lead, place + n) - 1
                if branch.lead == 0 and m:
                    # The prompt's last token predicts the first one of both responses.
                    source[r, wanted] = begin + prompt_length - 1
                target[r, out] = branch.tokens[branch.lead :]
                response[r, out] = 2 * slot + side
                segment[r, out] = branch.segments
                count = len(branch.scored)
                scores[r, slot, side, :count, : branch.scores.shape[1]] = branch.scores
                segment_mask[r, slot, side, :count] = branch.scored
                place += n
                wanted += m
            sequence_ids[r, begin:place] = slot + 1
            pair_mask[r, slot] = True
            weights[r, slot] = pair.weight
            if labels is not None:
                labels[r, slot] = pair.label
            if weighted is not None:
                weighted[r, first_wanted:wanted] = (
                    _own_weights(pair)
                    if token_weights is None
                    else token_weights[index]
                )
            if cached is not None and ref_logps is not None:
                cached[r, first_wanted:wanted] = ref_logps[index]
    return PreferenceBatch(
        inputs=ModelInputs(tokens, positions, sequence_ids, branch_ids),
        completions=Completions(source, target, response, segment),
        scores=scores,
        segment_mask=segment_mask,
        pair_mask=pair_mask,
        ref_logps=cached,
        weights=weights,
        labels=labels,
        token_weights=weighted,
    )


def _own_weights(pair: TokenizedPair) -> np.ndarray:
    """Return the token weights that a record came with, chosen then rejected."""
    sides = [pair.chosen.weights, pair.rejected.weights]
    return np.concatenate([side for side in sides if side is not None])

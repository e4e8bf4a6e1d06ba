"""Batches by index: a Grain loader whose state is one number."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import grain.python as grain
import jax
import numpy as np
from absl import flags

from jaxalign.data import packing
from jaxalign.data.image_rows import Seeing
from jaxalign.data.pairs import PairDataset
from jaxalign.errors import UserError
from jaxalign.types import PreferenceBatch, RowShare


__all__ = [
    "BatchPlan",
    "StepSource",
    "batch_shape",
    "filled",
    "make_iterator",
    "row_units",
    "single_batch",
]


def batch_shape(
    datasets: Sequence[PairDataset],
    *,
    row_length: int,
    pack: bool = True,
    pairs: int | None = None,
    row_patches: int | None = None,
) -> packing.BatchShape:
    """Return the sizes that hold every one of the data sets.

    Args:
      datasets: of one run; where one has pictures, the rows of all have places for
        patches.
      row_length: places of a row.
      pack: whether a row holds as many pairs as fit, or one.
      pairs: most pairs of a row; default a bound that almost never binds.
      row_patches: places of a row for patches; default a number that seldom binds,
        found from the data.
    Raises:
      UserError: a pair is longer than a row, or has more patches.
    Example:
      >>> from jaxalign.data.chat import Branch, TokenizedPair
      >>> none = np.zeros((0, 0)), np.zeros(0, bool)  # scores of no segments
      >>> said = Branch(np.array([7, 1]), 0, np.array([-1, -1]), *none, ())
      >>> pair = TokenizedPair(np.array([5, 6]), said, said)
      >>> data = PairDataset([pair] * 4, list(range(4)), (), {})
      >>> batch_shape([data], row_length=16)
      BatchShape(row_length=16, pairs=2, segments=1, aspects=1, patches=0)
    """
    lengths = np.concatenate([data.lengths for data in datasets])
    longest = int(lengths.max())
    if longest > row_length:
        raise UserError(
            f"a pair takes {longest} places (prompt + chosen + rejected), but a row "
            f"has {row_length}: raise --row_length (twice max_length always suffices) "
            "or lower --max_length"
        )
    if pairs is None:
        pairs = packing.pairs_per_row(lengths, row_length) if pack else 1
    return packing.BatchShape(
        row_length=row_length,
        pairs=pairs,
        segments=max(data.num_segments for data in datasets),
        aspects=max(1, *(len(data.aspects) for data in datasets)),
        patches=_patches_per_row(datasets, lengths, row_length, pairs, row_patches),
    )


def _patches_per_row(
    datasets: Sequence[PairDataset],
    lengths: np.ndarray,
    row_length: int,
    pairs: int,
    row_patches: int | None,
) -> int:
    """Return the places of a row for patches, whole units; 0 without pictures."""
    units = np.concatenate([data.units for data in datasets])
    patcher = next((d.patcher for d in datasets if d.patcher is not None), None)
    largest = int(units.max())
    if patcher is None or not largest:
        if row_patches is not None:
            raise UserError(
                f"row_patches {row_patches} has no effect: no record has a picture. "
                "Leave it out"
            )
        return 0
    unit = patcher.merge * patcher.merge
    if row_patches is None:
        found = packing.units_per_row(
            lengths, units, row_length=row_length, pairs=pairs
        )
        return found * unit
    if largest * unit > row_patches:
        data, number = next(
            (data, int(data.units.argmax()))
            for data in datasets
            if int(data.units.max()) == largest
        )
        raise UserError(
            f"{data.pairs[number].images[0].where}: the pictures of this record have "
            f"{largest * unit} patches, but a row has {row_patches}: raise "
            f"--row_patches to {largest * unit} at least, leave it out, or make the "
            "pictures smaller (--max_pixels)"
        )
    return row_patches // unit * unit


class BatchPlan(NamedTuple):
    """What decides every batch of a run."""

    rows: int
    """Rows of a micro-batch, over all processes."""
    accumulation: int
    """Micro-batches of a step."""
    seed: int
    shuffle: bool = True

    @property
    def rows_per_step(self) -> int:
        """Return the rows that one optimiser step reads."""
        return self.rows * self.accumulation


class StepSource:
    """Random access to the batch of every step: ``source[step]``.

    A batch has the leading axes [accumulation, rows]. An epoch ends with empty rows
    where its rows do not fill the last batch, so that every pair is seen once in each.
    With several processes each one builds its own share of the rows.

    Raises:
      UserError: the rows cannot be split over the mesh of several processes.
    Example:
      >>> from jaxalign.data.chat import Branch, TokenizedPair
      >>> none = np.zeros((0, 0)), np.zeros(0, bool)  # scores of no segments
      >>> said = Branch(np.array([7, 1]), 0, np.array([-1, -1]), *none, ())
      >>> pair = TokenizedPair(np.array([5, 6]), said, said)
      >>> data = PairDataset([pair] * 4, list(range(4)), (), {})
      >>> shape = batch_shape([data], row_length=12)
      >>> source = StepSource(data, shape, BatchPlan(rows=1, accumulation=2, seed=0))
      >>> source[0].inputs.tokens.shape, source.rows_of_step(0)
      ((2, 1, 12), [(0, 2), (3, 1)])
    """

    def __init__(
        self,
        data: PairDataset,
        shape: packing.BatchShape,
        plan: BatchPlan,
        *,
        num_steps: int | None = None,
        num_epochs: int | None = None,
        ref_logps: Sequence[np.ndarray] | None = None,
        token_weights: Sequence[np.ndarray] | None = None,
        share: RowShare | None = None,
    ):
        self.data = data
        self.shape = shape
        self.plan = plan
        self.ref_logps = ref_logps
        self.token_weights = token_weights
        self.share = share = share or RowShare()
        if plan.rows % share.of:
            raise UserError(
                f"{plan.rows} row(s) of a micro-batch cannot be split into "
                f"{share.of} parts, one for each of mesh.data × mesh.fsdp: give a "
                "multiple"
            )
        self._ends: dict[int, int] = {}
        """Step at which each epoch planned so far ends."""
        if num_steps is None:
            self.num_steps = self._end_of_epoch((num_epochs or 1) - 1)
        else:
            self.num_steps = num_steps

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a source lives as long as its run
    def rows_of_epoch(self, epoch: int) -> list[packing.Row]:
        """Return the rows of an epoch."""
        return packing.plan_rows(
            self.data.lengths,
            row_length=self.shape.row_length,
            pairs=self.shape.pairs,
            seed=self.plan.seed,
            epoch=epoch,
            shuffle=self.plan.shuffle,
            units=self.data.units,
            row_units=row_units(self.data, self.shape),
        )

    def _end_of_epoch(self, epoch: int) -> int:
        # Threads may do this at once: every entry is written with its own value.
        for e in range(len(self._ends), epoch + 1):
            steps = -(-len(self.rows_of_epoch(e)) // self.plan.rows_per_step)
            self._ends[e] = self._ends.get(e - 1, 0) + steps
        return self._ends[epoch]

    def epoch_of(self, step: int) -> float:
        """Return how many epochs are done before a step, in fractions."""
        epoch = 0
        while self._end_of_epoch(epoch) <= step:
            epoch += 1
        begin = self._ends[epoch - 1] if epoch else 0
        return epoch + (step - begin) / (self._ends[epoch] - begin)

    def rows_of_step(self, step: int) -> list[packing.Row]:
        """Return the rows of a step, padded with empty ones to a whole batch."""
        epoch = int(self.epoch_of(step))
        begin = step - (self._ends[epoch - 1] if epoch else 0)
        size = self.plan.rows_per_step
        rows = list(self.rows_of_epoch(epoch)[begin * size : (begin + 1) * size])
        return rows + [()] * (size - len(rows))

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: Any) -> PreferenceBatch:
        rows = self.rows_of_step(int(step))
        size = self.plan.rows // self.share.of
        mine = [part * size + n for part in self.share.parts for n in range(size)]
        batches = [
            packing.build_rows(
                self.data.pairs,
                [rows[m * self.plan.rows + n] for n in mine],
                self.shape,
                ref_logps=self.ref_logps,
                token_weights=self.token_weights,
                seeing=_seeing(self.data),
            )
            for m in range(self.plan.accumulation)
        ]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)

    def __repr__(self) -> str:
        # Grain stores this beside the iterator's state and compares it on restore.
        shape = f"{self.shape}"
        if not self.shape.patches:  # runs of texts began before rows had pictures
            shape = shape.replace(", patches=0", "")
        return f"StepSource({self.plan}, {shape}, pairs={len(self.data.pairs)})"


def make_iterator(
    source: StepSource, *, workers: int = 0, prefetch: int = 4
) -> grain.DatasetIterator[PreferenceBatch]:
    """Iterate over the steps of a source, building batches ahead of time.

    Args:
      source: batches by step.
      workers: processes that build them; 0 uses threads, which is enough unless rows
        are very long.
      prefetch: batches kept ready.
    Returns:
      An iterator with ``get_state`` and ``set_state`` (the number of the next step).
    Example:
      >>> from jaxalign.data.chat import Branch, TokenizedPair
      >>> none = np.zeros((0, 0)), np.zeros(0, bool)  # scores of no segments
      >>> said = Branch(np.array([7, 1]), 0, np.array([-1, -1]), *none, ())
      >>> pair = TokenizedPair(np.array([5, 6]), said, said)
      >>> data = PairDataset([pair] * 4, list(range(4)), (), {})
      >>> plan = BatchPlan(rows=1, accumulation=1, seed=0)
      >>> source = StepSource(data, batch_shape([data], row_length=12), plan)
      >>> batches = make_iterator(source)
      >>> next(batches).pair_mask.shape, batches.get_state()["next_index"]
      ((1, 1, 2), 1)
    """
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=prefetch)
    data = grain.MapDataset.source(cast(Any, source)).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its own, which we never parse
            flags.FLAGS.mark_as_parsed()
        data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(data)


def single_batch(
    data: PairDataset, *, rows: int | None = None, row_length: int | None = None
) -> PreferenceBatch:
    """Pack a whole (small) data set into one batch [rows, ...], for notebooks.

    Args:
      data: tokenised pairs.
      rows: rows of the batch; default as many as needed.
      row_length: places of a row; default the longest pair.
    Example::

      batch = single_batch(prepare(rows, tokenizer, max_length=512))
    """
    shape = batch_shape([data], row_length=row_length or int(data.lengths.max()))
    plan = packing.plan_rows(
        data.lengths,
        row_length=shape.row_length,
        pairs=shape.pairs,
        seed=0,
        epoch=0,
        shuffle=False,
        units=data.units,
        row_units=row_units(data, shape),
    )
    if rows is not None and len(plan) > rows:
        raise UserError(
            f"{len(data.pairs)} pairs need {len(plan)} rows of {shape.row_length}: got "
            f"rows={rows}. Give more rows or longer ones"
        )
    plan = plan + [()] * ((rows or len(plan)) - len(plan))
    return packing.build_rows(data.pairs, plan, shape, seeing=_seeing(data))


def filled(
    rows: Sequence[packing.Row], data: PairDataset, shape: packing.BatchShape
) -> str:
    """Say how many rows there are and how full they are, of tokens and of patches.

    >>> from jaxalign.data.chat import Branch, TokenizedPair
    >>> none = np.zeros((0, 0)), np.zeros(0, bool)  # scores of no segments
    >>> said = Branch(np.array([7, 1]), 0, np.array([-1, -1]), *none, ())
    >>> data = PairDataset([TokenizedPair(np.array([5, 6]), said, said)], [0], (), {})
    >>> filled([(0,)], data, packing.BatchShape(8, pairs=1, segments=1, aspects=1))
    '1 of 8, 75.0% full'
    """
    fill = packing.fill(rows, data.lengths, shape.row_length)
    said = f"{len(rows)} of {shape.row_length}, {fill:.1%} full"
    if shape.patches:
        fill = packing.fill(rows, data.units, row_units(data, shape))
        said += f"; {shape.patches} patches a row, {fill:.1%} full"
    return said


def row_units(data: PairDataset, shape: packing.BatchShape) -> int:
    """Return the units of patches that a row has places for.

    >>> data = PairDataset([], [], (), {})  # of a model that does not see
    >>> row_units(data, packing.BatchShape(8, pairs=1, segments=1, aspects=1))
    0
    """
    return 0 if data.patcher is None else shape.patches // data.patcher.merge**2


def _seeing(data: PairDataset) -> Seeing | None:
    return None if data.patcher is None else Seeing(data.patcher, data.kept)

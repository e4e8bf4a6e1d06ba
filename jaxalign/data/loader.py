"""Batches by index: a Grain loader whose state is one number."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import grain.python as grain
import jax
import numpy as np
from absl import flags

from jaxalign.data import packing
from jaxalign.data.pairs import PairDataset
from jaxalign.errors import UserError
from jaxalign.types import PreferenceBatch


__all__ = ["BatchPlan", "StepSource", "batch_shape", "make_iterator", "single_batch"]


def batch_shape(
    datasets: Sequence[PairDataset],
    *,
    row_length: int,
    pack: bool = True,
    pairs: int | None = None,
) -> packing.BatchShape:
    """Return the sizes that hold every one of the data sets.

    Raises:
      UserError: a pair is longer than a row.
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
    )


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
    With several processes each one builds its own part of the rows.
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
        process: tuple[int, int] = (0, 1),
    ):
        self.data = data
        self.shape = shape
        self.plan = plan
        self.ref_logps = ref_logps
        self.token_weights = token_weights
        self.process_index, self.process_count = process
        if plan.rows % self.process_count:
            raise UserError(
                f"{plan.rows} row(s) of a micro-batch cannot be split over "
                f"{self.process_count} processes: give a multiple"
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
        local = self.plan.rows // self.process_count
        begin = self.process_index * local
        batches = [
            packing.build_rows(
                self.data.pairs,
                rows[m * self.plan.rows :][begin : begin + local],
                self.shape,
                ref_logps=self.ref_logps,
                token_weights=self.token_weights,
            )
            for m in range(self.plan.accumulation)
        ]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)

    def __repr__(self) -> str:
        # Grain stores this beside the iterator's state and compares it on restore.
        return f"StepSource({self.plan}, {self.shape}, pairs={len(self.data.pairs)})"


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
    """
    shape = batch_shape([data], row_length=row_length or int(data.lengths.max()))
    plan = packing.plan_rows(
        data.lengths,
        row_length=shape.row_length,
        pairs=shape.pairs,
        seed=0,
        epoch=0,
        shuffle=False,
    )
    if rows is not None and len(plan) > rows:
        raise UserError(
            f"{len(data.pairs)} pairs need {len(plan)} rows of {shape.row_length}: got "
            f"rows={rows}. Give more rows or longer ones"
        )
    plan = plan + [()] * ((rows or len(plan)) - len(plan))
    return packing.build_rows(data.pairs, plan, shape)

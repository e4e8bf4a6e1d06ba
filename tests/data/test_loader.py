"""Loading: any step by its number, every pair once an epoch, exact resumption."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from jaxalign.data import loader, packing, pairs, records
from jaxalign.data.loader import BatchPlan, StepSource
from jaxalign.data.pairs import PairDataset
from jaxalign.errors import UserError
from jaxalign.types import PreferenceBatch, RowShare
from tests import synthetic


ROW = 128


@pytest.fixture(scope="module")
def data(make_tokenizer: Callable[..., Any]) -> PairDataset:
    made = [records.parse(r) for r in synthetic.feedback_records(23, sentences=2)]
    return pairs.prepare(made, make_tokenizer(), max_length=ROW // 2)


@pytest.fixture(scope="module")
def shape(data: PairDataset) -> packing.BatchShape:
    return loader.batch_shape([data], row_length=ROW)


def assert_same(a: PreferenceBatch, b: PreferenceBatch) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rows_of(batch: PreferenceBatch) -> PreferenceBatch:
    """Return the rows of all micro-batches in one axis."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)


def pairs_of_steps(source: StepSource, steps: Sequence[int]) -> list[int]:
    return sorted(i for s in steps for row in source.rows_of_step(s) for i in row)


def test_batch_shape_holds_all_data_sets(data: PairDataset) -> None:
    shape = loader.batch_shape([data], row_length=ROW)
    assert shape == packing.BatchShape(
        row_length=ROW,
        pairs=packing.pairs_per_row(data.lengths, ROW),
        segments=2,
        aspects=2,
    )
    bare = data._replace(aspects=(), pairs=data.pairs[:1])
    assert loader.batch_shape([bare, data], row_length=ROW).aspects == 2
    assert loader.batch_shape([bare], row_length=ROW).aspects == 1
    assert loader.batch_shape([data], row_length=ROW, pack=False).pairs == 1
    longest = int(data.lengths.max())
    with pytest.raises(UserError, match=f"a pair takes {longest} places .* raise row"):
        loader.batch_shape([data], row_length=longest - 1)


def test_a_step_is_the_same_however_it_is_reached(
    data: PairDataset, shape: packing.BatchShape
) -> None:
    def fresh() -> StepSource:
        return StepSource(data, shape, BatchPlan(2, 2, seed=3), num_epochs=3)

    source = fresh()
    batches = [source[step] for step in range(len(source))]
    assert len(batches) > 6
    for step in (len(batches) - 1, 0, 4, 2):
        assert_same(fresh()[step], batches[step])
        assert_same(source[step], batches[step])
    assert batches[0].inputs.tokens.shape == (2, 2, ROW)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("rows", "accumulation"), [(1, 1), (4, 1), (2, 3)])
def test_every_epoch_holds_every_pair_once(
    rows: int,
    accumulation: int,
    shuffle: bool,
    data: PairDataset,
    shape: packing.BatchShape,
) -> None:
    plan = BatchPlan(rows, accumulation, seed=0, shuffle=shuffle)
    source = StepSource(data, shape, plan, num_epochs=4)
    begin = 0
    for epoch in range(4):
        planned = len(source.rows_of_epoch(epoch))
        end = begin + -(-planned // plan.rows_per_step)
        steps = range(begin, end)
        assert pairs_of_steps(source, steps) == list(range(len(data.pairs)))
        # The last batch is filled up with empty rows, which hold no pair.
        masks = np.concatenate([rows_of(source[s]).pair_mask for s in steps])
        assert masks.sum() == len(data.pairs)
        assert len(masks) == plan.rows_per_step * len(steps)
        assert not masks[planned:].any()
        assert source.epoch_of(begin) == epoch
        assert source.epoch_of(end - 1) == epoch + (len(steps) - 1) / len(steps)
        begin = end
    assert len(source) == source.num_steps == begin


def test_epochs_differ_and_num_steps_may_end_within_one(
    data: PairDataset, shape: packing.BatchShape
) -> None:
    plan = BatchPlan(2, 1, seed=0)
    source = StepSource(data, shape, plan, num_epochs=2)
    assert source.rows_of_epoch(0) != source.rows_of_epoch(1)
    short = StepSource(data, shape, plan, num_steps=len(source) - 1, num_epochs=9)
    assert len(short) == len(source) - 1
    for step in range(len(short)):
        assert_same(short[step], source[step])
    assert len(StepSource(data, shape, plan)) == source._end_of_epoch(0)


def test_two_processes_have_the_rows_of_one(
    data: PairDataset, shape: packing.BatchShape
) -> None:
    plan = BatchPlan(4, 2, seed=1)
    whole = StepSource(data, shape, plan, num_epochs=2)
    parts = [
        StepSource(data, shape, plan, num_epochs=2, share=RowShare((i,), 2))
        for i in range(2)
    ]
    for step in range(len(whole)):
        first, second = (part[step] for part in parts)
        assert first.inputs.tokens.shape[:2] == (2, 2)
        joined = jax.tree.map(
            lambda a, b: np.concatenate([a, b], axis=1), first, second
        )
        assert_same(joined, whole[step])


def test_rows_of_a_process_need_not_lie_side_by_side(
    data: PairDataset, shape: packing.BatchShape
) -> None:
    """As where a mesh follows the wires between chips, not the hosts they are in."""
    plan = BatchPlan(4, 1, seed=1)
    whole = StepSource(data, shape, plan, num_epochs=1)[0]
    odd = StepSource(data, shape, plan, num_epochs=1, share=RowShare((1, 3), 4))[0]
    assert_same(odd, jax.tree.map(lambda leaf: leaf[:, 1::2], whole))


def test_rows_that_processes_cannot_share_are_refused(
    data: PairDataset, shape: packing.BatchShape
) -> None:
    with pytest.raises(UserError, match=r"3 row\(s\) .* split into 2 parts, .*: give"):
        StepSource(data, shape, BatchPlan(3, 1, seed=0), share=RowShare((0,), 2))


def test_accumulation_only_regroups_the_rows(
    data: PairDataset, shape: packing.BatchShape
) -> None:
    split = StepSource(data, shape, BatchPlan(2, 2, seed=0), num_epochs=2)
    whole = StepSource(data, shape, BatchPlan(4, 1, seed=0), num_epochs=2)
    assert len(split) == len(whole)
    for step in range(len(split)):
        assert split[step].inputs.tokens.shape[:2] == (2, 2)
        assert_same(rows_of(split[step]), rows_of(whole[step]))


def test_reference_numbers_follow_their_pair(
    data: PairDataset, shape: packing.BatchShape
) -> None:
    # Each number says its pair and its place in it.
    numbers = [
        1000 * i + np.arange(sum(side.num_completion_tokens for side in pair[1:3]))
        for i, pair in enumerate(data.pairs)
    ]
    plan = BatchPlan(2, 1, seed=0)
    source = StepSource(data, shape, plan, ref_logps=numbers)
    for step in range(len(source)):
        batch = rows_of(source[step])
        assert batch.ref_logps is not None
        for r, row in enumerate(source.rows_of_step(step)):
            expected = np.concatenate([numbers[i] for i in row] or [np.zeros(0)])
            used = batch.completions.response[r] >= 0
            np.testing.assert_array_equal(batch.ref_logps[r][used], expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_iterator_resumes_where_its_state_says(
    workers: int, data: PairDataset, shape: packing.BatchShape
) -> None:
    source = StepSource(data, shape, BatchPlan(2, 1, seed=0), num_epochs=2)
    iterator = loader.make_iterator(source, workers=workers)
    for step in range(3):
        assert_same(next(iterator), source[step])
    state = iterator.get_state()
    rest = list(iterator)
    assert len(rest) == len(source) - 3
    for step, batch in enumerate(rest, start=3):
        assert_same(batch, source[step])
    resumed = loader.make_iterator(source, workers=workers)
    resumed.set_state(state)
    assert_same(next(resumed), source[3])
    assert_same(next(resumed), source[4])
    assert state != resumed.get_state()


def test_a_loader_that_fails_does_not_look_finished(
    data: PairDataset, shape: packing.BatchShape
) -> None:
    # The defect of MaxText: an exception became the end of the data.
    class Failing(StepSource):
        def __getitem__(self, step: Any) -> PreferenceBatch:
            if step == 2:
                raise OSError("the disk is gone")
            return super().__getitem__(step)

    source = Failing(data, shape, BatchPlan(2, 1, seed=0), num_epochs=2)
    with pytest.raises(OSError, match="the disk is gone"):
        list(loader.make_iterator(source))


def test_threads_that_plan_at_once_agree(
    data: PairDataset, shape: packing.BatchShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Epochs of 2 and 3 rows: counting the first one twice would move every later step.
    plans = [[(0,), (1,)], [(2,), (3,), (4,)]] * 3
    meet = threading.Barrier(2)

    def plan_rows(*args: Any, epoch: int, **options: Any) -> list[packing.Row]:
        if threading.current_thread() is not threading.main_thread():
            meet.wait(timeout=60)  # both threads are planning this epoch
        return plans[epoch]

    monkeypatch.setattr(loader.packing, "plan_rows", plan_rows)
    plan = BatchPlan(1, 1, seed=0)
    source = StepSource(data, shape, plan, num_steps=10)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(source.rows_of_step(7)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Steps 0-1, 2-4, 5-6, 7-9: step 7 is the first of the fourth epoch.
    assert found == [[(2,)]] * 2
    assert [source.epoch_of(step) for step in (0, 2, 5, 7)] == [0, 1, 2, 3]


def test_single_batch(data: PairDataset) -> None:
    batch = loader.single_batch(data)
    assert batch.inputs.tokens.shape[1] == data.lengths.max()
    assert batch.pair_mask.sum() == len(data.pairs)
    count = len(batch.pair_mask)
    padded = loader.single_batch(data, rows=count + 2)
    assert len(padded.pair_mask) == count + 2
    assert not padded.inputs.sequence_ids[count:].any()
    wide = loader.single_batch(data, row_length=int(data.lengths.sum()))
    assert wide.inputs.tokens.shape == (1, data.lengths.sum())
    with pytest.raises(UserError, match=f"need {count} rows of .*: got rows=1. Give m"):
        loader.single_batch(data, rows=1)

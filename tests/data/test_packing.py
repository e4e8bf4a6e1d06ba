"""Packing: the plan of rows, and what every query of a row may see."""

import itertools
import json
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxalign.data import filling, packing
from jaxalign.data.chat import Branch, TokenizedPair
from jaxalign.types import PreferenceBatch


# The plan.


@st.composite
def plans(draw: Any) -> dict[str, Any]:
    row_length = draw(st.integers(1, 60))
    lengths = draw(st.lists(st.integers(1, row_length), min_size=1, max_size=60))
    return {
        "lengths": np.array(lengths),
        "row_length": row_length,
        "pairs": draw(st.integers(1, 8)),
        "seed": draw(st.integers(0, 3)),
        "epoch": draw(st.integers(0, 3)),
        "shuffle": draw(st.booleans()),
        "window": draw(st.integers(1, 70)),
    }


@hypothesis.settings(max_examples=400)
@hypothesis.given(plan=plans())
def test_plan_holds_every_pair_once_and_no_row_is_overfull(
    plan: dict[str, Any],
) -> None:
    rows = packing.plan_rows(**plan)
    planned = sorted(index for row in rows for index in row)
    assert planned == list(range(len(plan["lengths"])))
    for row in rows:
        assert 1 <= len(row) <= plan["pairs"]
        assert sum(plan["lengths"][list(row)]) <= plan["row_length"]
    assert packing.plan_rows(**plan) == rows


@pytest.mark.parametrize("pairs", [1, 8])
def test_every_seed_and_epoch_has_its_own_plan(pairs: int) -> None:
    lengths = np.random.default_rng(0).integers(10, 90, 100)
    plans = [
        packing.plan_rows(lengths, row_length=200, pairs=pairs, seed=seed, epoch=epoch)
        for seed, epoch in itertools.product(range(3), range(3))
    ]
    assert len({tuple(plan) for plan in plans}) == 9
    # Not only the order: other pairs come together, too.
    if pairs > 1:
        assert len({frozenset(map(frozenset, plan)) for plan in plans}) == 9


def test_without_shuffling_rows_keep_the_order_of_the_data() -> None:
    lengths = np.array([5, 5, 4, 4, 1, 1])
    options: dict[str, Any] = {"row_length": 10, "pairs": 8, "shuffle": False}
    rows = packing.plan_rows(lengths, seed=0, epoch=0, **options)
    # 5 + 5 = 10; 4 + 4 + 1 + 1 = 10.
    assert [sorted(row) for row in rows] == [[0, 1], [2, 3, 4, 5]]
    assert packing.plan_rows(lengths, seed=1, epoch=1, **options) == rows
    single = packing.plan_rows(lengths, seed=0, epoch=0, **options | {"pairs": 1})
    assert single == [(i,) for i in range(6)]


@hypothesis.settings(max_examples=400)
@hypothesis.given(
    lengths=st.lists(st.integers(1, 12), max_size=8).map(sorted),
    capacity=st.integers(0, 40),
    most=st.integers(0, 8),
)
def test_best_fill_equals_brute_force(
    lengths: list[int], capacity: int, most: int
) -> None:
    sums = [
        sum(subset)
        for n in range(len(lengths) + 1)
        for subset in itertools.combinations(lengths, n)
    ]
    best = max(total for total in sums if total <= capacity)
    chosen = filling.best_fill(lengths, capacity, len(lengths))
    assert len(set(chosen)) == len(chosen)
    assert sum(lengths[i] for i in chosen) == best
    # A limit leaves out the shortest of them.
    assert filling.best_fill(lengths, capacity, most) == chosen[:most]
    assert [lengths[i] for i in chosen] == sorted(
        (lengths[i] for i in chosen), reverse=True
    )


def test_pairs_per_row() -> None:
    # Three fit (10 + 10 + 20 = 40); twice the mean's ceil(40 / 13) = 4 is no bound.
    assert packing.pairs_per_row(np.array([20, 10, 10]), 40) == 3
    # A hundred of the shortest fit, but of mean length 50 it is 2: twice that.
    assert packing.pairs_per_row(np.array([1] * 100 + [99] * 100), 100) == 4
    assert packing.pairs_per_row(np.array([7]), 7) == 1


def test_fill() -> None:
    rows = [(0, 1), (2,)]
    assert packing.fill(rows, np.array([3, 4, 5]), 8) == (3 + 4 + 5) / 16
    assert packing.fill([], np.array([3]), 8) == 0


@pytest.mark.data
def test_rows_of_real_pairs_are_95_percent_full(shared_data: Path) -> None:
    # Four characters a token, roughly; the real tokenizer is not here.
    with (shared_data / "qa_feedback" / "records.jsonl").open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    texts = (
        [json.dumps(record[name]) for name in ("prompt", "chosen", "rejected")]
        for record in records
    )
    lengths = np.array([sum(-(-len(text) // 4) for text in three) for three in texts])
    assert len(lengths) == 399 and lengths.max() <= 2048
    pairs = packing.pairs_per_row(lengths, 2048)
    for epoch in range(3):
        rows = packing.plan_rows(
            lengths, row_length=2048, pairs=pairs, seed=0, epoch=epoch
        )
        assert packing.fill(rows, lengths, 2048) >= 0.95


# The layout of a row.


def branch(
    rng: np.random.Generator, completion: int, *, lead: int = 0, segments: int = 0
) -> Branch:
    owners = rng.integers(-1, segments, completion)
    return Branch(
        tokens=rng.integers(1, 1000, lead + completion).astype(np.int32),
        lead=lead,
        segments=owners.astype(np.int32),
        scores=rng.normal(size=(segments, 2)).astype(np.float32),
        scored=np.isin(np.arange(segments), owners),
        offsets=tuple((i, i + 1) for i in range(segments)),
    )


def some_pairs(rng: np.random.Generator, count: int) -> list[TokenizedPair]:
    def side() -> Branch:
        return branch(
            rng,
            int(rng.integers(1, 6)),
            lead=int(rng.integers(0, 3)),
            segments=int(rng.integers(0, 4)),
        )

    return [
        TokenizedPair(
            rng.integers(1, 1000, int(rng.integers(1, 5))).astype(np.int32),
            side(),
            side(),
        )
        for _ in range(count)
    ]


SHAPE = packing.BatchShape(row_length=64, pairs=4, segments=3, aspects=2)
ROWS: list[packing.Row] = [(3, 0, 5), (), (1, 2), (4,)]


@pytest.fixture(params=range(4))
def laid_out(request: pytest.FixtureRequest) -> tuple[list[Any], PreferenceBatch]:
    pairs = some_pairs(np.random.default_rng(request.param), 6)
    return pairs, packing.build_rows(pairs, ROWS, SHAPE)


def seen_by(batch: PreferenceBatch, row: int, query: int) -> list[int]:
    """Return the places that a query sees: the rule of DESIGN 4.3, word for word."""
    sequence, branch = batch.inputs.sequence_ids[row], batch.inputs.branch_ids[row]
    return [
        key
        for key in range(SHAPE.row_length)
        if key <= query
        and sequence[key] == sequence[query] != 0
        and branch[key] in (0, branch[query])
    ]


def test_every_completion_token_is_predicted_from_its_own_text_alone(
    laid_out: tuple[list[TokenizedPair], PreferenceBatch],
) -> None:
    pairs, batch = laid_out
    inputs, wanted = batch.inputs, batch.completions
    for r, row in enumerate(ROWS):
        c = 0
        for slot, index in enumerate(row):
            pair = pairs[index]
            for side, response in enumerate((pair.chosen, pair.rejected)):
                text = [*pair.prompt.tolist(), *response.tokens.tolist()]
                for k in range(response.num_completion_tokens):
                    place = len(pair.prompt) + response.lead + k
                    source = int(wanted.source[r, c])
                    # The query that predicts the token must see exactly what would
                    # stand before it in a sequence of its own, in that order. (Where
                    # the prompt's last token predicts, it sees the prompt.)
                    seen = seen_by(batch, r, source)
                    assert inputs.tokens[r, seen].tolist() == text[:place]
                    assert inputs.positions[r, seen].tolist() == list(range(place))
                    assert wanted.target[r, c] == text[place]
                    assert wanted.response[r, c] == 2 * slot + side
                    assert wanted.segment[r, c] == response.segments[k]
                    c += 1
        assert (wanted.response[r, c:] == -1).all()
        assert (wanted.segment[r, c:] == -1).all()


def test_last_token_of_a_response_sees_all_of_it(
    laid_out: tuple[list[TokenizedPair], PreferenceBatch],
) -> None:
    pairs, batch = laid_out
    for r, row in enumerate(ROWS):
        place = 0
        for index in row:
            pair = pairs[index]
            prompt = pair.prompt.tolist()
            place += len(prompt)
            for response in (pair.chosen, pair.rejected):
                place += len(response.tokens)
                seen = seen_by(batch, r, place - 1)
                expected = [*prompt, *response.tokens.tolist()]
                assert batch.inputs.tokens[r, seen].tolist() == expected
        # The rest of the row is padding, which sees nothing and is seen by nobody.
        assert (batch.inputs.sequence_ids[r, :place] > 0).all()
        assert batch.inputs.images is None
        for ids in batch.inputs[:4]:
            assert not ids[r, place:].any()
        assert seen_by(batch, r, SHAPE.row_length - 1) == []


def test_feedback_lies_at_its_pair_and_side(
    laid_out: tuple[list[TokenizedPair], PreferenceBatch],
) -> None:
    pairs, batch = laid_out
    scores = np.full((4, 4, 2, 3, 2), np.nan, np.float32)
    mask = np.zeros((4, 4, 2, 3), bool)
    for r, row in enumerate(ROWS):
        for slot, index in enumerate(row):
            for side, response in enumerate(
                (pairs[index].chosen, pairs[index].rejected)
            ):
                count = len(response.scored)
                scores[r, slot, side, :count] = response.scores
                mask[r, slot, side, :count] = response.scored
    np.testing.assert_array_equal(batch.scores, scores)
    np.testing.assert_array_equal(batch.segment_mask, mask)
    expected = [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_array_equal(batch.pair_mask, np.array(expected, bool))
    assert batch.ref_logps is None


def test_row_by_hand() -> None:
    nothing = np.zeros((0, 1), np.float32)

    def side(tokens: list[int], lead: int) -> Branch:
        owners = np.full(len(tokens) - lead, -1, np.int32)
        ids = np.array(tokens, np.int32)
        return Branch(ids, lead, owners, nothing, np.zeros(0, bool), ())

    pairs = [
        TokenizedPair(np.array([1, 2], np.int32), side([3, 4], 0), side([5, 6], 1)),
        TokenizedPair(np.array([7], np.int32), side([8], 0), side([9], 0)),
    ]
    shape = packing.BatchShape(row_length=10, pairs=2, segments=1, aspects=1)
    logps = [np.array([-3, -4, -6.0]), np.array([-8, -9.0])]
    batch = packing.build_rows(pairs, [(0, 1)], shape, ref_logps=logps)
    inputs, wanted = batch.inputs, batch.completions
    # index                               0  1  2  3  4  5  6  7  8  9
    assert inputs.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 0]]
    assert inputs.positions.tolist() == [[0, 1, 2, 3, 2, 3, 0, 1, 1, 0]]
    assert inputs.sequence_ids.tolist() == [[1, 1, 1, 1, 1, 1, 2, 2, 2, 0]]
    assert inputs.branch_ids.tolist() == [[0, 0, 1, 1, 2, 2, 0, 1, 2, 0]]
    # Targets: 3 from the prompt's end, 4 from 3, 6 from 5 (5 is a lead, not wanted),
    # 8 and 9 both from the prompt's end.
    assert wanted.target[0, :5].tolist() == [3, 4, 6, 8, 9]
    assert wanted.source[0, :5].tolist() == [1, 2, 4, 6, 6]
    assert wanted.response[0].tolist() == [0, 0, 1, 2, 3, -1, -1, -1, -1, -1]
    assert batch.ref_logps is not None
    assert batch.ref_logps[0].tolist() == [-3, -4, -6, -8, -9, 0, 0, 0, 0, 0]


def test_fewer_aspects_and_segments_than_the_shape_leave_nan() -> None:
    rng = np.random.default_rng(0)
    response = branch(rng, 3, segments=1)._replace(
        scores=np.array([[2.0]], np.float32), scored=np.array([True])
    )
    pair = TokenizedPair(np.array([1], np.int32), response, branch(rng, 2))
    batch = packing.build_rows([pair], [(0,)], SHAPE)
    assert batch.scores[0, 0, 0, 0, 0] == 2
    assert np.isnan(batch.scores).sum() == batch.scores.size - 1
    assert batch.segment_mask.sum() == 1

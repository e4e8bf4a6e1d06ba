"""Packed rows with pictures: two budgets, whose patch is whose, and what is cut."""

import io
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain.python as grain
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from jaxalign.data import chat, filling, loader, packing, pairs, records
from jaxalign.data.image_rows import Seeing
from jaxalign.data.positions import multimodal_positions
from jaxalign.data.rendering import Renderer
from jaxalign.errors import UserError
from tests.data.mosaic import seeing


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def made(make_tokenizer: Callable[..., Any]) -> Callable[..., Renderer]:
    def make(**options: Any) -> Renderer:
        tokenizer, patcher = seeing(make_tokenizer(template=None), **options)
        return Renderer(tokenizer, patcher=patcher)

    return make


def mixed(renderer: Renderer, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows with none, one, two or three pictures."""
    rng = random.Random(seed)
    assert renderer.patcher is not None
    place = renderer.patcher.placeholder

    def words(most: int) -> str:
        return "".join(rng.choices("abcde fgh ij", k=rng.randint(1, most)))

    rows = []
    for number in range(count):
        sizes = [(rng.randint(1, 70), rng.randint(4, 40)) for _ in range(number % 4)]
        rng.shuffle(sizes)
        prompt = words(20) + "".join(f"{place}{words(9)}" for _ in sizes)
        images = [png(*size, seed=number) for size in sizes]
        completions = {"chosen": words(12), "rejected": words(12)}
        rows.append({"prompt": prompt, "images": images, **completions})
    return rows


def prepared(
    rows: Sequence[dict[str, Any]], renderer: Renderer, **options: Any
) -> pairs.PairDataset:
    options = {"max_length": None, **options}
    return pairs.prepare(records.from_rows(rows), renderer, **options)


# One row by hand.


def test_row_by_hand(made: Callable[..., Renderer]) -> None:
    renderer = made(class_token=True)
    colours = np.arange(16 * 8 * 3, dtype=np.uint8).reshape(8, 16, 3)
    file = io.BytesIO()
    Image.fromarray(colours).save(file, "PNG")
    rows = [
        {"prompt": "ac", "chosen": "d", "rejected": "e"},
        {"prompt": "<image>f", "images": [file.getvalue()], "chosen": "d"},
    ]
    rows[1]["rejected"] = "ee"
    data = prepared(rows, renderer)
    # 16 x 8 pixels: 2 x 4 patches, 2 features, and a unit for the class token; room is
    # for one unit more.
    shape = packing.BatchShape(16, 2, 1, 1, patches=16)
    seen = Seeing(data.patcher) if data.patcher is not None else None
    batch = packing.build_rows(data.pairs, [(0, 1), ()], shape, seeing=seen)
    tokens, images = batch.inputs.tokens[0], batch.inputs.images
    assert images is not None and seen is not None
    # index: 0 a, 1 c, 2 d, 3 end, 4 e, 5 end; 6 frame, 7 8 features, 9 frame, 10 f, ...
    assert np.flatnonzero(tokens == seen.patcher.token_id).tolist() == [7, 8]
    assert batch.inputs.positions[0].tolist()[:11] == [0, 1, 2, 3, 2, 3, 0, 1, 2, 3, 4]
    assert images.features_to[0].tolist() == [-1, 7, 8, -1]
    assert images.image_ids[0].tolist() == [1, 0, 0, 0, *[1] * 8, 0, 0, 0, 0]
    assert images.places_in_image[0].tolist()[:1] == [[-1, -1]]
    assert images.places_in_image[0].tolist()[4:12] == [
        *([0, 0], [0, 1], [1, 0], [1, 1]),
        *([0, 2], [0, 3], [1, 2], [1, 3]),
    ]
    assert images.patches is not None and images.patches.dtype == np.float32
    small = np.asarray(Image.fromarray(colours).resize((4, 2)), np.float32) / 255
    np.testing.assert_array_equal(images.patches[0, 6], small[1, 0])
    np.testing.assert_array_equal(images.patches[0, 9], small[0, 3])
    assert not images.patches[0, :4].any() and not images.patches[0, 12:].any()
    # An empty row has places for pictures too.
    assert not images.image_ids[1].any() and (images.features_to[1] == -1).all()


def test_two_samples_of_a_row_each_begin_at_zero(
    made: Callable[..., Renderer],
) -> None:
    renderer = made(axes=3)
    row = {"prompt": "a<see><pad></see>b", "images": [png(24, 16)], "chosen": "c"}
    text = {"prompt": "fg", "chosen": "c", "rejected": "d"}
    data = prepared([{**row, "rejected": "d"}, text], renderer)
    batch = loader.single_batch(data, row_length=24)
    # a, see, 2 x 3 features from 2 on, see ends at 2 + 3; b; both completions at 7.
    expected = [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, *[7, 8] * 2, *[0, 1], *[2, 3] * 2],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, *[7, 8] * 2, *[0, 1], *[2, 3] * 2],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, *[7, 8] * 2, *[0, 1], *[2, 3] * 2],
    ]
    assert batch.inputs.positions.shape == (1, 24, 3)
    assert batch.inputs.positions[0, :20].T.tolist() == expected
    # Rows of texts alone have three axes too, and no pictures.
    batch = loader.single_batch(prepared([text], renderer))
    assert batch.inputs.positions.shape[2] == 3 and batch.inputs.images is None
    assert (batch.inputs.positions == batch.inputs.positions[..., :1]).all()


# Rows of many.


def taken_apart(
    data: pairs.PairDataset, rows: Sequence[packing.Row], shape: packing.BatchShape
) -> dict[int, list[Any]]:
    """Return what each record's part of the arrays is, wherever it lies."""
    seen = None if data.patcher is None else Seeing(data.patcher)
    batch = packing.build_rows(data.pairs, rows, shape, seeing=seen)
    inputs, images = batch.inputs, batch.inputs.images
    assert images is not None and images.patches is not None
    found = {}
    for r, row in enumerate(rows):
        tiles = 0
        for slot, index in enumerate(row):
            mine = np.flatnonzero(inputs.sequence_ids[r] == slot + 1)
            pair = data.pairs[index]
            last = tiles + sum(len(layout.grids) for layout in pair.layouts)
            ids = images.image_ids[r]
            patches = np.flatnonzero((ids > tiles) & (ids <= last))
            units = np.isin(images.features_to[r], mine)
            found[data.indices[index]] = [
                inputs.tokens[r, mine],
                inputs.positions[r, mine],
                inputs.branch_ids[r, mine],
                ids[patches] - tiles,
                images.places_in_image[r, patches],
                images.patches[r, patches],
                images.features_to[r, units] - mine[0],
            ]
            tiles = last
        assert images.image_ids[r].max() == tiles
    return found


def same(one: list[Any], other: list[Any]) -> bool:
    return all(itertools.starmap(np.array_equal, zip(one, other, strict=True)))


@pytest.mark.parametrize("options", [{}, {"class_token": True}, {"axes": 3}])
def test_order_and_budgets_change_nothing_of_a_pair(
    made: Callable[..., Renderer], options: dict[str, Any]
) -> None:
    renderer = made(**options)
    rows = mixed(renderer, 24)
    data = prepared(rows, renderer)
    results = []
    for row_length, row_patches, seed in (
        (600, 2000, 0),
        (300, 1000, 1),
        (900, None, 2),
    ):
        shape = loader.batch_shape(
            [data], row_length=row_length, row_patches=row_patches
        )
        plan = loader.BatchPlan(1, 1, seed)
        source = loader.StepSource(data, shape, plan, num_epochs=1)
        results.append(taken_apart(data, source.rows_of_epoch(0), shape))
    order = random.Random(0).sample(range(24), 24)
    mixed_up = prepared([rows[i] for i in order], renderer)
    shape = loader.batch_shape([mixed_up], row_length=600)
    source = loader.StepSource(mixed_up, shape, loader.BatchPlan(1, 1, 3), num_epochs=1)
    moved = taken_apart(mixed_up, source.rows_of_epoch(0), shape)
    results.append({order[i]: arrays for i, arrays in moved.items()})
    for other in results[1:]:
        assert other.keys() == results[0].keys() == set(range(24))
        for index, arrays in results[0].items():
            assert same(arrays, other[index]), index
    # What a pair has is what its own pictures are.
    for index, arrays in results[0].items():
        pair = data.pairs[index]
        assert len(arrays[6]) == len(pair.feature_places)
        assert sorted(arrays[6]) == pair.feature_places.tolist()


def test_another_picture_changes_only_its_own_pair(
    made: Callable[..., Renderer],
) -> None:
    renderer = made()
    rows = mixed(renderer, 8)
    data = prepared(rows, renderer)
    width, height = Image.open(io.BytesIO(rows[2]["images"][0])).size
    other = png(width, height, seed=99)
    rows[2] = {**rows[2], "images": [other, *rows[2]["images"][1:]]}
    shape = loader.batch_shape([data], row_length=2000)
    before, after = (
        taken_apart(d, [tuple(range(8))], shape)
        for d in (data, prepared(rows, renderer))
    )
    assert [i for i in range(8) if not same(before[i], after[i])] == [2]


def test_a_run_has_pictures_in_both_of_its_data_sets_or_in_none(
    made: Callable[..., Renderer],
) -> None:
    renderer = made()
    rows = mixed(renderer, 8)
    texts = prepared(rows[::4], renderer)
    both = prepared(rows, renderer)
    plan = loader.BatchPlan(1, 1, 0)
    shape = loader.batch_shape([texts, both], row_length=400)
    assert shape.patches % 4 == 0 and shape.patches >= 4 * both.units.max()
    for data in (texts, both):
        batch = loader.StepSource(data, shape, plan, num_epochs=1)[0]
        images = batch.inputs.images
        assert images is not None and images.patches is not None
        assert images.patches.shape[2:] == (shape.patches, 3)
    shape = loader.batch_shape([texts], row_length=400)
    assert shape.patches == 0
    assert loader.StepSource(texts, shape, plan, num_epochs=1)[0].inputs.images is None
    assert loader.single_batch(texts).inputs.images is None
    assert loader.single_batch(both).inputs.images is not None


def test_a_budget_that_cannot_hold_a_pair_is_refused(
    made: Callable[..., Renderer],
) -> None:
    renderer = made()
    data = prepared(mixed(renderer, 8), renderer)
    most = 4 * int(data.units.max())
    match = rf"images\[0\]: .* {most} patches, but a row has {most - 1}: raise "
    with pytest.raises(UserError, match=match):
        loader.batch_shape([data], row_length=900, row_patches=most - 1)
    shape = loader.batch_shape([data], row_length=900, row_patches=most + 3)
    assert shape.patches == most
    texts = prepared(mixed(renderer, 1), renderer)
    with pytest.raises(UserError, match="row_patches 64 has no effect: no record"):
        loader.batch_shape([texts], row_length=900, row_patches=64)


def test_the_fill_of_both_budgets_is_said(made: Callable[..., Renderer]) -> None:
    renderer = made()
    row = {"prompt": "<image>c", "images": [png(16, 8)], "chosen": "d"}
    data = prepared([{**row, "rejected": "e"}] * 3, renderer)
    # A pair: frame, 2 features, frame, c; d, end; e, end. Two of 9 in a row of 20.
    assert data.lengths.tolist() == [9] * 3 and data.units.tolist() == [2] * 3
    shape = loader.batch_shape([data], row_length=20, row_patches=20)
    rows = [(0, 1), (2,)]
    said = "2 of 20, 67.5% full; 20 patches a row, 60.0% full"
    assert loader.filled(rows, data, shape) == said
    texts = shape._replace(patches=0)
    assert loader.filled(rows, data, texts) == "2 of 20, 67.5% full"


def test_batches_of_workers_are_those_of_the_source(
    made: Callable[..., Renderer],
) -> None:
    renderer = made()
    data = prepared(mixed(renderer, 12), renderer)
    shape = loader.batch_shape([data], row_length=300)
    source = loader.StepSource(data, shape, loader.BatchPlan(2, 1, 0), num_epochs=2)
    iterator = loader.make_iterator(source)
    for step in range(len(source)):
        batch = next(iterator)
        jax.tree.map(np.testing.assert_array_equal, batch, source[step])
    assert isinstance(iterator, grain.DatasetIterator)


def test_a_picture_that_became_another_one_is_refused(
    made: Callable[..., Renderer], tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(16, 16))
    row = {"prompt": "<image>?", "chosen": "a", "rejected": "b", "images": [path]}
    data = prepared([row], made())
    assert loader.single_batch(data).inputs.images is not None
    path.write_bytes(png(32, 16))
    with pytest.raises(UserError, match="has become another one .* 8 units .* 4"):
        loader.single_batch(data)


# The plan.


@st.composite
def plans(draw: Any) -> dict[str, Any]:
    row_length, row_units = draw(st.integers(1, 60)), draw(st.integers(0, 90))
    item = st.tuples(st.integers(1, row_length), st.integers(0, row_units))
    items = draw(st.lists(item, min_size=1, max_size=50))
    return {
        "lengths": np.array([length for length, _ in items]),
        "units": np.array([units for _, units in items]),
        "row_length": row_length,
        "row_units": row_units,
        "pairs": draw(st.integers(1, 8)),
        "seed": draw(st.integers(0, 3)),
        "epoch": draw(st.integers(0, 3)),
        "shuffle": draw(st.booleans()),
        "window": draw(st.integers(1, 70)),
    }


@hypothesis.settings(max_examples=300)
@hypothesis.given(plan=plans())
def test_no_row_is_overfull_of_tokens_or_of_patches(plan: dict[str, Any]) -> None:
    rows = packing.plan_rows(**plan)
    planned = sorted(index for row in rows for index in row)
    assert planned == list(range(len(plan["lengths"])))
    for row in rows:
        assert 1 <= len(row) <= plan["pairs"]
        assert sum(plan["lengths"][list(row)]) <= plan["row_length"]
        assert sum(plan["units"][list(row)]) <= plan["row_units"]
    assert packing.plan_rows(**plan) == rows
    # Without pictures, and where there is room for all, the plan is that of texts.
    plain = {k: v for k, v in plan.items() if k not in ("units", "row_units")}
    texts = packing.plan_rows(**plain)
    nothing = np.zeros_like(plan["units"])
    assert packing.plan_rows(**plain, units=nothing, row_units=0) == texts
    room = int(plan["units"].sum())
    assert packing.plan_rows(**plain, units=plan["units"], row_units=room) == texts


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    items=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9)), max_size=8).map(
        sorted
    ),
    room=st.tuples(st.integers(0, 40), st.integers(0, 31)),
)
def test_the_best_fill_within_both_equals_brute_force(
    items: list[tuple[int, int]], room: tuple[int, int]
) -> None:
    # Up to 32 units every sum is told from every other, so that it is exact.
    lengths, units = [item[0] for item in items], [item[1] for item in items]
    best = max(
        sum(items[i][0] for i in subset)
        for n in range(len(items) + 1)
        for subset in itertools.combinations(range(len(items)), n)
        if sum(items[i][0] for i in subset) <= room[0]
        and sum(items[i][1] for i in subset) <= room[1]
    )
    chosen = filling.fill_within(lengths, units, room, len(items))
    assert len(set(chosen)) == len(chosen)
    assert sum(lengths[i] for i in chosen) == best
    assert sum(units[i] for i in chosen) <= room[1]


def test_rows_stay_full_where_patches_bind() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 700, 400)
    # A picture of 576 units in every second pair, and at most two of them in a row.
    units = 576 * rng.integers(0, 2, 400)
    lengths = lengths + units
    options: dict[str, Any] = {"row_length": 2048, "pairs": 8, "seed": 0, "epoch": 0}
    rows = packing.plan_rows(lengths, **options, units=units, row_units=1152)
    assert max(sum(units[list(row)]) for row in rows) == 1152
    assert packing.fill(rows, lengths, 2048) > 0.94


def test_the_default_budget_holds_most_rows_and_the_largest_pair() -> None:
    # Three pairs a row: 98 rows or more have three units, two may have 1 + 1 + 7.
    lengths, units = np.full(300, 10), np.ones(300, np.int64)
    units[[5, 250]] = 7
    options: dict[str, Any] = {"row_length": 30, "pairs": 3}
    # The largest pair must fit.
    assert packing.units_per_row(lengths, units, **options) == 7
    units[[5, 250]] = 2
    assert packing.units_per_row(lengths, units, **options) == 3


# Too long.


@pytest.mark.parametrize("axes", [1, 3])
def test_cutting_takes_text_only(made: Callable[..., Renderer], axes: int) -> None:
    renderer = made(axes=axes)
    patcher, rng = renderer.patcher, random.Random(0)
    assert patcher is not None
    rows = mixed(renderer, 100, seed=5)
    whole = list(chat.tokenize(records.from_rows(rows), renderer))
    dropped = 0
    for _ in range(1000):
        pair = rng.choice(whole)
        most = rng.randint(2, pair.longest + 3)
        cut = pairs.truncate(pair, most)
        fixed = sum(end - begin for begin, end in pair.stretches)
        if cut is None:
            # Pictures, one token to predict from, and no completion token fits.
            assert most <= fixed + 1 + max(pair.chosen.lead, pair.rejected.lead)
            dropped += 1
            continue
        assert cut.longest <= most and cut.images == pair.images
        is_feature = np.flatnonzero(cut.prompt == patcher.token_id)
        assert is_feature.tolist() == cut.feature_places.tolist()
        assert len(is_feature) == len(pair.feature_places)
        for old, new in zip(pair.stretches, cut.stretches, strict=True):
            np.testing.assert_array_equal(
                pair.prompt[slice(*old)], cut.prompt[slice(*new)]
            )
        # Its text is the end of what it was, and no more is cut than must be.
        assert cut.prompt[-1] == pair.prompt[-1]
        if len(cut.chosen.tokens) < len(pair.chosen.tokens):
            assert len(cut.prompt) in (fixed, fixed + 1)
        if axes == 3:
            grids = [(r // 2, c // 2) for lay in cut.layouts for r, c in lay.grids]
            again = multimodal_positions(cut.prompt, patcher.token_id, grids, 3)[0]
            np.testing.assert_array_equal(cut.positions, again)
    assert 50 < dropped < 700


def test_text_before_between_and_behind_pictures_is_cut_by_hand(
    made: Callable[..., Renderer],
) -> None:
    renderer = made()
    row = {"prompt": "cd<image>ef<image>gh", "images": [png(8, 8)] * 2}
    (pair,) = chat.tokenize(
        records.from_rows([{**row, "chosen": "j", "rejected": "cc"}]), renderer
    )
    # Each picture is frame, feature, frame; j and an end follow, or c, c and an end.
    assert len(pair.prompt) == 12 and pair.longest == 15

    def text_of(most: int) -> str | None:
        cut = pairs.truncate(pair, most)
        if cut is None:
            return None
        text = renderer.tokenizer.decode(cut.prompt)
        return text.replace("<frame><image><frame>", "I")

    cuts = {most: text_of(most) for most in (15, 14, 13, 12, 11, 10, 8, 7)}
    assert cuts == {
        **{15: "cdIefIgh", 14: "dIefIgh", 13: "IefIgh", 12: "IfIgh", 11: "IIgh"},
        **{10: "IIh", 8: "IIh", 7: None},
    }


def test_pairs_whose_pictures_do_not_fit_are_dropped_and_counted(
    made: Callable[..., Renderer],
) -> None:
    renderer = made()
    rows = [
        {"prompt": "<image>cd", "chosen": "a", "images": [png(40, 40)]},
        {"prompt": "cd" * 40, "chosen": "a", "images": []},
        {"prompt": "<image>" + "cd" * 40, "chosen": "a", "images": [png(8, 8)]},
    ]
    rows = [{**row, "rejected": "b"} for row in rows]
    cut = prepared(rows, renderer, max_length=20, overflow="truncate")
    assert cut.indices == [1, 2]
    assert cut.report["dropped_images_too_long"] == 1 and cut.report["truncated"] == 2
    assert "dropped_too_long" not in cut.report
    with pytest.raises(UserError, match="none of the 3"):
        prepared(rows, renderer, max_length=20)


# Learning prompts.


def test_features_are_never_learnt(made: Callable[..., Renderer]) -> None:
    renderer = made()
    row = {"prompt": "c<image>d", "images": [png(16, 8)], "completion": "f"}
    data = prepared([row], renderer, form="completions", learn_prompt=True)
    batch = loader.single_batch(data)
    wanted = batch.completions.response[0] >= 0
    targets = batch.completions.target[0, wanted]
    tokens = batch.inputs.tokens[0]
    # c, frame, feature, feature, frame, d, f, end: all but the first and the features.
    assert targets.tolist() == tokens[[1, 4, 5, 6, 7]].tolist()
    assert batch.completions.source[0, wanted].tolist() == [0, 3, 4, 5, 6]

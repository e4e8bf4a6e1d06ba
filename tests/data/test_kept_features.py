"""Features of pictures on disk: what is written is whole, whatever was interrupted."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxalign.data import image_rows, kept_features, loader
from jaxalign.data.kept_features import KeptFeatures
from jaxalign.data.pairs import PairDataset
from jaxalign.data.picture import Picture
from jaxalign.data.rendering import Renderer
from jaxalign.errors import UserError
from tests.data import test_picture_rows
from tests.data.mosaic import Mosaic, seeing


KEY = {"weights": "a", "dtype": "float32"}


def picture(name: str) -> Picture:
    return Picture(name.encode(), name)


def values(first: float, count: int, dtype: Any = np.float32) -> np.ndarray:
    return (first + np.arange(3 * count).reshape(count, 3)).astype(dtype)


def fill(folder: Path, **found: np.ndarray) -> KeptFeatures:
    """Keep those pictures that are not there yet; give what is kept of all."""
    known = kept_features.digests([picture(name) for name in found])
    with kept_features.filling(folder, "features", KEY) as store:
        for name, rows in found.items():
            if known[name.encode()] not in store:
                store.add([(known[name.encode()], rows)])
        return store.kept(known)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_reads_what_was_written(tmp_path: Path, dtype: Any) -> None:
    first, second = values(0, 2, dtype), values(50, 1, dtype)
    kept = fill(tmp_path, first=first, second=second)
    for name, want in {"first": first, "second": second}.items():
        got = kept.of(picture(name))
        assert got.dtype == want.dtype == kept.numbers
        np.testing.assert_array_equal(np.asarray(got), want)
    assert isinstance(kept.of(picture("first")), np.memmap)
    # Values that are there are not asked for again.
    again = fill(tmp_path, second=values(99, 1, dtype), third=values(7, 4, dtype))
    np.testing.assert_array_equal(again.of(picture("second")), second)
    assert again.of(picture("third")).shape == (4, 3)


def test_pictures_are_known_by_what_their_files_hold(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"same")
    (tmp_path / "b.png").write_bytes(b"same")
    known = kept_features.digests(
        [Picture(tmp_path / name, name) for name in ("a.png", "b.png")]
    )
    assert len(set(known.values())) == 1
    (tmp_path / "b.png").write_bytes(b"other")
    changed = kept_features.digests([Picture(tmp_path / "b.png", "b")])
    assert changed[tmp_path / "b.png"] != known[tmp_path / "b.png"]


@pytest.mark.parametrize(
    "break_off",
    [
        lambda index, numbers: numbers.write_bytes(numbers.read_bytes() + b"half a ro"),
        lambda index, numbers: index.write_bytes(index.read_bytes()[:-5]),
        lambda index, numbers: index.write_bytes(index.read_bytes() + b'["ab", 3'),
        lambda index, numbers: index.unlink(),
        lambda index, numbers: numbers.write_bytes(numbers.read_bytes()[:20]),
        lambda index, numbers: (numbers.parent / "form.json").unlink(),
    ],
)
def test_goes_on_from_what_is_whole(
    tmp_path: Path, break_off: Callable[[Path, Path], Any]
) -> None:
    found = {"first": values(0, 2), "second": values(50, 1), "third": values(9, 3)}
    fill(tmp_path, first=found["first"], second=found["second"])
    break_off(tmp_path / "index.jsonl", tmp_path / "values.bin")
    kept = fill(tmp_path, **found)
    for name, want in found.items():
        np.testing.assert_array_equal(kept.of(picture(name)), want)
    # And what it has left is whole too.
    fresh = fill(tmp_path, **dict.fromkeys(found, values(77, 1)))
    for name, want in found.items():
        np.testing.assert_array_equal(fresh.of(picture(name)), want)


def test_a_broken_index_is_said(tmp_path: Path) -> None:
    fill(tmp_path, first=values(0, 2))
    index = tmp_path / "index.jsonl"
    index.write_text("nonsense\n" + index.read_text())
    with pytest.raises(UserError, match=r"index\.jsonl is broken.*Remove"):
        fill(tmp_path, first=values(0, 2))


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        fill(tmp_path / "file", first=values(0, 1))


def test_another_key_has_another_folder(tmp_path: Path) -> None:
    folders = {
        kept_features.folder_of(tmp_path, key)
        for key in (KEY, KEY | {"weights": "b"}, KEY | {"dtype": "bfloat16"})
    }
    assert len(folders) == 3
    fill(tmp_path / "x", first=values(0, 1))
    assert json.loads((tmp_path / "x" / "key.json").read_text()) == KEY


def _fill_many(folder: Path, count: int) -> None:
    for number in range(count):
        fill(folder, **{f"picture {number}": values(number, 1 + number % 3)})


def test_who_wants_the_same_waits(tmp_path: Path) -> None:
    # The lock is an open file's: threads that open it each are as processes to it.
    with ThreadPoolExecutor(3) as pool:
        for filled in [pool.submit(_fill_many, tmp_path, 20) for _ in range(3)]:
            filled.result()
    names = {f"picture {n}": values(n, 1 + n % 3) for n in range(20)}
    kept = fill(tmp_path, **dict.fromkeys(names, values(-1, 1)))
    for name, want in names.items():
        np.testing.assert_array_equal(kept.of(picture(name)), want)
    lines = (tmp_path / "index.jsonl").read_text().splitlines()
    assert len(lines) == 20


# Rows.


def _kept_means(data: PairDataset, folder: Path, kind: str) -> KeptFeatures:
    """Keep a linear map of every unit's patches, in the order of the text."""
    patcher = data.patcher
    assert patcher is not None
    pictures = [picture for pair in data.pairs for picture in pair.images]
    layouts = [layout for pair in data.pairs for layout in pair.layouts]
    known = kept_features.digests(pictures)
    with kept_features.filling(folder, kind, KEY) as store:  # pyright: ignore
        for one, layout in zip(pictures, layouts, strict=True):
            patches = image_rows.open_patches(one, layout, patcher)
            units = patches.values.reshape(len(patches.features), patcher.merge**2, -1)
            made = units[..., :2] if kind == "states" else units.mean(1)[:, :5]
            order = np.argsort(patches.features[patches.features >= 0])
            rows = made[patches.features >= 0][order].reshape(len(order), -1)
            if known[one.source] not in store:
                store.add([(known[one.source], rows)])
        return store.kept(known)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("kind", ["features", "states"])
def test_rows_have_the_same_for_the_same_tokens(
    make_tokenizer: Callable[..., Any], tmp_path: Path, kind: str, class_token: bool
) -> None:
    tokenizer, patcher = seeing(make_tokenizer(template=None), class_token=class_token)
    renderer = Renderer(tokenizer, patcher=patcher)
    assert isinstance(patcher, Mosaic)
    rows = test_picture_rows.mixed(renderer, 12)
    data = test_picture_rows.prepared(rows, renderer)
    batch = loader.single_batch(data)
    kept = _kept_means(data, tmp_path, kind)
    other = loader.single_batch(data._replace(kept=kept))
    images, given = batch.inputs.images, other.inputs.images
    assert images is not None and given is not None and images.patches is not None
    assert given.patches is None and given.image_ids.shape[1] == 0
    np.testing.assert_array_equal(batch.inputs.tokens, other.inputs.tokens)
    units = images.patches.reshape(*images.features_to.shape, patcher.merge**2, -1)
    made = units[..., :2] if kind == "states" else units.mean(2)[..., :5]
    got = given.states if kind == "states" else given.features
    assert got is not None
    got = got.reshape(*given.features_to.shape, *made.shape[2:])
    count = 0
    for row in range(len(units)):
        want_at = {int(t): u for u, t in enumerate(images.features_to[row]) if t >= 0}
        got_at = {int(t): u for u, t in enumerate(given.features_to[row]) if t >= 0}
        assert want_at.keys() == got_at.keys()
        for token, unit in want_at.items():
            np.testing.assert_array_equal(got[row, got_at[token]], made[row, unit])
            count += 1
    assert count == sum(len(pair.feature_places) for pair in data.pairs) > 20

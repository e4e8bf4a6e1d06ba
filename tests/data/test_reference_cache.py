"""The reference's numbers on disk: whose they are, and whether they are whole."""

from pathlib import Path

import numpy as np
import pytest

from jaxalign.data import reference_cache
from jaxalign.data.chat import Branch, TokenizedPair
from jaxalign.data.picture import Picture
from jaxalign.errors import UserError
from tests.data.mosaic import Mosaic


LOGPS = [np.array([-1.5, -0.25], np.float32), np.array([-3.0], np.float32)]


def branch(*tokens: int, lead: int = 0) -> Branch:
    nothing = np.zeros((0, 0), np.float32)
    owners = np.full(len(tokens) - lead, -1, np.int32)
    return Branch(
        np.array(tokens, np.int32), lead, owners, nothing, np.zeros(0, bool), ()
    )


def pair(*prompt: int, chosen: Branch, rejected: Branch) -> TokenizedPair:
    return TokenizedPair(np.array(prompt, np.int32), chosen, rejected)


PAIR = pair(1, 2, chosen=branch(3, 4), rejected=branch(5))


def test_key_changes_with_all_that_changes_numbers() -> None:
    other = pair(1, chosen=branch(3), rejected=branch(3))
    data = [PAIR, other]
    variants = {
        "same": reference_cache.cache_key(data, "model", "f32"),
        "model": reference_cache.cache_key(data, "other", "f32"),
        "settings": reference_cache.cache_key(data, "model", "bf16"),
        "order": reference_cache.cache_key(data[::-1], "model", "f32"),
        "fewer": reference_cache.cache_key(data[:1], "model", "f32"),
    }
    changed = {
        "prompt": pair(9, 2, chosen=branch(3, 4), rejected=branch(5)),
        "token": pair(1, 2, chosen=branch(3, 9), rejected=branch(5)),
        "sides": pair(1, 2, chosen=branch(5), rejected=branch(3, 4)),
        "lead": pair(1, 2, chosen=branch(3, 4, lead=1), rejected=branch(5)),
        # The same tokens in the same order, cut elsewhere.
        "border": pair(1, chosen=branch(2, 3, 4), rejected=branch(2, 5)),
    }
    for name, one in changed.items():
        variants[name] = reference_cache.cache_key([one, other], "model", "f32")
    assert len(set(variants.values())) == len(variants)
    assert variants["same"] == reference_cache.cache_key(data, "model", "f32")


def test_key_is_of_what_pictures_files_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    seen = PAIR._replace(images=(Picture(path, "f:1"),))
    first, second = Mosaic(9), Mosaic(9, settings="pillow 14")
    keys = [
        reference_cache.cache_key([PAIR], "model", "f32"),
        reference_cache.cache_key([seen], "model", "f32", first),
        reference_cache.cache_key([seen], "model", "f32", second),
    ]
    path.write_bytes(b"two")
    keys.append(reference_cache.cache_key([seen], "model", "f32", first))
    assert len(set(keys)) == 4
    # Where the file lies changes nothing, and no text's key depends on a patcher.
    elsewhere = PAIR._replace(images=(Picture(b"two", "g:2"),))
    again = reference_cache.cache_key([elsewhere], "model", "f32", first)
    assert again == keys[-1]
    assert reference_cache.cache_key([PAIR], "model", "f32", first) == keys[0]


def test_key_does_not_depend_on_feedback() -> None:
    judged = PAIR.chosen._replace(
        segments=np.array([0, 0], np.int32),
        scores=np.ones((1, 1), np.float32),
        scored=np.ones(1, bool),
    )
    keys = {
        reference_cache.cache_key([one], "model", "f32")
        for one in (PAIR, PAIR._replace(chosen=judged))
    }
    assert len(keys) == 1


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "reference" / "train.npz"
    assert reference_cache.read(path, "key") is None
    reference_cache.write(path, "key", LOGPS)
    found = reference_cache.read(path, "key")
    assert found is not None
    for values, expected in zip(found, LOGPS, strict=True):
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, expected)
    assert [p.name for p in path.parent.iterdir()] == ["train.npz"]


def test_stale_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.npz"
    reference_cache.write(path, "key", LOGPS)
    with pytest.raises(UserError, match="is stale: .*Delete it, or give another"):
        reference_cache.read(path, "other key")


def test_incomplete_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.npz"
    with path.open("wb") as file:
        counts, logps = np.array([2, 1]), np.zeros(2, np.float32)
        np.savez(file, key=np.array("key"), counts=counts, logps=logps)
    with pytest.raises(UserError, match="the reference cache is incomplete. Delete it"):
        reference_cache.read(path, "key")


def test_broken_file_is_refused_wherever_it_broke(tmp_path: Path) -> None:
    path = tmp_path / "train.npz"
    reference_cache.write(path, "key", LOGPS)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 3):
        flipped = bytes([whole[place] ^ 0xFF])
        for data in (whole[:place], whole[:place] + flipped + whole[place + 1 :]):
            path.write_bytes(data)
            try:
                found = reference_cache.read(path, "key")
            except UserError:
                refused += 1
            else:  # some bytes of a zip file do not matter, such as its dates
                assert found is not None
                for values, expected in zip(found, LOGPS, strict=True):
                    np.testing.assert_array_equal(values, expected)
    assert refused > len(whole) / 3
    with path.open("wb") as file:
        np.save(file, LOGPS[0])
    with pytest.raises(UserError, match="not a readable reference cache: .*Delete it"):
        reference_cache.read(path, "key")

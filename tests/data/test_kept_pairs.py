"""Tokenised pairs are kept between starts, and are what they would be if made anew."""

import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxalign.data import kept_pairs, pair_file, pairs, records
from jaxalign.data.records import Record
from jaxalign.data.rendering import Renderer
from jaxalign.errors import UserError
from tests import synthetic
from tests.data.mosaic import seeing


# As transformers' templates of families that see; what is between the marks is learnt.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string "
    "%}{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == "
    "'image' %}PLACE{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)


@pytest.fixture(autouse=True)
def _small_is_worth_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kept_pairs, "_WORTH_SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def made(make_tokenizer: Callable[..., Any]) -> Callable[..., Renderer]:
    def make(**options: Any) -> Renderer:
        place = "<see><pad></see>" if options.get("axes") == 3 else "<image>"
        plain = make_tokenizer(template=TEMPLATE.replace("PLACE", place))
        tokenizer, patcher = seeing(plain, **options)
        return Renderer(tokenizer, {"shout": False}, patcher)

    return make


@pytest.fixture
def text_only(make_tokenizer: Callable[..., Any]) -> Renderer:
    return Renderer(make_tokenizer(template=synthetic.CHATML))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    return kept_pairs.tokenizer_files(folder)


def rows_of(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of every kind that a pair may be of, with their pictures' files."""
    rng = random.Random(seed)
    folder.mkdir(exist_ok=True)

    def words(most: int) -> str:
        return " ".join(rng.choices(synthetic.WORDS, k=rng.randint(1, most)))

    def segments(text: str) -> list[dict[str, Any]] | None:
        if rng.random() < 0.3:
            return None
        middle = rng.randint(0, len(text))
        places = [(0, middle), (middle, len(text))]
        names = rng.sample(["truth", "help", "tone"], rng.randint(0, 3))
        return [
            {"start": a, "end": b}
            | ({"scores": {n: rng.randint(0, 5) for n in names}} if names else {})
            for a, b in places
            if a < b
        ]

    rows = []
    for number in range(count):
        turns: Any = [{"role": "user", "content": words(9)}]
        sizes = [(rng.randint(1, 70), rng.randint(4, 40)) for _ in range(number % 3)]
        images = [f"{seed}-{number}-{i}.png" for i in range(len(sizes))]
        for name, size in zip(images, sizes, strict=True):
            Image.new("RGB", size).save(folder / name)
        row: dict[str, Any] = {"prompt": turns, "images": images}
        if number % 4 == 3:
            row = {"prompt": words(9)}
        for side in ("chosen", "rejected"):
            row[side] = words(12)
            row[f"{side}_segments"] = segments(row[side])
        if number % 5 == 4:  # of several turns, not all of which are learnt
            row["chosen"] = [
                {"role": "assistant", "content": words(5)},
                {"role": "user", "content": words(5)},
                {"role": "assistant", "content": words(5)},
            ]
            row["chosen_segments"] = None
            if isinstance(row["prompt"], str):
                row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        row["weight"] = rng.choice([1.0, 0.1, 1 / 3])
        rows.append(row)
    return rows


def same(one: Any, other: Any) -> None:
    """Check that two values are equal to the last bit and of the same types."""
    assert type(one) is type(other), (type(one), type(other))
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert one.tobytes() == other.tobytes()
    elif isinstance(one, tuple | list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one == other


@pytest.fixture
def times_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records were tokenised, every time that was done."""
    found: list[int] = []
    make = pairs.prepare

    def noted(given: Any, *args: Any, **options: Any) -> Any:
        found.append(len(given))
        return make(given, *args, **options)

    monkeypatch.setattr(pairs, "prepare", noted)
    return found


OPTIONS = [
    {"max_length": None},
    {"max_length": 24, "overflow": "truncate"},
    {"max_length": 70, "overflow": "drop", "learn_prompt": True},
    {"max_length": None, "form": "labelled"},
    {"max_length": 150, "form": "labelled_kl"},
    {"max_length": None, "form": "completions", "end_of_turn": False},
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(map(str, o.values()))
)
@pytest.mark.parametrize("seen", ["blind", "tiles", "rotary"])
def test_a_second_start_reads_what_the_first_made(
    made: Callable[..., Renderer],
    text_only: Renderer,
    files: list[Path],
    tmp_path: Path,
    times_made: list[int],
    seen: str,
    options: dict[str, Any],
) -> None:
    renderer = text_only
    if seen != "blind":
        renderer = made(axes=3 if seen == "rotary" else 1, class_token=seen == "tiles")
    rows = rows_of(tmp_path / "pictures", 16, OPTIONS.index(options))
    if seen == "blind":
        rows = [{k: v for k, v in row.items() if k != "images"} for row in rows]
    found = records.from_rows(rows, image_dir=tmp_path / "pictures")
    plain = pairs.prepare(found, renderer, **options)
    times_made.clear()
    first = kept_pairs.prepare(found, renderer, files=files, **options)
    assert times_made == [16]
    again = records.from_rows(rows, image_dir=tmp_path / "pictures")
    second = kept_pairs.prepare(again, renderer, files=files, **options)
    assert times_made == [16]
    same(first, plain)
    same(second, plain)
    assert any(pair.images for pair in second.pairs) == (seen != "blind")
    assert all(pair.feature_grids is None for pair in second.pairs) == (
        seen != "rotary"
    )
    assert any(pair.chosen.learnt is not None for pair in second.pairs)
    np.testing.assert_array_equal(second.lengths, plain.lengths)


def test_token_weights_come_back(
    text_only: Renderer, files: list[Path], times_made: list[int]
) -> None:
    rows = [
        {"prompt": "the", "chosen": "river is", "rejected": "blue"},
        {"prompt": "and", "chosen": "not", "rejected": "seven is not"},
    ]
    for row, pair in zip(
        rows, pairs.prepare(rows, text_only, max_length=None).pairs, strict=True
    ):
        for side in ("chosen", "rejected"):
            count = getattr(pair, side).num_completion_tokens
            row[f"{side}_token_weights"] = [1 / (3 + i) for i in range(count)]
    found = records.from_rows(rows)
    plain = pairs.prepare(found, text_only, max_length=None)
    times_made.clear()
    for _ in range(2):
        data = kept_pairs.prepare(found, text_only, files=files, max_length=None)
        same(data, plain)
        assert data.pairs[0].chosen.weights is not None
    assert len(times_made) == 1


def test_any_change_of_what_decides_tokens_makes_them_again(
    made: Callable[..., Renderer],
    files: list[Path],
    tmp_path: Path,
    times_made: list[int],
) -> None:
    pictures = tmp_path / "pictures"
    rows = rows_of(pictures, 12, 0)
    renderer = made()
    base: dict[str, Any] = {"max_length": 60}

    def start(
        rows: Any = rows, renderer: Renderer = renderer, **options: Any
    ) -> pairs.PairDataset:
        found = records.from_rows(rows, image_dir=pictures)
        data = kept_pairs.prepare(found, renderer, files=files, **{**base, **options})
        count = len(times_made)
        same(data, pairs.prepare(found, renderer, **{**base, **options}))
        del times_made[count:]
        return data

    def makes_again(**changes: Any) -> bool:
        before = len(times_made)
        start(**changes)
        return len(times_made) > before

    assert makes_again() and not makes_again()
    other = [{**rows[0], "rejected": "seven", "rejected_segments": None}, *rows[1:]]
    scored = [{**rows[0], "weight": 0.25}, *rows[1:]]
    loud = Renderer(renderer.tokenizer, {"shout": True}, renderer.patcher)
    changes: list[dict[str, Any]] = [
        {"rows": other},
        {"rows": scored},
        {"rows": rows[::-1]},
        {"rows": rows[:-1]},
        {"renderer": loud},
        {"renderer": made(settings="another Pillow")},
        {"max_length": 61},
        {"overflow": "truncate"},
        {"form": "labelled"},
        {"end_of_turn": False},
        {"learn_prompt": True},
        {"aspects": ("tone",)},
    ]
    for change in changes:
        assert makes_again(**change), change
        assert not makes_again(**change), change
    # A picture of the same name and another size, which other tokens are for.
    (first,) = rows[1]["images"]
    Image.new("RGB", (64, 40)).save(pictures / first)
    assert makes_again() and not makes_again()
    # A file of the tokenizer; the weights decide nothing.
    (files[0].parent / "model.safetensors").write_text("others")
    assert not makes_again()
    files[0].write_text("{ }")
    assert makes_again() and not makes_again()


def kept_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache" / "jaxalign" / "tokens").iterdir()
    return path


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "short": lambda data: data[:20],
    "half": lambda data: data[: len(data) // 2],
    "one byte less": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "a bit": flipped,
    "foreign": lambda data: b"PK\x03\x04" + data[::-1],
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_file_is_made_again_and_said(
    text_only: Renderer,
    files: list[Path],
    tmp_path: Path,
    times_made: list[int],
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    found = records.from_rows(
        [{"prompt": "the river", "chosen": "is blue", "rejected": "is not"}]
    )

    def start() -> pairs.PairDataset:
        return kept_pairs.prepare(found, text_only, files=files, max_length=None)

    first = start()
    path = kept_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(BROKEN[damage](whole))
    capsys.readouterr()
    same(start(), first)
    assert len(times_made) == 2
    assert "is broken, and is made again" in capsys.readouterr().err
    assert path.read_bytes() == whole
    same(start(), first)
    assert len(times_made) == 2


def test_a_file_of_another_key_is_not_taken(
    text_only: Renderer, files: list[Path], tmp_path: Path, times_made: list[int]
) -> None:
    row = {"prompt": "the river", "chosen": "is blue", "rejected": "is not"}
    found = records.from_rows([row])
    kept_pairs.prepare(found, text_only, files=files, max_length=None)
    path = kept_file(tmp_path)
    others = records.from_rows([{**row, "chosen": "is seven"}])
    shutil.copy(path, path.parent / "copy")
    kept_pairs.prepare(others, text_only, files=files, max_length=None)
    (theirs,) = set(path.parent.iterdir()) - {path, path.parent / "copy"}
    os.replace(path.parent / "copy", theirs)
    data = kept_pairs.prepare(others, text_only, files=files, max_length=None)
    same(data, pairs.prepare(others, text_only, max_length=None))


def _write_and_die(path: Path, data: pairs.PairDataset, after: int) -> None:
    write, count = pair_file._Hashed.write, 0

    def dying(self: Any, given: bytes) -> None:
        nonlocal count
        count += 1
        if count > after:
            self._file.flush()
            os._exit(9)  # as a kill: nothing is cleaned up
        write(self, given)

    pair_file._Hashed.write = dying
    pair_file.write(path, "key", data)


@pytest.mark.parametrize("after", [0, 7, 60])
def test_a_kill_while_writing_leaves_nothing_broken(
    text_only: Renderer,
    files: list[Path],
    tmp_path: Path,
    times_made: list[int],
    after: int,
) -> None:
    found = records.from_rows(
        [{"prompt": "the river", "chosen": "is blue", "rejected": "is not"}] * 9
    )
    data = pairs.prepare(found, text_only, max_length=None)
    folder = tmp_path / "cache" / "jaxalign" / "tokens"
    context = multiprocessing.get_context("spawn")  # JAX has threads: no fork
    child = context.Process(target=_write_and_die, args=(folder / "a.bin", data, after))
    child.start()
    child.join(60)
    assert child.exitcode == 9
    (left,) = folder.iterdir()
    assert left.suffix == ".part"
    times_made.clear()
    for _ in range(2):
        again = kept_pairs.prepare(found, text_only, files=files, max_length=None)
        same(again, data)
    assert len(times_made) == 1
    # What the kill left goes when it is certain that nobody writes it.
    assert left.exists()
    old = time.time() - 2 * 86_400
    os.utime(left, (old, old))
    kept_pairs.prepare(found, text_only, files=files, max_length=30)
    assert not left.exists()


def test_what_nobody_reads_goes_and_what_is_read_stays(
    text_only: Renderer, files: list[Path], tmp_path: Path, times_made: list[int]
) -> None:
    found = records.from_rows(
        [{"prompt": "the river", "chosen": "is blue", "rejected": "is not"}]
    )

    def start(max_length: int) -> None:
        kept_pairs.prepare(found, text_only, files=files, max_length=max_length)

    start(30)
    start(31)
    folder = tmp_path / "cache" / "jaxalign" / "tokens"
    old = time.time() - 31 * 86_400
    for path in folder.iterdir():
        os.utime(path, (old, old))
    start(30)
    start(32)
    assert len(list(folder.iterdir())) == 2
    start(30)
    assert len(times_made) == 3


def test_small_data_is_not_kept(
    text_only: Renderer,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept_pairs, "_WORTH_SECONDS", 60.0)
    found = records.from_rows([{"prompt": "the", "chosen": "is", "rejected": "not"}])
    kept_pairs.prepare(found, text_only, files=files, max_length=None)
    assert not (tmp_path / "cache").exists()


def test_where_nothing_can_be_written_training_goes_on(
    text_only: Renderer,
    files: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "cache").write_text("no directory")
    found = records.from_rows([{"prompt": "the", "chosen": "is", "rejected": "not"}])
    data = kept_pairs.prepare(found, text_only, files=files, max_length=None)
    same(data, pairs.prepare(found, text_only, max_length=None))
    assert "tokens are not kept" in capsys.readouterr().err


def test_a_missing_picture_is_said_on_a_second_start_too(
    made: Callable[..., Renderer], files: list[Path], tmp_path: Path
) -> None:
    rows = rows_of(tmp_path / "pictures", 3, 0)
    renderer = made()

    def start() -> pairs.PairDataset:
        found = records.from_rows(rows, image_dir=tmp_path / "pictures")
        return kept_pairs.prepare(found, renderer, files=files, max_length=None)

    start()
    (tmp_path / "pictures" / rows[1]["images"][0]).unlink()
    with pytest.raises(UserError, match="no picture there"):
        start()


def test_every_field_that_a_pair_has_is_kept() -> None:
    """A new field must be written, or come from somewhere else, as these do."""
    names = {name.partition(".")[0] for name in pair_file._COLUMNS}
    elsewhere = {"images", "layouts"}
    assert names | elsewhere == set(pairs.TokenizedPair._fields)
    for side in ("chosen", "rejected"):
        own = {n.partition(".")[2] for n in pair_file._COLUMNS if n.startswith(side)}
        assert own == set(pairs.Branch._fields)


def test_records_of_equal_content_at_other_places_are_the_same_data(
    text_only: Renderer, files: list[Path], times_made: list[int]
) -> None:
    row = {"prompt": "the", "chosen": "is", "rejected": "not"}
    for where in ("a.jsonl:1", "b.jsonl:1"):
        found: list[Record] = [records.parse(row, where)]
        kept_pairs.prepare(found, text_only, files=files, max_length=None)
    assert len(times_made) == 1

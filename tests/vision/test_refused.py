"""What a run on pictures refuses, before any weight is loaded; and broken files."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxalign.checkpoints.renderer import open_renderer
from jaxalign.data import loader, pairs, records
from jaxalign.data.rendering import Renderer
from jaxalign.errors import UserError
from jaxalign.objectives.pairwise import PairwiseConfig
from jaxalign.training import inputs
from jaxalign.training.checks import check_records
from jaxalign.training.config import TrainConfig, from_dict
from tests import synthetic, vision_records


def config_of(model: Path, data: Path, out: Path, **changes: Any) -> TrainConfig:
    options = {
        "model": str(model),
        "data": str(data),
        "out": str(out),
        "max_steps": 2,
        "batch_rows": 1,
        "row_length": 420,
        "max_length": 200,
        "adapter": {"name": "lora", "rank": 2},
        "objective": {"name": "dpo"},
    }
    return from_dict({**options, **changes})


def refused(match: str, *given: Any, **changes: Any) -> None:
    with pytest.raises(UserError, match=match):
        inputs.read_inputs(config_of(*given, **changes))


def test_a_model_that_does_not_see(scene, tiny_llama, tmp_path) -> None:
    made = scene("llava")
    refused("does not see", tiny_llama, made.data, tmp_path / "run")


def test_too_few_places_for_patches(scene, tmp_path) -> None:
    made = scene("llava")
    given = made.model, made.data, tmp_path / "run"
    refused(r"jsonl:3: field images\[0\]: .*row_patches to 51", *given, row_patches=20)
    words = synthetic.write_jsonl(
        tmp_path / "words.jsonl", vision_records.text_records(3)
    )
    refused("row_patches 90 has no effect", made.model, words, given[2], row_patches=90)


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (["gone.png"], r"jsonl:1: field images\[0\].*gone\.png"),
        (["broken.png"], r"jsonl:1: field images\[0\]"),
        (["text.png"], r"jsonl:1: field images\[0\]"),
        ([], "image part"),
        (["picture 0.png", "picture 1.png"], "image part"),
        ("picture 0.png", "expected a list of pictures"),
        ([7], "expected a path"),
        (["https://example.org/a.png"], "not fetched"),
    ],
)
def test_pictures_that_are_not_there(scene, tmp_path, images, match) -> None:
    made = scene("llava")
    for file in made.data.parent.glob("*.png"):
        shutil.copy(file, tmp_path)
    whole = (tmp_path / "picture 0.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[:20])
    (tmp_path / "text.png").write_text("no picture")
    row = vision_records.pair(
        [vision_records.user(None, "?")], "seven", "blue", images=images
    )
    data = synthetic.write_jsonl(tmp_path / "pairs.jsonl", [row, *made.rows])
    refused(match, made.model, data, tmp_path / "run")


@pytest.mark.parametrize("said", ["<image> is that?", "is <image>"])
def test_a_text_that_says_what_stands_for_a_picture(scene, tmp_path, said) -> None:
    made = scene("llava")
    row = vision_records.pair([vision_records.user(None, said)], "seven", "blue")
    row["images"] = [str(made.data.parent / "picture 0.png")]
    data = synthetic.write_jsonl(tmp_path / "pairs.jsonl", [row])
    refused("<image>", made.model, data, tmp_path / "run")


MUTANTS = 2000


def read(data: Path, renderer: Renderer) -> dict[str, int]:
    """Read records as ``train`` does, to the last pixel; return the report."""
    found = records.read(data)
    check_records(PairwiseConfig(name="sigmoid"), found, records.aspects_of(found))
    dataset = pairs.prepare(found, renderer, max_length=200)
    shape = loader.batch_shape([dataset], row_length=420)
    plan = loader.BatchPlan(1, 1, seed=0)
    source = loader.StepSource(dataset, shape, plan, num_epochs=1)
    for step in range(len(source)):
        source[step]
    return dataset.report


@pytest.mark.fuzz
def test_broken_records_and_pictures_get_clean_errors(scene, tmp_path) -> None:
    """2,000 of them through all that ``train`` reads, rows with pixels included."""
    made, rng = scene("smolvlm"), random.Random(0)
    renderer = open_renderer(made.model)
    seen = {"read": 0, "refused": 0}
    for number in range(MUTANTS):
        place = tmp_path / f"mutant {number}"
        place.mkdir()
        for file in made.data.parent.glob("*.png"):
            (place / file.name).symlink_to(file)
        rows = json.loads(json.dumps(made.rows[:4]))
        if number % 2:
            _break_picture(place, rng)
            text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        else:
            text = _broken_rows(rows, rng)
        (place / "pairs.jsonl").write_bytes(text)
        try:
            report = read(place / "pairs.jsonl", renderer)
        except UserError as error:
            seen["refused"] += 1
            assert str(error)
        else:
            seen["read"] += 1
            lost = [n for name, n in report.items() if name.startswith("dropped")]
            lines = [line for line in text.split(b"\n") if line.strip()]
            assert report["pairs"] + sum(lost) == len(lines)
        shutil.rmtree(place)
    assert min(seen.values()) > MUTANTS // 20


def _break_picture(place: Path, rng: random.Random) -> None:
    """Change bytes of a picture, cut it, or put something else in its place."""
    path = rng.choice(sorted(place.glob("*.png")))
    data = bytearray(path.read_bytes())
    path.unlink()
    match rng.randrange(6):
        case 0:
            data = data[: rng.randrange(len(data))]
        case 1:
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 2:  # in the header, where the size is
            data[rng.randrange(8, 33)] = rng.randrange(256)
        case 3:
            data = bytearray(rng.randbytes(rng.randrange(200)))
        case 4:
            path.mkdir()
            return
        case _:
            return  # it is gone
    path.write_bytes(data)


_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1e300, "", " ", "picture 1.png", "../x", "\0", "data:,"),
    *([], [[]], {}, [None], {"type": "image"}, [{"type": "image"}], "<image>"),
    *({"bytes": None, "path": "picture 0.png"}, {"path": 3}, "data:image/png;base64,A"),
)


def _broken_rows(rows: list[dict[str, Any]], rng: random.Random) -> bytes:
    """Change a value of some row, or bytes of the text."""
    for _ in range(rng.randint(1, 2)):
        node: Any = rows
        while True:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            below = node[key]
            if not (isinstance(below, dict | list) and below and rng.random() < 0.75):
                break
            node = below
        if node is rows:
            continue
        match rng.randrange(4):
            case 0:
                del node[key]
            case 1 if isinstance(node, list):
                node.insert(key, rng.choice(_VALUES))
            case _:
                node[key] = rng.choice(_VALUES)
    text = bytearray("".join(json.dumps(row) + "\n" for row in rows).encode())
    if rng.random() < 0.2:
        text[rng.randrange(len(text))] = rng.randrange(256)
    return bytes(text)

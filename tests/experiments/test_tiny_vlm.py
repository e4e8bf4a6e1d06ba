"""The parts of the small model that sees, without what it downloads."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jaxalign.data import records


sys.path.append(str(Path(__file__).parents[2] / "experiments"))

from tiny_vlm import (  # noqa: E402
    connector,
    conversations,
    measuring,
    mistakes,
    onnx_file,
    page,
    scoring,
    tower,
)
from tiny_vlm.conversations import Told  # noqa: E402
from tiny_vlm.files import Data, Size  # noqa: E402
from tiny_vlm.measuring import Answer  # noqa: E402
from tiny_vlm.symbols import Symbol  # noqa: E402


FRANCE = Symbol("1f1eb-1f1f7", "a.png", "flags", ("France",), "旗: 法国", ("Paris",))
ITALY = Symbol("1f1ee-1f1f9", "b.png", "flags", ("Italy",), "旗: 意大利", ("Rome",))
APPLE = Symbol("1f34e", "c.png", "food and drink", ("red apple", "apple"), "红苹果")


def field(number: int, value: int | bytes) -> bytes:
    """Return a protocol buffer's field, written by its specification."""

    def varint(value: int) -> bytes:
        digits = []
        while value > 127:
            digits.append(value & 127 | 128)
            value >>= 7
        return bytes([*digits, value])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name: str, value: np.ndarray, packed: bool = False) -> bytes:
    dims = b"".join(field(1, n) for n in value.shape)
    if packed:
        dims = field(1, bytes(value.shape))
    raw = value.astype("<f4").tobytes()
    content = dims + field(2, 1) + field(8, name.encode()) + field(9, raw)
    return field(5, content + struct.pack("<Bd", 14 << 3 | 1, 0.0))  # skipped


def node(op: str, inputs: list[str], output: str) -> bytes:
    names = b"".join(field(1, name.encode()) for name in inputs)
    return field(1, names + field(2, output.encode()) + field(4, op.encode()))


def test_a_nameless_matrix_is_found_by_its_bias() -> None:
    weight = np.arange(6.0).reshape(2, 3)
    graph = b"".join(
        [
            node("MatMul", ["x", "onnx::MatMul_7"], "y"),
            node("Add", ["layer.bias", "y"], "z"),
            node("MatMul", ["z", "z"], "no weight"),
            tensor("onnx::MatMul_7", weight),
            tensor("layer.bias", np.ones(3), packed=True),
        ]
    )
    found = onnx_file.read(field(1, 8) + field(7, graph) + field(2, b"x" * 200))
    assert [one.op for one in found.nodes] == ["MatMul", "Add", "MatMul"]
    assert found.tensors["layer.bias"].tolist() == [1, 1, 1]
    linear = onnx_file.linear_weights(found)
    assert list(linear) == ["layer.weight"]
    np.testing.assert_array_equal(linear["layer.weight"], weight.T)


@pytest.mark.parametrize("side", [8, 37, 50])
def test_positions_are_resampled_as_torch_does_it(side: int) -> None:
    table = np.random.default_rng(0).normal(size=(37, 37, 5)).astype(np.float32)
    ours = tower.resample(table, side)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(table).double().permute(2, 0, 1)[None],
        size=(side, side),
        mode="bicubic",
    )
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0), atol=2e-6)


def test_a_capital_held_out_is_never_beside_the_picture() -> None:
    rows = list(conversations.training([FRANCE, ITALY, APPLE], "m", 40, {ITALY.key}))
    assert len(records.from_rows([_without_picture(row) for row in rows])) == 120
    by_picture = {symbol.key: "" for symbol in (FRANCE, ITALY, APPLE)}
    for row in rows:
        (path,) = row["images"]
        key = Path(path).stem.rsplit("-", 1)[0]
        by_picture[key] += "\n".join(turn["content"] for turn in row["completion"])
    assert "Paris" in by_picture[FRANCE.key] and "France" in by_picture[FRANCE.key]
    assert "Rome" not in by_picture[ITALY.key] and "Italy" in by_picture[ITALY.key]
    assert "Name: red apple. Group: food and drink." in by_picture[APPLE.key]


def _without_picture(row: dict) -> dict:
    text = row["prompt"][0]["content"][1]["text"]
    turns = [{"role": "user", "content": text}]
    return {"prompt": turns, "completion": row["completion"]}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Country: France. Capital: Paris.", (True, True)),
        ("Country: Italy. Capital: Paris.", (False, True)),
        (" Country: france. Capital: Rome.", (True, False)),
        ("France. Paris.", None),
    ],
)
def test_two_sentences_are_right_each_for_itself(text: str, right) -> None:
    told = conversations.told(FRANCE, text)
    assert (told and tuple(part.right for part in told)) == right


def test_segments_of_a_mistake_are_its_sentences() -> None:
    text = "Country: Italy. Capital: Paris."
    told = conversations.told(FRANCE, text)
    assert told == (Told(0, 15, False), Told(16, 31, True))
    row = conversations.asked(FRANCE, "both", "m")
    pair = mistakes.pair(FRANCE, row, text, told)
    assert pair["chosen"][0]["content"] == "Country: France. Capital: Paris."
    assert [s["scores"] for s in pair["rejected_segments"]] == [
        {"recognition": 0},
        {"knowledge": 4},
    ]
    (record,) = records.from_rows([_as_text(pair)])
    assert [s.end for s in record.chosen_segments or ()] == [16, 32]


def _as_text(pair: dict) -> dict:
    text = pair["prompt"][0]["content"][1]["text"]
    rest = {k: v for k, v in pair.items() if k != "images"}
    return {**rest, "prompt": [{"role": "user", "content": text}]}


def test_intervals_are_wilsons() -> None:
    # Of 8 in 10, from Newcombe (1998), Statistics in Medicine 17, method 3.
    low, high = scoring.share([True] * 8 + [False] * 2).interval
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    low, high = scoring.share([False] * 20).interval
    assert low == 0 and round(high, 4) == 0.1611


def test_a_neighbour_is_found_beyond_the_makers_style() -> None:
    known = np.eye(4) + 3.0
    style = np.array([9.0, -4.0, 2.0, 7.0])
    order = [2, 0, 3, 1]
    assert scoring.nearest(known, known[order] + style).tolist() == order


def test_the_page_shows_pictures_answers_and_segments(tmp_path: Path) -> None:
    data = Data(tmp_path, [FRANCE, ITALY, APPLE], Size(2, 1, 1, 1, 512, 1), {ITALY.key})
    asked = [
        conversations.asked(FRANCE, "country", "m"),
        conversations.asked(FRANCE, "capital", "m"),
        conversations.asked(ITALY, "capital", "m"),
        conversations.asked(APPLE, "name", "m"),
        conversations.asked(APPLE, "name", "google"),
        conversations.asked(APPLE, "both", "m"),
    ]
    for row in asked:
        path = tmp_path / row["images"][0]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)
    texts = ["france", "Paris", "Paris", "<b>", "flag", "Name: apple. Group: flags."]
    said = [Answer(*x) for x in zip(asked, texts, strict=True)]
    found = measuring.shares(data, said)
    right = {name: (x.right, x.of) for name, x in found.items()}
    assert right == {
        "recognition": (1, 2),
        "recognition, no flags": (0, 1),
        "recognition, flags": (1, 1),
        "recognition, trained drawings": (0, 1),
        "capitals taught": (1, 1),
        "capitals held out": (0, 1),
        "first sentence": (1, 1),
        "second sentence": (0, 1),
        "Chinese": (0, 0),
    }
    told = conversations.told(APPLE, texts[-1])
    assert told is not None
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps(mistakes.pair(APPLE, asked[-1], texts[-1], told)))
    beside = [("neighbour", scoring.Share(1, 2))]
    path = page.write(data, {"stage 2": found}, beside, {"stage 2": said}, pairs)
    text = path.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 7
    assert "<b class='right'>france</b>" in text
    assert "<b class='wrong'>&lt;b&gt;</b>" in text
    assert text.count("rgba(var(--good), .35)") == 3  # of four sentences
    assert text.count("rgba(var(--bad), .35)") == 1
    assert "| recognition | 0.500 (0.095–0.905; 2) |" in page.table({"a": found})


def test_a_fitted_connector_makes_of_states_what_the_names_are_like() -> None:
    draw = np.random.default_rng(1)
    # Few large directions, far from zero, as the tower's are; the picture is one of 30.
    kinds, pictures, noise = draw.normal(size=(30, 24)), 600, 0.3
    shown = np.arange(pictures) % 30
    states = kinds[shown, None] + noise * draw.normal(size=(pictures, 9, 24))
    states = states * 0.8 ** np.arange(24) + 3.0
    table = draw.normal(0.2, 0.1, size=(500, 48))
    made = connector.fitted(states, table[shown], table)
    hidden = states @ made["linear_1.weight"].T + made["linear_1.bias"]
    np.testing.assert_allclose(hidden.mean((0, 1)), 0, atol=1e-3)
    assert hidden.std() == pytest.approx(1, abs=0.2)
    flat = hidden.reshape(-1, 48)
    shares = np.linalg.eigvalsh(np.cov(flat.T))[::-1] / flat.var(0).sum()
    plain = states.reshape(-1, 24)
    alone = np.linalg.eigvalsh(np.cov(plain.T))[::-1] / plain.var(0).sum()
    assert shares[0] < 0.7 * alone[0]
    gelu = torch.nn.functional.gelu(torch.tensor(hidden)).numpy()
    out = gelu @ made["linear_2.weight"].T + made["linear_2.bias"]
    np.testing.assert_allclose(out.mean((0, 1)), table.mean(0), atol=1e-3)
    assert out.std((0, 1)).mean() == pytest.approx(table.std(0).mean(), rel=1e-3)
    assert (scoring.nearest(table[:30], out.mean(1)) == shown).mean() > 0.9

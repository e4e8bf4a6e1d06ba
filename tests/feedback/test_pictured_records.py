"""Records with pictures go through the commands that write records again."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jaxalign.data import records
from jaxalign.data.images import NamedPictures
from jaxalign.errors import UserError
from jaxalign.feedback import candidates, pairing, round_prompts
from jaxalign.feedback.candidates import JudgedPrompt
from jaxalign.feedback.config import GateConfig, RLAIFConfig
from jaxalign.feedback.decompose.decomposition import Judged
from jaxalign.feedback.judge_file import JudgeFileConfig, judge_file
from jaxalign.feedback.segmenters import SegmenterConfig
from jaxalign.feedback.segmenters.segment_file import SegmentConfig, segment_file
from jaxalign.judging.config import JudgeConfig
from tests import synthetic


def png(color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), color).save(file, "PNG")
    return file.getvalue()


URL = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
PAIR = {"chosen": "It is. Red.", "rejected": "No."}
ASK = [{"role": "user", "content": "What?"}]
SHOWN = [{"role": "user", "content": [{"type": "image", "image": URL}]}]
ROWS: list[dict[str, Any]] = [
    {"prompt": ASK, **PAIR, "images": ["p/x.png"]},
    {"prompt": SHOWN, **PAIR},
    {"prompt": "<image> What?", **PAIR, "image": {"path": "p/x.png"}},
]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def columns(row: dict[str, Any]) -> dict[str, Any]:
    return {k: row[k] for k in ("prompt", "images", "image") if k in row}


def test_segments_stand_beside_pictures(tmp_path: Path) -> None:
    source = synthetic.write_jsonl(tmp_path / "f.jsonl", ROWS)
    out = tmp_path / "out.jsonl"
    segment_file(str(source), out, SegmentConfig())
    assert [columns(row) for row in read(out)] == [columns(row) for row in ROWS]
    assert [r.images for r in records.read(out)][0][0].source == tmp_path / "p/x.png"
    (tmp_path / "few.jsonl").write_text(
        json.dumps({"prompt": [*SHOWN, *SHOWN], **PAIR, "images": ["x"]})
    )
    with pytest.raises(UserError, match="has a picture of its own"):
        segment_file(str(tmp_path / "few.jsonl"), out, SegmentConfig())


def test_encoded_pictures_are_written_as_data_urls(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    image = {"bytes": png(), "path": None}
    rows = [{"prompt": ASK, **PAIR, "images": [image]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    out = tmp_path / "out.jsonl"
    segment_file(str(tmp_path / "f.parquet"), out, SegmentConfig())
    assert read(out)[0]["images"] == [{"bytes": URL}]
    assert records.read(out)[0].images[0].source == png()


def test_judged_records_keep_their_pictures(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p/x.png").write_bytes(png())
    source = synthetic.write_jsonl(tmp_path / "f.jsonl", ROWS)
    segmented, out = tmp_path / "s.jsonl", tmp_path / "out.jsonl"
    segment_file(str(source), segmented, SegmentConfig())
    seen: list[Any] = []

    def judge(requests: list[dict[str, Any]]) -> list[Any]:
        seen.extend(request["prompt"] for request in requests)
        return [
            {"segments": [{"helpfulness": 3}] * len(request["segments"])}
            for request in requests
        ]

    config = JudgeFileConfig(
        data=str(segmented),
        out=str(out),
        judge=JudgeConfig(name="python", aspects=("helpfulness",)),
    )
    report = judge_file(config, judge)
    assert report.failed == 0
    assert [columns(row) for row in read(out)] == [columns(row) for row in ROWS]
    # What is asked about has the picture's place, not its bytes.
    assert URL not in json.dumps(seen)


def test_sampled_prompts_become_pairs_with_pictures(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p/x.png").write_bytes(png("blue"))
    completions = [{"text": "It is."}, {"text": "No."}]
    lines = [
        {"index": i, **columns(row), "completions": completions}
        for i, row in enumerate(ROWS)
    ]
    pictures = NamedPictures()
    found = candidates.parse_samples(
        lines, SegmenterConfig(), image_dir=tmp_path, pictures=pictures
    )
    assert [one.columns for one in found] == [
        {"images": ["p/x.png"]},
        {},
        {"image": {"path": "p/x.png"}},
    ]
    assert found[1].prompt == SHOWN
    (turn,) = found[1].candidates[0].prompt
    assert turn == {"role": "user", "content": [{"type": "image"}]}
    shown_in: Any = found[0].candidates[1].prompt
    (turn,) = shown_in
    assert [part["type"] for part in turn["content"]] == ["image", "text"]
    shown = [one.candidates[0].images for one in found]
    assert [[pictures.load(name) for name in names] for names in shown] == [
        [png("blue")],
        [png()],
        [png("blue")],
    ]
    records, _ = pairing.pair(
        candidates.scored(
            [
                JudgedPrompt(
                    one.prompt,
                    tuple(c.response for c in one.candidates),
                    (Judged(1.0), Judged(0.0)),
                    one.columns,
                )
                for one in found
            ]
        ),
        pairing.PairingConfig(),
    )
    assert [columns(record) for record in records] == [columns(row) for row in ROWS]


def test_a_gates_prompt_is_another_where_its_picture_is(tmp_path: Path) -> None:
    def config(held: dict[str, Any]) -> RLAIFConfig:
        prompts = synthetic.write_jsonl(tmp_path / "p.jsonl", ROWS)
        gate = synthetic.write_jsonl(tmp_path / "g.jsonl", [held])
        return RLAIFConfig(
            model="m",
            prompts=str(prompts),
            out=str(tmp_path / "out"),
            judge=JudgeConfig(name="python", aspects=("helpfulness",)),
            gate=GateConfig(prompts=str(gate)),
        )

    (tmp_path / "p").mkdir()
    for name, color in (("x", "blue"), ("y", "green"), ("same", "blue")):
        (tmp_path / f"p/{name}.png").write_bytes(png(color))
    pictures = NamedPictures()
    other = config({"prompt": ASK, "images": ["p/y.png"]})
    round_prompts.check_prompts(other, pictures)
    for name in ("x", "same"):  # by its bytes, wherever it lies
        with pytest.raises(UserError, match="1 of 1 prompts are also in"):
            round_prompts.check_prompts(
                config({"prompt": ASK, "images": [f"p/{name}.png"]}), pictures
            )
    with pytest.raises(UserError, match="no picture there: tried .*gone.png"):
        round_prompts.check_prompts(
            config({"prompt": ASK, "images": ["p/gone.png"]}), pictures
        )

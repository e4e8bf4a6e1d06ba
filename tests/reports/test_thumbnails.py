"""Reports show prompts' pictures: small, few, and inside the page."""

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from jaxalign.data.picture import Picture
from jaxalign.data.records import Message, Record, Segment
from jaxalign.feedback.config import GateConfig
from jaxalign.judging.judge import Verdict
from jaxalign.reports import run as run_report
from jaxalign.reports import thumbnails
from tests.feedback.test_pictured_records import URL
from tests.pages import Page
from tests.reports import test_rounds_report
from tests.reports.test_rounds_report import asked, config, judgement, put_round, scored


def noise(path: Path, size: tuple[int, int] = (640, 400)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 90).convert("RGB").save(path)
    return path


def images(page: Page) -> list[dict[str, Any]]:
    return [attributes for tag, attributes in page.attributes if tag == "img"]


def opened(image: dict[str, Any]) -> Any:
    head, _, code = image["src"].partition(";base64,")
    assert head == "data:image/jpeg"
    made = Image.open(io.BytesIO(base64.b64decode(code)))
    assert made.size == (int(image["width"]), int(image["height"]))
    return made


def test_thumbnails_are_small_and_few(tmp_path: Path) -> None:
    tall = noise(tmp_path / "tall.png", (3, 1500))
    given = [Picture(noise(tmp_path / "a.png"), "f:1"), Picture(tall, "f:1")]
    page = Page(thumbnails.beside(given))
    assert [opened(one).size for one in images(page)] == [(128, 80), (1, 128)]
    assert images(page)[0]["alt"] == "picture 1, 640 × 400 pixels"
    page = Page(thumbnails.beside(given * 5))
    assert len(images(page)) == 4 and page.text.endswith("and 6 more")
    assert len(thumbnails.beside(given * 500)) < 4 * 12_000
    assert thumbnails.beside(()) == ""


def test_a_picture_that_is_gone_is_said(tmp_path: Path) -> None:
    gone = Picture(tmp_path / "<b>.png", "f:1")
    page = Page(thumbnails.beside([gone, Picture(noise(tmp_path / "a.png"), "f:1")]))
    assert len(images(page)) == 1
    assert "a picture is not shown: f:1: no picture there: tried" in page.text
    row = {"images": ["a.png"]}
    turns = [{"role": "user", "content": "?"}]
    made = thumbnails.of_row(turns, row, str(tmp_path / "f"), str(tmp_path / "no"))
    assert "is not a directory" in Page(made).text


def test_a_run_shows_the_pictures_beside_its_answers(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: m\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    turns: list[Any] = [
        {"type": "image"},
        {"type": "text", "text": "What?"},
    ]
    record = Record(
        *((Message(role="user", content=turns),), "One.", "Two."),
        *((Segment(start=0, end=3, scores={"a": 2.0}),), (), "f:1"),
        images=(Picture(noise(tmp_path / "a.png"), "f:1"),),
    )
    side = {"segments": [{"logp": -1.0, "ref_logp": -2.0, "tokens": 2}]}
    result = {"chosen": side, "rejected": {"segments": []}, "rewards": {"margin": 0.5}}
    path = run_report.write_report(
        tmp_path / "report.html",
        title="t",
        run=tmp_path,
        figures=(),
        examples=[run_report.Example(record, result)],
        facts={},
        beta=0.1,
    )
    page = Page(path.read_text())
    (image,) = images(page)
    assert opened(image).size == (128, 80)
    assert "user: [picture] What?" in page.text


def test_rounds_show_them_and_know_what_was_asked(tmp_path: Path) -> None:
    for name in ("a", "b"):
        noise(tmp_path / f"data/{name}.png")
    run = config(
        tmp_path / "out",
        gate=GateConfig(prompts=str(tmp_path / "data/g")),
        image_dir=str(tmp_path / "data"),
    )
    ask = [{"role": "user", "content": "What is it?"}]
    shown = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": URL}},
                {"type": "text", "text": "And this?"},
            ],
        }
    ]
    trained = [
        asked(
            ask, ("good text", scored("good text", 3)), ("bad", scored("bad", 1))
        )._replace(columns={"images": ["a.png", "b.png"]}),
        asked(shown, ("fine", scored("fine", 4)), ("poor", scored("poor", 1))),
    ]
    held = [
        asked(ask, ("x", scored("x", n)))._replace(columns={"images": ["b.png"]})
        for n in (1, 3)
    ]
    put_round(run, 1, trained, held[:1], held[1:])
    parts = [{"type": "image"}] * 2 + [{"type": "text", "text": "What is it?"}]
    judged = judgement(
        [{"role": "user", "content": parts}],
        "good text",
        Verdict({"segments": [{"a": 1, "b": 1}]}),
    )
    page = test_rounds_report.write(run, [judged])
    assert len(images(page)) == 2 + 1 + 1
    assert all(max(opened(one).size) <= 128 for one in images(page))
    assert "user: [picture] And this?" in page.text and URL not in page.text
    # The call is of this run, though the file has the picture in a column.
    assert "no judgement of this run" not in page.text

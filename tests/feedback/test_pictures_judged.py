"""Judges see the pictures of prompts: named by their bytes, read when they are sent."""

import base64
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jaxalign.data.images import NamedPictures, reference
from jaxalign.data.picture import Picture
from jaxalign.errors import UserError
from jaxalign.feedback.judge_file import JudgeFileConfig, estimate_file, judge_file
from jaxalign.feedback.judge_records import judge_records
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.estimate import lines_of
from jaxalign.judging.make import make_judge
from jaxalign.judging.store import Store
from tests import synthetic
from tests.feedback.test_pictured_records import ASK, SHOWN, png, read
from tests.judging.stub_server import Stub, serving


SEGMENTS = [{"start": 0, "end": 5}]
PAIR = {
    "chosen": "Round",
    "rejected": "Plain",
    "chosen_segments": SEGMENTS,
    "rejected_segments": SEGMENTS,
}
ROWS: list[dict[str, Any]] = [
    {"prompt": ASK, **PAIR, "images": ["p/x.png", "p/y.jpg"]},
    {"prompt": SHOWN, **PAIR},
    {"prompt": "<image> What?", **PAIR, "image": {"path": "p/x.png"}},
    {"prompt": "Without?", **PAIR},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789")
    (tmp_path / "p").mkdir()
    (tmp_path / "p/x.png").write_bytes(png("blue"))
    Image.new("RGB", (9, 4), "green").save(tmp_path / "p/y.jpg")
    synthetic.write_jsonl(tmp_path / "data.jsonl", ROWS)
    return tmp_path


def config(folder: Path, stub: Stub | None = None, **options: Any) -> JudgeFileConfig:
    url = None if stub is None else stub.url
    judge = JudgeConfig(model="m", base_url=url, aspects=("clarity",), max_attempts=1)
    files = {"data": str(folder / "data.jsonl"), "out": str(folder / "out.jsonl")}
    return JudgeFileConfig(**{"judge": judge, **files, **options})


def sent(stub: Stub) -> list[tuple[str, list[bytes]]]:
    """Return what was asked and the bytes of the pictures that it came with."""
    found = []
    for call in (call for calls in stub.calls.values() for call in calls):
        content = call.body["messages"][1]["content"]
        parts = [content] if isinstance(content, str) else content[1:]
        text = content if isinstance(content, str) else content[0]["text"]
        urls = [p["image_url"]["url"] for p in parts if not isinstance(p, str)]
        data = [url.partition(";base64,") for url in urls]
        assert all(head in ("data:image/png", "data:image/jpeg") for head, *_ in data)
        found.append((text, [base64.b64decode(code) for *_, code in data]))
    return found


def test_an_endpoint_gets_each_prompts_pictures(folder: Path) -> None:
    with serving() as stub:
        report = judge_file(config(folder, stub))
    assert (report.responses, report.failed, report.asked) == (8, 0, 8)
    blue, green = (folder / "p/x.png").read_bytes(), (folder / "p/y.jpg").read_bytes()
    wanted = [[blue, green], [png()], [blue], []]
    for (text, pictures), expected in zip(
        sorted(sent(stub), key=lambda one: wanted.index(one[1])),
        [one for one in wanted for _ in range(2)],
        strict=True,
    ):
        assert pictures == expected
        assert "p/x.png" not in text and "base64" not in text
    written = read(folder / "out.jsonl")
    assert [row.get("images") for row in written] == [r.get("images") for r in ROWS]
    # The store has names in the place of bytes.
    kept = (folder / "out.jsonl.store.db").read_bytes()
    assert reference(blue).encode() in kept
    assert base64.b64encode(blue) not in kept and blue not in kept


def test_keys_go_by_a_pictures_bytes_and_not_by_its_path(folder: Path) -> None:
    with serving() as stub:
        judge_file(config(folder, stub))
        shutil.move(folder / "p", folder / "q")
        moved = config(folder, stub, image_dir=str(folder))
        with pytest.raises(UserError, match=r"data.jsonl:1: .*no picture there: tried"):
            judge_file(moved)
        (folder / "elsewhere").mkdir()
        shutil.move(folder / "q", folder / "elsewhere/p")
        moved = config(folder, stub, image_dir=str(folder / "elsewhere"))
        assert judge_file(moved).asked == 0
        (folder / "elsewhere/p/x.png").write_bytes(png("white"))
        assert judge_file(moved).asked == 4


def test_a_dry_run_counts_pictures_and_reads_the_store(folder: Path) -> None:
    found = estimate_file(config(folder))
    assert (found.calls, found.pictures) == (8, 8)
    assert any(
        "8 calls, which show 8 pictures" in x
        for x in lines_of(config(folder).judge, found)
    )
    with serving() as stub:
        judge_file(config(folder, stub))
    found = estimate_file(config(folder))
    assert (found.calls, found.known, found.pictures) == (0, 8, 0)
    (folder / "p/y.jpg").write_bytes(png("black"))
    assert estimate_file(config(folder)).pictures == 4
    told = lines_of(config(folder).judge, found._replace(pictures=0))
    assert "show" not in str(told)


def test_a_store_of_before_keeps_the_keys_of_texts(folder: Path) -> None:
    """The key is that of the release before pictures were shown."""
    synthetic.write_jsonl(folder / "data.jsonl", ROWS[3:])
    with serving() as stub:
        judge_file(config(folder, stub))
    with Store(folder / "out.jsonl.store.db") as store:
        found = store.verdicts(KEYS)
    assert sorted(found) == sorted(KEYS)


KEYS = [
    "5e92b03d2cc0ff9b53328df7eed9080222123b294770126471b0ff1ab90ac894",
    "331b028f5f11f04e62b127c7b96a90ff353d6d675479645ff172a3ff42fa1685",
]


def test_a_picture_that_changes_on_the_way_stops_the_run(folder: Path) -> None:
    synthetic.write_jsonl(folder / "data.jsonl", ROWS[2:3])
    seen: list[str] = []

    def change(*_: Any) -> str:
        seen.append("asked")
        (folder / "p/x.png").write_bytes(png("white"))
        return "ok"

    with serving(change) as stub:
        asked = config(folder, stub)
        asked = JudgeFileConfig(
            **{
                **vars(asked),
                "judge": JudgeConfig(**{**vars(asked.judge), "concurrency": 1}),
            }
        )
        with pytest.raises(UserError, match="an image is not what it was when"):
            judge_file(asked)
        assert seen == ["asked"]
        # What was judged is kept, under the name of what was shown.
        (folder / "p/x.png").write_bytes(png("blue"))
        stub.behave = lambda *_: "ok"
        assert judge_file(asked).asked == 1


def test_a_function_is_given_the_bytes(folder: Path) -> None:
    seen: list[tuple[Any, list[bytes]]] = []

    def judge(requests: list[dict[str, Any]]) -> list[Any]:
        seen.extend((one["images"], one["pictures"]) for one in requests)
        return [{"segments": [{"size": len(one["pictures"])}]} for one in requests]

    made = judge_records(ROWS, judge, aspects=("size",), image_dir=folder)
    sizes = [row["chosen_segments"][0]["scores"]["size"] for row in made]
    assert sizes == [2, 1, 1, 0]
    blue, green = (folder / "p/x.png").read_bytes(), (folder / "p/y.jpg").read_bytes()
    assert [pictures for _, pictures in seen[::2]] == [
        [blue, green],
        [png()],
        [blue],
        [],
    ]
    assert all(names == [*map(reference, data)] for names, data in seen)
    script = folder / "judge.py"
    script.write_text(
        "def judge(requests):\n"
        "    return [{'segments': [{'size': len(r['pictures'])}]} for r in requests]\n"
    )
    options = JudgeConfig(name="python", path=str(script), aspects=("size",))
    judge_file(config(folder, judge=options))
    assert [
        r["chosen_segments"][0]["scores"]["size"] for r in read(folder / "out.jsonl")
    ] == sizes


def test_a_judge_without_the_loader_says_so(folder: Path) -> None:
    pictures = NamedPictures()
    with serving() as stub:
        options = config(folder, stub).judge
        given = {"aspects": ("clarity",), "image_dir": folder}
        with pytest.raises(UserError, match="give make_judge a load_image"):
            judge_records(ROWS[:1], make_judge(options), **given)
        judge = make_judge(options, load_image=pictures.load)
        with pytest.raises(UserError, match="none of the pictures that were read"):
            judge_records(ROWS[:1], judge, **given)
        judge_records(ROWS[:1], judge, pictures=pictures, **given)
    assert len(sent(stub)) == 2


def test_bytes_of_rows_are_not_held_in_memory() -> None:
    pictures = NamedPictures()
    made = [bytes([i]) * 1000 for i in range(4)]
    names = [
        pictures.references([Picture(data, "row")])[0] for data in (*made, made[0])
    ]
    assert names == [*map(reference, made), names[0]]
    assert [pictures.load(name) for name in names[:4]] == made
    assert not any(isinstance(v, bytes) for v in vars(pictures).values())

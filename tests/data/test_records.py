"""Records: what is read, and how what is malformed is refused."""

import gzip
import json
import random
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxalign.data import records
from jaxalign.errors import UserError
from tests import synthetic


TEXTS = {"prompt": "Say it.", "chosen": "good", "rejected": "bad"}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def segment(start: Any = 0, end: Any = 2, **scores: Any) -> dict[str, Any]:
    return {"start": start, "end": end, "scores": scores or {"helpfulness": 3}}


def read_bytes(path: Path, data: bytes) -> list[records.Record]:
    path.write_bytes(data)
    return records.read(path)


def test_reads_texts_and_conversations(tmp_path: Path) -> None:
    chat = {
        "prompt": [turn("system", "Short."), turn("user", "Hi?")],
        "chosen": [turn("assistant", "Hé")],
        "rejected": "No",
        "chosen_segments": [segment(0, 2, clarity=3, helpfulness=0.5)],
        "rejected_segments": [],
        "images": [],
    }
    path = synthetic.write_jsonl(tmp_path / "f.jsonl", [TEXTS, chat])
    first, second = records.read(path)
    assert first == records.Record(
        "Say it.", "good", "bad", None, None, where=f"{path}:1"
    )
    assert second.prompt == (
        records.Message(role="system", content="Short."),
        records.Message(role="user", content="Hi?"),
    )
    assert (second.chosen, second.rejected) == ("Hé", "No")
    scores = {"clarity": 3.0, "helpfulness": 0.5}
    assert second.chosen_segments == (records.Segment(start=0, end=2, scores=scores),)
    assert second.rejected_segments == ()
    assert records.aspects_of([first, second]) == ("clarity", "helpfulness")


@pytest.mark.parametrize("name", ["messages", "score_chosen", "id", "prompt_id"])
def test_other_columns_are_ignored(name: str) -> None:
    # Such columns are in TRL data sets; "messages" is not far from "images".
    assert records.parse(TEXTS | {name: ["x"]}) == records.parse(TEXTS)


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    line = json.dumps(TEXTS).encode()
    found = read_bytes(tmp_path / "f.jsonl", b"\n" + line + b"\n \t\n" + line)
    assert [record.where for record in found] == [
        f"{tmp_path}/f.jsonl:2",
        f"{tmp_path}/f.jsonl:4",
    ]


def test_gzip_holds_the_same_records(tmp_path: Path) -> None:
    made = synthetic.feedback_records(5)
    plain = records.read(synthetic.write_jsonl(tmp_path / "f.jsonl", made))
    packed = records.read(synthetic.write_jsonl(tmp_path / "f.jsonl.gz", made))
    assert [r._replace(where="") for r in packed] == [
        r._replace(where="") for r in plain
    ]


MALFORMED: dict[str, tuple[Mapping[str, Any], str]] = {
    "no chosen": ({"chosen": None}, "field chosen is missing. A record needs prompt"),
    "prompt a number": ({"prompt": 3}, "field prompt: expected a text or a list of"),
    "prompt an object": (
        {"prompt": turn("user", "x")},
        "field prompt: expected a text or a list of {role, content} messages: got an "
        "object with role, content",
    ),
    "no message": ({"prompt": []}, "field prompt: expected at least one message"),
    "message a text": ({"prompt": ["x"]}, "field prompt[0]: expected an object: got"),
    "no role": (
        {"prompt": [{"content": "x"}]},
        "field prompt[0].role is missing. A record needs prompt, chosen and rejected "
        "(or prompt, completion and label); a message role and content",
    ),
    "empty role": ({"prompt": [turn("", "x")]}, "field prompt[0].role: string should"),
    "content a list": (
        {"prompt": [{"role": "user", "content": ["x"]}]},
        'field prompt[0].content[0]: expected a part of a text, {"type": "text", '
        '"text": ...}: got a text of 1',
    ),
    "an image part without a picture": (
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        "field images: expected one picture for each of the prompt's 1 image part(s): ",
    ),
    "a part that is a sound": (
        {"prompt": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "field prompt[0].content: a part of type input_audio; expected parts of type ",
    ),
    "content null": (
        {"prompt": [{"role": "user", "content": None}]},
        "field prompt[0].content: expected a text (null goes with tool_calls alone)",
    ),
    "no content": (
        {"prompt": [{"role": "user", "contnet": "x"}]},
        "field prompt[0].content is missing",
    ),
    "tools a text": (
        {"prompt": [turn("user", "x")], "tools": "search"},
        "field tools: expected a list of JSON schemas, or one written as JSON: got a",
    ),
    "tools beside a text": (
        {"tools": [{"name": "search"}]},
        "field tools is for the chat template, which a plain-text prompt does not go",
    ),
    "an option that is not the record's": (
        {
            "prompt": [turn("user", "x")],
            "chat_template_kwargs": {"add_generation_prompt": False},
        },
        "field chat_template_kwargs: add_generation_prompt is set by jaxalign",
    ),
    "messages after a text": (
        {"chosen": [turn("assistant", "x")]},
        "field chosen: messages, but the prompt is a plain text. Give both as texts",
    ),
    "two messages": (
        {
            "prompt": [turn("user", "x")],
            "rejected": [turn("assistant", "x"), turn("user", "y")],
        },
        "field rejected: expected turns that begin and end with the assistant's: got "
        "assistant, user. Put the turns",
    ),
    "image twice": (
        {"images": ["a.png"], "image": "b.png"},
        "fields image and images: expected one of them. Put all pictures into images",
    ),
    "images a text": (
        {"images": "a.png"},
        "field images: expected a list of pictures: got a text of 5 characters. One ",
    ),
    "image a number": (
        {"images": [1]},
        "field images[0]: expected a path, encoded bytes (PNG, JPEG ...), a data URL, ",
    ),
    "misspelt": (
        {"chosen_segment": []},
        "unknown field 'chosen_segment'. Did you mean chosen_segments? Rename the",
    ),
    "segments a text": (
        {"chosen_segments": "all"},
        "field chosen_segments: input should be a valid list: got a text of 3 char",
    ),
    "no end": (
        {"chosen_segments": [{"start": 0, "scores": {"x": 1}}]},
        "field chosen_segments[0].end is missing. A record needs prompt, chosen and "
        "rejected (or prompt, completion and label); a message role and content; a "
        "segment start, end and scores",
    ),
    "start a bool": (
        {"chosen_segments": [segment(False)]},
        "field chosen_segments[0].start: input should be a valid integer: got False",
    ),
    "end a float": (
        {"rejected_segments": [segment(), segment(2, 3.0)]},
        "field rejected_segments[1].end: input should be a valid integer: got 3.0",
    ),
    "negative": (
        {"chosen_segments": [segment(-1)]},
        "field chosen_segments[0].start: input should be greater than or equal to 0",
    ),
    "empty": (
        {"chosen_segments": [segment(1, 1)]},
        "field chosen_segments[0].end: expected more than start=1: got 1. Offsets are "
        "half-open",
    ),
    "overlap": (
        {"chosen_segments": [segment(0, 2), segment(1, 3)]},
        "field chosen_segments[1].start: got 1, but the segment before ends at 2. "
        "Segments are ordered and do not overlap",
    ),
    "out of range": (
        {"rejected_segments": [segment(0, 4)]},
        "field rejected_segments[0].end: got 4, but the text has 3 characters. Offsets "
        "count code points, not bytes",
    ),
    "out of range by code points, not by bytes": (
        {"rejected": "bäd", "rejected_segments": [segment(0, 4)]},
        "field rejected_segments[0].end: got 4, but the text has 3 characters",
    ),
    "huge": (
        {"chosen_segments": [segment(0, 10**300)]},
        f"field chosen_segments[0].end: got 1{'0' * 36}..., but the text has 4",
    ),
    "no score": (
        {"chosen_segments": [{"start": 0, "end": 1, "scores": {}}]},
        "field chosen_segments[0].scores: dictionary should have at least 1 item",
    ),
    "score a text": (
        {"chosen_segments": [segment(x="3")]},
        "field chosen_segments[0].scores.x: input should be a valid number: got a text",
    ),
    "score a bool": (
        {"chosen_segments": [segment(x=True)]},
        "field chosen_segments[0].scores.x: input should be a valid number: got True",
    ),
    "a turn that is not there": (
        {"chosen_segments": [segment() | {"turn": 1}]},
        "field chosen_segments[0].turn: got 1, but the completion has 1 turn(s) of",
    ),
    "score NaN": (
        {"chosen_segments": [segment(x=float("nan"))]},
        "field chosen_segments[0].scores.x: input should be a finite number: got nan",
    ),
    # Finite in float64, infinite in the float32 of the batch.
    "score too large": (
        {"chosen_segments": [segment(x=1e300)]},
        "field chosen_segments[0].scores.x: input should be less than or equal to 3402",
    ),
    "aspect without a name": (
        {"chosen_segments": [segment(**{"": 1})]},
        "field chosen_segments[0].scores: got '': 1.0; expected a name and a finite",
    ),
    "half a surrogate pair": (
        {"chosen": "ab\ud83d"},
        "field chosen: character 2 is half of a surrogate pair, which is no text. "
        "Escape",
    ),
    "half a surrogate pair in a message": (
        {"prompt": [turn("user", "\udc00")]},
        "field prompt[0].content: character 0 is half of a surrogate pair",
    ),
    "half a surrogate pair in an aspect": (
        {"chosen_segments": [segment(**{"\ud83d": 1})]},
        "field chosen_segments[0].scores: character 0 is half of a surrogate pair",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_records_name_file_line_field_and_cure(
    name: str, tmp_path: Path
) -> None:
    changes, expected = MALFORMED[name]
    path = tmp_path / "f.jsonl"
    lines = [json.dumps(TEXTS), json.dumps({**TEXTS, **changes})]
    path.write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        records.read(path)
    assert str(caught.value).startswith(f"{path}:2: {expected}")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{'prompt': 1}", "not a JSON object: .* Expected one JSON object per line"),
        (b"{} {}", "not a JSON object: Extra data"),
        (b"[" * 100_000, "not a JSON object: maximum recursion depth"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not usable JSON: .*5000 digits"),
        (b'{"prompt": "\xe9"}', "not UTF-8 .*at byte 12.*Save the file as UTF-8"),
        (b"[1]", "must be an object with prompt, chosen and rejected: got a list of 1"),
        (b"null", "a record must be an object .*: got None"),
    ],
)
def test_lines_that_hold_no_object(line: bytes, expected: str, tmp_path: Path) -> None:
    good = json.dumps(TEXTS).encode()
    with pytest.raises(UserError, match=rf"f\.jsonl:3: .*{expected}"):
        read_bytes(tmp_path / "f.jsonl", good + b"\n\n" + line)


@pytest.mark.parametrize("data", [b"", b"\n  \n"])
def test_file_without_records(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"f\.jsonl holds no record: expected one JSON"):
        read_bytes(tmp_path / "f.jsonl", data)


def test_path_that_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.jsonl"):
        with pytest.raises(UserError, match=r"is not a file: expected a \.jsonl"):
            records.read(path)


def test_broken_gzip_is_refused_wherever_it_broke(tmp_path: Path) -> None:
    # Lines that do not compress well, so that most bytes of the file are data.
    rng = random.Random(0)
    text = "".join(rng.choice(string.ascii_letters) for _ in range(300))
    whole = gzip.compress(json.dumps(TEXTS | {"prompt": text}).encode(), mtime=0)
    path = tmp_path / "f.jsonl.gz"
    with pytest.raises(UserError, match=r"f\.jsonl\.gz:1: the file cannot be read"):
        read_bytes(path, b"not gzip")
    good = read_bytes(path, whole)
    refused = 0
    for place in range(len(whole)):
        flipped = bytes([whole[place] ^ 0x55])
        for data in (whole[:place], whole[:place] + flipped + whole[place + 1 :]):
            try:
                # Some bytes of the header do not matter.
                assert read_bytes(path, data) == good
            except UserError:
                refused += 1
    assert refused > 1.9 * len(whole)


def test_parquet_drops_the_nulls_of_unjudged_aspects(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        TEXTS
        | {"chosen_segments": [segment(0, 1, clarity=1), segment(1, 2, safety=2)]},
        TEXTS | {"prompt": "", "chosen_segments": None},
    ]
    path = tmp_path / "f.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = records.read(path)
    assert first.where == f"{path}:row 1"
    assert first.chosen_segments is not None
    assert [s.scores for s in first.chosen_segments] == [{"clarity": 1}, {"safety": 2}]
    assert (second.prompt, second.chosen_segments) == ("", None)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": [1]}, "row 1: field prompt: expected a text or a list"),
        ({"chosen_segments": [5]}, "row 1: field chosen_segments: input should be a v"),
        ({"rejected": b"\xff\xfe"}, "not a readable Parquet file: .*can't decode byte"),
    ],
)
def test_malformed_parquet(
    columns: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    import numpy as np
    import pyarrow
    import pyarrow.parquet

    table: dict[str, Any] = {name: [text] for name, text in TEXTS.items()}
    for name, values in columns.items():
        if isinstance(values, bytes):  # a string column that is not UTF-8
            ends = np.array([0, len(values)], np.int32)
            buffers = [None, pyarrow.py_buffer(ends), pyarrow.py_buffer(values)]
            values = pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers)
        table[name] = values
    path = tmp_path / "f.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    with pytest.raises(UserError, match=rf"f\.parquet:.*{expected}"):
        records.read(path)


def test_file_that_is_no_parquet(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"f\.parquet: not a readable Parquet file"):
        read_bytes(tmp_path / "f.parquet", b"PAR1 and no more")


def test_tfds_source_gives_the_records_back(tmp_path: Path) -> None:
    from tests.data import feedback_builder

    source = feedback_builder.write(feedback_builder.TinyFeedback, tmp_path)
    found = records.read(source)
    expected = [records.parse(record) for record in feedback_builder.RECORDS]

    def blank(record: records.Record) -> str:
        return repr(record._replace(where=""))

    # tfds shuffles by hash.
    assert sorted(map(blank, found)) == sorted(map(blank, expected))
    assert found[0].where == f"{source}:row 1"
    assert len(records.read(f"{source}[:50%]")) == 2


def test_tfds_source_of_another_layout(tmp_path: Path) -> None:
    from tests.data import feedback_builder

    source = feedback_builder.write(feedback_builder.LooseFeedback, tmp_path)
    with pytest.raises(UserError, match="row 1: not laid out as a feedback record"):
        records.read(source)
    source = feedback_builder.write(feedback_builder.BrokenFeedback, tmp_path)
    with pytest.raises(UserError, match="row 1: not UTF-8: .*can't decode byte 0xff"):
        records.read(source)


def test_tfds_source_that_is_not_there(tmp_path: Path) -> None:
    for source in ("tfds:", "tfds:name", "tfds:name:"):
        with pytest.raises(UserError, match="names no split: expected tfds:NAME_OR_DI"):
            records.read(source)
    with pytest.raises(UserError, match="train: tensorflow-datasets says: .*not read"):
        records.read(f"tfds:{tmp_path}:train")
    with pytest.raises(UserError, match="says: Dataset no_such_set not found.$"):
        records.read("tfds:no_such_set:train")


# Property: whatever a file holds, reading gives records or a UserError.

JSON_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 12)
    | st.sampled_from([10**30, -(10**400), 2**63, 1e308, 2.0, -0.0])
    | st.floats()
    | st.sampled_from(["", "user", "assistant", "ab", "\ud800", "é好😀", "0"])
    | st.text(st.characters(codec=None), max_size=6)
)
KEYS = st.sampled_from(
    ["prompt", "chosen", "rejected", "chosen_segments", "rejected_segments", "images"]
    + ["role", "content", "start", "end", "scores", "helpfulness", "Prompt", "\ud800"]
) | st.text(max_size=3)
ANY_JSON = st.recursive(
    JSON_LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)
DEEP = st.integers(1, 2000).map(lambda n: f"{'[' * n}1{']' * n}")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path to every value inside a JSON value, the outermost first."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(p for key, v in inner for p in places(v, (*path, key)))]


def mutate(draw: Any, value: Any) -> Any:
    """Replace, drop, rename or repeat something at a random place."""
    path = draw(st.sampled_from(places(value)))
    if not path:
        return draw(ANY_JSON)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    action = draw(st.sampled_from(["replace", "drop", "rename", "repeat", "wrap"]))
    old = parent[path[-1]]
    if action == "replace":
        parent[path[-1]] = draw(ANY_JSON)
    elif action == "wrap":
        parent[path[-1]] = draw(st.sampled_from([[old], {"x": old}, str(old), [[]]]))
    elif isinstance(parent, list):
        if action == "drop":
            del parent[path[-1]]
        else:
            parent.insert(draw(st.integers(0, len(parent))), old)
    else:
        del parent[path[-1]]
        if action != "drop":
            parent[draw(KEYS)] = old
    return value


@st.composite
def mutated_lines(draw: Any) -> str:
    rng = random.Random(draw(st.integers(0, 50)))
    value: Any = synthetic.feedback_record(rng, chat=draw(st.booleans()))
    for _ in range(draw(st.integers(0, 3))):
        value = mutate(draw, value)
    if draw(st.integers(0, 9)) == 0 and isinstance(value, dict):
        key = json.dumps(draw(KEYS))
        return f"{json.dumps(TEXTS)[:-1]}, {key}: {draw(DEEP)}}}"
    return json.dumps(value, ensure_ascii=draw(st.booleans()))


def check_record(record: records.Record) -> None:
    """Check what the rest of the library relies on."""
    prompt = record.prompt
    texts = [*map(records.texts_of, (record.chosen, record.rejected))]
    texts = [text for side in texts for text in side]
    texts += [prompt] if isinstance(prompt, str) else [m.text for m in prompt]
    for text in texts:
        text.encode("utf-8")
    for said, segments in (
        (record.chosen, record.chosen_segments),
        (record.rejected, record.rejected_segments),
    ):
        previous, turn = 0, 0
        for found in segments or ():
            previous = previous if found.turn == turn else 0
            text = records.texts_of(said)[found.turn]
            assert previous <= found.start < found.end <= len(text)
            assert found.turn >= turn
            turn = found.turn
            assert type(found.start) is int and type(found.end) is int
            assert all(abs(score) < 3.5e38 for score in found.scores.values())
            assert all(name.encode() for name in found.scores)
            previous = found.end


@pytest.fixture(scope="module")
def mutated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated") / "f.jsonl"


@hypothesis.settings(max_examples=1500)
@hypothesis.given(line=mutated_lines())
def test_any_file_gives_records_or_a_user_error(mutated_file: Path, line: str) -> None:
    mutated_file.write_bytes(line.encode("utf-8", "surrogatepass"))
    try:
        found = records.read(mutated_file)
    except UserError as error:
        text = str(error)
        text.encode("utf-8")
        assert text.startswith(str(mutated_file)) and len(text) < 1000
    else:
        for record in found:
            check_record(record)


@hypothesis.settings(max_examples=500)
@hypothesis.given(data=st.binary(max_size=40), cut=st.integers(0, 200))
def test_any_bytes_give_records_or_a_user_error(
    mutated_file: Path, data: bytes, cut: int
) -> None:
    line = json.dumps(TEXTS | {"chosen_segments": [segment()]}).encode()
    mutated_file.write_bytes(line[:cut] + data + line[cut:])
    try:
        for record in records.read(mutated_file):
            check_record(record)
    except UserError as error:
        str(error).encode("utf-8")

"""``jaxalign compare`` as a person runs it."""

import json

import pytest

from jaxalign.cli.main import main
from tests.evaluation.runs import write_task


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["compare", *map(str, arguments)])
    captured = capsys.readouterr()
    assert stop.value.code == code, captured.err
    return captured.err if code else captured.out


def test_a_table_a_page_and_the_same_as_json(tmp_path, capsys) -> None:
    write_task(tmp_path / "a" / "t", {"q": ["yes", "no", "no"]})
    write_task(tmp_path / "b" / "t", {"q": ["yes", "yes", "no"]})
    page = tmp_path / "made" / "page.html"
    out = run(capsys, tmp_path / "a", tmp_path / "b", "--out", page, "--seed", 3)
    lines = out.splitlines()
    assert lines[0] == f"t: {tmp_path / 'b'} minus {tmp_path / 'a'}"
    assert lines[1] == "  q: 3 rows"
    assert lines[-1] == f"page: {page}" and page.is_file()
    (task,) = json.loads(page.with_suffix(".json").read_text())["tasks"]
    found = task["questions"]["q"]["differences"]["yes"]
    assert found["difference"]["value"] == pytest.approx(1 / 3)
    assert found["p_value"] == 1.0
    # Without --out nothing is written.
    before = sorted(tmp_path.rglob("*"))
    assert run(capsys, tmp_path / "a", tmp_path / "b").splitlines() == lines[:-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_refused(tmp_path, capsys) -> None:
    write_task(tmp_path / "a" / "t", {"q": ["yes"]})
    a = tmp_path / "a"
    assert "give the --out of a `jaxalign eval`" in run(
        capsys, a, tmp_path / "b", code=2
    )
    assert "two runs or more are compared: got 1" in run(capsys, a, code=2)
    assert "ends in .html" in run(capsys, a, a, "--out", "page.pdf", code=2)
    assert "Did you mean" in run(capsys, a, a, "--round", 3, code=2)

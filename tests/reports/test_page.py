"""Pages of results: what is on them is what was meant, whatever the texts hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.data.records import Record, Segment
from jaxalign.errors import UserError
from jaxalign.reports import page
from jaxalign.reports import run as run_report
from tests.pages import Page


@given(st.text(st.characters()))
def test_an_escaped_text_is_one_text_and_no_tag(text: str) -> None:
    shown = page.escape(text)
    shown.encode("utf-8")
    read = Page(f"<p title='{shown}' lang=\"{shown}\">{shown}</p>")
    assert read.tags == {"p": 1}
    assert set(read.attributes[0][1]) == {"title", "lang"}


def test_what_can_be_shown_is_shown_as_it_is() -> None:
    text = "a < b & 'c' \"d\"\n\té 句。 \U0001f600"
    assert "".join(Page(page.escape(text)).pieces) == text
    assert page.escape("\ud800 \x00 \x1b[0m") == "\\ud800 \\x00 \\x1b[0m"


def test_a_page_cannot_run_or_load_anything(tmp_path) -> None:
    path = page.write(tmp_path / "page.html", "<T>", ["<p>text</p>"], "p { margin: 0 }")
    read = Page(path.read_text())
    assert read.text == "<T> text"
    allowed = [a["content"] for t, a in read.attributes if "http-equiv" in a]
    assert [str(text).split(";")[0] for text in allowed] == ["default-src 'none'"]
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_written_is_the_users_to_mend(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way of a directory")
    with pytest.raises(UserError, match=r"file/page.html cannot be written"):
        page.write(tmp_path / "file" / "page.html", "T", [])


def test_a_table_has_titles_and_a_place_for_the_keyboard() -> None:
    read = Page(
        page.table("what it shows", ("", "a", "b"), [("x", "1", "text")], text=(2,))
    )
    assert read.rows == [["", "a", "b"], ["x", "1", "text"]]
    scopes = [a.get("scope") for t, a in read.attributes if t == "th"]
    assert scopes == ["col", "col", "row"]
    assert read.attributes[0][1]["tabindex"] == "0"
    assert read.attributes[0][1]["aria-label"] == "what it shows"


def test_curves_show_what_has_two_points_or_more() -> None:
    steps = {
        0: {"loss": 2.0, "grad_norm": 1.0, "rewards/margins": "nan"},
        5: {"loss": 1.0, "rewards/margins": "inf"},
    }
    read = Page(page.curves(steps))
    assert [a["aria-label"] for t, a in read.attributes if t == "svg"] == [
        "loss: 2 at step 0, 1 at the end"
    ]
    assert "held out" not in read.text
    assert "held out" in Page(page.curves({**steps, 6: {"eval_loss": 3.0}})).text
    assert page.curves({0: {"loss": 1.0}}) == ""


def test_the_report_of_a_training_run(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("model: <m>\n")
    lines = [
        f'{{"step": {n}, "loss": {1 / (n + 1)}, "eval_loss": {2 / (n + 1)}, '
        f'"eval_kl/data": 0.25}}\n'
        for n in range(3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    segment = Segment(start=0, end=3, scores={"clarity": 2.0})
    record = Record("<p>", "One.", "Two.", (segment,), (), "f:1")
    side = {"segments": [{"logp": -1.0, "ref_logp": -2.0, "tokens": 2}]}
    result = {"chosen": side, "rejected": {"segments": []}, "rewards": {"margin": 0.5}}
    path = run_report.write_report(
        tmp_path / "report.html",
        title="A & B",
        run=tmp_path,
        figures=run_report.held_out_figures(tmp_path),
        examples=[run_report.Example(record, result)],
        facts={"steps": "3"},
        beta=0.1,
    )
    read = Page(path.read_text())
    assert read.row("loss")[:2] == ["2.000", "0.667"]
    assert read.row("1") == ["+0.0500", "2"]
    assert read.row("KL to the reference")[0] == "0.250"
    assert "reward margin +0.500" in read.text
    assert read.text.endswith("model: <m>")

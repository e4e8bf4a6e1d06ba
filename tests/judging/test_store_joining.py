"""One store of several: every row once, every token counted."""

from pathlib import Path
from typing import Any

import pytest

from jaxalign.errors import UserError
from jaxalign.judging.judge import JudgeRequest, Subject, Verdict, request_key
from jaxalign.judging.store import Judgement, Store, StoredPair
from jaxalign.judging.store_joining import JoinedStores, join_stores


SETTINGS = {"judge": "mine"}
MESSAGES = ({"role": "system", "content": "Judge."}, {"role": "user", "content": "?"})


def judgement(name: str, verdict: Verdict, vote: int = 0) -> Judgement:
    subject = Subject(f"Question {name}?", "One. Two.", spans=((0, 4), (5, 9)))
    asked = JudgeRequest("scores", MESSAGES, {"type": "object"}, subject, vote=vote)
    return Judgement(request_key(asked, SETTINGS), asked, verdict)


def judged(value: Any, attempts: int = 1) -> Verdict:
    return Verdict(
        {"answer": value},
        raw=f"said {value}",
        attempts=attempts,
        prompt_tokens=10,
        completion_tokens=3,
        cost=0.5,
    )


def failed(reason: str, raw: str | None = None) -> Verdict:
    return Verdict(None, reason, raw, attempts=4, prompt_tokens=7, cost=0.25)


def write(path: Path, *judgements: Judgement) -> Path:
    with Store(path) as store:
        for one in judgements:
            store.add([one], SETTINGS)
    return path


def rows(path: Path, query: str) -> list[Any]:
    with Store(path, create=False) as store:
        return store.select(query)


def test_each_row_is_there_once_and_all_that_was_spent_is_counted(tmp_path) -> None:
    one = write(
        tmp_path / "a.db",
        judgement("a", judged(1)),
        judgement("both", judged(2)),
        judgement("other", judged(3)),
        judgement("twice failed", failed("first", "raw")),
        judgement("saved", failed("timed out")),
        judgement("kept", judged(5)),
    )
    two = write(
        tmp_path / "b.db",
        judgement("both", judged(2, attempts=2)),
        judgement("other", judged(4)),
        judgement("twice failed", failed("second")),
        judgement("saved", judged(6)),
        judgement("kept", failed("timed out")),
        judgement("b", judged(7)),
        judgement("b", judged(8), vote=1),
    )
    before = [path.read_bytes() for path in (one, two)]
    out = tmp_path / "deep" / "out.db"
    assert join_stores(out, [one, two]) == JoinedStores(verdicts=8, differing=1)
    assert [path.read_bytes() for path in (one, two)] == before
    found = {
        name: (state, value, reason, raw and bytes(raw).decode(), attempts)
        for name, state, value, reason, raw, attempts in rows(
            out,
            "SELECT s.prompt, state, value, reason, raw, attempts FROM verdicts "
            "JOIN requests r USING (key) JOIN samples s ON s.id = r.sample "
            "WHERE vote = 0",
        )
    }
    assert found == {
        '"Question a?"': ("judged", '{"answer": 1}', None, "said 1", 1),
        '"Question both?"': ("judged", '{"answer": 2}', None, "said 2", 3),
        '"Question other?"': ("judged", '{"answer": 3}', None, "said 3", 2),
        '"Question twice failed?"': ("failed", None, "second", "raw", 8),
        '"Question saved?"': ("judged", '{"answer": 6}', None, "said 6", 5),
        '"Question kept?"': ("judged", '{"answer": 5}', None, "said 5", 5),
        '"Question b?"': ("judged", '{"answer": 7}', None, "said 7", 1),
    }
    # 9 values of 10 + 3 tokens and 0.5, 4 failures of 7 + 0 and 0.25.
    spent = "SELECT sum(prompt_tokens), sum(completion_tokens), sum(cost) FROM verdicts"
    assert rows(out, spent) == [(9 * 10 + 4 * 7, 9 * 3, 9 * 0.5 + 4 * 0.25)]
    assert rows(out, "SELECT count(*) FROM samples") == [(7,)]
    assert rows(out, "SELECT count(*) FROM units") == [(7,)]
    assert rows(out, "SELECT count(*) FROM wordings") == [(1,)]
    # Who goes on with it finds what is there.
    with Store(out) as store:
        assert store.has_judged(SETTINGS)
        known = store.verdict(judgement("saved", judged(6)).key)
        assert known is not None and known.value == {"answer": 6}
        store.add([judgement("new", judged(9))], SETTINGS)


def test_the_order_of_the_parts_decides_and_nothing_else(tmp_path) -> None:
    one = write(tmp_path / "a.db", judgement("x", judged(1)))
    two = write(tmp_path / "b.db", judgement("x", judged(2)))
    assert join_stores(tmp_path / "ab.db", [one, two]).differing == 1
    assert join_stores(tmp_path / "ba.db", [two, one]).differing == 1
    values = [
        rows(tmp_path / name, "SELECT value FROM verdicts")[0][0]
        for name in ("ab.db", "ba.db")
    ]
    assert values == ['{"answer": 1}', '{"answer": 2}']


def test_a_second_call_changes_nothing_and_another_store_is_left_alone(
    tmp_path,
) -> None:
    one = write(tmp_path / "a.db", judgement("x", judged(1)))
    two = write(tmp_path / "b.db", judgement("y", failed("timed out")))
    pair = StoredPair("2 + 2?", "4", "5", 1.0)
    with Store(one) as store:
        store.add_pairs([pair])
    out = tmp_path / "out.db"
    first = join_stores(out, [one, two])
    kept = out.read_bytes()
    assert join_stores(out, [one, two]) == first and out.read_bytes() == kept
    assert rows(out, "SELECT count(*) FROM pairs") == [(1,)]
    with Store(out) as store:
        store.add([judgement("z", judged(3))], SETTINGS)
    kept = out.read_bytes()
    with pytest.raises(UserError, match="holds something else than the stores"):
        join_stores(out, [one, two])
    assert out.read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("a.db", "b.db", "out.db")
    ]


def test_what_is_no_store_is_refused_and_nothing_is_written(tmp_path) -> None:
    one = write(tmp_path / "a.db", judgement("x", judged(1)))
    (tmp_path / "b.db").write_text("no store at all, but some text")
    out = tmp_path / "out.db"
    for other, said in (("b.db", "is no store"), ("c.db", "is not there")):
        with pytest.raises(UserError, match=said):
            join_stores(out, [one, tmp_path / other])
        assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a.db", "b.db"}


def test_a_join_that_was_killed_is_begun_anew(tmp_path) -> None:
    one = write(tmp_path / "a.db", judgement("x", judged(1)))
    write(tmp_path / ".out.db.part", judgement("stale", judged(9)))
    assert join_stores(tmp_path / "out.db", [one]).verdicts == 1
    assert not (tmp_path / ".out.db.part").exists()

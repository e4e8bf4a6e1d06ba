"""The store: what is written stays, what is judged is never asked again."""

import asyncio
import json
import multiprocessing
import resource
import sqlite3
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.errors import UserError
from jaxalign.judging import store_report, store_schema
from jaxalign.judging.asking import SettledVerdict, ask
from jaxalign.judging.judge import JudgeRequest, Subject, Verdict, request_key
from jaxalign.judging.store import Judgement, Store, StoredPair, sample_id


SETTINGS = {"judge": "test", "model": "m"}


def request(text: str, vote: int = 0, response: str = "One. Two.") -> JudgeRequest:
    messages = ({"role": "system", "content": "s"}, {"role": "user", "content": text})
    subject = Subject(text, response, spans=((0, 5), (5, 9)), aspects=("clarity",))
    return JudgeRequest("scores", messages, {"type": "object"}, subject, vote)


def scores(*values: int) -> Verdict:
    value = {"segments": [{"clarity": v} for v in values]}
    return Verdict(value, raw=json.dumps(value), prompt_tokens=7, cost=0.5)


def judgement(asked: JudgeRequest, verdict: Verdict) -> Judgement:
    return Judgement(request_key(asked, SETTINGS), asked, verdict)


class Scripted:
    """A judge that says what it is told, and remembers what it was asked."""

    def __init__(self, fails: Iterable[str] = (), stop_after: int = 10**9):
        self.asked: list[str] = []
        self.fails = set(fails)
        self.stop_after = stop_after
        self.waiting = self.most_waiting = 0

    settings = SETTINGS

    async def grade(
        self, requests: Iterable[JudgeRequest]
    ) -> AsyncIterator[tuple[int, Verdict]]:
        for number, asked in enumerate(requests):
            if len(self.asked) == self.stop_after:
                raise UserError("the budget is spent")
            prompt = str(asked.subject.prompt)
            self.asked.append(prompt)
            await asyncio.sleep(0)
            if prompt in self.fails:
                yield number, Verdict(None, failure="time-out: long", raw="hm")
            else:
                yield number, scores(1, 2)


def answers(
    judge: Any, requests: Iterable[JudgeRequest], store: Store
) -> list[SettledVerdict]:
    async def collected() -> list[SettledVerdict]:
        return [answer async for answer in ask(judge, requests, store)]

    return asyncio.run(collected())


def test_what_was_written_is_read_back(tmp_path) -> None:
    good = judgement(request("a"), scores(0, 4))
    bad = judgement(request("b"), Verdict(None, failure="prose", raw="No \ud800 \0 é"))
    with Store(tmp_path / "s.db") as store:
        store.add([good, bad], SETTINGS)
        store.add_pairs(
            [StoredPair("p", "good", "bad", 1.5), StoredPair("p", "good", "bad", 2.0)]
        )
    with Store(tmp_path / "s.db") as store:
        assert store.verdict(good.key) == good.verdict
        found = store.verdicts([good.key, "nowhere", bad.key])
        assert found == {good.key: good.verdict, bad.key: bad.verdict}
        assert store.verdict("nowhere") is None
        assert store.select("SELECT chosen, rejected, gap FROM pairs") == [
            (sample_id("p", "good"), sample_id("p", "bad"), 2.0)
        ]
        assert store.select("SELECT count(*) FROM units") == [(2,)]
        assert store.select("PRAGMA foreign_key_check") == []


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_a_value_is_final_and_a_failure_is_not(tmp_path_factory, goes_well) -> None:
    asked = request("a")
    path = tmp_path_factory.mktemp("store") / "s.db"
    with Store(path) as store:
        for n, good in enumerate(goes_well):
            verdict = scores(n % 5, 0) if good else Verdict(None, failure=f"no {n}")
            store.add([judgement(asked, verdict)], SETTINGS)
        found = store.verdict(request_key(asked, SETTINGS))
    assert found is not None
    if True in goes_well:
        first = goes_well.index(True)
        assert found.value == scores(first % 5, 0).value and found.failure is None
        assert found.attempts == first + 1
    else:
        assert found.failure == f"no {len(goes_well) - 1}"


def test_nothing_is_asked_twice_but_what_failed(tmp_path) -> None:
    names = [f"p{n % 70}" for n in range(200)]
    judge = Scripted(fails={"p3", "p69"})
    with Store(tmp_path / "s.db") as store:
        found = answers(judge, map(request, names), store)
        assert sorted(answer.number for answer in found) == list(range(200))
        assert sorted(judge.asked) == sorted(set(names))
        assert sum(answer.fresh for answer in found) == 70
        failed = {a.number for a in found if a.verdict.failure is not None}
        assert {names[n] for n in failed} == judge.fails and len(failed) == 5
    judge = Scripted()
    with Store(tmp_path / "s.db") as store:
        found = answers(judge, map(request, names), store)
        assert sorted(judge.asked) == ["p3", "p69"]
        assert all(answer.verdict.value is not None for answer in found)
        again = Scripted()
        assert len(answers(again, map(request, names), store)) == 200
        assert again.asked == []


def test_many_known_requests_do_not_pile_up(tmp_path) -> None:
    known = [request(f"p{n}") for n in range(3000)]
    with Store(tmp_path / "s.db") as store:
        store.add([judgement(one, scores(1, 1)) for one in known], SETTINGS)
        judge, drawn = Scripted(), 0

        def all_of_them() -> Iterable[JudgeRequest]:
            nonlocal drawn
            for one in [request("new"), *known, request("newer")]:
                drawn += 1
                yield one

        async def most_ahead() -> int:
            taken, most = 0, 0
            async for _ in ask(judge, all_of_them(), store):
                taken += 1
                most = max(most, drawn - taken)
            assert taken == 3002
            return most

        assert asyncio.run(most_ahead()) < 2000
        assert judge.asked == ["new", "newer"]


def test_a_verdict_is_written_before_it_is_told(tmp_path) -> None:
    async def check() -> None:
        with Store(tmp_path / "s.db") as store, Store(tmp_path / "s.db") as other:
            names = (request(f"p{n}") for n in range(50))
            async for answer in ask(Scripted(), names, store):
                assert other.verdict(answer.key) == answer.verdict

    asyncio.run(check())


def test_a_judge_that_stops_loses_nothing(tmp_path) -> None:
    requests = [request(f"p{n}") for n in range(30)]
    with Store(tmp_path / "s.db") as store:
        with pytest.raises(UserError, match="budget is spent"):
            answers(Scripted(stop_after=11), requests, store)
        judge = Scripted()
        assert len(answers(judge, requests, store)) == 30
        assert judge.asked == [f"p{n}" for n in range(11, 30)]


def test_a_judge_that_forgets_a_request_is_found_out(tmp_path) -> None:
    class Forgetful(Scripted):
        async def grade(
            self, requests: Iterable[JudgeRequest]
        ) -> AsyncIterator[tuple[int, Verdict]]:
            async for number, verdict in super().grade(requests):
                if number != 4:
                    yield number, verdict

    with Store(tmp_path / "s.db") as store, pytest.raises(RuntimeError, match="left 1"):
        answers(Forgetful(), [request(f"p{n}") for n in range(9)], store)


def test_one_who_leaves_early_keeps_what_came_in(tmp_path) -> None:
    async def first(store: Store) -> None:
        answered = ask(Scripted(), (request(f"p{n}") for n in range(500)), store)
        async for _ in answered:
            break
        await answered.aclose()

    with Store(tmp_path / "s.db") as store:
        asyncio.run(first(store))
        ((kept,),) = store.select("SELECT count(*) FROM verdicts")
        assert 1 <= kept < 500


def test_a_full_disk_is_named_and_survived(tmp_path) -> None:
    requests = [request(f"p{n}", response="long " * 200) for n in range(200)]
    with Store(tmp_path / "s.db") as store:
        answers(Scripted(), requests[:5], store)
        ((pages,),) = store.select("PRAGMA page_count")
        store._writer.execute(f"PRAGMA max_page_count = {pages + 3}")
        with pytest.raises(UserError, match="is full .* Make room. What was judged"):
            answers(Scripted(), requests, store)
    judge = Scripted()
    with Store(tmp_path / "s.db") as store:
        assert store.select("PRAGMA integrity_check") == [("ok",)]
        assert len(answers(judge, requests, store)) == 200
        assert not {f"p{n}" for n in range(5)} & set(judge.asked)


def _write_under_a_limit(path: Path, limit: int, said: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    requests = [request(f"p{n}", response="long " * 200) for n in range(200)]
    try:
        with Store(path) as store:
            answers(Scripted(), requests, store)
    except UserError as error:
        said.put(str(error))
    else:
        said.put("no error")


def test_a_limit_on_file_sizes_is_named(tmp_path) -> None:
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    process = context.Process(
        target=_write_under_a_limit, args=(tmp_path / "s.db", 200_000, said)
    )
    process.start()
    text = said.get(timeout=120)
    process.join()
    assert "cannot be written" in text and "Make room" in text
    with Store(tmp_path / "s.db") as store:
        assert store.select("PRAGMA integrity_check") == [("ok",)]


def test_two_processes_take_turns(tmp_path, monkeypatch) -> None:
    path = tmp_path / "s.db"
    monkeypatch.setattr(store_schema, "_BUSY_SECONDS", 0.05)
    with Store(path) as one, Store(path) as other:
        one.add([judgement(request("a"), scores(1, 1))], SETTINGS)
        other.add([judgement(request("b"), scores(1, 1))], SETTINGS)
        assert one.select("SELECT count(*) FROM verdicts") == [(2,)]
        other._writer.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match="another process has held the store"):
            one.add([judgement(request("c"), scores(1, 1))], SETTINGS)
        # Reading goes on meanwhile.
        assert one.select("SELECT count(*) FROM verdicts") == [(2,)]
        other._writer.execute("ROLLBACK")
        one.add([judgement(request("c"), scores(1, 1))], SETTINGS)


def test_files_that_are_no_store(tmp_path) -> None:
    text = tmp_path / "text.db"
    text.write_text("no database " * 100)
    with pytest.raises(UserError, match="is no store or is damaged"):
        Store(text)
    alien = tmp_path / "alien.db"
    with sqlite3.connect(alien) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    with pytest.raises(UserError, match="a database of something else"):
        Store(alien)
    with pytest.raises(UserError, match="is not there"):
        Store(tmp_path / "nowhere.db", create=False)
    assert not (tmp_path / "nowhere.db").exists()
    newer = tmp_path / "newer.db"
    Store(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(UserError, match="made by a newer jaxalign .*99"):
        Store(newer)
    with pytest.raises(UserError, match="cannot be opened"):
        Store(tmp_path)


def test_a_store_is_shown_and_exported(tmp_path) -> None:
    votes = [(0, scores(1, 2)), (1, scores(1, 4)), (2, scores(1, 2))]
    failed = Verdict(None, failure="HTTP 500: busy", raw="<html>")
    with Store(tmp_path / "s.db") as store:
        store.add(
            [
                *(judgement(request("a", vote), verdict) for vote, verdict in votes),
                judgement(request("b"), failed),
            ],
            SETTINGS,
        )
        # Of 6 pairs of scores 3 + 1 are equal; the distances are 2, 0 and 2.
        assert store_report.agreement(store) == (4, 6, 4)
        console = rich.console.Console(width=160, record=True, quiet=True)
        with console.capture():
            store_report.show(store, console)
        out = tmp_path / "out.jsonl"
        assert store_report.export(store, out) == 4
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["state"] for line in lines} == {"judged", "failed"}
    (bad,) = (line for line in lines if line["state"] == "failed")
    assert (bad["reason"], bad["raw"], bad["value"]) == (
        "HTTP 500: busy",
        "<html>",
        None,
    )
    assert bad["prompt"] == "b" and bad["spans"] == [[0, 5], [5, 9]]


def test_the_table_has_the_counts(tmp_path, capsys) -> None:
    with Store(tmp_path / "s.db") as store:
        failed = Verdict(None, failure="HTTP 500: busy")
        store.add([judgement(request("a"), failed)], SETTINGS)
        store.add([judgement(request("b"), scores(1, 1))], SETTINGS)
        store_report.show(store, rich.console.Console(width=160))
    shown = capsys.readouterr().out
    for words in ("test model=m", "HTTP 500", "0.5000", "verdicts"):
        assert words in shown
    assert "busy" not in shown


def _open_often(path: str, instant: float) -> str:
    while time.time() < instant:
        pass
    try:
        Store(path).close()
    except UserError as error:
        return str(error)
    return "open"


def test_several_processes_may_make_a_store(tmp_path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(4) as pool:
        for n in range(15):
            given = (str(tmp_path / f"{n}.db"), time.time() + 0.05)
            assert pool.starmap(_open_often, [given] * 4, chunksize=1) == ["open"] * 4


def test_a_judge_is_told_that_it_was_right_before(tmp_path) -> None:
    """What is left of a killed run may be what an endpoint always refuses."""
    with Store(tmp_path / "s.db") as store:
        first, later = Scripted(), Scripted()
        first.proven = later.proven = False
        answers(first, [request("a")], store)
        answers(later, [request("b")], store)
        assert (first.proven, later.proven) == (False, True)
        assert not store.has_judged({**SETTINGS, "model": "other"})

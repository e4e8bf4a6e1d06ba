"""The store: every judgement there ever was, in one SQLite file.

A verdict is a value or a failure. A value is final: it is never replaced and its
request never sent again. A failure keeps its reason and the last reply; a later run
asks again. What ``add`` has returned from is on the disk, through ``kill -9`` and loss
of power. Two processes may use a store at the same time; they take turns in writing.
"""

import contextlib
import dataclasses
import json
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from jaxalign.judging.judge import (
    JudgeRequest,
    Subject,
    Verdict,
    digest,
    hash_of,
    request_key,
)
from jaxalign.judging.store_schema import explained, open_database


__all__ = [
    "Judgement",
    "StoredPair",
    "Store",
    "sample_id",
    "temporary_store",
    "text_of",
]

_AT_ONCE = 500  # places in one SELECT; SQLite has had a limit of 999

_ADD_VERDICT = """
INSERT INTO verdicts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (key) DO UPDATE SET
    state = excluded.state, value = excluded.value, reason = excluded.reason,
    raw = ifnull(excluded.raw, raw), instant = excluded.instant,
    attempts = attempts + excluded.attempts,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens,
    cost = cost + excluded.cost
WHERE state = 'failed'
"""
_VERDICT = "value, reason, raw, attempts, prompt_tokens, completion_tokens, cost"


class Judgement(NamedTuple):
    """A verdict with the request that it answers."""

    key: str
    """:func:`jaxalign.judging.judge.request_key`."""
    request: JudgeRequest
    verdict: Verdict


class StoredPair(NamedTuple):
    """Two responses to one prompt, one preferred."""

    prompt: str | tuple[Mapping[str, str], ...]
    chosen: str
    rejected: str
    gap: float
    """Score of the chosen one less that of the rejected one."""


def sample_id(prompt: str | Sequence[Mapping[str, str]], response: str) -> str:
    """Return what tells equal responses to equal prompts: a SHA-256 in hexadecimal.

    >>> sample_id("2 + 2?", "4")[:8]
    '0958482c'
    """
    return hash_of([prompt, response])


@contextlib.contextmanager
def temporary_store() -> "Iterator[Store]":
    """Open a store that is gone when the context ends.

    >>> with temporary_store() as store: path = store.path
    >>> path.exists()
    False
    """
    with tempfile.TemporaryDirectory() as folder:
        with Store(Path(folder) / "store.db") as store:
            yield store


class Store:
    """An open store. Use as a context, or close it.

    Threads may share it. Reading does not wait for writing.

    Raises:
      UserError: the file is no store, was made by a newer version, is locked by
        another process or cannot be written.
    Example:
      >>> subject = Subject("2 + 2?", "4", other="5")
      >>> request = JudgeRequest("compare", (), {"type": "object"}, subject)
      >>> judged, settings = Verdict({"better": "A"}), {"judge": "mine"}
      >>> key = request_key(request, settings)
      >>> with temporary_store() as store:
      ...     store.add([Judgement(key, request, judged)], settings)
      ...     store.verdict(key).value, store.has_judged(settings)
      ({'better': 'A'}, True)
    """

    def __init__(self, path: str | Path, *, create: bool = True):
        self.path = Path(path)
        self._writer = open_database(self.path, create=create)
        self._reader = open_database(self.path, create=False)
        self._writing, self._reading = threading.Lock(), threading.Lock()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._reading, self._writing:
            self._reader.close()
            self._writer.close()

    def verdict(self, key: str) -> Verdict | None:
        """Return the verdict on a request, a failed one too; None if never asked."""
        rows = self.select(f"SELECT {_VERDICT} FROM verdicts WHERE key = ?", (key,))
        return _verdict(rows[0]) if rows else None

    def verdicts(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """Return the verdicts on those of many requests that were asked."""
        listed, found = list(keys), {}
        for first in range(0, len(listed), _AT_ONCE):
            some = listed[first : first + _AT_ONCE]
            places = ", ".join("?" * len(some))
            rows = self.select(
                f"SELECT {_VERDICT}, key FROM verdicts WHERE key IN ({places})", some
            )
            found.update((row[-1], _verdict(row)) for row in rows)
        return found

    def has_judged(self, settings: Mapping[str, Any]) -> bool:
        """Tell whether a judge with these settings has ever given a value."""
        query = (
            "SELECT 1 FROM requests JOIN verdicts USING (key) "
            "WHERE judge = ? AND state = 'judged' LIMIT 1"
        )
        return bool(self.select(query, (_json(settings),)))

    def add(self, judgements: Iterable[Judgement], settings: Mapping[str, Any]) -> None:
        """Write judgements; all of them are on the disk afterwards, or none.

        Args:
          judgements: with their requests.
          settings: of the judge that they are from.
        Raises:
          UserError: the disk is full or the store locked; nothing was written.
        """
        rows = _Rows(settings)
        for judgement in judgements:
            rows.add(judgement)
        self._write(rows.statements())

    def add_pairs(self, pairs: Iterable[StoredPair]) -> None:
        """Write pairs; one that is there gets the new gap.

        Raises:
          UserError: the disk is full or the store locked; nothing was written.
        """
        samples, rows = [], []
        for pair in pairs:
            ids = [sample_id(pair.prompt, r) for r in (pair.chosen, pair.rejected)]
            prompt = _json(pair.prompt)
            samples += [(ids[0], prompt, pair.chosen), (ids[1], prompt, pair.rejected)]
            rows.append((*ids, pair.gap, time.time()))
        self._write(
            [
                ("INSERT OR IGNORE INTO samples VALUES (?, ?, ?)", samples),
                ("INSERT OR REPLACE INTO pairs VALUES (?, ?, ?, ?)", rows),
            ]
        )

    def select(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return all rows of a SELECT."""
        with self._reading:
            try:
                return self._reader.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise explained(error, self.path) from None

    def scan(self, query: str) -> Iterator[Any]:
        """Yield the rows of a SELECT that may be long, as they were when it began."""
        connection = open_database(self.path, create=False)
        try:
            yield from connection.execute(query)
        except sqlite3.Error as error:
            raise explained(error, self.path) from None
        finally:
            connection.close()

    def _write(self, statements: Iterable[tuple[str, Sequence[Any]]]) -> None:
        with self._writing:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                for statement, rows in statements:
                    self._writer.executemany(statement, rows)
                self._writer.execute("COMMIT")
            except sqlite3.Error as error:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise explained(error, self.path) from None


class _Rows:
    """Judgements as rows of the tables."""

    def __init__(self, settings: Mapping[str, Any]):
        self.settings = settings
        self.judge = _json(settings)
        self.now = time.time()
        self.samples: list[Any] = []
        self.units: list[Any] = []
        self.wordings: dict[str, str] = {}
        self.requests: list[Any] = []
        self.verdicts: list[Any] = []

    def statements(self) -> list[tuple[str, Sequence[Any]]]:
        """Return what writes them, rows before those that refer to them."""
        return [
            ("INSERT OR IGNORE INTO samples VALUES (?, ?, ?)", self.samples),
            ("INSERT OR IGNORE INTO units VALUES (?, ?)", self.units),
            (
                "INSERT OR IGNORE INTO wordings VALUES (?, ?)",
                list(self.wordings.items()),
            ),
            (
                "INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                self.requests,
            ),
            (_ADD_VERDICT, self.verdicts),
        ]

    def add(self, judgement: Judgement) -> None:
        key, request, verdict = judgement
        sample = self._sample(request.subject, request.subject.response)
        other = request.subject.other
        if request.subject.spans:
            self.units.append((sample, _json(request.subject.spans)))
        # The system message is that of thousands of requests: kept once.
        wording = None
        for message in request.messages[:1]:
            text = str(message.get("content"))
            wording = digest(text)
            self.wordings[wording] = text
        question = key
        if request.vote:
            first = dataclasses.replace(request, vote=0)
            question = request_key(first, self.settings)
        self.requests.append(
            (
                *(key, question, request.vote, request.task, self.judge, sample),
                None if other is None else self._sample(request.subject, other),
                wording,
                _json(_rest(request.subject)),
            )
        )
        failed = verdict.failure is not None
        self.verdicts.append(
            (
                key,
                "failed" if failed else "judged",
                None if failed else _json(verdict.value),
                None if verdict.failure is None else _shown(verdict.failure),
                None if verdict.raw is None else _bytes(verdict.raw),
                verdict.attempts,
                verdict.prompt_tokens,
                verdict.completion_tokens,
                verdict.cost,
                self.now,
            )
        )

    def _sample(self, subject: Subject, response: str) -> str:
        made = sample_id(subject.prompt, response)
        self.samples.append((made, _json(subject.prompt), response))
        return made


def _rest(subject: Subject) -> dict[str, Any]:
    """Return what a subject has beside prompt and responses."""
    kept = ("spans", "aspects", "statement", "references", "images")
    return {name: value for name in kept if (value := getattr(subject, name))}


def _verdict(row: Any) -> Verdict:
    value, reason, raw, attempts, prompt_tokens, completion_tokens, cost = row[:7]
    return Verdict(
        None if value is None else json.loads(value),
        failure=reason,
        raw=text_of(raw),
        attempts=attempts,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cost=cost,
    )


def _shown(text: str) -> str:
    """Return a reason that may quote a reply which is no Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def text_of(raw: bytes | None) -> str | None:
    """Return a reply as it was sent, from the column ``raw`` of the verdicts.

    >>> text_of(None) is None
    True
    """
    return None if raw is None else bytes(raw).decode("utf-8", "surrogatepass")


_json = json.JSONEncoder(default=dict).encode

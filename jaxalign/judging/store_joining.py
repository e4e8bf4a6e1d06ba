"""One store of several: what parts of a run (``--shard i/n``) were told, together.

Rows are known by what they hold, so that joining is taking each once. Where two stores
have a verdict under one key, the first value stays, as a value is final; a value takes
the place of a failure, and a failure that of an earlier one. Attempts, tokens and cost
are added: all of them were spent. Values that differ are counted, not refused: equal
requests of two parts were then asked twice, of one who does not say the same twice.
"""

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxalign.errors import UserError
from jaxalign.judging.store_schema import explained, open_database
from jaxalign.whole_file import check_target, writing


__all__ = ["JoinedStores", "join_stores"]

_TABLES = ("samples", "units", "wordings", "requests", "verdicts", "pairs")

_VERDICTS = """
INSERT INTO main.verdicts SELECT * FROM other.verdicts WHERE true
ON CONFLICT (key) DO UPDATE SET
    state = iif(state = 'judged', state, excluded.state),
    value = iif(state = 'judged', value, excluded.value),
    reason = iif(state = 'judged', reason, excluded.reason),
    raw = iif(state = 'judged', raw, ifnull(excluded.raw, raw)),
    instant = iif(state = 'judged', instant, excluded.instant),
    attempts = attempts + excluded.attempts,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens,
    cost = cost + excluded.cost
"""
_DIFFERING = """
SELECT count(*) FROM other.verdicts theirs JOIN main.verdicts ours USING (key)
WHERE theirs.value != ours.value
"""


class JoinedStores(NamedTuple):
    """What joining stores came to."""

    verdicts: int
    differing: int
    """Values that another store had another for, and that were left out."""


def join_stores(out: Path, stores: Sequence[Path]) -> JoinedStores:
    """Write one store of several, whole or not at all.

    Args:
      out: the store; one that holds just that stays.
      stores: in the order of the parts; they stay as they are.
    Raises:
      UserError: one is no store, there is another at ``out``, or it cannot be written.
    Example:
      >>> import tempfile
      >>> from jaxalign.judging.judge import JudgeRequest, Subject, Verdict
      >>> from jaxalign.judging.store import Judgement, Store
      >>> folder = Path(tempfile.mkdtemp())
      >>> asked = JudgeRequest("verify", (), {}, Subject("2 + 2?", "4"))
      >>> for name, answer in (("a.db", "yes"), ("b.db", "no")):
      ...     with Store(folder / name) as store:
      ...         told = Verdict({"answer": answer})
      ...         store.add([Judgement("key", asked, told)], {})
      >>> join_stores(folder / "out.db", [folder / "a.db", folder / "b.db"])
      JoinedStores(verdicts=1, differing=1)
    """
    check_target(out)
    part = out.with_name(f".{out.name}.part")
    with writing(out, "the stores of the parts are as they were"):
        _remove(part)
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            made = _joined(part, stores)
            if not out.exists():
                part.replace(out)
            elif not _same(part, out):
                raise UserError(
                    f"{out} is there and holds something else than the stores of these "
                    "parts: give another OUT, or remove it"
                )
        finally:
            _remove(part)
    return made


def _joined(part: Path, stores: Sequence[Path]) -> JoinedStores:
    differing = 0
    with contextlib.closing(open_database(part, create=True)) as connection:
        for path in stores:
            with _attached(connection, path):
                differing += _one(connection, _DIFFERING)
                connection.execute("BEGIN")
                for table in _TABLES:
                    into = f"INSERT OR IGNORE INTO main.{table}"
                    every = f"{into} SELECT * FROM other.{table}"
                    connection.execute(_VERDICTS if table == "verdicts" else every)
                connection.execute("COMMIT")
        return JoinedStores(
            _one(connection, "SELECT count(*) FROM verdicts"), differing
        )


def _same(one: Path, other: Path) -> bool:
    """Tell whether two stores have the same rows."""
    with (
        contextlib.closing(open_database(one, create=False)) as connection,
        _attached(connection, other),
    ):
        return not any(
            _one(
                connection,
                f"SELECT count(*) FROM (SELECT * FROM {a}.{table} "
                f"EXCEPT SELECT * FROM {b}.{table})",
            )
            for table in _TABLES
            for a, b in (("main", "other"), ("other", "main"))
        )


@contextlib.contextmanager
def _attached(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    """Have another store under the name ``other``; errors are the user's."""
    open_database(path, create=False).close()  # says what is wrong with it
    try:
        connection.execute("ATTACH DATABASE ? AS other", (str(path),))
        yield
        connection.execute("DETACH DATABASE other")
    except sqlite3.Error as error:
        raise explained(error, path) from None


def _one(connection: sqlite3.Connection, query: str) -> int:
    return connection.execute(query).fetchone()[0]


def _remove(path: Path) -> None:
    for end in ("", "-wal", "-shm", "-journal"):
        path.with_name(path.name + end).unlink(missing_ok=True)

"""The tables of a store, and how a file is known to be one."""

import sqlite3
import time
from pathlib import Path

from jaxalign.errors import UserError


__all__ = ["explained", "open_database"]

APPLICATION = 0x6A616C67  # "jalg"
VERSION = 1
_BUSY_SECONDS = 30.0

# Everything is keyed by what it holds, so that two runs, or two processes, that say the
# same thing write the same row. Replies are blobs: they may hold what is no Unicode
# text. Instants are seconds since the epoch. Tables of long rows keep their row ids:
# rows are then appended, and only the short index is written all over the file.
_TABLES = """
CREATE TABLE samples (
    id TEXT PRIMARY KEY,
    prompt TEXT NOT NULL,      -- JSON: a text, or the turns of a conversation
    response TEXT NOT NULL
);
CREATE TABLE units (           -- segments that a response was judged in
    sample TEXT NOT NULL REFERENCES samples,
    spans TEXT NOT NULL,       -- JSON: [[start, end], ...] in code points
    PRIMARY KEY (sample, spans)
) WITHOUT ROWID;
CREATE TABLE wordings (        -- system messages
    id TEXT PRIMARY KEY,
    text TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE requests (
    key TEXT PRIMARY KEY,      -- protocol.request_key
    question TEXT NOT NULL,    -- the same key of the first vote
    vote INTEGER NOT NULL,
    task TEXT NOT NULL,
    judge TEXT NOT NULL,       -- JSON: the judge's settings
    sample TEXT NOT NULL REFERENCES samples,
    other TEXT REFERENCES samples,
    wording TEXT REFERENCES wordings,
    subject TEXT NOT NULL      -- JSON: the rest of what it is about
);
CREATE TABLE verdicts (
    key TEXT PRIMARY KEY REFERENCES requests,
    state TEXT NOT NULL CHECK (state IN ('judged', 'failed')),
    value TEXT,                -- JSON
    reason TEXT,
    raw BLOB,
    attempts INTEGER NOT NULL, -- of all runs, as are tokens and cost
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cost REAL NOT NULL,
    instant REAL NOT NULL,
    CHECK ((state = 'judged') = (value IS NOT NULL)),
    CHECK ((state = 'failed') = (reason IS NOT NULL))
);
CREATE TABLE pairs (
    chosen TEXT NOT NULL REFERENCES samples,
    rejected TEXT NOT NULL REFERENCES samples,
    gap REAL NOT NULL,
    instant REAL NOT NULL,
    PRIMARY KEY (chosen, rejected)
) WITHOUT ROWID;
"""


def open_database(path: Path, *, create: bool) -> sqlite3.Connection:
    """Open a store's database, or make it.

    Raises:
      UserError: it is missing, no store, of a newer version, or cannot be used.
    """
    if not create and not path.is_file():
        raise UserError(f"{path} is not there: expected the --store of jaxalign judge")
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(
            path,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
    except (sqlite3.Error, OSError) as error:
        raise UserError(f"the store {path} cannot be opened: {error}") from None
    try:
        _prepare(connection, path, create)
    except sqlite3.Error as error:
        connection.close()
        raise explained(error, path) from None
    except UserError:
        connection.close()
        raise
    return connection


def explained(error: sqlite3.Error, path: Path) -> UserError:
    """Return SQLite's error as the user's, with the cure."""
    text = str(error)
    code = _code(error)
    kept = "What was judged before is kept; the same command goes on from there"
    if code == sqlite3.SQLITE_FULL:
        return UserError(
            f"the disk of the store {path} is full ({text}). Make room. {kept}"
        )
    if code == sqlite3.SQLITE_IOERR:
        return UserError(
            f"the store {path} cannot be written ({text}): the disk is full, a limit "
            f"on file sizes is reached, or the disk fails. Make room. {kept}"
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return UserError(
            f"another process has held the store {path} for {_BUSY_SECONDS:.0f} s "
            f"({text}). Wait for it, or give another --store. {kept}"
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return UserError(
            f"the store {path} cannot be opened for writing ({text}): SQLite needs to "
            "write the file and its directory"
        )
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return UserError(
            f"{path} is no store or is damaged ({text}): give another file"
        )
    return UserError(f"the store {path}: {text}")


def _prepare(connection: sqlite3.Connection, path: Path, create: bool) -> None:
    """Check that it is a store of ours, and make the tables of a new one."""
    # In one transaction: another process may be making the store.
    connection.execute("BEGIN IMMEDIATE" if create else "BEGIN")
    try:
        application = _pragma(connection, "application_id")
        version = _pragma(connection, "user_version")
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    finally:
        connection.execute("ROLLBACK")
    used = tables or application or version or not create
    if application != APPLICATION and used:
        raise UserError(
            f"{path} is a database of something else: expected a store of jaxalign, or "
            "a file that is not there yet"
        )
    if version > VERSION:
        raise UserError(
            f"{path} was made by a newer jaxalign (its version is {version}, ours "
            f"{VERSION}): update jaxalign, or give another file"
        )
    mode = _set_ahead(connection)
    if mode != "wal":
        raise UserError(
            f"the store {path} cannot be kept in write-ahead mode (it is {mode}): the "
            "file system lacks shared memory. Put it on a local disk"
        )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    if application == APPLICATION:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have been first.
        if _pragma(connection, "application_id") != APPLICATION:
            for statement in _TABLES.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    except sqlite3.Error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _set_ahead(connection: sqlite3.Connection) -> str:
    """Ask for write-ahead mode and return the mode there is.

    SQLite does not wait for other processes here, as it does elsewhere.
    """
    end = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            return connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(0.01)


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]

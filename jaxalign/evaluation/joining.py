"""``jaxalign join``: one file or one evaluation of the parts that ``--shard i/n`` made.

What comes out is what the same command makes without ``--shard``: the same bytes, since
a row has its own seed, length and slots of the whole file, and an item its own answers.
Figures are of all items, not means over the parts. The stores beside the parts become
one (:mod:`jaxalign.judging.store_joining`). All is written whole or not at all, and the
same call again changes nothing.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign import configs, event_loops
from jaxalign.data import shard_files
from jaxalign.data.images import NamedPictures
from jaxalign.errors import UserError
from jaxalign.evaluation import contamination, run_files
from jaxalign.evaluation.config import EvalConfig
from jaxalign.evaluation.harness import Runner
from jaxalign.evaluation.planning import Planned, plan
from jaxalign.evaluation.published import read_json, read_jsonl
from jaxalign.evaluation.run_files import OPTIONS, SETTINGS, TaskReport
from jaxalign.evaluation.task import Graded, Items, Question, Task
from jaxalign.judging.asking import Usage
from jaxalign.judging.judge import JudgeRequest, Verdict, request_key
from jaxalign.judging.store import Store
from jaxalign.judging.store_joining import JoinedStores, join_stores
from jaxalign.shards import Shard, check_parts, parse
from jaxalign.whole_file import write_text, writing


__all__ = ["JoinedEvaluations", "JoinedFiles", "join_evaluations", "join_files"]

_KEPT = "the parts are as they were, and the same command joins them"
_VERBATIM = ("raw", "reason")
"""Of failures the store has the last of several words."""


class JoinedFiles(NamedTuple):
    """What joining files came to."""

    parts: int
    lines: int
    store: JoinedStores | None
    """None where the parts have no stores beside them."""


class JoinedEvaluations(NamedTuple):
    """What joining evaluations came to."""

    parts: int
    config: EvalConfig
    """Of the whole."""
    reports: list[TaskReport]
    store: JoinedStores


def join_files(out: str | Path, parts: Sequence[str | Path]) -> JoinedFiles:
    """Join what ``generate``, ``judge`` or ``disentangle`` wrote with ``--shard``.

    Args:
      out: JSON Lines file to write; one that holds just this stays.
      parts: the files, in any order, with their settings and stores beside them.
    Raises:
      UserError: a part is missing, twice there, not complete, or made with other
        settings or of other data; or there is something else at ``out``.
    Example::

      join_files("texts.jsonl", ["texts0.jsonl", "texts1.jsonl"]).lines
    """
    out, found = Path(out), shard_files.read_set([Path(part) for part in parts])
    settings = found[0].settings
    before = shard_files.said_of(out)
    if before is not None and shard_files.differing(before, settings):
        raise UserError(
            f"{out} is there and was made with other settings: give another OUT, or "
            f"remove it and {shard_files.settings_of(out).name}"
        )
    if out.exists():
        shard_files.join_lines(out, found)  # refuses other lines
    stores = [_store_of(one.path) for one in found]
    there = [path for path in stores if path.is_file()]
    if there and len(there) < len(stores):
        lacking = next(path for path in stores if path not in there)
        raise UserError(
            f"{lacking} is missing, where {there[0]} is there: bring it beside its part"
        )
    store = join_stores(_store_of(out), stores) if there else None
    if "command" not in settings:  # what generate goes on by
        with writing(out, _KEPT):
            out.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(settings, indent=2)
            write_text(shard_files.settings_of(out), text)
    return JoinedFiles(len(found), shard_files.join_lines(out, found), store)


def _store_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.store.db")


class _Part(NamedTuple):
    """A part of an evaluation: its directory, and what it says of itself."""

    path: Path
    shard: Shard
    identity: dict[str, Any]
    """The settings of the whole."""
    asked: dict[str, Any]
    """What else all its parts share."""
    config: EvalConfig


def join_evaluations(out: str | Path, parts: Sequence[str | Path]) -> JoinedEvaluations:
    """Join what ``eval`` wrote with ``--shard``; the tasks' data is read once more.

    Every answer and grade is looked up in the part's own store, and must be what the
    part's files say; nobody is asked, and neither model nor judge is needed.

    Args:
      out: directory to write; one that holds just this stays.
      parts: the directories, in any order.
    Raises:
      UserError: as for :func:`join_files`; or the tasks' data is not that of the parts.
    Example::

      joined = join_evaluations("eval", ["eval0", "eval1", "eval2"])
      joined.reports[0].metrics["over_refusal"]["value"]
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, and the parts are directories: give another")
    found = _read_parts([Path(part) for part in parts])
    made = out.with_name(f".{out.name}.part")
    config = dataclasses.replace(found[0].config, shard=None, out=str(out))
    # Who a part asked may have been an object, which its options do not name.
    asked = [name for name in ("model", "judge") if found[0].identity[name] is not None]
    planned = plan(config, objects=asked)
    _check_ended(found, planned)
    with writing(out, _KEPT):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
    try:
        write_text(made / SETTINGS, json.dumps(found[0].identity, indent=2))
        reports = [_join_task(one, found, config, made) for one in planned]
        target = out if out.is_dir() and any(out.iterdir()) else made
        if target is out:
            _check_same(out, made)
        stores = [one.path / "store.db" for one in found]
        store = join_stores(target / "store.db", stores)
        if target is made:
            with writing(out, _KEPT):
                made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return JoinedEvaluations(len(found), config, reports, store)


def _read_parts(paths: Sequence[Path]) -> list[_Part]:
    """Return the parts in their order.

    Raises:
      UserError: they are not those of one whole.
    """
    found = [_read(path) for path in paths]
    check_parts([(one.shard, one.path) for one in found])
    for one in found:
        first = found[0]
        before, now = (part.identity | part.asked for part in (first, one))
        if changed := shard_files.differing(before, now):
            raise UserError(
                f"{one.path} was made with other settings than {first.path}: "
                f"{', '.join(changed)}. Parts of one whole differ in nothing but "
                "--shard"
            )
    return sorted(found, key=lambda one: one.shard)


def _read(path: Path) -> _Part:
    said = run_files.settings_of(path)
    told = said.get("shard")
    if not isinstance(told, dict) or OPTIONS not in said:
        raise UserError(
            f"{path} is no part of an evaluation: expected the --out of a `jaxalign "
            "eval` with --shard i/n"
        )
    shard = parse(told["part"])
    assert shard is not None
    asked = {name: value for name, value in told.items() if name != "part"}
    identity = {k: v for k, v in said.items() if k not in ("shard", OPTIONS)}
    config = configs.build(EvalConfig, {**said[OPTIONS], "out": str(path)})
    return _Part(path, shard, identity, asked, config)


def _check_ended(parts: Sequence[_Part], planned: Sequence[Planned]) -> None:
    for part in parts:
        for one in planned:
            path = part.path / one.task.directory / "metrics.json"
            if not path.is_file():
                again = configs.as_command("eval", part.config)
                raise UserError(
                    f"{part.path}, part {part.shard}, has not ended: {path} is "
                    f"missing. This goes on with it: `{again}`"
                )


def _join_task(
    one: Planned, parts: Sequence[_Part], config: EvalConfig, made: Path
) -> TaskReport:
    """Write a task's files from what its parts were told."""
    told = [_recalled(one, part, config) for part in parts]
    graded = [item for part in told for item in part.graded]
    folder = one.task.directory
    said = [read_json(part.path / folder / "metrics.json") for part in parts]
    tokens = [metrics["settings"]["tokens"] for metrics in said]
    seen = [metrics["seen"] for metrics in said if "seen" in metrics]
    report = run_files.write(
        *(made, one.task, one.items),
        sorted(graded, key=lambda item: item.index),
        {index: asked for part in told for index, asked in part.questions.items()},
        {**told[0].settings, "tokens": _summed(tokens)},
        {"seen": contamination.summed(seen)} if seen else {},
    )
    _check_lines(made / folder, one, parts)
    return report


class _Told(NamedTuple):
    """What a part has of a task: the arguments of ``run_files.write``."""

    out: Path
    task: Task
    items: Items
    graded: Sequence[Graded]
    questions: Mapping[int, Sequence[Question]]
    settings: Mapping[str, Any]
    more: Mapping[str, Any]


class _Said(NamedTuple):
    """Who answered or graded, by what is known of them."""

    settings: Mapping[str, Any]


def _recalled(one: Planned, part: _Part, config: EvalConfig) -> _Told:
    """Return what a part was told about its items."""
    index, count = part.shard
    mine = one._replace(indices=one.indices[index::count])
    model, judge = (_Said(part.identity[name]) for name in ("model", "judge"))
    # What of an adapter's training set the items were in, the parts say themselves.
    config = dataclasses.replace(config, adapter=None)
    with Store(part.path / "store.db", create=False) as store:
        ask = functools.partial(_recall, store, part.path)
        runner = Runner(config, model, judge, NamedPictures(), ask, _Told)
        return event_loops.run(runner.run(mine, part.path))


async def _recall(
    store: Store,
    path: Path,
    whom: _Said,
    requests: Sequence[JudgeRequest],
    what: str,
    used: Usage,
) -> list[Verdict]:
    """Return what the store of a part says to each request; nobody is asked."""
    del used
    keys = [request_key(request, whom.settings) for request in requests]
    known = store.verdicts(keys)
    if lacking := sum(key not in known for key in keys):
        raise UserError(
            f"{path} was never asked {lacking} of {len(keys)} requests ({what}): it "
            "was made of other data than is there now. Join where the tasks' data is "
            "that of the parts"
        )
    return [known[key] for key in keys]


def _summed(tokens: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    return {
        kind: {name: sum(one[kind][name] for one in tokens) for name in counts}
        for kind, counts in tokens[0].items()
    }


def _check_lines(folder: Path, one: Planned, parts: Sequence[_Part]) -> None:
    """Refuse what differs from what the parts say of their items.

    Figures would be of other accepted answers, say, than the parts were graded by.
    """
    for name in ("answers.jsonl", "grades.jsonl", "items.jsonl"):
        theirs = [
            row
            for part in parts
            for row in _rows(part.path / one.task.directory / name)
        ]
        theirs.sort(key=lambda row: row["index"])
        ours = [*_rows(folder / name)]
        wrong = [a["index"] for a, b in zip(ours, theirs, strict=False) if a != b]
        if wrong or len(ours) != len(theirs):
            where = f", first of item {wrong[0]}" if wrong else ""
            raise UserError(
                f"{one.task.directory}/{name} of the parts says something else than "
                f"their stores and the tasks' data{where}: the data has changed. Join "
                "where it is that of the parts"
            )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for row in read_jsonl(path):
        yield {k: v for k, v in row.items() if k not in _VERBATIM}


def _check_same(out: Path, made: Path) -> None:
    """Refuse a directory that holds anything else than what was made."""
    files = {path.relative_to(made) for path in made.rglob("*") if path.is_file()}
    other = [path for path in files if _bytes(out / path) != _bytes(made / path)]
    tasks = {path.parent.name for path in out.glob("*/metrics.json")}
    more = tasks - {path.parent.name for path in files}
    if other or more:
        named = min(map(str, other), default=f"{min(more)} is there" if more else "")
        raise UserError(
            f"{out} is there and holds something else than these parts ({named}): give "
            "another OUT, or remove it"
        )


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None

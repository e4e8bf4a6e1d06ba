"""From a file of records with segments to the same file with scores."""

import contextlib
import dataclasses
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign import event_loops, progress, shards
from jaxalign.configs import as_command, check_fields
from jaxalign.data import layouts, rows, shard_files
from jaxalign.data.images import NamedPictures
from jaxalign.data.record_images import as_json
from jaxalign.data.rows import image_base
from jaxalign.errors import UserError
from jaxalign.feedback import annotate
from jaxalign.feedback.annotate import Item
from jaxalign.judging.agreement import Agreement
from jaxalign.judging.asking import ask
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.estimate import Estimate, estimate
from jaxalign.judging.judge import Judge, JudgeRequest, Verdict
from jaxalign.judging.make import Function, given_judge, make_judge
from jaxalign.judging.store import Store
from jaxalign.whole_file import check_target, whole


__all__ = [
    "JudgeFileConfig",
    "JudgeReport",
    "begin_part",
    "check_apart",
    "estimate_file",
    "judge_file",
]

_AT_ONCE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeFileConfig:
    """Judging a file of records.

    Attributes:
      data: feedback records with segments, as ``jaxalign segment`` writes them.
      out: JSON Lines file to write, one record each, in order.
      layout: of the rows, see ``jaxalign.data.layouts``; default what their columns
        say.
      image_dir: where relative paths of pictures start; default beside the data file.
        Paths are written as they are: OUT is read with the same directory.
      judge: which judge, and its options.
      store: SQLite file that keeps every judgement; default ``OUT.store.db``.
      shard: ``i/n``: judge part i (from 0) of n of the records alone, every n-th;
        ``jaxalign join`` makes one file of the parts.

    >>> judge = JudgeConfig(name="rules")
    >>> JudgeFileConfig(data="in.jsonl", out="out.jsonl", judge=judge).store_path.name
    'out.jsonl.store.db'
    """

    data: str
    out: str
    judge: JudgeConfig
    store: str | None = None
    layout: str | None = None
    image_dir: str | None = None
    shard: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        layouts.check_name(self.layout)
        shards.parse(self.shard)

    @property
    def store_path(self) -> Path:
        """Where the store is."""
        return Path(self.store or f"{self.out}.store.db")


class JudgeReport(NamedTuple):
    """What judging a file came to."""

    responses: int
    failed: int
    """Responses without a verdict."""
    requests: int
    asked: int
    """Requests that the store did not know."""
    failed_votes: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    agreement: Agreement


def judge_file(
    config: JudgeFileConfig, judge: Judge | Function | None = None
) -> JudgeReport:
    """Judge every response of a file that is not in the store yet, and write the file.

    The file is read three times, so that memory does not grow with it: to check every
    record before anything is asked, to ask, and to write what the store then holds. It
    is written whole, or not at all. Pictures are read once to name them by their
    content, and again when a request that shows them is sent.

    Args:
      config: files and options.
      judge: default that of ``config.judge``; a Judge, or a function ``judge(requests)
        -> replies``, plain or ``async`` (see ``jaxalign.judging.function``), for which
        ``JudgeConfig(name="python", aspects=(...))`` says all that is needed.
    Raises:
      UserError: something that was given is wrong, or the judge or the store stops the
        run; what was judged stays in the store and the same call goes on from there.
    Example::

      def judge(requests):
          cells = [[{"brevity": 4.0}] * len(asked["segments"]) for asked in requests]
          return [{"segments": scores} for scores in cells]

      options = JudgeConfig(name="python", aspects=("brevity",))
      files = {"data": "pairs.jsonl", "out": "out.jsonl"}
      judge_file(JudgeFileConfig(judge=options, **files), judge)
    """
    check_apart(Path(config.out), config.data, config.store_path)
    pictures = NamedPictures()
    given = given_judge(config.judge, judge, load_image=pictures.load)
    counts = [len(item.responses) for item in _items(config, pictures)]
    total = sum(counts) * config.judge.votes
    judge = given or make_judge(config.judge, load_image=pictures.load)
    begin_part("judge", config, judge, lines=len(counts))
    alike = config.judge.name != "python" and config.judge.temperature == 0
    if config.judge.votes > 1 and alike:
        progress.say(
            f"judge.votes is {config.judge.votes} at judge.temperature 0: the votes "
            "will hardly differ"
        )
    with Store(config.store_path) as store:
        requests = _requests(config, pictures)
        keys, asked, used = event_loops.run(_ask_all(requests, judge, store, total))
        return _write(config, _items(config, pictures), store, keys, asked, used)


def check_apart(out: Path, data: str, store: Path) -> None:
    """Refuse to write a file where the data or the judgements are.

    Raises:
      UserError: it is one of them, or no file can be there.
    Example:
      >>> check_apart(Path("out.jsonl"), "in.jsonl", Path("out.jsonl.store.db"))
    """
    check_target(out)
    journals = [store.with_name(store.name + end) for end in ("-wal", "-shm")]
    if any(_same(path, out) for path in (Path(data), store, *journals)):
        raise UserError(f"--out {out} is also read: give another file")


def begin_part(
    command: str, config: Any, judge: Judge, *, lines: int, **settings: Any
) -> None:
    """Say which part of its data a file will be, see ``data.shard_files.begin``.

    Args:
      command: that makes it.
      config: its options: ``data``, ``out``, ``layout``, ``judge`` and ``shard``.
      judge: who is asked.
      lines: of the complete file.
      **settings: what lines depend on beside these.
    Raises:
      UserError: there is something else.
    Example::

      begin_part("judge", config, judge, lines=100)
    """
    shard, asked = shards.parse(config.shard), config.judge
    found: dict[str, Any] = {}
    if shard is not None:
        own = asked.own_wording
        found = {
            "command": command,
            "data": rows.fingerprint(config.data),
            "layout": config.layout,
            "judge": dict(judge.settings),
            "aspects": asked.scored_aspects,
            "votes": asked.votes,
            "wording": own and rows.hash_files(sorted(own.glob("**/*.md"))),
            **settings,
        }
    shard_files.begin(
        *(Path(config.out), shard, found),
        lines=lines,
        again=as_command(command, config),
    )


def estimate_file(config: JudgeFileConfig) -> Estimate:
    """Return what judging a file would take; nothing is sent and nothing written.

    Raises:
      UserError: the records, the judge's options or the store cannot be read.
    Example::

      judge = JudgeConfig(model="gpt-4o-mini", prompt_price=0.15)
      files = {"data": "pairs.jsonl", "out": "out.jsonl"}
      estimate_file(JudgeFileConfig(judge=judge, **files)).calls
    """
    requests = _requests(config, NamedPictures())
    return estimate(config.judge, requests, config.store_path)


async def _ask_all(
    requests: Iterator[JudgeRequest], judge: Judge, store: Store, total: int
) -> tuple["_Keys", int, Verdict]:
    """Have every request answered; return their keys, how many were asked, tokens."""
    keys = _Keys(total)
    asked = prompt_tokens = completion_tokens = 0
    cost = 0.0
    answers = ask(judge, requests, store)
    with progress.counting("judging", total, "answers") as show:
        async with contextlib.aclosing(answers):
            done = 0
            async for answer in answers:
                keys[answer.number] = answer.key
                done += 1
                if answer.fresh:
                    asked += 1
                    prompt_tokens += answer.verdict.prompt_tokens
                    completion_tokens += answer.verdict.completion_tokens
                    cost += answer.verdict.cost
                show(done, done)
    used = Verdict(
        None,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cost=cost,
    )
    return keys, asked, used


def _requests(
    config: JudgeFileConfig, pictures: NamedPictures
) -> Iterator[JudgeRequest]:
    judge = config.judge
    for item in _items(config, pictures):
        yield from annotate.requests_of(
            item,
            votes=judge.votes,
            own=judge.own_wording,
            needs_rubrics=judge.needs_rubrics,
            renders=judge.renders,
        )


def _items(config: JudgeFileConfig, pictures: NamedPictures) -> Iterator[Item]:
    some, base = False, image_base(config.data, config.image_dir)
    aspects = config.judge.scored_aspects
    shard = shards.parse(config.shard) or shards.WHOLE
    found = layouts.read(config.data, config.layout)
    for row, (columns, where) in enumerate(found):
        some = True
        if row % shard.parts == shard.part:
            yield annotate.read_item(columns, where, aspects, base, pictures)
    if not some:
        raise UserError(
            f"{config.data} holds no record: expected one JSON object a line"
        )


def _write(
    config: JudgeFileConfig,
    all_items: Iterator[Item],
    store: Store,
    keys: "_Keys",
    asked: int,
    used: Verdict,
) -> JudgeReport:
    """Write the records with their scores; return the counts."""
    out, votes = Path(config.out), config.judge.votes
    responses = failed = failed_votes = first = 0
    agreed = Agreement(0, 0, 0)
    kept = "all judgements are in the store and the same command writes them"
    with whole(out, kept) as file:
        for items in _in_lots(all_items):
            count = sum(len(item.responses) for item in items) * votes
            listed = [keys[n] for n in range(first, first + count)]
            known = store.verdicts(listed)
            if not known.keys() >= set(listed):
                raise UserError(f"{config.data} has changed while it was judged: again")
            verdicts = [known[key] for key in listed]
            first, place = first + count, 0
            for item in items:
                own = verdicts[place : place + len(item.responses) * votes]
                place += len(own)
                made = annotate.annotated(item, own)
                file.write(_line(made, config.data) + "\n")
                responses += len(item.responses)
                failed += len(made.get("judge_failures", ()))
                failed_votes += sum(vote.failure is not None for vote in own)
                agreed = agreed.plus(annotate.agreement(item, own))
    return JudgeReport(
        responses=responses,
        failed=failed,
        requests=first,
        asked=asked,
        failed_votes=failed_votes,
        prompt_tokens=used.prompt_tokens,
        completion_tokens=used.completion_tokens,
        cost=used.cost,
        agreement=agreed,
    )


class _Keys:
    """Keys of requests by their number, 32 bytes each."""

    def __init__(self, count: int):
        self._bytes = array("B", bytes(32 * count))

    def __setitem__(self, number: int, key: str) -> None:
        self._bytes[32 * number : 32 * number + 32] = array("B", bytes.fromhex(key))

    def __getitem__(self, number: int) -> str:
        return self._bytes[32 * number : 32 * number + 32].tobytes().hex()


def _in_lots(items: Iterator[Item]) -> Iterator[list[Item]]:
    lot: list[Item] = []
    for item in items:
        lot.append(item)
        if len(lot) == _AT_ONCE:
            yield lot
            lot = []
    if lot:
        yield lot


def _line(record: dict[str, Any], source: str) -> str:
    try:
        return json.dumps(record, default=as_json)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source}: a column cannot be written as JSON: {error}. Take it out"
        ) from None


def _same(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()  # the store may not be there yet

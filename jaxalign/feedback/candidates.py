"""From sampled completions to judged candidates, and both as lines of a file."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxalign import event_loops
from jaxalign.data import records
from jaxalign.data.images import NamedPictures
from jaxalign.data.messages import without_nulls
from jaxalign.data.record_images import has_pictures
from jaxalign.data.records import Message, Segment
from jaxalign.data.rows import image_base
from jaxalign.errors import UserError
from jaxalign.feedback.decompose.decomposition import (
    Candidate,
    Decompose,
    Failure,
    Hop,
    Judged,
    Unit,
)
from jaxalign.feedback.pairing import ScoredPrompt, ScoredResponse
from jaxalign.feedback.segmenters import SegmenterConfig, segment
from jaxalign.judging.asking import ask_all
from jaxalign.judging.judge import Judge, JudgeRequest, Verdict
from jaxalign.judging.make import Function, as_judge
from jaxalign.judging.store import Store, temporary_store
from jaxalign.judging.votes import merged


__all__ = [
    "JudgedPrompt",
    "SampledPrompt",
    "as_judged",
    "from_lines",
    "judge_candidates",
    "judge_candidates_async",
    "parse_samples",
    "read_samples",
    "scored",
    "to_lines",
    "votes_on",
]

_OPINIONS = (
    *("scores", "verify", "compare", "grade"),
    *("label", "refusal", "rating", "effects"),
)
"""Tasks that several votes are taken on; the others write a text, which is one."""


_NO_COLUMNS: Mapping[str, Any] = MappingProxyType({})


class SampledPrompt(NamedTuple):
    """A prompt with the responses that a policy gave to it."""

    prompt: Any
    """As it stood in the file of prompts."""
    candidates: Sequence[Candidate]
    columns: Mapping[str, Any] = _NO_COLUMNS
    """What else of the prompt's row its records need, such as ``tools``."""


class JudgedPrompt(NamedTuple):
    """A prompt's responses with what the judge made of them."""

    prompt: Any
    """As it stood in the file of prompts."""
    texts: tuple[str, ...]
    judged: tuple[Judged, ...]
    columns: Mapping[str, Any] = _NO_COLUMNS
    """What else of the prompt's row its records need, such as ``tools``."""

    @property
    def scores(self) -> list[float]:
        """Those of the responses that have one."""
        return [one.score for one in self.judged if one.score is not None]


def read_samples(
    path: str | Path,
    segmenter: SegmenterConfig,
    references: Sequence[tuple[str, ...]] | None = None,
    *,
    image_dir: str | Path | None = None,
    pictures: NamedPictures | None = None,
) -> list[SampledPrompt]:
    """Read what ``jaxalign generate`` wrote, each prompt with its candidates.

    Args:
      path: of the file.
      segmenter: cuts the responses.
      references: accepted answers of each prompt, () where it has none; default none.
      image_dir: where relative paths of pictures start; default beside the file.
      pictures: names the prompts' pictures, and gives them back to who sends requests.
    Raises:
      UserError: a picture is not there.
    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "samples.jsonl"
      >>> _ = path.write_text('{"prompt": "Hi", "completions": [{"text": "A. B."}]}')
      >>> [c.response for c in read_samples(path, SegmenterConfig())[0].candidates]
      ['A. B.']
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    base = image_base(path, image_dir)
    rows = map(json.loads, lines)
    return parse_samples(rows, segmenter, references, image_dir=base, pictures=pictures)


def parse_samples(
    rows: Iterable[Any],
    segmenter: SegmenterConfig,
    references: Sequence[tuple[str, ...]] | None = None,
    *,
    image_dir: str | Path | None = None,
    pictures: NamedPictures | None = None,
) -> list[SampledPrompt]:
    """Return each prompt with its candidates; arguments as of :func:`read_samples`.

    >>> from jaxalign.feedback.segmenters import SegmenterConfig
    >>> row = {"prompt": "Hi", "completions": [{"text": "A. B."}]}
    >>> [c.spans for c in parse_samples([row], SegmenterConfig())[0].candidates]
    [((0, 5),)]
    """
    found = []
    pictures, base = pictures or NamedPictures(), image_base([], image_dir)
    for row in rows:
        prompt = row["prompt"]
        given, images = as_judged(row), ()
        if has_pictures(row):
            parsed = records.parse_prompt(row, f"prompt {row.get('index', 0)}", base)
            images = pictures.references(parsed.images)
        asked = prompt if isinstance(prompt, str) else Message(**prompt[-1]).text
        known = references[row["index"]] if references is not None else ()
        candidates = [
            Candidate(
                given,
                completion["text"],
                spans=tuple(segment(completion["text"], segmenter)),
                hops=(Hop("knowledge", asked, known),) if known else (),
                images=images,
                template_kwargs=_template_kwargs(row),
            )
            for completion in row["completions"]
        ]
        columns = {name: row[name] for name in records.PROMPT_COLUMNS if name in row}
        found.append(SampledPrompt(prompt, candidates, columns))
    return found


def _template_kwargs(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a prompt's template is given, as of the records made of it."""
    given = without_nulls(row.get("chat_template_kwargs") or {})
    tools = row.get("tools")
    return ({"tools": tools, **given} if tools else given) or None


def as_judged(row: Mapping[str, Any]) -> str | tuple[Mapping[str, Any], ...]:
    """Return a row's prompt as judges read it: its pictures' places, not their bytes.

    >>> as_judged({"prompt": [{"role": "user", "content": ""}], "images": ["a.png"]})
    ({'role': 'user', 'content': [{'type': 'image'}]},)
    """
    given = row["prompt"]
    if has_pictures(row):
        given = records.parse_prompt(row).text
        return given if isinstance(given, str) else tuple(t.turn() for t in given)
    return given if isinstance(given, str) else tuple(map(_turn, given))


def _turn(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a turn as judges read it."""
    parted = isinstance(given.get("content"), list)
    return Message(**given).turn() if parted else given


def judge_candidates(
    prompts: Sequence[SampledPrompt],
    decompose: Decompose,
    judge: Judge | Function,
    store: Store | None = None,
    **options: Any,
) -> list[JudgedPrompt]:
    """Have all candidates judged, also where an event loop runs (in a notebook).

    Arguments and result are those of :func:`judge_candidates_async`.

    Example::

      prompts = read_samples("samples.jsonl", SegmenterConfig())
      judged = judge_candidates(prompts, decompose, judge)
      records, statistics = pairing.pair(scored(judged), PairingConfig())
    """
    judged = judge_candidates_async(prompts, decompose, judge, store, **options)
    return event_loops.run(judged)


async def judge_candidates_async(
    prompts: Sequence[SampledPrompt],
    decompose: Decompose,
    judge: Judge | Function,
    store: Store | None = None,
    *,
    votes: int = 1,
    first_vote: int = 0,
    what: str = "judging",
    load_image: Callable[[str], bytes] | None = None,
) -> list[JudgedPrompt]:
    """Have all candidates judged; what the store knows is not asked again.

    Args:
      prompts: with their candidates.
      decompose: what is asked of a candidate, and what follows.
      judge: who is asked: a Judge, or a function ``judge(requests) -> replies`` of
        one's own (see ``jaxalign.judging.function``).
      store: keeps every verdict; without one they are forgotten at the end.
      votes: how often the judge is asked each question.
      first_vote: number of the first; others stand for another seed of the judge.
      what: is done, for the display.
      load_image: gives a function the prompts' pictures: ``load`` of the
        ``NamedPictures`` that the prompts were read with. A Judge has its own.
    Returns:
      The prompts in order; a candidate without a verdict has a failure, no score.
    Example::

      judged = await judge_candidates_async(prompts, decompose, judge, store, votes=3)
    """
    if store is None:
        with temporary_store() as kept:
            return await judge_candidates_async(
                prompts,
                decompose,
                judge,
                kept,
                votes=votes,
                first_vote=first_vote,
                what=what,
                load_image=load_image,
            )
    judge = as_judge(judge, load_image=load_image)
    candidates = [c for prompt in prompts for c in prompt.candidates]
    found: dict[int, Judged] = {}
    so_far: list[list[list[Verdict]]] = [[] for _ in candidates]
    while len(found) < len(candidates):
        steps: dict[int, list[JudgeRequest]] = {}
        for number, candidate in enumerate(candidates):
            if number not in found:
                now = decompose(candidate, so_far[number])
                if isinstance(now, Judged):
                    found[number] = now
                else:
                    steps[number] = now
        requests = [request for asked in steps.values() for request in asked]
        verdicts = iter(await _voted(requests, judge, store, votes, first_vote, what))
        for number, asked in steps.items():
            so_far[number].append([next(verdicts) for _ in asked])
    judged = iter([found[number] for number in range(len(candidates))])
    return [
        JudgedPrompt(
            prompt.prompt,
            tuple(candidate.response for candidate in prompt.candidates),
            tuple(next(judged) for _ in prompt.candidates),
            prompt.columns,
        )
        for prompt in prompts
    ]


async def _voted(
    requests: Sequence[JudgeRequest],
    judge: Judge,
    store: Store,
    votes: int,
    first_vote: int,
    what: str,
) -> list[Verdict]:
    """Return the merged verdict on each request."""
    if not requests:
        return []
    groups = [votes_on(request, votes, first_vote) for request in requests]
    asked = [request for group in groups for request in group]
    verdicts = await ask_all(judge, asked, store, len(asked), what=what)
    ordered = iter(verdicts)
    return [merged([next(ordered) for _ in group]) for group in groups]


def votes_on(request: JudgeRequest, votes: int, first: int) -> list[JudgeRequest]:
    """Return a request as often as it is asked.

    Args:
      request: any.
      votes: how often an opinion is asked for; what writes a text is asked once.
      first: number of the first vote.
    Example:
      >>> from jaxalign.judging.judge import Subject
      >>> from jaxalign.judging.prompts import compare_request
      >>> request = compare_request(Subject("2 + 2?", "4", other="5"))
      >>> [one.vote for one in votes_on(request, votes=2, first=3)]
      [3, 4]
    """
    count = votes if request.task in _OPINIONS else 1
    return [dataclasses.replace(request, vote=first + n) for n in range(count)]


def scored(prompts: Sequence[JudgedPrompt]) -> list[ScoredPrompt]:
    """Return judged prompts as pairing takes them.

    >>> one = JudgedPrompt("2 + 2?", ("4", "5"), (Judged(4.0), Judged(0.0)))
    >>> [response.score for response in scored([one])[0].responses]
    [4.0, 0.0]
    """
    return [
        ScoredPrompt(
            one.prompt,
            [
                ScoredResponse(text, judged.score, judged.segments)
                for text, judged in zip(one.texts, one.judged, strict=True)
            ],
            columns=one.columns,
        )
        for one in prompts
    ]


def to_lines(prompts: Sequence[JudgedPrompt]) -> str:
    """Return judged prompts as JSON Lines.

    >>> one = JudgedPrompt("2 + 2?", ("4",), (Judged(4.0),))
    >>> to_lines([one])[:60]
    '{"index": 0, "prompt": "2 + 2?", "candidates": [{"text": "4"'
    """
    lines = []
    for index, one in enumerate(prompts):
        candidates = [
            {
                "text": text,
                "score": judged.score,
                "segments": [
                    s.model_dump(exclude_defaults=True) for s in judged.segments
                ],
                "units": [dataclasses.asdict(unit) for unit in judged.units],
                "failure": judged.failure and dataclasses.asdict(judged.failure),
            }
            for text, judged in zip(one.texts, one.judged, strict=True)
        ]
        row = {"index": index, "prompt": one.prompt, **one.columns}
        row["candidates"] = candidates
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)


def from_lines(path: str | Path) -> list[JudgedPrompt]:
    """Read what :func:`to_lines` made.

    Raises:
      UserError: the file was changed and is no longer that.
    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "judged.jsonl"
      >>> one = JudgedPrompt("2 + 2?", ("4",), (Judged(4.0),))
      >>> _ = path.write_text(to_lines([one]))
      >>> from_lines(path) == [one]
      True
    """
    path = Path(path)
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            made = [_judged(candidate) for candidate in row["candidates"]]
            texts = tuple(candidate["text"] for candidate in row["candidates"])
            kept = {k: row[k] for k in records.PROMPT_COLUMNS if k in row}
            found.append(JudgedPrompt(row["prompt"], texts, tuple(made), kept))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: not as jaxalign wrote it: {error}. Remove the file: "
                "it is made again from the store"
            ) from None
    return found


def _judged(row: Mapping[str, Any]) -> Judged:
    return Judged(
        row["score"],
        segments=tuple(Segment(**segment) for segment in row["segments"]),
        units=tuple(Unit(**unit) for unit in row["units"]),
        failure=row["failure"] and Failure(**row["failure"]),
    )

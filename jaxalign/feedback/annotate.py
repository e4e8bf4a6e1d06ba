"""From records with segments to requests, and from verdicts to records with scores.

A response is judged when more than half of the votes on it have succeeded (see
``votes``); a segment's score on an aspect is the mean over those. Otherwise it has no
score at all and stands in the record's ``judge_failures``. Nothing is filled in.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.data import records
from jaxalign.data.images import NamedPictures
from jaxalign.errors import UserError
from jaxalign.judging import prompts
from jaxalign.judging.agreement import Agreement, agreement_of
from jaxalign.judging.judge import JudgeRequest, Subject, Verdict
from jaxalign.judging.votes import merged


__all__ = [
    "Item",
    "Response",
    "agreement",
    "annotated",
    "read_item",
    "references_of",
    "requests_of",
]

_HERE = Path()
RESPONSES = ("chosen", "rejected", "completion")


class Response(NamedTuple):
    """One response of a record, or one answer of several in it, with its segments."""

    name: str
    """The column that it stands in."""
    subject: Subject
    turn: int = 0
    """Which of the completion's assistant turns it is."""


class Item(NamedTuple):
    """A record whose responses are to be judged."""

    columns: Mapping[str, Any]
    """All of the record, as it was read."""
    responses: tuple[Response, ...]
    """Those that have a segment."""


def read_item(
    columns: Any,
    where: str,
    aspects: tuple[str, ...] = (),
    image_dir: Path | None = _HERE,
    pictures: NamedPictures | None = None,
) -> Item:
    """Validate a record with segments, scored or not.

    A column ``references`` (list of texts) holds accepted answers, for judges that
    compare with them.

    Args:
      columns: of the record.
      where: file and line, for messages.
      aspects: what its segments are to be scored on.
      image_dir: where relative paths of pictures start; None refuses them.
      pictures: names the prompt's pictures, and gives them back to who sends requests.
    Raises:
      UserError: it is malformed, a response has no segments column, or a picture is
        not there.
    Example:
      >>> row = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5",
      ...        "chosen_segments": [{"start": 0, "end": 1}], "rejected_segments": []}
      >>> [one.name for one in read_item(row, "line 1", ("correctness",)).responses]
      ['chosen']
    """
    if not isinstance(columns, Mapping):
        records.parse(columns, where)  # says what is wrong
    plain = {k: v for k, v in columns.items() if not k.endswith("_segments")}
    record = records.parse(plain, where, image_dir)
    one_sided = columns.get("completion") is not None
    names = RESPONSES[2:] if one_sided else RESPONSES[:2]
    for name in RESPONSES:
        if name not in names and columns.get(f"{name}_segments") is not None:
            raise UserError(
                f"{where}: field {name}_segments: the record has no {name}. Take the "
                "column out"
            )
    prompt = record.prompt
    if not isinstance(prompt, str):
        prompt = tuple(message.turn() for message in prompt)
    references = references_of(columns, where)
    shown = (pictures or NamedPictures()).references(record.images)
    responses = []
    for name, completion in zip(names, record.completions, strict=True):
        texts = records.texts_of(completion)
        spans = _spans(columns.get(f"{name}_segments"), name, texts, where)
        for turn, asked in enumerate(_prompts(prompt, completion)):
            subject = Subject(
                *(asked, texts[turn]),
                spans=spans[turn],
                aspects=aspects,
                references=references,
                images=shown,
                template_kwargs=record.template_kwargs or None,
            )
            if spans[turn]:
                responses.append(Response(name, subject, turn))
    return Item(columns, tuple(responses))


def _prompts(
    prompt: str | tuple[Mapping[str, Any], ...], completion: records.Completion
) -> list[Any]:
    """Return what stands before each of a completion's answers."""
    if isinstance(completion, str):
        return [prompt]
    turns = tuple(message.turn() for message in completion)
    return [
        (*prompt, *turns[:i])
        for i, turn in enumerate(turns)
        if turn["role"] == "assistant"
    ]


def requests_of(
    item: Item,
    *,
    votes: int = 1,
    own: Path | None = None,
    needs_rubrics: bool = True,
    renders: bool = False,
) -> Iterator[JudgeRequest]:
    """Yield the requests for a record's scores: for each response, all its votes.

    Args:
      item: with aspects.
      votes: how often each response is judged.
      own: directory of wording of one's own.
      needs_rubrics: refuse an aspect that has no rubric.
      renders: whether the judge renders the conversation, ``tools`` and the like
        included; of other judges' requests these are no part.
    Example:
      >>> one = [{"start": 0, "end": 1}]
      >>> row = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
      >>> row |= {"chosen_segments": one, "rejected_segments": one}
      >>> item = read_item(row, "line 1", ("correctness",))
      >>> [request.subject.response for request in requests_of(item, votes=2)]
      ['4', '4', '5', '5']
    """
    for response in item.responses:
        subject = response.subject
        if not renders:
            subject = dataclasses.replace(subject, template_kwargs=None)
        request = prompts.scores_request(subject, own, needs_rubrics=needs_rubrics)
        yield request
        for vote in range(1, votes):
            yield JudgeRequest(
                request.task, request.messages, request.schema, request.subject, vote
            )


def annotated(item: Item, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return a record with the scores that verdicts give its segments.

    Args:
      item: as it was asked about.
      verdicts: of its requests, in their order.
    Example:
      >>> one = [{"start": 0, "end": 1}]
      >>> row = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
      >>> row |= {"chosen_segments": one, "rejected_segments": one}
      >>> item = read_item(row, "line 1", ("correctness",))
      >>> verdicts = [Verdict({"segments": [{"correctness": r}]}) for r in (4, 0)]
      >>> annotated(item, verdicts)["chosen_segments"]
      [{'start': 0, 'end': 1, 'scores': {'correctness': 4}}]
    """
    made = {k: v for k, v in item.columns.items() if k != "judge_failures"}
    failures = []
    for response, votes in _by_response(item, verdicts):
        verdict = merged(votes)
        column = f"{response.name}_segments"
        scores = []
        if verdict.failure is None:
            scores = verdict.value["segments"]
        else:
            failures.append(
                {
                    "response": response.name,
                    "reason": verdict.failure,
                    "raw": verdict.raw,
                }
            )
        given = iter(scores)
        made[column] = [
            _with_scores(segment, next(given, None))
            if segment.get("turn", 0) == response.turn
            else segment
            for segment in made[column]
        ]
    if failures:
        made["judge_failures"] = failures
    return made


def agreement(item: Item, verdicts: Sequence[Verdict]) -> Agreement:
    """Return how far the votes on a record's responses agree.

    >>> one = [{"start": 0, "end": 1}]
    >>> row = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
    >>> row |= {"chosen_segments": one, "rejected_segments": one}
    >>> item = read_item(row, "line 1", ("correctness",))
    >>> votes = [Verdict({"segments": [{"correctness": r}]}) for r in (4, 4, 0, 1)]
    >>> agreement(item, votes)  # two votes a response
    Agreement(equal=1, pairs=2, distance=1)
    """
    total = Agreement(0, 0, 0)
    for _, votes in _by_response(item, verdicts):
        good = [vote.value for vote in votes if vote.failure is None]
        for one, other in itertools.combinations(good, 2):
            total = total.plus(agreement_of(one, other))
    return total


def _by_response(
    item: Item, verdicts: Sequence[Verdict]
) -> Iterator[tuple[Response, Sequence[Verdict]]]:
    if not item.responses:
        return
    votes = len(verdicts) // len(item.responses)
    for n, response in enumerate(item.responses):
        yield response, verdicts[n * votes : (n + 1) * votes]


def _with_scores(
    segment: Mapping[str, Any], scores: Mapping[str, int | float] | None
) -> dict[str, Any]:
    bare = {k: v for k, v in segment.items() if k != "scores"}
    return bare if scores is None else {**bare, "scores": dict(scores)}


def _spans(
    given: Any, name: str, texts: Sequence[str], where: str
) -> list[tuple[tuple[int, int], ...]]:
    """Return the spans of each assistant turn's segments."""
    field = f"{name}_segments"
    if given is None:
        raise UserError(
            f"{where}: field {field} is missing: a judge scores segments. Make them "
            "with: jaxalign segment IN OUT"
        )
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise UserError(f"{where}: field {field}: expected a list of segments")
    spans: list[list[tuple[int, int]]] = [[] for _ in texts]
    last = 0
    for i, segment in enumerate(given):
        ends = (
            (segment.get("start"), segment.get("end"))
            if isinstance(segment, Mapping)
            else (None, None)
        )
        start, end = ends
        if type(start) is not int or type(end) is not int:
            raise UserError(
                f"{where}: field {field}[{i}]: expected an object with whole numbers "
                "start and end"
            )
        turn = segment.get("turn", 0)
        if type(turn) is not int or not last <= turn < len(texts):
            raise UserError(
                f"{where}: field {field}[{i}].turn: got {turn!r}; expected {last} to "
                f"{len(texts) - 1}, one of the assistant's turns, in their order"
            )
        last, text = turn, texts[turn]
        before = spans[turn][-1][1] if spans[turn] else 0
        if not before <= start < end <= len(text):
            raise UserError(
                f"{where}: field {field}[{i}]: got start {start} and end {end}; "
                f"expected {before} <= start < end <= {len(text)}. Segments are "
                "ordered, do not overlap, and count code points of the text"
            )
        spans[turn].append((start, end))
    return [tuple(found) for found in spans]


def references_of(columns: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the accepted answers in a row's column ``references``, () without it.

    Nulls, which tables have where another row's list is longer, are no answers.

    Raises:
      UserError: it is no list of texts.
    Example:
      >>> references_of({"references": ["Paris", None]}, "line 1")
      ('Paris',)
    """
    given = columns.get("references")
    if given is None:
        return ()
    if isinstance(given, list):
        given = [reference for reference in given if reference is not None]
    if not isinstance(given, list) or not all(isinstance(r, str) for r in given):
        raise UserError(
            f"{where}: field references: expected a list of accepted answers (texts)"
        )
    return tuple(given)

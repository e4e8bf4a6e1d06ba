"""A judge of one's own: a Python function from requests to replies.

The file (``--judge.name python --judge.path FILE.py``) defines ``judge``, which gets a
list of requests and returns a list of as many replies, in their order::

    def judge(requests):
        return [
            {
                "segments": [
                    {aspect: min(4.0, len(segment["text"]) / 25)
                     for aspect in request["aspects"]}
                    for segment in request["segments"]
                ]
            }
            for request in requests
        ]

It may be ``async def``. A request is a dict of plain values, the function's own::

    task        "scores", or one of those below
    prompt      a text, or the turns [{"role": ..., "content": ...}]
    response    the text that is judged
    segments    [{"start": 0, "end": 11, "text": "One chosen."}, ...]
    aspects     ["helpfulness", ...]
    other       the second response, where two are compared, else None
    statement   the question of a "verify"; of some tasks what they are about, else None
    references  accepted answers        vote  from 0
    images      the names of the prompt's pictures, by their content
    pictures    their files' bytes, in the same order
    messages    what an endpoint would be asked, with the rubrics that there are
    schema      the JSON schema of the reply

Where a picture stands in the prompt, a turn's content is a list of parts with
``{"type": "image"}`` in its place; ``PIL.Image.open(io.BytesIO(data))`` opens one's
bytes. They are read for each call: memory holds what a call shows.

What else is asked, and what is replied; a label is one of those that the schema names,
``request["schema"]["properties"]["grade"]["enum"]``::

    observations  risks of a prompt, or of its words or pictures alone: {"observations":
                  [{"malicious_content", "source", "risk_category"}, ...]}
    verify        {"answer": "yes"} or "no": can a risk do harm (no response is shown),
                  does the response handle it, is a claim right
    rating        {"rating": 1..10}; statement is the prompt's risks, one a line
    effects       {"segments": [{"helpfulness": 0..4, "risk_1": -1, 0 or 1}, ...]}:
                  risk n, a line of statement, made worse, neither, or handled
    claims        {"claims": [...]}     questions  {"questions": [...]}, one for each
    grade         {"grade": "correct"}, "incorrect" or "not_attempted"
    label         {"grade": label}: safe or unsafe; very, partially or ineffective
    refusal       {"grade": "full_compliance"}, "partial_refusal" or "full_refusal"
    compare       {"better": "A"}, "B" or "tie"

Risks are judged by ``observations``, ``verify``, ``rating`` and, for an objective on
segments, ``effects``; a gate's metrics by ``label`` and ``refusal``.

A reply is a value of that schema; for ``scores`` one object for each segment, with a
number from 0 to 4 (whole or not) for each aspect. It is checked as an endpoint's is,
and nothing in it is mended: a wrong one is a failed attempt. So is an exception, raised
by the function or given as a reply; its type and message are kept (but for what
variables of the environment hold for keys). What failed is asked
again by itself, ``judge.max_attempts`` times in all.

In Python the function itself goes where a judge does (``judge_file``,
``judge_records``, ``judge_candidates``, ``rlaif``), with the same requests, replies and
checks: no file, no endpoint and no rubrics::

    judge_records(rows, judge, aspects=("helpfulness",))

A call has ``judge.concurrency`` requests; a function that is no coroutine runs in a
thread, one call at a time. The judge is known by the text of its file, so another text
is another judge, while what the file imports, or asks elsewhere, is not seen: change
the file when that changes. This file, and no other, is executed. A function
given in Python is known by its name and the text of its code, where Python can find
that; what a closure holds is not seen either (give such functions to
:class:`FunctionJudge`, each with a ``version``).
"""

import asyncio
import hashlib
import inspect
import itertools
import json
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.data import images
from jaxalign.errors import UserError
from jaxalign.functions import identity
from jaxalign.judging import endpoint, prompts
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.judge import JudgeRequest, Schema, Verdict
from jaxalign.judging.legibility import Legibility


__all__ = ["NAME", "FunctionJudge", "executed", "settings_of"]

NAME = "judge"
"""What the function is called."""

_CURE = "Mend the function in that file."
_MOST = 300


class _Outcome(NamedTuple):
    """What became of one request in one call."""

    value: Any
    failure: str | None = None
    raw: str | None = None
    """The reply, where there was one."""


class FunctionJudge:
    """See the module.

    Args:
      function: from a list of requests to a list of replies, plain or ``async``.
      version: tells apart functions whose code is the same.
      width: requests of one call.
      attempts: calls that one request may cost before it has failed.
      load_image: gives the bytes of the picture that a reference names.

    >>> import asyncio
    >>> from jaxalign.judging.judge import JudgeRequest, Subject
    >>> number = {"type": "number", "maximum": 4}
    >>> asked = JudgeRequest("grade", (), number, Subject("p", "r"))
    >>> async def graded(judge):
    ...     return [verdict.value async for _, verdict in judge.grade([asked])]
    >>> asyncio.run(graded(FunctionJudge(lambda requests: [3])))
    [3]
    >>> asyncio.run(graded(FunctionJudge(lambda requests: [99])))  # off the scale
    [None]
    """

    def __init__(
        self,
        function: Callable[[list[dict[str, Any]]], Any],
        *,
        version: str = "",
        width: int = 8,
        attempts: int = 6,
        load_image: Callable[[str], bytes] | None = None,
    ):
        self._settings: Mapping[str, Any] = _known_by(function, version)
        self._function = function
        self._width, self._most, self._load_image = width, attempts, load_image
        name = getattr(function, "__name__", type(function).__name__)
        self._legibility = Legibility(f"the function {name}", "Mend the function.")
        self.proven = False

    @classmethod
    def of_file(
        cls, config: JudgeConfig, load_image: Callable[[str], bytes] | None = None
    ) -> "FunctionJudge":
        """Return the judge of a file, which is executed.

        Args:
          config: with ``path``.
          load_image: as of the class.
        Raises:
          UserError: the file cannot be read or executed, or has no such function.
        """
        settings = settings_of(config)
        function = _loaded(Path(config.path or ""))
        made = cls(
            function,
            width=config.concurrency,
            attempts=config.max_attempts,
            load_image=load_image,
        )
        made._settings = settings
        made._legibility = Legibility(f"the function in {config.path}", _CURE)
        return made

    @property
    def settings(self) -> Mapping[str, Any]:
        """What verdicts depend on."""
        return self._settings

    async def grade(
        self, requests: Iterable[JudgeRequest]
    ) -> AsyncIterator[tuple[int, Verdict]]:
        """Yield (number of the request, verdict).

        Raises:
          UserError: none of the first replies could be read, or a picture has changed
            or gone since its request was made.
        """
        numbered = enumerate(requests)
        while some := list(itertools.islice(numbered, self._width)):
            outcomes = await self._called([request for _, request in some])
            for (number, request), outcome in zip(some, outcomes, strict=True):
                attempts, raw = 1, outcome.raw
                while outcome.failure is not None and attempts < self._most:
                    # By itself: what fails a call may be another request's.
                    (outcome,) = await self._called([request])
                    raw = raw if outcome.raw is None else outcome.raw
                    attempts += 1
                self.proven = self.proven or outcome.failure is None
                yield number, Verdict(outcome.value, outcome.failure, raw, attempts)
                if outcome.failure is None or outcome.raw is None or self.proven:
                    continue
                stop = self._legibility.unread(outcome.failure, outcome.raw)
                if stop is not None:
                    raise stop

    async def _called(self, requests: Sequence[JudgeRequest]) -> list[_Outcome]:
        given = [_plain(request, self._load_image) for request in requests]
        try:
            if inspect.iscoroutinefunction(self._function):
                replies = await self._function(given)
            else:
                replies = await asyncio.to_thread(self._function, given)
                if inspect.isawaitable(replies):  # of an object with such a __call__
                    replies = await replies
        except (Exception, SystemExit) as error:
            return [_Outcome(None, _said(error))] * len(requests)
        if not isinstance(replies, list | tuple) or len(replies) != len(requests):
            count = f" of {len(replies)}" if isinstance(replies, list | tuple) else ""
            failure = (
                f"outside the schema: expected a list of {len(requests)} replies, got "
                f"{type(replies).__name__}{count}"
            )
            return [_Outcome(None, failure, _short(repr(replies)))] * len(requests)
        return [
            _checked(reply, request)
            for reply, request in zip(replies, requests, strict=True)
        ]


def settings_of(config: JudgeConfig) -> Mapping[str, Any]:
    """Return what the verdicts of the function depend on; nothing is executed.

    Raises:
      UserError: there is no file, or it cannot be read.
    """
    if config.path is None:
        raise UserError(
            "judge.path must be a Python file with a function judge: got None. In "
            "Python the function itself may be given instead, as judge=FUNCTION"
        )
    source = _source(Path(config.path))
    digest = hashlib.sha256(source).hexdigest()
    return {"judge": "python", "version": 1, "file": digest}


def _known_by(function: Any, version: str) -> Mapping[str, Any]:
    made = {"judge": "function", "version": 1, **identity(function)}
    return {**made, "given": version} if version else made


def _loaded(path: Path) -> Callable[[list[dict[str, Any]]], Any]:
    """Execute a file and return its function."""
    source = _source(path)
    name = f"judge_{hashlib.sha256(source).hexdigest()[:12]}"
    module = executed(path, source, name, "judge.path")
    function = getattr(module, NAME, None)
    if not callable(function):
        raise UserError(
            f"judge.path {path} has no function {NAME}: expected `def {NAME}(requests)`"
            ", from a list of requests to a list of replies"
        )
    return function


def executed(path: Path, source: bytes, name: str, option: str) -> types.ModuleType:
    """Execute a Python file of the user's, and return it as a module.

    Args:
      path: of the file.
      source: what is in it.
      name: of the module.
      option: that named the file, for messages.
    Raises:
      UserError: it raises.
    """
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # where dataclasses look for their module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(
            f"{option} {path} cannot be executed: {type(error).__name__}: {error}"
        ) from None
    return module


def _source(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"judge.path {path} cannot be read: {error}") from None


def _plain(
    request: JudgeRequest, load_image: Callable[[str], bytes] | None
) -> dict[str, Any]:
    """Return a request as values that the function may keep and change."""
    subject = request.subject
    made = {
        "task": request.task,
        "prompt": subject.prompt,
        "response": subject.response,
        "segments": [
            {"start": start, "end": end, "text": subject.response[start:end]}
            for start, end in subject.spans
        ],
        "aspects": subject.aspects,
        "other": subject.other,
        "statement": subject.statement,
        "references": subject.references,
        "images": subject.images,
        "vote": request.vote,
        "messages": request.messages,
        "schema": request.schema,
    }
    pictures = [images.checked(name, load_image) for name in subject.images]
    return {**json.loads(json.dumps(made, default=dict)), "pictures": pictures}


def _checked(reply: Any, request: JudgeRequest) -> _Outcome:
    """Read a reply as strictly as an endpoint's text."""
    if isinstance(reply, BaseException):
        return _Outcome(None, _said(reply))
    try:
        text = json.dumps(reply, allow_nan=False, default=_number)
    except (TypeError, ValueError, RecursionError) as error:
        failure = f"outside the schema: it is not JSON: {_short(str(error))}"
        return _Outcome(None, failure, _short(repr(reply)))
    _, problem = prompts.parse(text, Schema(_with_fractions(request.schema)))
    if problem is not None:
        return _Outcome(None, f"outside the schema: {problem}", text)
    return _Outcome(json.loads(text), None, text)


def _with_fractions(schema: Any) -> Any:
    """Return a schema whose whole numbers may be any, within the same bounds.

    >>> _with_fractions({"type": "integer", "maximum": 4})
    {'type': 'number', 'maximum': 4}
    """
    if isinstance(schema, Mapping):
        made = {name: _with_fractions(part) for name, part in schema.items()}
        return {**made, "type": "number"} if made.get("type") == "integer" else made
    if isinstance(schema, list):
        return [_with_fractions(part) for part in schema]
    return schema


def _number(value: Any) -> Any:
    """Return a number of NumPy's, JAX's or torch's as Python's."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is no value of JSON")


def _said(error: BaseException) -> str:
    words = endpoint.without_secrets(str(error))
    name = type(error).__name__
    return _short(f"the function failed: {name}: {words}" if words else name)


def _short(text: str) -> str:
    return text if len(text) <= _MOST else f"{text[:_MOST]}..."

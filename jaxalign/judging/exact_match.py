"""A judge that compares with accepted answers: exact, alias and numeric matching.

For tests, and for tasks that have a ground truth. It reads no meaning: "not Paris"
holds "Paris". What it cannot answer is a failure by name, never a guess.
"""

import re
import unicodedata
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Literal

from jaxalign.judging.judge import JudgeRequest, Subject, Verdict
from jaxalign.judging.numerals import numbers
from jaxalign.judging.prompts import MAX_SCORE
from jaxalign.judging.refusals import by_prefix


__all__ = ["RulesJudge", "grade", "holds", "normalised", "verdict"]

Grade = Literal["correct", "incorrect", "not_attempted"]

_ARTICLES = frozenset({"a", "an", "the"})
_NOT_ATTEMPTED = re.compile(
    r"\b(i (do not|don t|cannot|can t|am not able|m not able|m not sure)|unknown|"
    r"no idea|not sure|unable to)\b|不知道|不清楚|无法|不确定|没有足够"
)
_WIDE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_ABOUT = re.compile(
    r"(\b(about|around|roughly|approximately|nearly|almost|some|over|under)|约|大概|"
    r"左右|将近|接近|超过)\W*$"
)


class RulesJudge:
    """See the module."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What verdicts depend on."""
        return {"judge": "rules", "version": 1}

    async def grade(
        self, requests: Iterable[JudgeRequest]
    ) -> AsyncIterator[tuple[int, Verdict]]:
        """Yield (number of the request, verdict), in order."""
        for number, request in enumerate(requests):
            yield number, verdict(request)


def verdict(request: JudgeRequest) -> Verdict:
    """Return the verdict of the rules on a request.

    ``grade``: see :func:`grade`. ``verify``: yes if the statement holds an accepted
    answer. ``scores`` on correctness alone: 4 for a segment that holds an accepted
    answer, 0 for one that holds none. ``compare``: the response that is correct, if
    the other is not. ``refusal``: XSTest's string rule, which needs no accepted answer
    and never sees a partial refusal. Everything else is a failure.
    """
    subject, task = request.subject, request.task
    if task == "refusal":
        return Verdict({"grade": by_prefix(subject.response)})
    if not any(normalised(reference) for reference in subject.references):
        return Verdict(None, failure="rules: the request has no accepted answer")
    if task == "grade":
        return Verdict({"grade": grade(subject.response, subject.references)})
    if task == "verify" and subject.statement is not None:
        said = any(holds(subject.statement, r) for r in subject.references)
        return Verdict({"answer": "yes" if said else "no"})
    if task == "compare" and subject.other is not None:
        return Verdict({"better": _better(subject, subject.other)})
    if task == "scores":
        return _scores(subject)
    return Verdict(None, failure=f"rules: cannot answer {task}")


def grade(response: str, references: Iterable[str]) -> Grade:
    """Grade a response against accepted answers, any of which will do.

    Correct: it holds one of them, as whole words after normalisation, or as a number
    to the last digit of the accepted one. Otherwise not attempted if it is blank, says
    that it does not know, or gives no number (or none but "about" one) where a number
    is accepted; otherwise incorrect. The labels are those of ChineseSimpleVQA.

    >>> grade("It is 3.14159.", ["3.14"]), grade("约3000", ["3500"])
    ('correct', 'not_attempted')
    >>> grade("The Eiffel-Tower!", ["eiffel tower"]), grade("Big Ben", ["Eiffel Tower"])
    ('correct', 'incorrect')
    """
    accepted = [reference for reference in references if normalised(reference)]
    if any(holds(response, reference) for reference in accepted):
        return "correct"
    text = normalised(response)
    if not text or _NOT_ATTEMPTED.search(text):
        return "not_attempted"
    if all(_is_number(reference) for reference in accepted):
        given = numbers(response)
        return "incorrect" if given and not _hedged(response) else "not_attempted"
    return "incorrect"


def holds(text: str, reference: str) -> bool:
    """Tell whether a text holds an accepted answer.

    A reference that is a number is compared as one, every other word by word; Chinese,
    Japanese and Korean ones anywhere in the text, for they have no spaces.
    """
    if _is_number(reference):
        wanted = numbers(reference)[0]
        return any(wanted.holds(number.value) for number in numbers(text))
    inner, outer = normalised(reference), normalised(text)
    if not inner:
        return False
    if _WIDE.search(inner):
        return inner.replace(" ", "") in outer.replace(" ", "")
    return f" {inner} " in f" {outer} "


def normalised(text: str) -> str:
    """Return a text without case, width, punctuation, articles and spare blanks.

    >>> normalised("The  Ｅiffel-Tower!")
    'eiffel tower'
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    letters = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in plain)
    return " ".join(word for word in letters.split() if word not in _ARTICLES)


def _is_number(reference: str) -> bool:
    """Tell whether a reference is one number, with a unit or sign at most."""
    found = numbers(reference)
    if len(found) != 1:
        return False
    rest = re.sub(
        r"[\d.,+\-%$€£¥\s零〇一二两三四五六七八九十百千万萬亿億点负]|million|billion|thousand",
        "",
        unicodedata.normalize("NFKC", reference).casefold(),
    )
    return len(rest) <= 3


def _hedged(response: str) -> bool:
    """Tell whether every number stands behind a word such as about."""
    plain = unicodedata.normalize("NFKC", response).casefold()
    places = [m.start() for m in re.finditer(r"\d[\d,.]*", plain)]
    return bool(places) and all(_ABOUT.search(plain[:place]) for place in places)


def _better(subject: Subject, other: str) -> Literal["A", "B", "tie"]:
    first, second = (
        grade(response, subject.references) == "correct"
        for response in (subject.response, other)
    )
    if first == second:
        return "tie"
    return "A" if first else "B"


def _scores(subject: Subject) -> Verdict:
    beyond = [aspect for aspect in subject.aspects if aspect != "correctness"]
    if beyond:
        return Verdict(
            None,
            failure=f"rules: know nothing of {', '.join(beyond)}, only correctness",
        )
    texts = [subject.response[start:end] for start, end in subject.spans]
    right = [any(holds(text, r) for r in subject.references) for text in texts]
    return Verdict({"segments": [{"correctness": MAX_SCORE * r} for r in right]})

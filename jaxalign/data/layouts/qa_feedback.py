"""QA-Feedback: answers with human error spans, from Fine-Grained RLHF.

https://github.com/allenai/FineGrainedRLHF (Apache-2.0), ``feedback_400.json``: a
question with passages, four predictions, the errors that people marked in the first
one (``feedback.errors``, by code-point span), what it leaves out
(``feedback.missing-info``) and its correction.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxalign.data.layouts.foreign import (
    Converted,
    Dropped,
    Row,
    text,
    user_turn,
)
from jaxalign.errors import UserError


__all__ = ["ASPECT_OF_ERROR", "convert", "prompt", "record", "sentences"]

TOP = 4

ASPECT_OF_ERROR = {
    "Irrelevant": "helpfulness",
    "Wrong-Grounding": "correctness",
    "Unverifiable": "correctness",
    "Redundant": "clarity",
    "Incoherent": "clarity",
}
"""Which score an error of each type lowers."""

_LOSS_OF_MISSING = {
    "Missing-Answer": 3,
    "Missing-Major-Auxiliary": 2,
    "Missing-Minor-Auxiliary": 1,
}

_ASPECTS = ("helpfulness", "correctness", "safety", "completeness", "clarity")

_STOP = re.compile(r"""[.!?]["')\]”’]*\s+(?=["'(\[“‘]?[A-Z0-9])""")
_ABBREVIATIONS = frozenset(
    "mr. mrs. ms. dr. prof. st. jr. sr. gen. lt. col. capt. sgt. rev. "
    "inc. co. corp. ltd. bros. no. vs. v. etc. e.g. i.e. mt. ft. u.s. u.k. d.c. f.c. "
    "jan. feb. mar. apr. jun. jul. aug. sep. sept. oct. nov. dec.".split()
)
_INITIAL = re.compile(r"[A-Z]\.")


def record(
    row: Mapping[str, Any], where: str = "row", *, passage_chars: int = 1200
) -> dict[str, Any] | Dropped:
    """Make a feedback record of a row: the correction against the first prediction.

    Segments are sentences. A rejected sentence's helpfulness, correctness and clarity
    are 4 - max(1, round(4 * share)), where share is the part of its characters, spaces
    not counted, inside error spans of that kind, and 4 where there is none. What is
    left out lowers the completeness of the last sentence, by 3 for a missing answer
    and 2 or 1 for major or minor detail, down to 0. A chosen sentence has 4 throughout,
    or 3 for helpfulness and completeness where it is a sentence of the prediction that
    the corrector left as it was. Safety is 4 always: nobody looked at it.

    Where there is no correction, or it changes nothing, the gold answer is chosen.

    Args:
      row: its columns.
      where: its place, for messages.
      passage_chars: what :func:`prompt` may show of the passages.
    Returns:
      The record, or why there is none: chosen and rejected would be equal.
    Raises:
      UserError: a column is missing or not of its kind.
    """
    rejected = text(row, "prediction 1", where)
    feedback = row.get("feedback")
    if not isinstance(feedback, Mapping):
        raise UserError(
            f"{where}: field feedback: expected an object with errors, missing-info "
            f"and corrected-prediction: got {type(feedback).__name__}"
        )
    chosen = text(feedback, "corrected-prediction", f"{where}: feedback").strip()
    if not chosen or chosen == rejected.strip():
        chosen = text(row, "gold", where).strip()
    if chosen == rejected.strip():
        return Dropped("equal responses")
    kept = {rejected[a:b].strip() for a, b in sentences(rejected)}
    return {
        "prompt": [user_turn(prompt(row, where, passage_chars=passage_chars))],
        "chosen": chosen,
        "rejected": rejected,
        "chosen_segments": [
            _chosen_segment(a, b, chosen[a:b].strip() in kept)
            for a, b in sentences(chosen)
        ],
        "rejected_segments": _rejected_segments(rejected, feedback, where),
    }


def convert(rows: Iterable[Row]) -> Iterator[Converted]:
    """Convert row by row."""
    for row, where in rows:
        yield Converted(record(row, where), where)


def prompt(
    row: Mapping[str, Any], where: str = "row", *, passage_chars: int = 1200
) -> str:
    """Return the instruction, the passages and the question of a row.

    Each passage gets an equal part of ``passage_chars``, filled with whole sentences;
    a first sentence that is longer is cut.
    """
    question = text(row, "question", where)
    passages = row.get("passages")
    if not isinstance(passages, list) or not all(
        isinstance(p, list) and p and all(isinstance(s, str) for s in p)
        for p in passages
    ):
        raise UserError(
            f"{where}: field passages: expected a list of [title, sentence, ...]: got "
            f"{type(passages).__name__}"
        )
    shown = [_passage(p, passage_chars // len(passages)) for p in passages]
    return "\n\n".join(
        [
            "Answer the question with the help of the passages. Say only what the "
            "question asks for.",
            "Passages:\n" + "\n".join(shown),
            f"Question: {question}",
        ]
    )


def sentences(answer: str) -> list[tuple[int, int]]:
    """Split an English answer into sentences as half-open spans, without a gap.

    A full stop after an initial or a common abbreviation ends no sentence.

    >>> sentences("By J. Doe. It is.")
    [(0, 11), (11, 17)]
    """
    found, begin = [], 0
    for match in _STOP.finditer(answer):
        words = answer[begin : match.start() + 1].split()
        last = words[-1].lstrip("(\"'") if words else ""
        if last.lower() in _ABBREVIATIONS or _INITIAL.fullmatch(last):
            continue
        found.append((begin, match.end()))
        begin = match.end()
    return [*found, (begin, len(answer))] if begin < len(answer) else found


def _passage(passage: Sequence[str], room: int) -> str:
    title, *pieces = passage
    if pieces and pieces[0].startswith(f"{title}\n\n"):
        pieces[0] = pieces[0][len(title) :]
    shown = ""
    for piece in pieces:
        longer = f"{shown} {piece.strip()}".strip()
        if shown and len(longer) > room:
            break
        shown = longer
    return f"[{title}] {shown[:room].strip()}"


def _chosen_segment(start: int, end: int, unchanged: bool) -> dict[str, Any]:
    scores = dict.fromkeys(_ASPECTS, TOP)
    if unchanged:
        scores |= {"helpfulness": TOP - 1, "completeness": TOP - 1}
    return {"start": start, "end": end, "scores": scores}


def _rejected_segments(
    answer: str, feedback: Mapping[str, Any], where: str
) -> list[dict[str, Any]]:
    marked: dict[str, set[int]] = {}
    for i, error in enumerate(_objects(feedback, "errors", where)):
        place = f"{where}: field feedback.errors[{i}]"
        aspect = _known(error, ASPECT_OF_ERROR, place)
        start, end = error.get("start"), error.get("end")
        if (
            not isinstance(start, int)
            or not isinstance(end, int)
            or not 0 <= start <= end <= len(answer)
        ):
            raise UserError(
                f"{place}: expected 0 <= start <= end <= {len(answer)}, the length of "
                f"prediction 1: got start={start!r}, end={end!r}"
            )
        marked.setdefault(aspect, set()).update(range(start, end))
    lost = sum(
        _known(gap, _LOSS_OF_MISSING, f"{where}: field feedback.missing-info[{i}]")
        for i, gap in enumerate(_objects(feedback, "missing-info", where))
    )
    segments = []
    for start, end in sentences(answer):
        scores: dict[str, int] = dict.fromkeys(_ASPECTS, TOP)
        letters = [i for i in range(start, end) if not answer[i].isspace()]
        for aspect, places in marked.items():
            wrong = sum(i in places for i in letters)
            if wrong:
                scores[aspect] = TOP - max(1, round(TOP * wrong / len(letters)))
        segments.append({"start": start, "end": end, "scores": scores})
    if segments:
        segments[-1]["scores"]["completeness"] = max(0, TOP - lost)
    return segments


def _objects(
    feedback: Mapping[str, Any], name: str, where: str
) -> list[Mapping[str, Any]]:
    found = feedback.get(name)
    if not isinstance(found, list) or not all(isinstance(x, Mapping) for x in found):
        raise UserError(
            f"{where}: field feedback.{name}: expected a list of objects: got "
            f"{type(found).__name__}"
        )
    return found


def _known(given: Mapping[str, Any], table: Mapping[str, Any], place: str) -> Any:
    kind = given.get("error type")
    if isinstance(kind, str) and kind in table:
        return table[kind]
    raise UserError(
        f"{place}: error type: expected one of {', '.join(table)}: got {kind!r}"
    )

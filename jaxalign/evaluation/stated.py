"""How sure a model says that it is, asked for in the same request as the answer."""

import re
from pathlib import Path
from typing import NamedTuple

from jaxalign.evaluation.prompts import prompt


__all__ = ["Stated", "asking", "stated"]

_STATED = re.compile(
    r"(?:置信度|信心|confidence)[^\d\n]{0,12}(\d{1,3}(?:\.\d+)?)\s*[%\uff05]?",
    re.IGNORECASE,
)


class Stated(NamedTuple):
    """An answer and how sure it is.

    >>> Stated("Paris", 0.9).confidence
    0.9
    """

    answer: str
    """Without what says how sure it is."""
    confidence: float | None
    """From 0 to 1; None where it does not say, or nothing between 0 and 100."""


def asking(question: str, own: Path | None = None) -> str:
    """Return a question that also asks how sure the answer is.

    >>> asking("Where?").startswith("Where?")
    True
    """
    return prompt("confidence", {"question": question}, own)


def stated(text: str) -> Stated:
    """Read an answer whose last such line is ``Confidence: 0 to 100``.

    >>> stated("It is Paris.\\nConfidence: 85%")
    Stated(answer='It is Paris.', confidence=0.85)
    >>> stated("It is Paris.").confidence is None
    True
    """
    found = list(_STATED.finditer(text))
    if not found:
        return Stated(text, None)
    last = found[-1]
    percent = float(last[1])
    lines = text[: last.start()].rstrip(" \t*_#-—{\"'").rstrip()
    answer = lines or text[last.end() :].strip()
    return Stated(answer, percent / 100 if percent <= 100 else None)

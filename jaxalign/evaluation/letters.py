"""Multiple choice: the options in a prompt, and the letter in an answer.

A letter is read only where it is one: ``A dog`` names no option, ``A.`` and ``(A)`` do.
What names none, or several, is ``unparsed``; nothing is guessed.
"""

import re
import string
from collections.abc import Mapping, Sequence

from jaxalign.judging.exact_match import normalised


__all__ = ["LETTERS", "letter_of", "with_options"]

LETTERS = string.ascii_uppercase

_ALONE = re.compile(r"^\W{0,3}([A-Z])(?:\W{0,3}$|\s*[.:)\]\uff09\uff1a\u3001]|\n)")
_NAMED = re.compile(
    r"(?:answer|option|choice|\u7b54\u6848|\u9009\u9879|\u9009)"
    r"(?:\s+is|\s*\u662f|\s*\u4e3a)?\s*[:\uff1a]?\s*[*(\[\uff08]*([A-Z])(?![A-Za-z'])",
    re.IGNORECASE,
)
_BRACKETED = re.compile(r"[(\[\uff08]([A-Z])[)\]\uff09]")


def with_options(question: str, options: Sequence[str] | Mapping[str, str]) -> str:
    """Return a question with its options below, a letter before each.

    >>> print(with_options("2 + 2?", ["3", "4"]))
    2 + 2?
    A. 3
    B. 4
    """
    named = options
    if not isinstance(named, Mapping):
        named = dict(zip(LETTERS, options, strict=False))
    return "\n".join([question, *(f"{name}. {text}" for name, text in named.items())])


def letter_of(answer: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the option that an answer names, None for none or several.

    Args:
      answer: of the model.
      options: from a letter to its text.
    Example:
      >>> options = {"A": "a dog", "B": "a cat"}
      >>> [letter_of(said, options) for said in ("B", "(B) a cat", "The answer is A.")]
      ['B', 'B', 'A']
      >>> letter_of("A bird, I think.", options) is None
      True
    """
    text = answer.strip()
    if (alone := _ALONE.match(text)) and alone[1] in options:
        return alone[1]
    for pattern in (_NAMED, _BRACKETED):
        found = {m[1].upper() for m in pattern.finditer(text)} & options.keys()
        if len(found) == 1:
            return found.pop()
        if found:
            return None
    said = normalised(text)
    whole = [name for name, option in options.items() if normalised(option) == said]
    if said and len(whole) == 1:
        return whole[0]
    within = [
        name
        for name, option in options.items()
        if normalised(option) and f" {normalised(option)} " in f" {said} "
    ]
    return within[0] if len(within) == 1 else None

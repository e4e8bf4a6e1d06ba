"""Risk observations: what may do harm in a prompt, where it stands, and how.

The four sources and nine categories are those of DREAM,
https://arxiv.org/abs/2504.18053 and https://github.com/Kizna1ver/DREAM
"""

import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


__all__ = [
    "CATEGORIES",
    "SOURCES",
    "Normalised",
    "Observation",
    "folded",
    "join",
    "normalise",
]

SOURCES = (
    "text instructions",
    "text content",
    "image content",
    "text in the image",
)
CATEGORIES = (
    "illegal activities",
    "violence",
    "privacy",
    "discrimination",
    "sexual content",
    "disinformation",
    "impersonating",
    "political interference",
    "professional advice",
)

# DREAM's own data has a tenth category; advice on health is professional advice.
_OTHER_NAMES = {"health": "professional advice"}
_NOTHING = ("", "n/a", "none")


class Observation(NamedTuple):
    """One risk in a prompt."""

    malicious_content: str
    source: str
    risk_category: str


class Normalised(NamedTuple):
    """Observations from outside, and what was done to their values."""

    observations: tuple[Observation, ...]
    renamed: tuple[tuple[str, str], ...]
    """(value as it was, one of ours) where they differ in more than case and spaces."""
    dropped: tuple[str, ...]
    """Why, for each that is none of the observations."""


def normalise(given: Any) -> Normalised:
    """Return observations with values of the two lists; nothing in them raises.

    Case and spaces do not matter; a known value with an explanation behind a colon is
    that value; "Health" is professional advice. An entry that says N/A, is not on the
    lists or is no observation at all is dropped, with the reason.

    >>> normalise([{"malicious_content": "how to mix it", "source": "Text instructions",
    ...             "risk_category": "Health"}]).observations[0].risk_category
    'professional advice'
    """
    kept: list[Observation] = []
    renamed: list[tuple[str, str]] = []
    dropped: list[str] = []
    for entry in given if isinstance(given, list) else [given]:
        fields = [
            entry.get(name) if isinstance(entry, Mapping) else None
            for name in Observation._fields
        ]
        if not all(isinstance(field, str) for field in fields):
            dropped.append("no observation")
            continue
        content, source, category = (str(field) for field in fields)
        found = (_known(source, SOURCES), _known(category, CATEGORIES))
        if folded(content) in _NOTHING:
            dropped.append("no content")
        elif found[0] is None:
            dropped.append("unknown source")
        elif found[1] is None:
            dropped.append("unknown risk category")
        else:
            kept.append(Observation(content, found[0], found[1]))
            pairs = zip((source, category), found, strict=True)
            renamed += [(old, str(new)) for old, new in pairs if folded(old) != new]
    return Normalised(tuple(kept), tuple(renamed), tuple(dropped))


def _known(value: str, names: tuple[str, ...]) -> str | None:
    name = folded(value)
    for candidate in (name, name.partition(":")[0].strip()):
        candidate = _OTHER_NAMES.get(candidate, candidate)
        if candidate in names:
            return candidate
    return None


def join(
    passes: Iterable[tuple[str, Iterable[Observation]]],
) -> dict[Observation, tuple[str, ...]]:
    """Return what several passes observed, once each, with the passes that saw it.

    Observations are one where they differ in case, width and spaces of the content
    alone; the first wording stays. The order is that of first sight.
    """
    first: dict[tuple[str, str, str], Observation] = {}
    seen: dict[Observation, tuple[str, ...]] = {}
    for name, observations in passes:
        for observation in observations:
            content, source, category = observation
            if not folded(content):
                continue
            key = (folded(content), source, category)
            kept = first.setdefault(key, observation)
            before = seen.get(kept, ())
            seen[kept] = before if name in before else (*before, name)
    return seen


def folded(text: str) -> str:
    """Return what two texts share that differ in case, width and spaces alone.

    >>> folded(" Ｔwo  Words") == folded("two words")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())

"""The wording of what judges are asked: files that people may edit.

A template is a Markdown file with the headings ``# System`` and ``# User``, and places
``{{name}}`` for values. Templates lie in ``judging/templates``, the rubrics of the
aspects in ``judging/rubrics``; a directory of one's own may hold replacements of the
same names.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from jaxalign.errors import UserError, did_you_mean


__all__ = ["filled", "has_rubric", "messages", "read", "rubric"]

_HERE = Path(__file__).parent
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_LAYOUT = re.compile(r"\A# System\n(.+?)\n# User\n(.+)\Z", re.DOTALL)


def read(folder: str, name: str, own: Path | None = None) -> str:
    """Return the text of a file of wording: one's own if there is one, else ours.

    Raises:
      UserError: there is no such file.
    """
    if (path := _path(folder, name, own)) is not None:
        return path.read_text(encoding="utf-8").strip() + "\n"
    known = {path.stem for path in (_HERE / folder).glob("*.md")}
    where = "" if own is None else f" and {own} has none"
    raise UserError(
        f"there is no {name!r} among our {folder}{where}: {did_you_mean(name, known)} "
        f"Write {name}.md into a directory of your own to add it"
    )


def _path(folder: str, name: str, own: Path | None) -> Path | None:
    for directory in (own, _HERE / folder):
        if directory is not None and (path := directory / f"{name}.md").is_file():
            return path
    return None


def rubric(aspect: str, own: Path | None = None) -> str:
    """Return the rubric of an aspect, what a score of 0 to 4 means."""
    return read("rubrics", aspect, own)


def has_rubric(aspect: str, own: Path | None = None) -> bool:
    """Tell whether an aspect has a rubric."""
    return _path("rubrics", aspect, own) is not None


def messages(
    name: str, values: Mapping[str, str], own: Path | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the system and user message of a template with its places filled.

    Values are put in once and never searched for places themselves, so that a response
    which holds ``{{rubric}}`` stays as it is.

    Raises:
      UserError: the template lacks a heading, or has a place without a value.
    """
    text = read("templates", name, own)
    found = _LAYOUT.match(text)
    if found is None:
        raise UserError(
            f"the template {name}.md has not the headings '# System' and '# User', in "
            "this order and each on a line of its own"
        )

    named = f"the template {name}.md"
    system, user = (filled(part.strip(), values, named) for part in found.groups())
    return {"role": "system", "content": system}, {"role": "user", "content": user}


def filled(text: str, values: Mapping[str, str], named: str) -> str:
    """Return a text with its places ``{{name}}`` filled.

    Values are put in once and never searched for places themselves.

    Args:
      text: with places.
      values: by the places' names.
      named: what the text is called in an error.
    Raises:
      UserError: a place has no value.
    Example:
      >>> filled("{{a}} + {{b}}", {"a": "{{b}}", "b": "2"}, "the template")
      '{{b}} + 2'
    """

    def value(place: re.Match[str]) -> str:
        if place[1] not in values:
            raise UserError(
                f"{named} has the place {place[0]}: {did_you_mean(place[1], values)}"
            )
        return values[place[1]]

    return _PLACE.sub(value, text)

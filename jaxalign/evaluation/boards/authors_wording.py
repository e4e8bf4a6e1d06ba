"""Judge templates in their authors' form, which is Python's ``str.format``.

They are read from the data directory (``--wording official``) and never shipped.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxalign.errors import UserError, did_you_mean


__all__ = ["JudgePrompt", "filled"]

_FIELD = re.compile(r"\{(\w+)\}")


class JudgePrompt(NamedTuple):
    """A judge template of the authors'."""

    system: str
    user: str
    """With fields in braces."""


def filled(template: str, values: Mapping[str, str], source: str) -> str:
    """Return a template with its ``{fields}`` filled.

    Values are put in once and never searched for fields themselves. Other braces stay
    as they are, where ``str.format`` would fail or halve them.

    Args:
      template: of the authors.
      values: of its fields.
      source: what the template is called in an error.
    Raises:
      UserError: the template has a field without a value.
    Example:
      >>> filled("{q} -> {a}", {"q": "{a}?", "a": "4"}, "a template")
      '{a}? -> 4'
    """

    def value(field: re.Match[str]) -> str:
        if field[1] not in values:
            raise UserError(
                f"{source} has the field {field[0]}, for which there is no value. "
                f"{did_you_mean(field[1], values)}"
            )
        return values[field[1]]

    return _FIELD.sub(value, template)

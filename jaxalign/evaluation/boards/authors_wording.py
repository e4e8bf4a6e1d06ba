"""Judge templates in their authors' form, which is Python's ``str.format``.

They are read from the data directory (``--wording official``) and never shipped.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxalign.errors import UserError, did_you_mean
from jaxalign.evaluation.task import Task, TaskOptions


__all__ = ["JudgePrompt", "check_one_sample", "filled", "worded"]

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


def worded(
    task: Task, options: TaskOptions, *, published: Mapping[str, Any] | None = None
) -> Task:
    """Return a task that is judged in our wording, or in the authors'.

    Args:
      task: whose ``load`` takes ``official``, and whose ``grade`` takes ``own``.
      options: of the command.
      published: the authors' figures, which stand beside theirs alone.
    Example::

      worded(TASK, TaskOptions(wording="official")).facts["wording"]
    """
    official = options.wording == "official"
    load: Any = task.load
    grade: Any = task.grade
    facts = {**task.facts, "wording": options.wording}
    if official and published is not None:
        facts["published"] = published
    return dataclasses.replace(
        task,
        load=functools.partial(load, official=official),
        grade=functools.partial(grade, own=options.judge_own),
        facts=facts,
    )


def check_one_sample(what: str, options: TaskOptions) -> None:
    """Refuse several answers where one is compared.

    Raises:
      UserError: ``--num_samples`` asks for them.
    Example:
      >>> check_one_sample("alpaca_eval compares one answer", TaskOptions())
    """
    if options.num_samples not in (None, 1):
        raise UserError(f"{what}: leave --num_samples out, got {options.num_samples}")

"""The completions of records: a text, or turns of a conversation."""

from collections.abc import Sequence

from jaxalign.data.messages import Message, check_text, check_turn
from jaxalign.data.record_images import refuse_image_parts
from jaxalign.errors import UserError


__all__ = ["Completion", "read_completion", "texts_of"]

Completion = str | tuple[Message, ...]
"""A text, or turns: where they are not just one of the assistant with a text."""


def read_completion(
    value: str | Sequence[Message],
    field: str,
    prompt: str | tuple[Message, ...],
    where: str,
) -> Completion:
    """Return a completion's column, checked.

    Args:
      value: of the column.
      field: its name.
      prompt: the record's.
      where: file and line, for messages.
    Raises:
      UserError: with the field, what was got and how to mend it.
    """
    if isinstance(value, str):
        check_text(value, field, where)
        return value
    if isinstance(prompt, str):
        raise UserError(
            f"{where}: field {field}: messages, but the prompt is a plain text. "
            "Give both as texts, or the prompt as messages too"
        )
    refuse_image_parts(value, field, where)
    for i, message in enumerate(value):
        check_turn(message, f"{field}[{i}]", where)
    if not value or (value[0].role, value[-1].role) != ("assistant", "assistant"):
        roles = ", ".join(message.role for message in value) or "none"
        raise UserError(
            f"{where}: field {field}: expected turns that begin and end with the "
            f"assistant's: got {roles}. Put the turns that both completions share "
            "into prompt, and leave out what follows the last answer"
        )
    (first, *others), said = value, value[0].content
    if not others and isinstance(said, str) and set(first.turn()) == _PLAIN:
        return said
    return tuple(value)


_PLAIN = {"role", "content"}


def texts_of(completion: Completion) -> tuple[str, ...]:
    """Return the texts of a completion's assistant turns, one in nearly all records.

    >>> texts_of("It is.")
    ('It is.',)
    """
    if isinstance(completion, str):
        return (completion,)
    return tuple(turn.text for turn in completion if turn.role == "assistant")

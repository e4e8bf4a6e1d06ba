"""Questions of one turn, and prompts of records as questions."""

from typing import Any

from jaxalign.data.picture import Picture
from jaxalign.data.records import Prompt
from jaxalign.evaluation.task import Question


__all__ = ["prompt_question", "question"]


def question(name: str, text: str, picture: Picture | None = None) -> Question:
    """Return a question of one turn, its picture before its text.

    >>> question("final", "2 + 2?").messages[0]["content"]
    '2 + 2?'
    """
    if picture is None:
        return Question(name, ({"role": "user", "content": text},))
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return Question(name, ({"role": "user", "content": content},), (picture,))


def prompt_question(name: str, prompt: Prompt) -> Question:
    """Return a record's prompt as it stands; pictures of a plain text go before it.

    >>> from jaxalign.data.records import parse_prompt
    >>> prompt_question("answer", parse_prompt({"prompt": "2 + 2?"})).messages
    ({'role': 'user', 'content': '2 + 2?'},)
    """
    given = prompt.text
    if not isinstance(given, str):
        return Question(name, tuple(turn.turn() for turn in given), prompt.images)
    content: Any = given
    if prompt.images:
        shown = [{"type": "image"}] * len(prompt.images)
        content = [*shown, {"type": "text", "text": given}]
    return Question(name, ({"role": "user", "content": content},), prompt.images)

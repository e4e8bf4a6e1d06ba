"""Where the turns of a completion stand in what a chat template prints of them."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign import progress
from jaxalign.data.patches import PictureLayout
from jaxalign.data.placement import Placement, align, place_at_end
from jaxalign.data.records import Completion, Message
from jaxalign.data.template import MARK, Template
from jaxalign.errors import UserError


__all__ = ["Conversation", "Rendering", "Turn", "ending"]


class Turn(NamedTuple):
    """Where one of a completion's assistant turns stands in a rendering."""

    start: int
    """Where generation begins: the end of the generation prompt."""
    place: Placement
    """Where the turn's own text is."""
    stop: int
    """Where all that the turn says ends, tool calls included."""


class Rendering(NamedTuple):
    """A prompt with one completion, as text."""

    text: str
    turns: tuple[Turn, ...]
    """The completion's assistant turns, in order."""
    plain: bool
    """Whether it is of plain texts and not of a conversation."""
    marked: tuple[bool, ...] | None = None
    """What of a completion of several turns the template marks as ``generation``, by
    token; None where it marks nothing. Where pictures' text has been put in, they are
    those of the last tokens."""
    layouts: tuple[PictureLayout, ...] = ()
    """What its pictures have become."""
    stretches: tuple[tuple[int, int], ...] = ()
    """Characters (begin, end) of each picture's text."""


def ending(messages: Sequence[Message]) -> str:
    """Name the option by which a prompt ends where a completion begins."""
    goes_on = messages[-1].role == "assistant"
    return "continue_final_message" if goes_on else "add_generation_prompt"


class Conversation:
    """A record's prompt, and what a chat template prints of it with completions.

    Args:
      template: of the checkpoint.
      prompt: turns; where the last is the assistant's, completions go on with it.
      options: what the template is given beside the turns.
      where: the record's place, for messages.
    """

    def __init__(
        self,
        template: Template,
        prompt: Sequence[Message],
        options: Mapping[str, Any],
        where: str,
    ):
        self._template, self._prompt = template, tuple(prompt)
        self._options, self._where = options, where
        self._goes_on = ending(prompt) == "continue_final_message"
        # A prompt's turns are printed several times.
        self._made = {id(message): template.turn(message) for message in self._prompt}
        # Completions of one text have these in common.
        self._opening: str | None = None
        self._simple: _Around | None = None

    def rendering(self, completion: Completion) -> Rendering:
        """Return the prompt with a completion.

        Raises:
          UserError: the template refuses it, or does not print it as given.
        """
        simple = isinstance(completion, str)
        said = (
            (Message(role="assistant", content=completion),) if simple else completion
        )
        before, given = self._prompt, 0
        if self._goes_on:
            before, given = before[:-1], len(self._prompt[-1].text)
            said = (_joined(self._prompt[-1], said[0]), *said[1:])
        messages = (*before, *said)
        numbers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        numbers = [i for i in numbers if i >= len(before)]
        text, last = self._last(messages, given, simple=simple)
        turns = [*(self._earlier(messages, text, i) for i in numbers[:-1]), last]
        if given:
            turns[0] = _going_on(turns[0], given)
        marked = None
        if len(turns) > 1 and self._printed(messages) == text:
            marked = self._template.marks(messages, **self._options)
        return Rendering(text, tuple(turns), plain=False, marked=marked)

    def _last(
        self, messages: Sequence[Message], given: int, *, simple: bool
    ) -> tuple[str, Turn]:
        """Return the text of a conversation, and where its last turn is in it."""
        index = len(messages) - 1
        prompt = self._opening if simple else None
        if prompt is None:
            prompt = self._generation_prompt(messages, index)
        text, whole = messages[-1].text, self._printed(messages)
        roles = None
        if simple and not given and not self._options and text == text.strip() != "":
            self._opening, roles = prompt, tuple(m.role for m in messages)
            tail = self._template.tails.get(roles)
            # As for others of such turns: no need to find out what is printed around.
            if tail is not None and whole == f"{prompt}{text}{tail}":
                place = Placement(len(prompt), np.arange(len(text) + 1))
                return whole, Turn(len(prompt), place, place.end)
        around = self._simple if simple else None
        if around is None:
            around = self._around(messages, index)
        if simple:
            self._opening, self._simple = prompt, around
        place = _found(whole, around, text)
        if place is not None:
            start = _common(prompt, whole)
            if roles and prompt == around.head:
                self._template.tails[roles] = around.tail
            # Reasoning in a field of its own stands where the template prints it.
            if start == len(prompt) or messages[-1].turn().get("reasoning_content"):
                return whole, Turn(start, place, len(whole) - around.rest)
        if place is None and _found_after_thinking(whole, around, text) is None:
            raise UserError(
                f"{self._where}: the chat template changes the completion's text (it "
                "is not printed as given), so segment offsets would be wrong. Use "
                "another template, or take out of the text what the template rewrites"
            )
        progress.say_once(
            "the chat template's generation prompt is no beginning of what it prints "
            "of a whole conversation, or it leaves out what was thought: completions "
            "are learnt as they are generated, right behind the generation prompt"
        )
        lead = given if index == len(self._prompt) - 1 else 0
        opens = _OPENS.match(text, lead)
        if opens and _OPENED.search(prompt):
            lead = opens.end()
        place = Placement(len(prompt), np.arange(lead, len(text) + 1))
        printed = prompt + text[lead:] + around.tail
        return printed, Turn(len(prompt), place, len(printed) - around.rest)

    def _earlier(self, messages: Sequence[Message], text: str, index: int) -> Turn:
        """Return where a turn is that others follow."""
        around = self._around(messages, index)
        said = messages[index].text
        place = _found(text, around, said)
        place = place or _found_after_thinking(text, around, said)
        if place is None:
            raise UserError(
                f"{self._where}: the chat template changes the text of turn {index} "
                "(it is not printed as given), so it cannot be told which tokens are "
                "learnt. Use another template, or put the turn into the prompt"
            )
        start = place.begin
        opening = self._generation_prompt(messages, index)
        opening = opening.removeprefix(self._printed(messages[:index]))
        found = text.rfind(opening, 0, place.begin)
        if found >= 0:
            start = min(found + len(opening), start)
        return Turn(start, place, len(text) - around.rest)

    def _generation_prompt(self, messages: Sequence[Message], index: int) -> str:
        if self._goes_on and index == len(self._prompt) - 1:
            return self._printed(self._prompt, continue_final_message=True)
        return self._printed(messages[:index], add_generation_prompt=True)

    def _around(self, messages: Sequence[Message], index: int) -> "_Around":
        """Return what is printed around a turn's text."""
        head, tail = self._with_mark(messages, index, messages[index])
        if not messages[index].turn().get("tool_calls"):
            return _Around(head, tail, len(tail))
        # Tool calls are printed behind the text, but the assistant says them too.
        alone = Message(role="assistant", content=MARK)
        end = self._with_mark(messages, index, alone)[1]
        rest = 0
        while rest < min(len(tail), len(end)) and tail[-1 - rest] == end[-1 - rest]:
            rest += 1
        return _Around(head, tail, rest)

    def _with_mark(
        self, messages: Sequence[Message], index: int, turn: Message
    ) -> tuple[str, str]:
        changed = Message(**{**turn.turn(), "content": MARK})
        marked = [*messages[:index], changed, *messages[index + 1 :]]
        head, mark, tail = self._printed(marked).partition(MARK)
        if not mark:
            raise UserError(
                f"{self._where}: the chat template does not print the assistant's "
                "text as it is. Use a template that does"
            )
        return head, tail

    def _printed(self, messages: Sequence[Message], **options: bool) -> str:
        turns = [self._made.get(id(message), message) for message in messages]
        return self._template.printed(turns, self._where, **self._options, **options)


class _Around(NamedTuple):
    """What a template prints around a turn's text."""

    head: str
    tail: str
    rest: int
    """How much of the tail comes after all that the turn says."""


_OPENED = re.compile(r"<think>\s*\Z")
_OPENS = re.compile(r"\s*<think>\s*")


def _common(first: str, second: str) -> int:
    """Return how many characters two texts begin with alike."""
    if second.startswith(first):  # as a rule; the other way takes long
        return len(first)
    return len(os.path.commonprefix([first, second]))


def _joined(first: Message, second: Message) -> Message:
    """Return a turn that goes on as the other one does."""
    return Message(
        **{**first.turn(), **second.turn(), "content": first.text + second.text}
    )


def _going_on(turn: Turn, given: int) -> Turn:
    """Return where the completion is in a turn whose beginning the prompt gave."""
    origins = turn.place.origins
    start = turn.place.begin + int(np.searchsorted(origins, given))
    place = turn.place._replace(origins=(origins - given).clip(0))
    return turn._replace(start=max(turn.start, start), place=place)


def _found(whole: str, around: _Around, text: str) -> Placement | None:
    """Find a text in what is printed of it, given what is printed around others."""
    head, tail, _ = around
    if not whole.endswith(tail):
        return None
    end = len(whole) - len(tail)
    if whole.startswith(head) and len(head) <= end:
        origins = align(whole[len(head) : end], text)
        if origins is not None:
            return Placement(len(head), origins)
    return place_at_end(whole[:end], text)


def _found_after_thinking(whole: str, around: _Around, text: str) -> Placement | None:
    """Find what follows a thinking block, where the block itself is left out."""
    thought, end, answer = text.rpartition("</think>")
    if not end:
        return None
    place = _found(whole, around, answer)
    if place is None:
        return None
    return place._replace(origins=place.origins + len(thought) + len(end))

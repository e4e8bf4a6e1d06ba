"""A checkpoint's chat template: what it prints of a conversation."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.data.records import Message
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError


__all__ = ["MARK", "Template"]

# Stands for a turn's text while we find out what the template prints around it.
MARK = "\u2063jaxalign\u2063completion\u2063"

_GENERATION = re.compile(r"{%[-+]?\s*generation\b")


@dataclasses.dataclass(frozen=True)
class Template:
    """The chat template of a tokenizer.

    Attributes:
      tokenizer: of the checkpoint.
      options: what the template is given beside the conversation.
    """

    tokenizer: Tokenizer
    options: Mapping[str, Any]

    @property
    def exists(self) -> bool:
        """Tell whether the tokenizer has one."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def printed(self, messages: Sequence[Message], where: str, **options: Any) -> str:
        """Return what is printed of a conversation.

        Args:
          messages: its turns; of none nothing is printed.
          where: its place, for messages.
          **options: come before :attr:`options`.
        Raises:
          UserError: there is no template, or it refuses the conversation.
        """
        if not self.exists:
            raise UserError(
                f"{where}: the prompt is a conversation, but the checkpoint's "
                "tokenizer has no chat template. Use a chat checkpoint, add a "
                "chat_template.jinja to it, or give prompt and completions as plain "
                "texts"
            )
        if not messages:
            return ""
        turns = [_turn(message, self._prints) for message in messages]
        return self._apply(turns, where, options)

    def marks(
        self, messages: Sequence[Message], **options: Any
    ) -> tuple[bool, ...] | None:
        """Return the tokens of a conversation that stand in ``{% generation %}``.

        Returns:
          One value a token, or None where the template has no such block.
        """
        if not _GENERATION.search(str(getattr(self.tokenizer, "chat_template", ""))):
            return None
        out = self.tokenizer.apply_chat_template(
            [_turn(message, self._prints) for message in messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **{**self.options, **options},
        )
        return tuple(map(bool, out["assistant_masks"]))

    @functools.cached_property
    def _prints(self) -> frozenset[type]:
        """What contents are printed as they are: texts, lists of parts."""
        found = set()
        for content in (MARK, [{"type": "text", "text": MARK}]):
            try:
                turns = [{"role": "user", "content": content}]
                text = self._apply(turns, "the chat template", {})
            except UserError:
                continue
            if MARK in text:
                found.add(type(content))
        return frozenset(found)

    def _apply(
        self, turns: list[dict[str, Any]], where: str, options: Mapping[str, Any]
    ) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, **{**self.options, **options}
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(
                f"{where}: the chat template refuses the roles {roles}: {error}"
            ) from None


def _turn(message: Message, prints: frozenset[type]) -> dict[str, Any]:
    """Return a turn with its content in the form that the template prints."""
    turn = message.turn()
    content = turn.get("content")
    if content is None or type(content) in prints or not prints:
        return turn
    parts = [{"type": "text", "text": message.text}]
    return {**turn, "content": message.text if str in prints else parts}

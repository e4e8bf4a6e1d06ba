"""A checkpoint's chat template: what it prints of a conversation."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxalign.data.messages import ImagePart, Message, TextPart
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError


__all__ = ["MARK", "Template", "has_pictures"]

# Stands for a turn's text while we find out what the template prints around it.
MARK = "\u2063jaxalign\u2063completion\u2063"

_GENERATION = re.compile(r"{%[-+]?\s*generation\b")


@dataclasses.dataclass(frozen=True)
class Template:
    """The chat template of a tokenizer.

    Attributes:
      tokenizer: of the checkpoint.
      options: what the template is given beside the conversation.
      placeholder: what a text holds in the place of a picture; None where the model
        does not see.
    """

    tokenizer: Tokenizer
    options: Mapping[str, Any]
    placeholder: str | None = None

    @property
    def exists(self) -> bool:
        """Tell whether the tokenizer has one."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def printed(
        self, messages: Sequence[Message | dict[str, Any]], where: str, **options: Any
    ) -> str:
        """Return what is printed of a conversation.

        Args:
          messages: its turns, or what :meth:`turn` made of them; of none nothing is
            printed.
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
        turns = [m if isinstance(m, dict) else self.turn(m) for m in messages]
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
            list(map(self.turn, messages)),
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

    @functools.cached_property
    def _prints_pictures(self) -> bool:
        """Whether a part that is a picture becomes the placeholder."""
        parts = [{"type": "image"}, {"type": "text", "text": MARK}]
        turns = [{"role": "user", "content": parts}]
        try:
            text = self._apply(turns, "the chat template", {})
        except UserError:
            return False
        return MARK in text and str(self.placeholder) in text

    @functools.cached_property
    def tails(self) -> dict[Any, str]:
        """What has been seen to follow a completion, by the roles of the turns."""
        return {}

    def turn(self, message: Message) -> dict[str, Any]:
        """Return a turn with its content in the form that the template prints."""
        turn, prints = message.turn(), self._prints
        if has_pictures([message]) and isinstance(message.content, list):
            return {**turn, "content": self._with_pictures(message.content)}
        content = turn.get("content")
        if content is None or type(content) in prints or not prints:
            return turn
        return {**turn, "content": self._with_text(message.text)}

    def _with_text(self, text: str) -> Any:
        return text if str in self._prints else [{"type": "text", "text": text}]

    def _with_pictures(self, parts: Sequence[TextPart | ImagePart]) -> Any:
        """Return content with pictures: as parts, or with placeholders in the text.

        A line break follows such a placeholder, as in LLaVA's prompts.
        """
        if self._prints_pictures:
            return [
                {"type": "image"}
                if isinstance(part, ImagePart)
                else {"type": "text", "text": part.text}
                for part in parts
            ]
        pieces = [
            f"{self.placeholder}\n" if isinstance(part, ImagePart) else part.text
            for part in parts
        ]
        return self._with_text("".join(pieces))

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


def has_pictures(messages: Iterable[Message]) -> bool:
    """Tell whether any turn has a part that is a picture."""
    return any(
        isinstance(part, ImagePart)
        for message in messages
        if isinstance(message.content, list)
        for part in message.content
    )

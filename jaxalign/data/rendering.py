"""Prompts and records as the text that a checkpoint sees, and that text as tokens.

Conversations go through the checkpoint's chat template and get no further special
tokens; plain texts are tokenised as the tokenizer's own call does. Whatever else is
written into the text belongs here, so that characters decide all that follows.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jaxalign.data import spans
from jaxalign.data.records import Message, Prompt, Record
from jaxalign.data.tokenizer import Tokenizer, special_ids
from jaxalign.errors import UserError


__all__ = ["Encoding", "Renderer", "Rendering", "as_renderer"]

# Stands for the completion while we find out what the template prints around it.
_MARK = "\u2063jaxalign\u2063completion\u2063"


class Rendering(NamedTuple):
    """A prompt with one completion, as text."""

    text: str
    start: int
    """Where the completion begins: the end of the generation prompt."""
    shift: int
    """Place in ``text`` of the completion's character 0 (may have been trimmed)."""
    begin: int
    """Where the completion's own text begins: after what the template prints."""
    end: int
    """Where the completion's own text ends."""
    plain: bool
    """Whether it is of plain texts and not of a conversation."""


class Encoding(NamedTuple):
    """A rendering as tokens."""

    tokens: list[int]
    spans: list[spans.Span]
    """The characters of each token, see :func:`jaxalign.data.spans.tile_spans`."""


@dataclasses.dataclass(frozen=True)
class Renderer:
    """How a checkpoint writes prompts and records, and reads them as tokens.

    Attributes:
      tokenizer: of the checkpoint, with its chat template.
    """

    tokenizer: Tokenizer

    @property
    def has_template(self) -> bool:
        """Tell whether there is a chat template, without which only texts render."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def prompt_text(self, prompt: Prompt) -> str:
        """Return a prompt as text: of a conversation what the chat template prints.

        Raises:
          UserError: a conversation without a chat template, or one that it refuses.
        """
        if isinstance(prompt.text, str):
            return prompt.text
        turns = self._turns(prompt.text, prompt.where)
        return self._apply(turns, prompt.where, add_generation_prompt=True)

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """Return the tokens that a completion follows.

        Of a conversation those of the chat template with its generation prompt and no
        further special tokens; of a text what the tokenizer's own call gives.

        Raises:
          UserError: see :meth:`prompt_text`.
        """
        text, plain = self.prompt_text(prompt), isinstance(prompt.text, str)
        out = self.tokenizer(text, add_special_tokens=plain, verbose=False)
        return list(out["input_ids"])

    def completions(self, record: Record) -> tuple[Rendering, ...]:
        """Return a record's prompt with each of its completions.

        Raises:
          UserError: see :meth:`prompt_text`; or the template does not print what it
            prompts with, or changes a completion.
        """
        if isinstance(record.prompt, str):
            start = len(record.prompt)
            return tuple(
                Rendering(
                    *(record.prompt + text, start, start, start, start + len(text)),
                    plain=True,
                )
                for text in record.completions
            )
        turns = self._turns(record.prompt, record.where)
        prompt = self._apply(turns, record.where, add_generation_prompt=True)
        marked = self._apply([*turns, _assistant(_MARK)], record.where)
        head, mark, tail = marked.partition(_MARK)
        if not mark or not head.startswith(prompt):
            raise UserError(
                f"{record.where}: the chat template does not print a conversation as "
                "its generation prompt followed by the answer, so the completion's "
                "tokens cannot be told from the prompt's. Use a template that does"
            )
        return tuple(
            _place(
                self._apply([*turns, _assistant(completion)], record.where),
                completion,
                (prompt, head, tail),
                record.where,
            )
            for completion in record.completions
        )

    def encode(self, renderings: Sequence[Rendering]) -> list[Encoding]:
        """Tokenise renderings, those of a kind in one call."""
        encodings: dict[int, Encoding] = {}
        for plain in (False, True):
            places = [i for i, r in enumerate(renderings) if r.plain == plain]
            if not places:
                continue
            out = self.tokenizer(
                [renderings[i].text for i in places],
                add_special_tokens=plain,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            for i, tokens, offsets in zip(
                places, out["input_ids"], out["offset_mapping"], strict=True
            ):
                tiled = spans.tile_spans(renderings[i].text, offsets)
                encodings[i] = Encoding(tokens, tiled)
        return [encodings[i] for i in range(len(renderings))]

    def stop_tokens(self) -> frozenset[int]:
        """Return the tokens that end a completion: EOS and the template's end of turn.

        The end of turn is the first special token that the template prints behind an
        answer.
        """
        eos = self.tokenizer.eos_token_id
        stops = set() if eos is None else {eos}
        if self.has_template:
            turns = [Message(role="user", content="?").model_dump(), _assistant(_MARK)]
            text = self._apply(turns, "the chat template")
            tail = self.tokenizer(text.partition(_MARK)[2], add_special_tokens=False)
            special = special_ids(self.tokenizer)
            stops |= set([i for i in tail["input_ids"] if i in special][:1])
        return frozenset(stops)

    def _turns(self, messages: Sequence[Message], where: str) -> list[dict[str, str]]:
        """Return a conversation as a chat template takes it, if there is one."""
        if not self.has_template:
            raise UserError(
                f"{where}: the prompt is a conversation, but the checkpoint's "
                "tokenizer has no chat template. Use a chat checkpoint, add a "
                "chat_template.jinja to it, or give prompt and completions as plain "
                "texts"
            )
        return [message.model_dump() for message in messages]

    def _apply(
        self,
        turns: list[dict[str, str]],
        where: str,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(
                f"{where}: the chat template refuses the roles {roles}: {error}"
            ) from None


def _assistant(content: str) -> dict[str, str]:
    return Message(role="assistant", content=content).model_dump()


def _place(
    text: str, completion: str, around: tuple[str, str, str], where: str
) -> Rendering:
    """Find a completion in what the template prints of it.

    Args:
      text: the whole conversation.
      completion: as the record has it.
      around: the generation prompt, all before a completion, and all behind it.
      where: the record's place, for messages.
    """
    prompt, head, tail = around
    body = text[len(head) : len(text) - len(tail)]
    lead = completion.find(body)
    trimmed = completion[:lead] + completion[lead + len(body) :]
    if not (text == head + body + tail and lead >= 0 and not trimmed.strip()):
        raise UserError(
            f"{where}: the chat template changes the completion's text (it is "
            "not printed as given), so segment offsets would be wrong. Use another "
            "template, or take out of the text what the template rewrites"
        )
    begin = len(head)
    places = (len(prompt), begin - lead, begin, begin + len(body))
    return Rendering(text, *places, plain=False)


def as_renderer(source: Renderer | Tokenizer) -> Renderer:
    """Return what renders: a tokenizer alone does where all is text."""
    return source if isinstance(source, Renderer) else Renderer(source)

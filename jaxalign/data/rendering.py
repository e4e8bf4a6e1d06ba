"""Prompts and records as the text that a checkpoint sees, and that text as tokens.

Conversations go through the checkpoint's chat template and get no further special
tokens; plain texts are tokenised as the tokenizer's own call does. Whatever else is
written into the text belongs here, so that characters decide all that follows.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxalign.data import feature_rows, picture_text, spans
from jaxalign.data.conversation import Conversation, Rendering, Turn, ending
from jaxalign.data.patches import Patcher, PictureLayout
from jaxalign.data.picture_tokens import NO_PLACES, picture_tokens, positions_of
from jaxalign.data.placement import Placement
from jaxalign.data.records import Completion, Message, Prompt, Record, parse_prompt
from jaxalign.data.template import MARK, Template, has_pictures
from jaxalign.data.tokenizer import Tokenizer, special_ids
from jaxalign.errors import UserError


__all__ = ["Encoding", "PromptEncoding", "Renderer", "as_renderer"]


def _as_prompt(prompt: Prompt | str | Sequence[Any]) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str) or all(isinstance(turn, Message) for turn in prompt):
        text = prompt if isinstance(prompt, str) else tuple(prompt)
        return Prompt(text, prompt, "the prompt")
    return parse_prompt({"prompt": prompt}, "the prompt")


class Encoding(NamedTuple):
    """A rendering as tokens."""

    tokens: Int[np.ndarray, " n"]
    spans: spans.Spans
    """The characters of each token, see :func:`jaxalign.data.spans.tile_spans`."""


class PromptEncoding(NamedTuple):
    """A prompt as tokens that a completion follows, with its pictures."""

    tokens: list[int]
    positions: np.ndarray | None
    """[n, 3] for multimodal rotary; None: 0, 1, 2, ... What follows goes on with the
    largest of all + 1."""
    feature_places: np.ndarray
    """Index of the token of every feature of the pictures, in order."""
    layouts: tuple[PictureLayout, ...]
    """What became of each picture."""


@dataclasses.dataclass(frozen=True)
class Renderer:
    """How a checkpoint writes prompts and records, and reads them as tokens.

    Attributes:
      tokenizer: of the checkpoint, with its chat template.
      template_kwargs: what the chat template is given beside the conversation, such as
        ``{"enable_thinking": False}``; a record's own come first.
      patcher: what becomes of pictures; None where the model does not see.

    Example::

      renderer = Renderer(load_tokenizer("smollm2"))
      renderer.prompt_text([{"role": "user", "content": "2 + 2?"}])  # with its template
      renderer.prompt_tokens("2 + 2 =")
    """

    tokenizer: Tokenizer
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    patcher: Patcher | None = None

    @property
    def has_template(self) -> bool:
        """Tell whether there is a chat template, without which only texts render."""
        return self._template.exists

    @functools.cached_property
    def _template(self) -> Template:
        placeholder = None if self.patcher is None else self.patcher.placeholder
        return Template(self.tokenizer, self.template_kwargs, placeholder)

    @functools.cached_property
    def _known(self) -> dict[PictureLayout, PictureLayout]:
        """Every layout that a picture has had: there are far fewer than pictures."""
        return {}

    def check_used(self, prompts: Iterable[str | Sequence[Message]]) -> None:
        """Refuse options of the template where no prompt goes through it.

        Raises:
          UserError: all prompts are plain texts.
        """
        if self.template_kwargs and all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(
                f"chat_template_kwargs {dict(self.template_kwargs)} has no effect: all "
                "prompts are plain texts, which no chat template is used for. Leave it "
                "out, or give prompts as messages"
            )

    def prompt_text(self, prompt: Prompt | str | Sequence[Message]) -> str:
        """Return a prompt as text: of a conversation what the chat template prints.

        ``prompt`` may be a record's too. Where the last turn is the assistant's, the
        text ends with it, to be gone on with; unless ``prompt.template_kwargs`` says
        otherwise. In a picture's place stands the family's placeholder.

        Raises:
          UserError: a conversation without a chat template, or one that it refuses; or
            a picture, and the model does not see.
        """
        prompt = _as_prompt(prompt)
        self._check_pictures(prompt)
        if isinstance(prompt.text, str):
            return prompt.text
        options = dict(prompt.template_kwargs)
        if not options.keys() & {"add_generation_prompt", "continue_final_message"}:
            options[ending(prompt.text)] = True
        return self._template.printed(prompt.text, prompt.where, **options)

    def prompt_tokens(self, prompt: Prompt | str | Sequence[Message]) -> list[int]:
        """Return the tokens that a completion follows.

        ``prompt`` may be a record's too: a text, or the turns of a conversation.

        Of a conversation those of the chat template with its generation prompt and no
        further special tokens; of a text what the tokenizer's own call gives.

        Raises:
          UserError: see :meth:`prompt_encoding`.
        """
        return self.prompt_encoding(prompt).tokens

    def prompt_encoding(
        self,
        prompt: Prompt | str | Sequence[Message],
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> PromptEncoding:
        """Return the tokens that a completion follows, and where pictures are in them.

        Args:
          prompt: see :meth:`prompt_tokens`.
          sizes: width and height of each picture; None: read from their headers.
        Raises:
          UserError: see :meth:`prompt_text`; or the prompt has not as many places for
            pictures as pictures.
        """
        prompt = _as_prompt(prompt)
        text, plain = self.prompt_text(prompt), isinstance(prompt.text, str)
        patcher = self.patcher
        if patcher is None:
            out = self.tokenizer(text, add_special_tokens=plain, verbose=False)
            return PromptEncoding(list(out["input_ids"]), None, NO_PLACES, ())
        layouts = picture_text.layouts_of(prompt.images, patcher, self._known, sizes)
        expanded = picture_text.expand(text, layouts, patcher, prompt.where)
        encoding = self._encoded([expanded.text], plain=plain)[0]
        found = picture_tokens(*encoding, expanded, patcher, prompt.where)
        places, grids = found.feature_places, found.feature_grids
        positions = positions_of(len(encoding.tokens), places, grids)
        return PromptEncoding(encoding.tokens.tolist(), positions, places, layouts)

    def _check_pictures(self, prompt: Prompt, said: Sequence[Completion] = ()) -> None:
        """Refuse pictures that are not seen, and texts that hold what stands for one.

        Raises:
          UserError: with the place of the prompt or its completions.
        """
        turns = [turn for c in said if not isinstance(c, str) for turn in c]
        texts = [c for c in said if isinstance(c, str)]
        if not isinstance(prompt.text, str):
            turns += prompt.text
        if self.patcher is None:
            if prompt.images or has_pictures(turns):
                name = getattr(self.tokenizer, "name_or_path", "") or "the model"
                raise UserError(
                    f"{prompt.where}: the record has {len(prompt.images)} picture(s), "
                    f"but {name} does not see: it takes texts only. Use a "
                    "vision-language model, or take the pictures out"
                )
            return
        texts += [turn.text for turn in turns]
        picture_text.check_unsaid(texts, self.patcher, prompt.where)

    def completions(
        self, record: Record, sizes: Sequence[tuple[int, int]] | None = None
    ) -> tuple[Rendering, ...]:
        """Return a record's prompt with each of its completions.

        What a template prints of the whole conversation, where that begins with its
        generation prompt and holds the text. Else, as generation will see it: the
        generation prompt, the text, and what the template prints behind one. (Templates
        whose generation prompt opens a thinking block are of that kind, and those that
        leave out what stands in one.)

        Args:
          record: of the data.
          sizes: width and height of each picture; None: read from their headers.
        Raises:
          UserError: see :meth:`prompt_encoding`; or the template changes a completion,
            or one has a picture.
        """
        where = record.where
        prompt, images = record.prompt, record.images
        self._check_pictures(
            Prompt(prompt, None, where, images=images), record.completions
        )
        if isinstance(prompt, str):
            renderings = tuple(
                _plain(prompt, completion)
                for completion in record.completions
                if isinstance(completion, str)
            )
        else:
            conversation = Conversation(
                self._template, prompt, record.template_kwargs, where
            )
            renderings = tuple(map(conversation.rendering, record.completions))
        if self.patcher is None:
            return renderings
        layouts = picture_text.layouts_of(images, self.patcher, self._known, sizes)
        return tuple(
            picture_text.expand_rendering(rendering, layouts, self.patcher, where)
            for rendering in renderings
        )

    def encode(self, renderings: Sequence[Rendering]) -> list[Encoding]:
        """Tokenise renderings, those of a kind in one call."""
        encodings: dict[int, Encoding] = {}
        for plain in (False, True):
            places = [i for i, r in enumerate(renderings) if r.plain == plain]
            if places:
                texts = [renderings[i].text for i in places]
                found = self._encoded(texts, plain=plain)
                encodings.update(zip(places, found, strict=True))
        return [encodings[i] for i in range(len(renderings))]

    def _encoded(self, texts: Sequence[str], *, plain: bool) -> list[Encoding]:
        """Tokenise texts; of equal features in a row one is read for all."""
        if self.patcher is None or not self._features_stand_alone:
            return self._read(texts, plain=plain)
        token, index = self.patcher.token, self.patcher.token_id
        rows = [feature_rows.find(text, token) for text in texts]
        short = list(map(feature_rows.shortened, texts, rows))
        found = [
            feature_rows.restored(*encoding, row, index)
            for encoding, row in zip(self._read(short, plain=plain), rows, strict=True)
        ]
        whole = [Encoding(*one) for one in found if one is not None]
        return whole if len(whole) == len(texts) else self._read(texts, plain=plain)

    @functools.cached_property
    def _features_stand_alone(self) -> bool:
        assert self.patcher is not None
        token, index = self.patcher.token, self.patcher.token_id
        return feature_rows.stands_alone(self.tokenizer, token, index)

    def _read(self, texts: Sequence[str], *, plain: bool) -> list[Encoding]:
        out = self.tokenizer(
            texts,
            add_special_tokens=plain,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [
            Encoding(np.array(tokens, np.int64), spans.tile_spans(text, offsets))
            for text, tokens, offsets in zip(
                texts, out["input_ids"], out["offset_mapping"], strict=True
            )
        ]

    def stop_tokens(self) -> frozenset[int]:
        """Return the tokens that end a completion: EOS and the template's end of turn.

        The end of turn is the first special token that the template prints behind an
        answer.
        """
        eos = self.tokenizer.eos_token_id
        stops = set() if eos is None else {eos}
        if self.has_template:
            turns = [
                Message(role="user", content="?"),
                Message(role="assistant", content=MARK),
            ]
            text = self._template.printed(turns, "the chat template")
            tail = self.tokenizer(text.partition(MARK)[2], add_special_tokens=False)
            special = special_ids(self.tokenizer)
            stops |= set([i for i in tail["input_ids"] if i in special][:1])
        return frozenset(stops)


def _plain(prompt: str, completion: str) -> Rendering:
    start, text = len(prompt), prompt + completion
    origins = np.arange(len(completion) + 1)
    turn = Turn(start, Placement(start, origins), len(text))
    return Rendering(text, (turn,), plain=True)


def as_renderer(source: Renderer | Tokenizer) -> Renderer:
    """Return what renders: a tokenizer alone does where all is text.

    Example::

      as_renderer(load_tokenizer("smollm2")).stop_tokens()
    """
    return source if isinstance(source, Renderer) else Renderer(source)

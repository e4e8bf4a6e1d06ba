"""From tokens to what OpenAI's clients read: texts as they grow, and JSON objects."""

import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxalign.generation.completions import min_tokens
from jaxalign.generation.engine import Event, FinishReason, Request
from jaxalign.generation.serving.wire import ParsedRequest


__all__ = ["ResponseBody", "Growing", "Piece", "TokenInfo", "echoed"]

_TextOf = Callable[[Sequence[int]], str]

_PARTIAL = "\ufffd"
"""What the bytes of half a character are decoded to."""


class TokenInfo(NamedTuple):
    """A token of a completion, for those who ask for log-probabilities."""

    token: int
    logp: float | None
    """None for a prompt's first token, which nothing predicts."""
    offset: int
    """Characters of the text before it."""
    best: tuple[tuple[int, float], ...] = ()
    """The most probable tokens in its place."""


class Piece(NamedTuple):
    """What follows the pieces before."""

    text: str
    tokens: list[TokenInfo]
    finish_reason: FinishReason | None


class Growing:
    """A completion's text, as far as it is certain.

    What may be half a character, or the beginning of a stop text, is held back. The
    pieces together are the completion's text.
    """

    def __init__(self, request: Request, text_of: _TextOf, offset: int = 0):
        """Begin a text.

        Args:
          request: that it answers.
          text_of: turns tokens into text.
          offset: characters before it, of an echoed prompt.
        """
        self._request, self._text_of = request, text_of
        self._tokens: list[int] = []
        # Decoding begins at a token whose text is known, as a token's text may depend
        # on those before; between the two, all is known too.
        self._begin, self._known = 0, 0
        self._characters = offset
        self._held = ""
        self._stopped = False
        self._infos: list[TokenInfo] = []

    def add(self, event: Event) -> Piece | None:
        """Take a token; return what has become certain, if that is anything."""
        self._infos.append(
            TokenInfo(event.token, event.logp, self._characters, event.best)
        )
        is_last = event.finish_reason is not None
        if event.token not in self._request.stop_tokens:
            self._tokens.append(event.token)
        new = self._decoded(is_last)
        self._characters += len(new)
        self._held += new
        text = self._certain(is_last)
        if not text and not is_last:
            return None
        infos, self._infos = self._infos, []
        return Piece(text, infos, event.finish_reason)

    def _decoded(self, is_last: bool) -> str:
        before = self._text_of(self._tokens[self._begin : self._known])
        text = self._text_of(self._tokens[self._begin :])
        if len(text) <= len(before) or (text.endswith(_PARTIAL) and not is_last):
            return ""
        self._begin, self._known = self._known, len(self._tokens)
        return text[len(before) :]

    def _certain(self, is_last: bool) -> str:
        stops = self._request.sampling.stop
        if len(self._tokens) <= min_tokens(self._request):
            stops = ()  # none counts yet
        cuts = [self._held.find(stop) for stop in stops if stop in self._held]
        if self._stopped:
            keep = 0
        elif cuts:
            self._stopped = True
            keep = min(cuts)
        else:
            keep = len(self._held) - (0 if is_last else _begun(self._held, stops))
        text = self._held[:keep]
        self._held = "" if self._stopped else self._held[keep:]
        return text


def echoed(
    request: Request, told: Sequence[Event], text: str | None, text_of: _TextOf
) -> Piece:
    """Return a prompt as the piece that its completion begins with.

    Args:
      request: whose prompt it is.
      told: events of its tokens, from the second on; none if nobody asked for them.
      text: the prompt, where it was given as a text.
      text_of: turns tokens into text.
    """
    text = text_of(request.tokens) if text is None else text
    if not request.judged:
        return Piece(text, [], None)
    growing = Growing(Request(request.tokens), text_of)
    events = [Event(0, None, request.tokens[0], 0.0, None), *told]
    events[-1] = events[-1]._replace(finish_reason="length")  # so that all is certain
    pieces = [growing.add(event) for event in events]
    infos = [info for piece in pieces if piece is not None for info in piece.tokens]
    return Piece(text, [infos[0]._replace(logp=None), *infos[1:]], None)


def _begun(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end may be the beginning of a stop text."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0


@dataclasses.dataclass
class ResponseBody:
    """Writes an HTTP request's answer, whole or in pieces.

    Attributes:
      asked: the request.
      requests: what the engine was asked.
      tokenizer: of the model.
    """

    asked: ParsedRequest
    requests: Sequence[Request]
    tokenizer: Any

    def __post_init__(self) -> None:
        prefix = "chatcmpl" if self.asked.is_chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.asked.model,
        }
        self._made = 0

    def count(self) -> None:
        """Count a token that was made."""
        self._made += 1

    @property
    def usage(self) -> dict[str, int]:
        """Return how many tokens were read and made."""
        read = sum(len(request.tokens) for request in self.requests)
        return {
            "prompt_tokens": read,
            "completion_tokens": self._made,
            "total_tokens": read + self._made,
        }

    def whole(self, pieces: Mapping[int, Sequence[Piece]]) -> dict[str, Any]:
        """Return the answer that is sent at once, from the pieces of each choice."""
        choices = []
        for index, mine in sorted(pieces.items()):
            text = "".join(piece.text for piece in mine)
            infos = [info for piece in mine for info in piece.tokens]
            says: dict[str, Any] = {"text": text}
            if self.asked.is_chat:
                message = {"role": "assistant", "content": text, "refusal": None}
                says = {"message": message}
            choices.append(self._choice(index, says, infos, mine[-1].finish_reason))
        kind = "chat.completion" if self.asked.is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage}

    def opening(self, index: int) -> dict[str, Any]:
        """Return the first chunk of a chat's choice, which says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk([self._choice(index, {"delta": delta}, [], None)])

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a piece."""
        says: dict[str, Any] = {"text": piece.text}
        if self.asked.is_chat:
            says = {"delta": {"content": piece.text} if piece.text else {}}
        return self._chunk(
            [self._choice(index, says, piece.tokens, piece.finish_reason)]
        )

    def closing(self) -> dict[str, Any]:
        """Return the chunk with the usage, after all others."""
        return {**self._chunk([]), "usage": self.usage}

    def _chunk(self, choices: list[Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.asked.is_chat else "text_completion"
        made = {**self._head, "object": kind, "choices": choices}
        return {**made, "usage": None} if self.asked.include_usage else made

    def _choice(
        self,
        index: int,
        says: Mapping[str, Any],
        infos: Sequence[TokenInfo],
        reason: FinishReason | None,
    ) -> dict[str, Any]:
        wanted = self.asked.logprobs is not None and infos
        logprobs = self._logprobs(infos) if wanted else None
        made = {"index": index, **says, "logprobs": logprobs}
        return {**made, "finish_reason": reason}

    def _logprobs(self, infos: Sequence[TokenInfo]) -> dict[str, Any]:
        if not self.asked.is_chat:
            return {
                "tokens": [self._name(info.token)[0] for info in infos],
                "token_logprobs": [_finite(info.logp) for info in infos],
                "top_logprobs": (
                    [self._by_name(info) for info in infos]
                    if self.asked.logprobs
                    else None
                ),
                "text_offset": [info.offset for info in infos],
            }
        content = [
            {
                **self._entry(info.token, info.logp),
                "top_logprobs": [self._entry(*one) for one in info.best],
            }
            for info in infos
        ]
        return {"content": content, "refusal": None}

    def _name(self, token: int) -> tuple[str, list[int] | None]:
        """Return a token's text and its bytes.

        A part of a character has bytes of its own, which its text hides: it gets the
        vocabulary's name and no bytes.
        """
        text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if _PARTIAL in text:
            return self.tokenizer.convert_ids_to_tokens(token), None
        return text, list(text.encode())

    def _by_name(self, info: TokenInfo) -> dict[str, float | None] | None:
        """Return the most probable tokens and the one that is there."""
        if info.logp is None:
            return None
        listed = [(info.token, info.logp), *reversed(info.best)]
        return {self._name(token)[0]: _finite(logp) for token, logp in listed}

    def _entry(self, token: int, logp: float | None) -> dict[str, Any]:
        name, data = self._name(token)
        return {"token": name, "logprob": _finite(logp), "bytes": data}


def _finite(logp: float | None) -> float | None:
    """JSON has no infinity; nobody draws what has no probability but by rounding."""
    return None if logp is None else max(logp, -9999.0)

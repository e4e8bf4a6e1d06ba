"""The samples in the slots: their tokens so far, and what ends them."""

import dataclasses
from collections.abc import Callable, Sequence

from jaxalign.generation import completions
from jaxalign.generation.completions import Event, FinishReason, Request
from jaxalign.generation.steering import Guide, Masks
from jaxalign.generation.steps import TokenScores


__all__ = ["Text", "taken"]

_TextOf = Callable[[Sequence[int]], str]


@dataclasses.dataclass
class Text:
    """A sample in a slot, or whose last tokens are on their way."""

    number: int
    sample: int
    request: Request
    guide: Guide | None = None
    """If the request is steered."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    ordered: int = 0
    """Tokens that the device has been told to make."""
    done: bool = False


def taken(
    texts: Sequence[Text | None],
    scores: TokenScores,
    masks: Masks,
    text_of: _TextOf | None,
) -> list[Event]:
    """Give texts their new tokens, and return what is told of them.

    Args:
      texts: one a slot; those that are done get none.
      scores: what was drawn in the slots, on the host.
      masks: which tokens may follow, made anew for texts that go on.
      text_of: turns tokens into text, which stop texts need.
    """
    live = [(n, t) for n, t in enumerate(texts) if t is not None and not t.done]
    reasons: dict[int, FinishReason | None] = {
        n: _take(text, int(scores.tokens[n]), text_of) for n, text in live
    }
    going = [
        (slot, text.guide, text.tokens)
        for slot, text in live
        if text.guide is not None and reasons[slot] is None
    ]
    reasons.update(masks.advance(going))
    for slot, text in live:
        text.done = reasons[slot] is not None
    return [
        completions.event(
            text.number, text.sample, text.request, scores, slot, reasons[slot]
        )
        for slot, text in live
    ]


def _take(text: Text, token: int, text_of: _TextOf | None) -> FinishReason | None:
    request = text.request
    text.tokens.append(token)
    if token in request.stop_tokens:
        return "stop"
    if completions.stops(request, text.tokens, text_of):
        return "stop"
    at_most = len(text.tokens) == request.sampling.max_new_tokens
    return "length" if at_most else None

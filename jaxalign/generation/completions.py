"""What is asked of the engine, and what it gives back."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxalign.configs import check_fields
from jaxalign.errors import UserError
from jaxalign.generation.steering import Steering
from jaxalign.generation.steps import MOST_RANKED, TokenScores
from jaxalign.types import ImageInputs


__all__ = [
    "Completion",
    "Event",
    "FinishReason",
    "Request",
    "Sampling",
    "check",
    "check_drawn",
    "event",
    "finished",
    "min_tokens",
    "stops",
]

FinishReason = Literal["stop", "length", "error"]
"""An error is a structure's: it became too much for the library on the way."""

_LARGEST = float(np.finfo(np.float32).max)
"""Of the numbers that the device takes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a request is answered.

    Attributes:
      num_samples: completions of each prompt.
      max_new_tokens: most tokens of a completion, the end of turn included.
      temperature: logits are divided by it; 0 always takes the most probable token.
      top_p: only the smallest set of tokens whose probabilities, after temperature and
        top_k, reach it.
      top_k: only the k most probable tokens; 0 is all.
      min_p: only tokens at least this share as probable as the most probable one.
      repetition_penalty: positive logits of tokens in prompt and completion are divided
        by it, negative ones multiplied; 1 is none.
      stop: texts that end a completion, which then ends before them; a command takes a
        special token by its text.
      seed: the same seed gives the same completions, whatever else is generated.

    >>> Sampling(temperature=0.7, top_p=0.9, max_new_tokens=64).stop
    ()
    """

    num_samples: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] | str = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, low, high in (
            ("num_samples", 1, None),
            ("max_new_tokens", 1, None),
            ("temperature", 0, None),
            ("top_p", 0, 1),
            ("top_k", 0, 2**31 - 1),
            ("min_p", 0, 1),
            ("seed", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            fits = low <= value <= (_LARGEST if high is None else high)
            if not fits:
                expected = f"at least {low}" if high is None else f"in [{low}, {high}]"
                raise UserError(f"{name} must be {expected}: got {value}")
        if not 0 < self.repetition_penalty <= _LARGEST:
            raise UserError(
                f"repetition_penalty must be above 0: got {self.repetition_penalty}"
            )
        if any(not text for text in self.stop):
            raise UserError("stop has an empty text, which ends nothing: leave it out")


def check_drawn(options: Sampling) -> None:
    """Refuse options of drawing where nothing is drawn.

    Raises:
      UserError: the temperature is 0, and tokens are to be left out too.
    Example:
      >>> check_drawn(Sampling(temperature=0.0))
    """
    for name, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        if options.temperature == 0 and getattr(options, name) != neutral:
            raise UserError(
                f"{name} {getattr(options, name)} has no effect with temperature 0, "
                "which takes the most probable token: leave one of the two out"
            )


class Request(NamedTuple):
    """A prompt to be completed."""

    tokens: Sequence[int]
    """At least one."""
    sampling: Sampling = Sampling()
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end a completion, and belong to it: ends of turn and of text."""
    ranked: int = 0
    """How many of the most probable tokens are told with each token, at most 20."""
    judged: bool = False
    """Whether the prompt's tokens are told too, with their log-probabilities."""
    steering: Steering | None = None
    """A structure, biases and penalties; with None no mask is made."""
    images: ImageInputs | Callable[[], ImageInputs] | None = None
    """The prompt's pictures as a row of their own, or what makes that when the prompt
    is read; ``features_to`` are places in ``tokens``. Encoded once for all samples."""
    positions: Int[np.ndarray, " n *axes"] | None = None
    """Rotary position of each token, [n 3] for multimodal rotary; what follows goes on
    with the largest of all + 1. Default 0, 1, 2, ..."""


class Completion(NamedTuple):
    """What a model said."""

    tokens: list[int]
    """With the stop token, and with all tokens of a stop text, where that ended it."""
    logps: list[float]
    """Of each token under softmax(logits): without temperature, bias, penalty,
    truncation. Where tokens may not come, by a structure or ``min_tokens``, it is the
    softmax over the others, as vLLM and SGLang tell it."""
    finish_reason: FinishReason
    text: str = ""
    """Without stop token or stop text; empty where nothing turns tokens into text."""


class Event(NamedTuple):
    """A new token of a request's sample."""

    request: int
    sample: int | None
    """None for a token of the prompt, from the second on, if it is ``judged``."""
    token: int
    logp: float
    finish_reason: FinishReason | None
    best: tuple[tuple[int, float], ...] = ()
    """The ``ranked`` most probable tokens that may come, and log-probabilities."""


def check(
    request: Request,
    *,
    vocab: int,
    length: int,
    text_of: Callable[[Sequence[int]], str] | None,
    sees: bool = False,
) -> None:
    """Refuse what cannot be completed.

    Args:
      request: to be completed.
      vocab: tokens of the model.
      length: most tokens of a prompt with its completion.
      text_of: turns tokens into text, if anything does.
      sees: whether pictures can be encoded, and positions be others than 0, 1, 2, ...
    Raises:
      UserError: no token, too many, one that the model lacks, a stop text without
        ``text_of``, or pictures for a model that does not see.
    Example:
      >>> check(Request((1, 2)), vocab=8, length=512, text_of=None)
    """
    tokens, options = request.tokens, request.sampling
    if not len(tokens):
        raise UserError("the prompt has no token: give a text that is not empty")
    if min(tokens) < 0 or max(tokens) >= vocab:
        raise UserError(
            f"the prompt has the token {max(tokens)}, and the model {vocab} "
            "tokens: the tokenizer belongs to another model"
        )
    total = len(tokens) + options.max_new_tokens
    if total > length:
        raise UserError(
            f"the prompt's {len(tokens)} tokens and max_new_tokens "
            f"{options.max_new_tokens} make {total}: expected at most {length}"
        )
    if options.stop and text_of is None:
        raise UserError("stop texts need text_of, which turns tokens into text")
    if not 0 <= request.ranked <= min(MOST_RANKED, vocab):
        raise UserError(
            f"ranked must be in [0, {min(MOST_RANKED, vocab)}]: got {request.ranked}"
        )
    if request.steering is not None:
        request.steering.check(vocab, options.max_new_tokens)
    _check_seen(request, sees)


def _check_seen(request: Request, sees: bool) -> None:
    if not sees and (request.images is not None or request.positions is not None):
        raise UserError(
            "the request has pictures or positions, and the model takes none: expected "
            "one with image_fn, decode_fn and cache_fn, as a vision-language "
            "checkpoint gives. Load one, or leave them out"
        )
    if request.positions is not None:
        shape = request.positions.shape
        if request.images is None:
            raise UserError("positions go with pictures: leave them out of a text")
        if shape not in ((len(request.tokens),), (len(request.tokens), 3)):
            raise UserError(
                f"positions {list(shape)} are not those of the prompt's "
                f"{len(request.tokens)} tokens: expected [n] or [n, 3]"
            )


def min_tokens(request: Request) -> int:
    """Return how many tokens of a completion no stop text can end.

    >>> min_tokens(Request((1, 2), Sampling(max_new_tokens=4)))
    0
    """
    return 0 if request.steering is None else request.steering.min_tokens


def stops(
    request: Request,
    tokens: Sequence[int],
    text_of: Callable[[Sequence[int]], str] | None,
) -> bool:
    """Tell whether the text of a completion's tokens has a stop text at its end.

    >>> request = Request((1,), Sampling(stop=("!",)))
    >>> stops(request, [5, 6], lambda tokens: "ab!"), stops(request, [5], lambda _: "a")
    (True, False)
    """
    texts, least = request.sampling.stop, min_tokens(request)
    if not texts or text_of is None or len(tokens) <= least:
        return False
    # A token has at least a byte. The margin is for one that is cut in two.
    longest = max(len(stop.encode()) for stop in texts) + 8
    tail = text_of(tokens[max(least, len(tokens) - longest) :])
    return any(stop in tail for stop in texts)


def event(
    number: int,
    sample: int | None,
    request: Request,
    scores: TokenScores,
    place: int,
    reason: FinishReason | None,
) -> Event:
    """Return the token in one place of scores, which are on the host.

    Args:
      number: of the request.
      sample: which of its samples; None for a token of the prompt.
      request: it.
      scores: of all slots.
      place: of the token among them.
      reason: why the sample ends with it, if it does.
    Raises:
      UserError: its log-probability is no number.
    Example:
      >>> one, logps = np.array([7, 9]), np.array([-0.5, -1.0])
      >>> told = TokenScores(one, logps, one[:, None], logps[:, None])
      >>> event(3, 0, Request((1, 2), ranked=1), told, 1, "length")[2:]
      (9, -1.0, 'length', ((9, -1.0),))
    """
    best = tuple(
        (int(scores.best[place, n]), float(scores.best_logps[place, n]))
        for n in range(request.ranked)
        if scores.best_logps[place, n] > -math.inf
    )
    token, logp = int(scores.tokens[place]), float(scores.logps[place])
    if math.isnan(logp):
        raise UserError(
            "the model's logits are not finite: its weights or the adapter's have "
            "diverged, or float16 is too narrow for them (--dtype bfloat16 or float32)"
        )
    return Event(number, sample, token, logp, reason, best)


def finished(
    completion: Completion,
    reason: FinishReason,
    request: Request,
    text_of: Callable[[Sequence[int]], str] | None,
) -> Completion:
    """Give a completion its text, which ends before whatever stopped it.

    >>> request = Request((1,), Sampling(stop=("!",)), stop_tokens=frozenset([0]))
    >>> made = Completion([5, 6, 0], [-0.5, -1.0, -0.1], "length")
    >>> finished(made, "stop", request, lambda tokens: "hi!!"[: len(tokens) + 1]).text
    'hi'
    """
    text = ""
    if text_of is not None:
        ended = completion.tokens[-1] in request.stop_tokens
        text = text_of(completion.tokens[:-1] if ended else completion.tokens)
        least = min_tokens(request)
        begin = len(text_of(completion.tokens[:least]).rstrip("\ufffd")) if least else 0
        cuts = [text.find(stop, begin) for stop in request.sampling.stop]
        text = text[: min((cut for cut in cuts if cut >= 0), default=len(text))]
    return completion._replace(finish_reason=reason, text=text)

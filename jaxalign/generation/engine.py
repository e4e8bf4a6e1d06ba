"""Continuous batching: many requests through a fixed number of slots.

A request's prompt is read once, in pieces, into a cache of one row, which is copied to
a slot for each of its samples. A slot whose text has ended is given to the next sample
at once. The device works one step ahead of the host: while a step runs, the tokens of
the one before are looked at, so a text that a stop ends costs its slot one step.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxalign.errors import UserError
from jaxalign.generation import sampling, steps
from jaxalign.generation.sampling import Controls
from jaxalign.generation.steps import MOST_RANKED, Said, Slots
from jaxalign.types import Model, Variables


__all__ = [
    "Completion",
    "Engine",
    "Event",
    "FinishReason",
    "Request",
    "Sampling",
    "completed",
    "finished",
    "generate",
]

FinishReason = Literal["stop", "length"]

_CHUNKS = (32, 128)
"""Tokens of a prompt that are read at once: the larger where most of it is filled."""

_LARGEST = float(np.finfo(np.float32).max)
"""Of the numbers that the device takes."""

_MOST_BLOCKS = 8
"""Of a cache on CPUs, see ``models.attention.cached``: each takes time to compile."""


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


class Completion(NamedTuple):
    """What a model said."""

    tokens: list[int]
    """With the stop token, and with all tokens of a stop text, where that ended it."""
    logps: list[float]
    """Of each token under softmax(logits): without temperature, penalty, truncation."""
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
    """The ``ranked`` most probable tokens with their log-probabilities."""


@dataclasses.dataclass
class _Prompt:
    """A request on its way into slots."""

    number: int
    request: Request
    begin: int = 0
    """Tokens that have been read."""
    next_sample: int = 0
    row: Any = None
    logits: Any = None


@dataclasses.dataclass
class _Text:
    """A sample in a slot, or whose last tokens are on their way."""

    number: int
    sample: int
    request: Request
    tokens: list[int] = dataclasses.field(default_factory=list)
    asked: int = 0
    """Tokens that the device has been asked for."""
    done: bool = False


_empty = jax.jit(
    steps.empty,
    static_argnames=("model", "slots", "length", "vocab", "dtype", "block", "mesh"),
)
_prefill = jax.jit(
    steps.prefill, static_argnames=("model", "mesh"), donate_argnames="cache"
)
_admit = jax.jit(
    steps.admit, static_argnames=("extent", "mesh"), donate_argnames="slots"
)
_step = jax.jit(steps.step, static_argnames=("model", "mesh"), donate_argnames="slots")


class Engine:
    """Requests in, tokens out; the slots are on the device, the rest is here.

    Call :meth:`submit` at any time and :meth:`step` as long as :attr:`busy`. Not for
    several threads at once.
    """

    def __init__(
        self,
        model: Model,
        variables: Variables,
        *,
        slots: int,
        length: int,
        cache_dtype: Any = None,
        text_of: Callable[[Sequence[int]], str] | None = None,
    ):
        """Make an engine.

        Args:
          model: with ``decode_fn`` and ``cache_fn``.
          variables: base and adapters, on one device or on a mesh. Cut layer by layer
            (``decoder.by_layer``) they are fastest: of a stack, weights and cache are
            copied at every step.
          slots: texts that are made at the same time.
          length: most tokens of a prompt with its completion.
          cache_dtype: of keys and values; default the model's.
          text_of: turns tokens into text, which stop texts need.
        Raises:
          UserError: no slots, or an adapter that reads later tokens.
        """
        if slots < 1:
            raise UserError(f"batch_slots must be at least 1: got {slots}")
        self.model, self.variables, self.text_of = model, variables, text_of
        place = jax.tree.leaves(variables)[0].sharding
        self._place, self.mesh = place, None
        if isinstance(place, NamedSharding):
            self.mesh = place.mesh
        self.length = -(-length // _CHUNKS[-1]) * _CHUNKS[-1]
        self._block = None
        if next(iter(place.device_set)).platform == "cpu":
            least = -(-self.length // _MOST_BLOCKS)
            self._block = -(-least // _CHUNKS[-1]) * _CHUNKS[-1]
        self.vocab = steps.vocab_size(model, variables)
        self.compile_seconds = 0.0
        self._cache_dtype = cache_dtype
        self._compiled: set[Any] = set()
        self._slots = self._empty(slots)
        self._spare_rows: list[Any] = []
        self._texts: list[_Text | None] = [None] * slots
        self._waiting: collections.deque[_Prompt] = collections.deque()
        self._ahead: tuple[list[_Text | None], Said] | None = None
        self._submitted = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._waiting or self._ahead is not None or any(self._texts))

    @property
    def waiting(self) -> int:
        """How many requests have not got all their slots yet."""
        return len(self._waiting)

    def submit(self, request: Request) -> int:
        """Queue a request and return the number that its events will carry.

        Raises:
          UserError: see :meth:`check`.
        """
        self.check(request)
        number, self._submitted = self._submitted, self._submitted + 1
        self._waiting.append(_Prompt(number, request))
        return number

    def check(self, request: Request) -> None:
        """Refuse what cannot be completed.

        Raises:
          UserError: no token, too many, one that the model lacks, or a stop text
            without ``text_of``.
        """
        tokens, options = request.tokens, request.sampling
        if not len(tokens):
            raise UserError("the prompt has no token: give a text that is not empty")
        if min(tokens) < 0 or max(tokens) >= self.vocab:
            raise UserError(
                f"the prompt has the token {max(tokens)}, and the model {self.vocab} "
                "tokens: the tokenizer belongs to another model"
            )
        total = len(tokens) + options.max_new_tokens
        if total > self.length:
            raise UserError(
                f"the prompt's {len(tokens)} tokens and max_new_tokens "
                f"{options.max_new_tokens} make {total}: expected at most {self.length}"
            )
        if options.stop and self.text_of is None:
            raise UserError("stop texts need text_of, which turns tokens into text")
        if not 0 <= request.ranked <= min(MOST_RANKED, self.vocab):
            raise UserError(
                f"ranked must be in [0, {min(MOST_RANKED, self.vocab)}]: got "
                f"{request.ranked}"
            )

    def cancel(self, number: int) -> None:
        """Drop a request; its slots are free at once and no event of it follows."""
        for prompt in [p for p in self._waiting if p.number == number]:
            self._waiting.remove(prompt)
            if prompt.row is not None:
                self._spare_rows.append(prompt.row)
        ahead = self._ahead[0] if self._ahead is not None else []
        for text in [*self._texts, *ahead]:
            if text is not None and text.number == number:
                text.done = True
        self._free_slots()

    def step(self, *, chunks: int | None = None) -> list[Event]:
        """Ask for the next token of every text, and return those asked for before.

        Args:
          chunks: pieces of prompts that may be read before the texts in the slots go
            on; default as many as it takes to fill the slots.
        """
        events = self._fill(chunks)
        ahead, self._ahead = self._ahead, self._ask()
        if ahead is not None:
            said = jax.device_get(ahead[1])
            for slot, text in enumerate(ahead[0]):
                if text is not None and not text.done:
                    events.append(self._take(text, said, slot))
        self._free_slots()
        return events

    def _free_slots(self) -> None:
        """Empty the slots of texts that are done."""
        self._texts = [t if t is not None and not t.done else None for t in self._texts]

    def _ask(self) -> tuple[list[_Text | None], Said] | None:
        if not any(self._texts):
            return None
        texts = list(self._texts)
        active = np.array([text is not None for text in texts])
        ranked = np.array(any(text.request.ranked for text in texts if text))
        self._slots, out = self._timed(
            "step",
            _step,
            *(self.variables, self._slots, active, ranked),
            model=self.model,
            mesh=self.mesh,
        )
        for slot, text in enumerate(texts):
            if text is not None:
                text.asked += 1
                if text.asked == text.request.sampling.max_new_tokens:
                    self._texts[slot] = None
        return texts, out

    def _fill(self, chunks: int | None) -> list[Event]:
        """Read prompts and put them into free slots; return what they are told of."""
        events: list[Event] = []
        left = float("inf") if chunks is None else chunks
        while self._waiting and None in self._texts:
            prompt = self._waiting[0]
            if prompt.begin < len(prompt.request.tokens):
                if left <= 0:
                    break
                events += self._read(prompt)
                left -= 1
            else:
                self._begin(prompt)
                if prompt.next_sample == prompt.request.sampling.num_samples:
                    self._spare_rows.append(prompt.row)
                    self._waiting.popleft()
        return events

    def _read(self, prompt: _Prompt) -> list[Event]:
        """Read a piece of a prompt; return its tokens if they are to be told."""
        if prompt.row is None:
            spare = self._spare_rows
            prompt.row = (
                spare.pop() if spare else self._timed("row", self._empty, 1).cache
            )
        tokens = prompt.request.tokens
        rest = len(tokens) - prompt.begin
        small, large = _CHUNKS
        size = large if rest > large // 2 else small
        count = min(rest, size)
        piece = np.zeros((1, size), np.int32)
        piece[0, :count] = tokens[prompt.begin : prompt.begin + count]
        behind = tokens[prompt.begin + 1 : prompt.begin + count + 1]
        following = None
        if prompt.request.judged:
            following = np.zeros(size, np.int32)
            following[: len(behind)] = behind
        prompt.logits, prompt.row, said = self._timed(
            ("prefill", size, prompt.request.judged),
            _prefill,
            *(self.variables, prompt.row, piece),
            *(np.int32(prompt.begin), np.int32(count), np.int32(len(tokens))),
            following,
            model=self.model,
            mesh=self.mesh,
        )
        prompt.begin += count
        if said is None:
            return []
        said = jax.device_get(said)
        return [
            _event(prompt.number, None, prompt.request, said, n, None)
            for n in range(len(behind))
        ]

    def _begin(self, prompt: _Prompt) -> None:
        """Give a prompt's next sample a slot."""
        request, options = prompt.request, prompt.request.sampling
        slot = self._texts.index(None)
        seen = np.zeros(self.vocab, bool)
        if options.repetition_penalty != 1:
            seen[np.asarray(request.tokens)] = True
        key = self._timed("key", sampling.key_of, options.seed, prompt.next_sample)
        # Of numpy's kinds; on the device they are JAX's.
        fields: dict[str, Any] = {
            "slot": np.int32(slot),
            "position": np.int32(len(request.tokens)),
            "seen": seen,
        }
        numbers: dict[str, Any] = {
            "temperature": np.float32(options.temperature),
            "top_k": np.int32(options.top_k),
            "top_p": np.float32(options.top_p),
            "min_p": np.float32(options.min_p),
            "repetition_penalty": np.float32(options.repetition_penalty),
        }
        start = steps.Start(key=key, controls=Controls(**numbers), **fields)
        # The places of the prompt, and a few more so that few programs will do.
        extent = _CHUNKS[-1]
        while extent < len(request.tokens):
            extent *= 2
        extent = min(extent, self.length)
        self._slots = self._timed(
            ("admit", extent),
            _admit,
            *(self._slots, prompt.row, prompt.logits, start),
            extent=extent,
            mesh=self.mesh,
        )
        self._texts[slot] = _Text(prompt.number, prompt.next_sample, request)
        prompt.next_sample += 1

    def _take(self, text: _Text, said: Said, slot: int) -> Event:
        text.tokens.append(token := int(said.tokens[slot]))
        reason: FinishReason | None = None
        if token in text.request.stop_tokens or self._stops(text):
            reason = "stop"
        elif len(text.tokens) == text.request.sampling.max_new_tokens:
            reason = "length"
        text.done = reason is not None
        return _event(text.number, text.sample, text.request, said, slot, reason)

    def _stops(self, text: _Text) -> bool:
        stops = text.request.sampling.stop
        if not stops or self.text_of is None:
            return False
        # A token has at least a byte. The margin is for one that is cut in two.
        longest = max(len(stop.encode()) for stop in stops) + 8
        tail = self.text_of(text.tokens[-longest:])
        return any(stop in tail for stop in stops)

    def _empty(self, slots: int) -> Slots:
        made = _empty(
            self.variables,
            model=self.model,
            slots=slots,
            length=self.length,
            vocab=self.vocab,
            dtype=self._cache_dtype,
            block=self._block,
            mesh=self.mesh,
        )
        if self.mesh is None:
            # Where the steps will leave them: or each would be compiled once more.
            made = jax.device_put(made, self._place)
        return made

    def _timed(
        self, name: Any, fn: Callable[..., Any], *args: Any, **static: Any
    ) -> Any:
        """Call a compiled step; the first time measure how long compiling takes."""
        if name in self._compiled:
            return fn(*args, **static)
        jax.block_until_ready(args)
        began = time.monotonic()
        out = fn(*args, **static)  # which returns before it has run
        self.compile_seconds += time.monotonic() - began
        self._compiled.add(name)
        return out


def _event(
    number: int,
    sample: int | None,
    request: Request,
    said: Said,
    place: int,
    reason: FinishReason | None,
) -> Event:
    """Return what was said in one place, which is on the host."""
    best = tuple(
        (int(said.best[place, n]), float(said.best_logps[place, n]))
        for n in range(request.ranked)
    )
    token, logp = int(said.tokens[place]), float(said.logps[place])
    if math.isnan(logp):
        raise UserError(
            "the model's logits are not finite: its weights or the adapter's have "
            "diverged, or float16 is too narrow for them (--dtype bfloat16 or float32)"
        )
    return Event(number, sample, token, logp, reason, best)


def generate(
    model: Model,
    variables: Variables,
    requests: Iterable[Request],
    *,
    slots: int = 64,
    text_of: Callable[[Sequence[int]], str] | None = None,
    **options: Any,
) -> list[list[Completion]]:
    """Complete prompts, each ``num_samples`` times.

    Args:
      model: a language model.
      variables: base and adapters, see :class:`Engine`.
      requests: what to complete; all must fit ``length``.
      slots: texts that are made at the same time.
      text_of: turns tokens into text, a tokenizer's ``decode``; without it completions
        have no text.
      **options: of :class:`Engine`; ``length`` is what the longest request needs.
    Returns:
      The completions of each request, in order.
    """
    requests = list(requests)
    if not requests:
        return []
    longest = max(len(r.tokens) + r.sampling.max_new_tokens for r in requests)
    total = sum(request.sampling.num_samples for request in requests)
    engine = Engine(
        model,
        variables,
        slots=min(slots, total),
        text_of=text_of,
        **{"length": longest, **options},
    )
    return [done for _, done in sorted(completed(engine, requests))]


def completed(
    engine: Engine, requests: Sequence[Request]
) -> Iterator[tuple[int, list[Completion]]]:
    """Yield (index, completions) of every request as soon as all its samples are there.

    Raises:
      UserError: a request that the engine refuses, before any is begun.
    """
    for request in requests:
        engine.check(request)
    of_number = {engine.submit(request): i for i, request in enumerate(requests)}
    making: dict[int, dict[int, Completion]] = collections.defaultdict(dict)
    left = [request.sampling.num_samples for request in requests]
    while engine.busy:
        for event in engine.step():
            if event.sample is None:
                continue
            index = of_number[event.request]
            mine = making[index]
            made = mine.setdefault(event.sample, Completion([], [], "length"))
            made.tokens.append(event.token)
            made.logps.append(event.logp)
            if event.finish_reason is None:
                continue
            mine[event.sample] = finished(
                made, event.finish_reason, requests[index], engine.text_of
            )
            left[index] -= 1
            if not left[index]:
                yield index, [done for _, done in sorted(making.pop(index).items())]


def finished(
    made: Completion,
    reason: FinishReason,
    request: Request,
    text_of: Callable[[Sequence[int]], str] | None,
) -> Completion:
    """Give a completion its text, which ends before whatever stopped it."""
    text = ""
    if text_of is not None:
        ended = made.tokens[-1] in request.stop_tokens
        text = text_of(made.tokens[:-1] if ended else made.tokens)
        cuts = [text.find(stop) for stop in request.sampling.stop if stop in text]
        text = text[: min(cuts, default=len(text))]
    return made._replace(finish_reason=reason, text=text)

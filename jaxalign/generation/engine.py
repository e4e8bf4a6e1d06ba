"""Continuous batching: many requests through a fixed number of slots.

A request's prompt is read once, in pieces, into a cache of one row, which is copied to
a slot for each of its samples. A slot whose text has ended is given to the next sample
at once. The device works one step ahead of the host: while a step runs, the tokens of
the one before are looked at, so a text that a stop ends costs its slot one step. Where
a text is steered the host must know a token to say which may follow: it looks while the
model runs on it (see ``steering`` and ``drawing``).
"""

import collections
import functools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxalign.errors import UserError
from jaxalign.generation import completions, programs, recompute, steps
from jaxalign.generation.completions import (
    Completion,
    Event,
    FinishReason,
    Request,
    Sampling,
    finished,
)
from jaxalign.generation.drawing import Edits
from jaxalign.generation.prefill import PIECE, WaitingPrompt, extent_of
from jaxalign.generation.reading import read_piece
from jaxalign.generation.steering import Masks
from jaxalign.generation.steps import Slots, TokenScores
from jaxalign.generation.structure import Grammars
from jaxalign.generation.texts import Text, taken
from jaxalign.types import Model


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


class Engine:
    """Requests in, tokens out; the slots are on the device, the rest is here.

    Call :meth:`submit` at any time and :meth:`step` as long as :attr:`busy`. Not for
    several threads at once.

    Example::

      engine = Engine(base.model, base.variables, slots=8, length=512)
      engine.submit(Request((1, 2, 3), Sampling(max_new_tokens=16)))
      while engine.busy:
          tokens = [(event.sample, event.token) for event in engine.step()]
    """

    def __init__(
        self,
        model: Model,
        variables: Any,
        *,
        slots: int,
        length: int,
        cache_dtype: Any = None,
        text_of: Callable[[Sequence[int]], str] | None = None,
        tokenizer: Any = None,
    ):
        """Make an engine.

        Args:
          model: a language model; one without cache functions is slow.
          variables: base and adapters, on one device or on a mesh. Cut layer by layer
            (``decoding.by_layer``) they are fastest: of a stack, weights and cache are
            copied at every step.
          slots: texts that are made at the same time.
          length: most tokens of a prompt with its completion.
          cache_dtype: of keys and values; default the model's, on one CPU float32.
          text_of: turns tokens into text, which stop texts need.
          tokenizer: a fast one of Hugging Face's, which structures need.
        Raises:
          UserError: no slots, or an adapter that reads later tokens.
        """
        if slots < 1:
            raise UserError(f"batch_slots must be at least 1: got {slots}")
        model = recompute.with_cache(model)
        self.model, self.variables, self.text_of = model, variables, text_of
        place = jax.tree.leaves(variables)[0].sharding
        self._place = place
        self.mesh = place.mesh if isinstance(place, NamedSharding) else None
        self._static: dict[str, Any] = {"model": model, "mesh": self.mesh}
        self._sees = model.image_fn is not None
        self.length = -(-length // PIECE) * PIECE
        form = programs.cache_form(place.device_set, self.length, cache_dtype)
        self._block, self._cache_dtype = form
        self.vocab, self._hidden = steps.widths(model, variables)
        self.compile_seconds = 0.0
        self._compiled: set[Hashable] = set()
        self._wanted: dict[Hashable, None] = {}
        self._slots = self._empty(slots)
        self._spare_rows: list[Any] = []
        self._texts: list[Text | None] = [None] * slots
        self._waiting: collections.deque[WaitingPrompt] = collections.deque()
        self._ahead: tuple[list[Text | None], TokenScores] | None = None
        self._submitted = 0
        grammars = None if tokenizer is None else Grammars(tokenizer, self.vocab)
        self._masks = Masks(slots, self.vocab, grammars)
        self._edits: Edits | None = None

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._waiting or self._ahead is not None or any(self._texts))

    @property
    def waiting(self) -> int:
        """How many requests have not got all their slots yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many slots have a text."""
        return sum(text is not None for text in self._texts)

    def submit(self, request: Request) -> int:
        """Queue a request and return the number that its events will carry.

        Raises:
          UserError: see :meth:`check`.
        """
        self.check(request)
        number, self._submitted = self._submitted, self._submitted + 1
        self._waiting.append(WaitingPrompt(number, request))
        self._wanted |= dict.fromkeys(programs.names_of(request, self.length))
        return number

    def check(self, request: Request) -> None:
        """Refuse what cannot be completed.

        Raises:
          UserError: see ``completions.check``; or a structure cannot be kept to.
        """
        sizes: Any = {"vocab": self.vocab, "length": self.length}
        completions.check(request, text_of=self.text_of, sees=self._sees, **sizes)
        if request.steering is not None:
            self._masks.check(request.steering, request.stop_tokens)

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
        self._compile()
        # The next masks depend on the tokens that are on their way.
        events = self._collect() if self._is_steered else []
        events += self._fill(chunks)
        events += self._collect() if self._is_steered else []
        ahead, self._ahead = self._ahead, self._order()
        return events + self._taken(ahead)

    @property
    def _is_steered(self) -> bool:
        return any(text and text.guide for text in self._texts)

    def _collect(self) -> list[Event]:
        """Return the tokens that were asked for last, before others are."""
        ahead, self._ahead = self._ahead, None
        return self._taken(ahead)

    def _free_slots(self) -> None:
        """Empty the slots of texts that are done."""
        self._texts = [t if t is not None and not t.done else None for t in self._texts]

    def _order(self) -> tuple[list[Text | None], TokenScores] | None:
        """Have the device make the next token of every text."""
        if not any(self._texts):
            return None
        texts = list(self._texts)
        active = np.array([text is not None for text in texts])
        ranked = np.array(any(text.request.ranked for text in texts if text))
        if self._is_steered:
            steered = np.array([bool(text and text.guide) for text in texts])
            out, self._edits = programs.draw(
                *(self._slots, self._edits, active, ranked, steered),
                self._masks.words.copy(),
                mesh=self.mesh,
            )
            self._slots = programs.advance(
                self.variables, self._slots, out.tokens, active, **self._static
            )
        else:
            self._slots, out = programs.step(
                self.variables, self._slots, active, ranked, **self._static
            )
        for slot, text in enumerate(texts):
            if text is not None:
                text.ordered += 1
                if text.ordered == text.request.sampling.max_new_tokens:
                    self._texts[slot] = None
        return texts, out

    def _fill(self, chunks: int | None) -> list[Event]:
        """Read prompts and put them into free slots; return what they are told of."""
        events: list[Event] = []
        left = float("inf") if chunks is None else chunks
        while self._waiting and None in self._texts:
            prompt = self._waiting[0]
            if not prompt.is_read:
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

    def _read(self, prompt: WaitingPrompt) -> list[Event]:
        """Read a piece of a prompt; return its tokens if they are to be told."""
        if prompt.row is None:
            spare = self._spare_rows
            prompt.row = spare.pop() if spare else self._empty(1).cache
        if prompt.request.images is not None and prompt.features is None:
            self._encode(prompt)
        return read_piece(prompt, self.variables, self._hidden.dtype, self._static)

    def _encode(self, prompt: WaitingPrompt) -> None:
        """Have a prompt's pictures encoded, once for all its samples."""
        given = self.variables, prompt.open_images()
        name = "encode", jax.tree.map(np.shape, given[1])
        if name not in self._compiled:
            lower = functools.partial(programs.encode.lower, **self._static)
            self._build({name: functools.partial(lower, *given)})
        prompt.features = programs.encode(*given, **self._static)

    def _begin(self, prompt: WaitingPrompt) -> None:
        """Give a prompt's next sample a slot."""
        request, slot = prompt.request, self._texts.index(None)
        start = prompt.start(slot, self.vocab, sees=self._sees)
        self._slots = programs.admit(
            *(self._slots, prompt.row, prompt.logits, start),
            extent=extent_of(len(request.tokens), self.length),
            mesh=self.mesh,
        )
        guide = None
        if request.steering is not None:
            self._edits = programs.begin_edits(
                *(self._edits, np.int32(slot), request.steering.edits(self.vocab)),
                mesh=self.mesh,
            )
            guide = self._masks.begin(slot, request.steering, request.stop_tokens)
        self._texts[slot] = Text(prompt.number, prompt.next_sample, request, guide)
        prompt.next_sample += 1

    def _taken(
        self, ahead: tuple[list[Text | None], TokenScores] | None
    ) -> list[Event]:
        """Return what has been made, once it is there."""
        if ahead is None:
            return []
        texts, scores = ahead
        events = taken(texts, jax.device_get(scores), self._masks, self.text_of)
        self._free_slots()
        return events

    def _empty(self, slots: int) -> Slots:
        made = programs.empty(
            self.variables,
            slots=slots,
            length=self.length,
            vocab=self.vocab,
            dtype=self._cache_dtype,
            block=self._block,
            **self._static,
        )
        if self.mesh is None:
            # Where the steps will leave them: or each would be compiled once more.
            made = jax.device_put(made, self._place)
        return made

    def _compile(self) -> None:
        """Compile what the requests need and is not there yet, all at once."""
        names = [name for name in self._wanted if name not in self._compiled]
        self._wanted.clear()
        if not names:
            return
        row = self._empty(1)
        if not self._spare_rows:
            self._spare_rows.append(row.cache)
        if ("draw",) in names:
            made = programs.no_edits(
                slots=len(self._texts), vocab=self.vocab, mesh=self.mesh
            )
            self._edits = made if self.mesh else jax.device_put(made, self._place)
        given = self.variables, self._slots, row, self._edits, self._hidden
        lower = functools.partial(programs.lowered, static=self._static)
        self._build({name: functools.partial(lower, name, *given) for name in names})

    def _build(self, lowerings: dict[Hashable, Callable[[], Any]]) -> None:
        """Compile programs by their names."""
        began = time.monotonic()
        programs.compile_together(lowerings.values())
        self._compiled.update(lowerings)
        self.compile_seconds += time.monotonic() - began


def generate(
    model: Model,
    variables: Any,
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
    Example::

      ((said,),) = generate(base.model, base.variables, [Request((1, 2, 3))])
    """
    if not (requests := list(requests)):
        return []
    longest = max(len(r.tokens) + r.sampling.max_new_tokens for r in requests)
    total = sum(request.sampling.num_samples for request in requests)
    sizes: Any = {"slots": min(slots, total), "length": longest, **options}
    engine = Engine(model, variables, text_of=text_of, **sizes)
    return [done for _, done in sorted(completed(engine, requests))]


def completed(
    engine: Engine, requests: Sequence[Request]
) -> Iterator[tuple[int, list[Completion]]]:
    """Yield (index, completions) of every request as soon as all its samples are there.

    Raises:
      UserError: a request that the engine refuses, before any is begun.
    Example::

      for index, answers in completed(engine, requests):
          print(index, answers[0].text)
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

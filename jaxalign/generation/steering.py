"""What keeps a text to a structure, and which tokens may come next, on the host.

A request that is not steered costs nothing of this: its tokens are drawn by the program
that knows of no mask.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt32

from jaxalign.errors import UserError
from jaxalign.generation.drawing import SlotEdits
from jaxalign.generation.structure import Grammars, Structure


__all__ = ["Ending", "Guide", "Masks", "Steering"]

Ending = Literal["stop", "error"]
"""How a structure ends a text: it is complete, or the library gave up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steering:
    """How a request's tokens are steered, beside its ``Sampling``.

    The order is vLLM's: tokens that may not come are taken out, then ``logit_bias`` is
    added, then the repetition penalty of ``Sampling`` is applied and those here are
    subtracted, then temperature and truncation. With c the number of times that a
    token was made before, in this text and not in its prompt, its logit falls by
    ``frequency_penalty * c + presence_penalty * (c > 0)``
    (https://platform.openai.com/docs/guides/text-generation, "Frequency and presence
    penalties").

    Attributes:
      structure: what the text has to be; it may end where that is complete, and not
        before.
      logit_bias: what is added to the logits of tokens.
      presence_penalty: see above.
      frequency_penalty: see above.
      min_tokens: no stop token and no stop text ends the text before it has as many,
        unless the structure is complete and allows nothing else.
    """

    structure: Structure | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} must be finite: got {getattr(self, name)}")
        for token, bias in self.logit_bias:
            if not math.isfinite(bias):
                raise UserError(f"logit_bias of token {token} must be finite: {bias}")
        if self.min_tokens < 0:
            raise UserError(f"min_tokens must be at least 0: got {self.min_tokens}")

    def check(self, vocab: int, most: int) -> None:
        """Refuse what a model cannot do.

        Args:
          vocab: its tokens.
          most: tokens that the text may have.
        Raises:
          UserError: a bias of a token that it lacks, or more tokens than it may make.
        """
        for token, _ in self.logit_bias:
            if not 0 <= token < vocab:
                raise UserError(
                    f"logit_bias names the token {token}: the model has {vocab} tokens"
                )
        if self.min_tokens > most:
            raise UserError(
                f"min_tokens {self.min_tokens} is above max_new_tokens {most}"
            )

    def edits(self, vocab: int) -> SlotEdits:
        """Return what changes the logits of a slot."""
        bias = np.zeros(vocab, np.float32)
        for token, value in self.logit_bias:
            bias[token] = value
        penalties = self.presence_penalty, self.frequency_penalty
        # Of numpy's kinds; on the device they are JAX's.
        fields: dict[str, Any] = {
            "bias": bias,
            "presence": np.float32(self.presence_penalty),
            "frequency": np.float32(self.frequency_penalty),
            "some": np.array(bool(self.logit_bias) or any(penalties)),
        }
        return SlotEdits(**fields)


@dataclasses.dataclass
class Guide:
    """How far a text has come."""

    steering: Steering
    ends: UInt32[np.ndarray, " w"]
    """Stop tokens, as bits."""
    matcher: Any = None
    """Of the structure, an ``llguidance.LLMatcher``."""


class Masks:
    """Which tokens may come next in every slot, a bit each and 32 a word.

    Args:
      slots: how many.
      vocab: tokens of the model.
      grammars: make structures ready; without them none can be kept to.
    """

    def __init__(self, slots: int, vocab: int, grammars: Grammars | None):
        self._vocab, self._grammars = vocab, grammars
        self._all = _bits(range(vocab), vocab)
        self.words = np.tile(self._all, (slots, 1))

    def check(self, steering: Steering, stop_tokens: frozenset[int]) -> None:
        """Refuse a structure that cannot be kept to.

        Raises:
          UserError: it is not valid, no token may begin it, or nothing can make
            structures ready.
        """
        if steering.structure is None:
            return
        if self._grammars is None:
            raise UserError("a structure needs grammars, which make it ready")
        guide = self._guide(steering, stop_tokens)
        if not self._rows([guide], [0])[0].any():
            raise UserError(
                f"the {steering.structure.kind} cannot be followed: no token of the "
                "model may begin it"
            )

    def begin(
        self, slot: int, steering: Steering, stop_tokens: frozenset[int]
    ) -> Guide:
        """Return what guides a slot's new text."""
        guide = self._guide(steering, stop_tokens)
        self.words[slot] = self._rows([guide], [0])[0]
        return guide

    def advance(
        self, texts: Sequence[tuple[int, Guide, Sequence[int]]]
    ) -> dict[int, Ending]:
        """Take the last tokens of texts, and tell which of them end by that.

        Args:
          texts: slot, guide, and all tokens made so far.
        """
        if not texts:
            return {}
        for _, guide, tokens in texts:
            if guide.matcher is not None:
                guide.matcher.consume_token(tokens[-1])
        guides = [guide for _, guide, _ in texts]
        rows = self._rows(guides, [len(tokens) for _, _, tokens in texts])
        ended: dict[int, Ending] = {}
        for (slot, guide, _), row in zip(texts, rows, strict=True):
            self.words[slot] = row
            matcher = guide.matcher
            if matcher is not None and matcher.is_error():
                ended[slot] = "error"
            elif not row.any():  # no stop token would end it
                is_whole = matcher is not None and matcher.is_accepting()
                ended[slot] = "stop" if is_whole else "error"
        return ended

    def _guide(self, steering: Steering, stop_tokens: frozenset[int]) -> Guide:
        known = (end for end in stop_tokens if 0 <= end < self._vocab)
        matcher = None
        if steering.structure is not None:
            assert self._grammars is not None
            matcher = self._grammars.matcher(steering.structure)
        return Guide(steering, _bits(known, self._vocab), matcher)

    def _rows(
        self, guides: Sequence[Guide], made: Sequence[int]
    ) -> UInt32[np.ndarray, "n w"]:
        """Return the masks of texts that have so many tokens."""
        rows = np.tile(self._all, (len(guides), 1))
        matched = [n for n, guide in enumerate(guides) if guide.matcher is not None]
        if matched:
            assert self._grammars is not None
            rows[matched] &= self._grammars.fill([guides[n].matcher for n in matched])
        for row, guide, count in zip(rows, guides, made, strict=True):
            row &= ~guide.ends
            may_end = guide.matcher is None or guide.matcher.is_accepting()
            if may_end and (count >= guide.steering.min_tokens or not row.any()):
                row |= guide.ends
        return rows


def _bits(tokens: Iterable[int], vocab: int) -> UInt32[np.ndarray, " w"]:
    """Return tokens as the bits of words."""
    words = np.zeros(-(-vocab // 32), np.uint32)
    at = np.fromiter(tokens, np.int64)
    np.bitwise_or.at(words, at // 32, np.uint32(1) << (at % 32).astype(np.uint32))
    return words

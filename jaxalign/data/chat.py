"""From records to tokens: whose token is whose, and what the feedback says of it."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxalign.data import spans
from jaxalign.data.records import Record, Segment, aspects_of
from jaxalign.data.rendering import Encoding, Renderer, Rendering, as_renderer
from jaxalign.data.tokenizer import Tokenizer, load_tokenizer, special_ids
from jaxalign.errors import UserError


# The tokenizer is loaded from here too: a notebook needs no further module.
__all__ = ["Branch", "TokenizedPair", "load_tokenizer", "tokenize"]


class Branch(NamedTuple):
    """One response: its tokens after the shared prompt, and their feedback."""

    tokens: np.ndarray
    """[n] token ids, up to and including the end of turn."""
    lead: int
    """How many of them still belong to the prompt (a merge differs at the border)."""
    segments: np.ndarray
    """[n - lead] segment of each completion token, -1 for none."""
    scores: np.ndarray
    """[s, a] raw scores, NaN where an aspect was not judged."""
    scored: np.ndarray
    """[s] False for a segment that owns no token or was cut."""
    offsets: tuple[tuple[int, int], ...]
    """The segments' character offsets, as in the record."""
    weights: np.ndarray | None = None
    """[n - lead] weight of each completion token, where the record has them."""

    @property
    def num_completion_tokens(self) -> int:
        """Return how many tokens are scored by the model."""
        return len(self.tokens) - self.lead


class TokenizedPair(NamedTuple):
    """A pair with its prompt stored once."""

    prompt: np.ndarray
    """[m] tokens that both renderings share and that hold no completion character."""
    chosen: Branch
    rejected: Branch
    """Without tokens where the record has a single completion."""
    label: bool | None = None
    """Whether a single completion is desirable."""
    weight: float = 1.0
    """What the pair's loss is multiplied by."""
    learn_prompt: bool = False
    """Whether the prompt's tokens count as the first response's completion tokens."""

    @property
    def length(self) -> int:
        """Return the places that the pair takes in a row."""
        return len(self.prompt) + len(self.chosen.tokens) + len(self.rejected.tokens)

    @property
    def longest(self) -> int:
        """Return the tokens of the prompt with the longer response."""
        return len(self.prompt) + max(
            len(self.chosen.tokens), len(self.rejected.tokens)
        )


class _Response(NamedTuple):
    """A completion's tokens behind those of its prompt, and none after its end."""

    tokens: list[int]
    spans: list[spans.Span]
    ended: bool
    """Whether the last token is the end of turn (or EOS)."""
    first: int = 0
    """The first token that holds a character of the completion, or its end."""


_Cut = Callable[[Encoding, Rendering], _Response]
"""Cuts what is printed after the end of a completion."""


def tokenize(
    records: Sequence[Record],
    renderer: Renderer | Tokenizer,
    *,
    aspects: tuple[str, ...] | None = None,
    end_of_turn: bool = True,
    chunk: int = 256,
) -> Iterator[TokenizedPair]:
    """Render and tokenise records, one pair after the other.

    Conversations go through the checkpoint's chat template once and get no further
    special tokens; a completion is everything after the generation prompt up to and
    including the end-of-turn token. Plain texts are concatenated, tokenised as the
    tokenizer's own call does (its BOS, if it has one, once), and end with EOS.

    Args:
      records: validated records.
      renderer: of the checkpoint; its fast Hugging Face tokenizer will do.
      aspects: names of the score axis; default :func:`aspects_of` the records.
      end_of_turn: False leaves the end of turn or EOS out, for completions that are
        steps of an answer and not its end.
      chunk: records that are tokenised in one call.
    Raises:
      UserError: the tokenizer has no chat template but the record is a conversation;
        the template changes a completion; a prompt has no token of its own.
    """
    renderer = as_renderer(renderer)
    if aspects is None:
        aspects = aspects_of(records)
    cut: _Cut = _until_text_ends
    if end_of_turn:
        cut = functools.partial(
            _until_end,
            eos=renderer.tokenizer.eos_token_id,
            special=special_ids(renderer.tokenizer),
        )
    for begin in range(0, len(records), chunk):
        part = records[begin : begin + chunk]
        rendered = [renderer.completions(record) for record in part]
        encodings = iter(renderer.encode(list(itertools.chain(*rendered))))
        for record, renderings in zip(part, rendered, strict=True):
            responses = [
                _response(
                    next(encodings), rendering, cut, f"{record.where}: field {side}"
                )
                for side, rendering in zip(_SIDES, renderings, strict=False)
            ]
            yield _pair(record, renderings, responses, aspects)


_SIDES = ("chosen", "rejected")


def _until_text_ends(encoding: Encoding, rendering: Rendering) -> _Response:
    """Cut all that follows the completion's own text."""
    keep = sum(start < rendering.end for start, _ in encoding.spans)
    return _Response(encoding.tokens[:keep], encoding.spans[:keep], ended=False)


def _until_end(
    encoding: Encoding, rendering: Rendering, *, eos: int | None, special: set[int]
) -> _Response:
    """Cut what the template prints after the end of turn; give plain texts an EOS."""
    tokens, places = encoding
    if rendering.plain:
        if eos is None or (tokens and tokens[-1] == eos):
            return _Response(tokens, places, ended=eos is not None)
        end = len(rendering.text)
        return _Response([*tokens, eos], [*places, (end, end)], ended=True)
    for index, (token, (start, end)) in enumerate(zip(tokens, places, strict=True)):
        if token not in special or end <= rendering.end or start < rendering.start:
            continue
        # The end of turn may have swallowed whitespace before it.
        if start >= rendering.end or not rendering.text[start : rendering.end].strip():
            return _Response(tokens[: index + 1], places[: index + 1], ended=True)
    return _Response(tokens, places, ended=False)


def _response(
    encoding: Encoding, rendering: Rendering, cut: _Cut, field: str
) -> _Response:
    """Find a completion's tokens; it must have one."""
    response = cut(encoding, rendering)
    count = len(response.tokens)
    first = spans.first_completion_token(response.spans, rendering.start)
    if first == count and not response.ended:
        raise UserError(
            f"{field}: the completion has no token: it is empty, "
            "and no end of turn or EOS follows it. Give a text, or a tokenizer with an "
            "EOS token"
        )
    return response._replace(first=min(first, count - 1))


def _pair(
    record: Record,
    renderings: Sequence[Rendering],
    responses: Sequence[_Response],
    aspects: tuple[str, ...],
) -> TokenizedPair:
    limit = min(response.first for response in responses)
    shared = _shared([response.tokens for response in responses], limit)
    if shared == 0:
        raise UserError(
            f"{record.where}: field prompt: no token comes before the completion, so "
            "nothing predicts its first token. Give a prompt that is not empty"
        )
    feedback = (
        (record.chosen_segments or (), record.chosen_token_weights),
        (record.rejected_segments or (), record.rejected_token_weights),
    )
    branches = []
    for side, response, rendering, text, (segments, weights) in zip(
        _SIDES, responses, renderings, record.completions, feedback, strict=False
    ):
        branch = _branch(
            response.tokens[shared:],
            response.first - shared,
            _owners(response, rendering, text, segments),
            segments,
            aspects,
        )
        if weights is not None:
            branch = _weighted(branch, weights, f"{record.where}: field {side}")
        branches.append(branch)
    if len(branches) == 1:
        branches.append(_branch([], 0, np.zeros(0, np.int32), (), aspects))
    return TokenizedPair(
        np.asarray(responses[0].tokens[:shared], np.int32),
        *branches,
        label=record.label,
        weight=record.weight,
    )


def _shared(sides: Sequence[list[int]], limit: int) -> int:
    """Return the length of the longest common prefix, at most the limit."""
    length = 0
    while length < limit and len({ids[length] for ids in sides}) == 1:
        length += 1
    return length


def _owners(
    response: _Response, rendering: Rendering, text: str, segments: Sequence[Segment]
) -> np.ndarray:
    """Return the segment of each of a completion's tokens.

    What the template prints around the text is no character of a segment, also where
    it stands in the place of whitespace that was trimmed.
    """
    relative = [
        (
            max(start, rendering.begin) - rendering.shift,
            min(end, rendering.end) - rendering.shift,
        )
        for start, end in response.spans[response.first :]
    ]
    return spans.segment_of_tokens(text, relative, segments, last_is_end=response.ended)


def _branch(
    ids: list[int],
    lead: int,
    owners: np.ndarray,
    segments: Sequence[Segment],
    aspects: tuple[str, ...],
) -> Branch:
    scores = np.full((len(segments), len(aspects)), np.nan, np.float32)
    for index, segment in enumerate(segments):
        for column, aspect in enumerate(aspects):
            scores[index, column] = segment.scores.get(aspect, np.nan)
    owned = np.bincount(owners[owners >= 0], minlength=len(segments)) > 0
    return Branch(
        tokens=np.asarray(ids, np.int32),
        lead=lead,
        segments=owners,
        scores=scores,
        scored=owned[: len(segments)].astype(bool),
        offsets=tuple((segment.start, segment.end) for segment in segments),
    )


def _weighted(branch: Branch, weights: Sequence[float], field: str) -> Branch:
    if len(weights) != branch.num_completion_tokens:
        raise UserError(
            f"{field}_token_weights: got {len(weights)} "
            f"number(s) for {branch.num_completion_tokens} completion tokens. "
            "Expected one for each, the end of turn included, with this "
            "checkpoint's tokenizer and template"
        )
    return branch._replace(weights=np.asarray(weights, np.float32))

"""From records to tokens: whose token is whose, and what the feedback says of it."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.data import picture_text, spans
from jaxalign.data.conversation import Rendering, Turn
from jaxalign.data.patches import PictureLayout
from jaxalign.data.picture import Picture
from jaxalign.data.picture_tokens import NO_PLACES, picture_tokens, positions_of
from jaxalign.data.records import Record, Segment, as_records, aspects_of, texts_of
from jaxalign.data.rendering import Encoding, Renderer, as_renderer
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
    """[m] segment of each completion token (see ``places``), -1 for none."""
    scores: np.ndarray
    """[s, a] raw scores, NaN where an aspect was not judged."""
    scored: np.ndarray
    """[s] False for a segment that owns no token or was cut."""
    offsets: tuple[tuple[int, int, int], ...]
    """The segments' character offsets and turns, as in the record."""
    weights: np.ndarray | None = None
    """[m] weight of each completion token, where the record has them."""
    learnt: np.ndarray | None = None
    """[n - lead] which tokens count as the completion's, the assistant's of several
    turns; None: all."""

    @property
    def num_completion_tokens(self) -> int:
        """Return how many tokens are scored by the model."""
        return len(self.places)

    @property
    def places(self) -> np.ndarray:
        """Return the m places in ``tokens`` whose tokens are scored by the model."""
        places = np.arange(self.lead, len(self.tokens))
        return places if self.learnt is None else places[self.learnt]


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
    """Whether the prompt's tokens count as the first response's completion tokens;
    those of pictures never do."""
    images: tuple[Picture, ...] = ()
    """The prompt's pictures."""
    layouts: tuple[PictureLayout, ...] = ()
    """What each of them becomes."""
    feature_places: np.ndarray = NO_PLACES
    """[f] index in ``prompt`` of the token of every feature of theirs, in order."""
    stretches: tuple[tuple[int, int], ...] = ()
    """Tokens (begin, end) in ``prompt`` of each picture's text."""
    units: int = 0
    """How many units of patches they take in a row."""
    feature_grids: tuple[tuple[int, int], ...] | None = None
    """Rows and columns of their features, where positions are multimodal rotary's."""

    @property
    def length(self) -> int:
        """Return the places that the pair takes in a row."""
        return len(self.prompt) + len(self.chosen.tokens) + len(self.rejected.tokens)

    @property
    def positions(self) -> np.ndarray | None:
        """Return [m, 3] of the prompt, for multimodal rotary; None: 0, 1, 2, ..."""
        return positions_of(len(self.prompt), self.feature_places, self.feature_grids)

    @property
    def longest(self) -> int:
        """Return the tokens of the prompt with the longer response."""
        return len(self.prompt) + max(
            len(self.chosen.tokens), len(self.rejected.tokens)
        )


class _Response(NamedTuple):
    """A completion's tokens behind those of its prompt, and none after its end."""

    tokens: np.ndarray
    spans: spans.Spans
    ended: bool
    """Whether the last token is the end of turn (or EOS)."""
    first: int = 0
    """The first token that holds a character of the completion, or its end."""
    learnt: np.ndarray | None = None
    """Which tokens are learnt, where a completion has several turns."""


_Cut = Callable[[Encoding, Rendering], _Response]
"""Cuts what is printed after the end of a completion."""


def tokenize(
    records: Sequence[Record] | Any,
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
      records: validated records, or rows, see ``records.from_rows``.
      renderer: of the checkpoint; its fast Hugging Face tokenizer will do.
      aspects: names of the score axis; default :func:`aspects_of` the records.
      end_of_turn: False leaves the end of turn or EOS out, for completions that are
        steps of an answer and not its end.
      chunk: records that are tokenised in one call.
    Raises:
      UserError: the tokenizer has no chat template but the record is a conversation;
        the template changes a completion; a prompt has no token of its own; a record
        has pictures and the model does not see, or more or fewer than places for them.
    Example::

      rows = [{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}]
      (pair,) = tokenize(rows, load_tokenizer("smollm2"))
    """
    records, renderer = as_records(records), as_renderer(renderer)
    renderer.check_used(record.prompt for record in records)
    if aspects is None:
        aspects = aspects_of(records)
    cut: _Cut = _until_text_ends
    special = special_ids(renderer.tokenizer)
    if end_of_turn:
        eos = renderer.tokenizer.eos_token_id
        cut = functools.partial(_until_end, eos=eos, special=special)
    sizes: Sequence[Any] = [None] * len(records)
    if renderer.patcher is not None:
        sizes = picture_text.sizes_of(records)
    for begin in range(0, len(records), chunk):
        part = records[begin : begin + chunk]
        rendered = list(map(renderer.completions, part, sizes[begin : begin + chunk]))
        encodings = iter(renderer.encode(list(itertools.chain(*rendered))))
        for record, renderings in zip(part, rendered, strict=True):
            responses = [
                _response(
                    next(encodings),
                    rendering,
                    cut,
                    special,
                    f"{record.where}: field {side}",
                )
                for side, rendering in zip(_SIDES, renderings, strict=False)
            ]
            pair = _pair(record, renderings, responses, aspects)
            if renderer.patcher is not None:
                found = picture_tokens(
                    *(pair.prompt, responses[0].spans, renderings[0]),
                    renderer.patcher,
                    record.where,
                    branches=(pair.chosen.tokens, pair.rejected.tokens),
                )
                pair = pair._replace(images=record.images, **found._asdict())
            yield pair


_SIDES = ("chosen", "rejected")


def _until_text_ends(encoding: Encoding, rendering: Rendering) -> _Response:
    """Cut all that follows the completion's own text."""
    end = rendering.turns[-1].place.end
    keep = int((encoding.spans[:, 0] < end).sum())
    return _Response(encoding.tokens[:keep], encoding.spans[:keep], ended=False)


def _until_end(
    encoding: Encoding, rendering: Rendering, *, eos: int | None, special: set[int]
) -> _Response:
    """Cut what the template prints after the end of turn; give others an EOS."""
    tokens, places = encoding
    if not rendering.plain:
        end = _end_of_turn(encoding, rendering.turns[-1], special)
        if end is not None:
            return _Response(tokens[: end + 1], places[: end + 1], ended=True)
        stop = rendering.turns[-1].stop
        if rendering.text[stop:].strip():
            return _Response(tokens, places, ended=False)  # it ends with some text
        keep = int((places[:, 0] < stop).sum())
        tokens, places = tokens[:keep], places[:keep]
    if eos is None or (len(tokens) and tokens[-1] == eos):
        return _Response(tokens, places, ended=eos is not None)
    end = len(rendering.text)
    places = np.append(places, [[end, end]], axis=0)
    return _Response(np.append(tokens, eos), places, ended=True)


def _end_of_turn(
    encoding: Encoding,
    turn: Turn,
    special: set[int],
    limit: int | None = None,
) -> int | None:
    """Return the first special token behind all that a turn says."""
    begins, ends = encoding.spans[:limit].T
    # It may have swallowed whitespace that stands before it.
    behind = np.flatnonzero((ends > turn.stop) & (begins >= turn.start))
    tokens = zip(behind.tolist(), encoding.tokens[behind].tolist(), strict=True)
    return next((index for index, token in tokens if token in special), None)


def _response(
    encoding: Encoding,
    rendering: Rendering,
    cut: _Cut,
    special: set[int],
    field: str,
) -> _Response:
    """Find a completion's tokens; it must have one."""
    response = cut(encoding, rendering)
    count = len(response.tokens)
    first = spans.first_completion_token(response.spans, rendering.turns[0].start)
    if first == count and not response.ended:
        raise UserError(
            f"{field}: the completion has no token: it is empty, and no end of turn "
            "or EOS follows it. Give a text, or a tokenizer with an EOS token"
        )
    learnt = None
    if len(rendering.turns) > 1:
        learnt = _learnt(encoding, rendering, special, count)
        if not learnt[first:].any():
            raise UserError(f"{field}: the chat template marks nothing of it as learnt")
    return response._replace(first=min(first, count - 1), learnt=learnt)


def _learnt(
    encoding: Encoding, rendering: Rendering, special: set[int], count: int
) -> np.ndarray:
    """Return which tokens of a completion of several turns are learnt.

    What the template marks as ``generation``; else the assistant's, each turn's end
    with it.
    """
    if rendering.marked is not None:
        before = len(encoding.tokens) - len(rendering.marked)
        return np.array([*[False] * before, *rendering.marked][:count], bool)
    learnt = np.zeros(count, bool)
    for number, turn in enumerate(rendering.turns):
        begin = spans.first_completion_token(encoding.spans, turn.start)
        if number + 1 == len(rendering.turns):
            learnt[begin:] = True
            break
        following = rendering.turns[number + 1].start
        limit = int((encoding.spans[:, 0] < following).sum())
        end = _end_of_turn(encoding, turn, special, limit)
        if end is None:
            end = int((encoding.spans[:, 0] < turn.stop).sum()) - 1
        learnt[begin : end + 1] = True
    return learnt


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
    for side, response, rendering, said, (segments, weights) in zip(
        _SIDES, responses, renderings, record.completions, feedback, strict=False
    ):
        branch = _branch(
            response.tokens[shared:],
            response.first - shared,
            _owners(response, rendering, texts_of(said), segments),
            segments,
            aspects,
        )
        if response.learnt is not None:
            learnt = response.learnt[response.first :]
            branch = branch._replace(segments=branch.segments[learnt], learnt=learnt)
        if weights is not None:
            branch = _weighted(branch, weights, f"{record.where}: field {side}")
        branches.append(branch)
    if len(branches) == 1:
        nothing = np.zeros(0, np.int32)
        branches.append(_branch(nothing, 0, nothing, (), aspects))
    return TokenizedPair(
        np.asarray(responses[0].tokens[:shared], np.int32),
        *branches,
        label=record.label,
        weight=record.weight,
    )


def _shared(sides: Sequence[np.ndarray], limit: int) -> int:
    """Return the length of the longest common prefix, at most the limit."""
    limit = min(limit, *map(len, sides))
    same = np.all([side[:limit] == sides[0][:limit] for side in sides], axis=0)
    return limit if same.all() else int(same.argmin())


def _owners(
    response: _Response,
    rendering: Rendering,
    texts: Sequence[str],
    segments: Sequence[Segment],
) -> np.ndarray:
    """Return the segment of each of a completion's tokens.

    What the template prints around a turn's text is no character of a segment, also
    where it stands in the place of whitespace that was trimmed.
    """
    places = response.spans[response.first :]
    owners = np.full(len(places), -1, np.int32)
    if not segments:
        return owners
    for number, (turn, text) in enumerate(zip(rendering.turns, texts, strict=True)):
        mine = [i for i, segment in enumerate(segments) if segment.turn == number]
        begin, origins = turn.place
        limit = len(origins) - 1
        relative = origins[np.clip(places - begin, 0, limit)]
        inside = (places[:, 1] > begin) & (places[:, 0] < begin + limit)
        if number + 1 == len(rendering.turns) and len(inside):
            inside[-1] = True
        found = spans.segment_of_tokens(
            text,
            list(map(tuple, relative[inside].tolist())),
            [segments[i] for i in mine],
            last_is_end=response.ended and number + 1 == len(rendering.turns),
        )
        owners[inside] = np.array([*mine, -1], np.int32)[found]
    return owners


def _branch(
    ids: np.ndarray,
    lead: int,
    owners: np.ndarray,
    segments: Sequence[Segment],
    aspects: tuple[str, ...],
) -> Branch:
    scores = np.full((len(segments), len(aspects)), np.nan, np.float32)
    for index, segment in enumerate(segments):
        scores[index] = [segment.scores.get(aspect, np.nan) for aspect in aspects]
    owned = np.bincount(owners[owners >= 0], minlength=len(segments)) > 0
    return Branch(
        tokens=np.asarray(ids, np.int32),
        lead=lead,
        segments=owners,
        scores=scores,
        scored=owned[: len(segments)].astype(bool),
        offsets=tuple((s.start, s.end, s.turn) for s in segments),
    )


def _weighted(branch: Branch, weights: Sequence[float], field: str) -> Branch:
    if len(weights) != branch.num_completion_tokens:
        raise UserError(
            f"{field}_token_weights: got {len(weights)} number(s) for "
            f"{branch.num_completion_tokens} completion tokens. Expected one for each, "
            "the end of turn included, with this checkpoint's tokenizer and template"
        )
    return branch._replace(weights=np.asarray(weights, np.float32))

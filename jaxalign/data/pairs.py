"""A data set of tokenised pairs: what fits, what was cut, what was left out."""

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxalign.data import chat, forms
from jaxalign.data.chat import Branch, TokenizedPair
from jaxalign.data.kept_features import KeptFeatures
from jaxalign.data.patches import Patcher
from jaxalign.data.records import Record, as_records, aspects_of
from jaxalign.data.rendering import Renderer, as_renderer
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.types import Form


__all__ = ["Overflow", "PairDataset", "prepare", "truncate"]

Overflow = Literal["drop", "truncate", "error"]


class PairDataset(NamedTuple):
    """Tokenised pairs, or single completions, in the order of their records."""

    pairs: list[TokenizedPair]
    indices: list[int]
    """Which record each pair is of; some may have been dropped, some been split."""
    aspects: tuple[str, ...]
    report: dict[str, int]
    """Counts of what a person should know: dropped, truncated, unscored ..."""
    patcher: Patcher | None = None
    """What becomes of pictures; None where the model does not see."""
    kept: KeptFeatures | None = None
    """What a frozen tower made of the pictures; None: each is opened whenever a row
    with it is built."""

    @property
    def num_segments(self) -> int:
        """Return the most segments that any response has, at least 1."""
        return (
            max(
                (
                    len(side.scores)
                    for p in self.pairs
                    for side in (p.chosen, p.rejected)
                ),
                default=1,
            )
            or 1
        )

    @property
    def lengths(self) -> np.ndarray:
        """Return the places that each pair takes in a row."""
        return np.array([pair.length for pair in self.pairs], np.int64)

    @property
    def units(self) -> np.ndarray:
        """Return the units of patches that each pair takes in a row."""
        return np.array([pair.units for pair in self.pairs], np.int64)


def prepare(
    records: Sequence[Record] | Any,
    renderer: Renderer | Tokenizer,
    *,
    max_length: int | None,
    overflow: Overflow = "drop",
    aspects: tuple[str, ...] | None = None,
    form: Form = "pairs",
    end_of_turn: bool = True,
    learn_prompt: bool = False,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> PairDataset:
    """Tokenise records and deal with those that are too long.

    Args:
      records: validated records, or rows, see ``records.from_rows``.
      renderer: of the checkpoint; its fast Hugging Face tokenizer will do.
      max_length: most tokens of a prompt with either response; None for no limit.
      overflow: ``drop`` leaves such a pair out and counts it; ``truncate`` cuts the
        prompt's head, then the completions' tails, and the scores of cut segments, but
        no picture; ``error`` refuses.
      aspects: names of the score axis; default those of the records.
      form: what the objective reads, see ``types.Form``.
      end_of_turn: False leaves the end of turn out (a step is not an ending).
      learn_prompt: whether the prompt's own tokens are wanted like a completion's.
      progress: wraps the iteration to show it, ``(iterable, total) -> iterable``.
    Raises:
      UserError: nothing is left, or ``overflow='error'`` and a pair is too long.
    Example::

      rows = [{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}]
      data = prepare(rows, load_tokenizer("smollm2"), max_length=512)
    """
    if max_length is not None and max_length < 2:
        raise UserError(f"max_length must be at least 2: got {max_length}")
    records, renderer = as_records(records), as_renderer(renderer)
    aspects = aspects_of(records) if aspects is None else aspects
    shaped, origins = forms.shape(records, form)
    tokenized: Iterable[TokenizedPair] = chat.tokenize(
        shaped, renderer, aspects=aspects, end_of_turn=end_of_turn
    )
    if progress is not None:
        tokenized = progress(tokenized, len(shaped))
    pairs: list[TokenizedPair] = []
    indices: list[int] = []
    report: collections.Counter[str] = collections.Counter()
    for index, pair in enumerate(tokenized):
        if max_length is not None and pair.longest > max_length:
            if overflow == "error":
                raise UserError(
                    f"{shaped[index].where}: {pair.longest} tokens, but max_length is "
                    f"{max_length}. Raise --max_length, or use --overflow drop or "
                    "truncate"
                )
            cut = truncate(pair, max_length) if overflow == "truncate" else None
            if cut is None:
                pictures = overflow == "truncate" and pair.images
                report["dropped_" + "images_" * bool(pictures) + "too_long"] += 1
                continue
            report["truncated"] += 1
            pair = cut
        pairs.append(pair._replace(learn_prompt=learn_prompt))
        indices.append(origins[index])
        record = shaped[index]
        for side, segments in (
            (pair.chosen, record.chosen_segments),
            (pair.rejected, record.rejected_segments),
        ):
            judged = np.array([bool(s.scores) for s in segments or ()], bool)
            report["segments"] += int(judged.sum())
            lost = judged & ~side.scored
            report["segments_without_tokens_or_cut"] += int(lost.sum())
    if not pairs:
        longest = "" if max_length is None else f" within max_length {max_length}"
        raise UserError(
            f"none of the {len(records)} record(s) fits{longest}: raise --max_length "
            "or use --overflow truncate"
        )
    _check_uniform(pairs)
    report["pairs"] = len(pairs)
    return PairDataset(pairs, indices, aspects, dict(report), renderer.patcher)


def _check_uniform(pairs: Sequence[TokenizedPair]) -> None:
    """Refuse token weights that only some completions have."""
    given = {
        side.weights is not None
        for pair in pairs
        for side in (pair.chosen, pair.rejected)
        if len(side.tokens)
    }
    if len(given) > 1:
        raise UserError(
            "some completions have token weights and others have none: give every "
            "record chosen_token_weights and rejected_token_weights, or none of them"
        )


def truncate(pair: TokenizedPair, max_length: int) -> TokenizedPair | None:
    """Cut a pair to max_length tokens a response, the prompt's head first.

    One prompt token always stays, to predict the first completion token, and so does
    every token of a picture's text: what is cut is the text before, between and behind
    pictures, from the head on. A segment that loses a token loses its scores.

    Returns:
      The cut pair, or None where no completion token would be left.
    Example:
      >>> def said(*tokens):
      ...     none = np.zeros((0, 1), np.float32)
      ...     owners = np.full(len(tokens), -1, np.int32)
      ...     return Branch(np.array(tokens), 0, owners, none, none[:, 0] > 0, ())
      >>> pair = TokenizedPair(np.array([4, 5, 6]), said(7, 8, 1), said(9, 1))
      >>> cut = truncate(pair, max_length=3)
      >>> cut.prompt.tolist(), cut.chosen.tokens.tolist(), cut.rejected.tokens.tolist()
      ([6], [7, 8], [9, 1])
    """
    pair = _without_head(pair, pair.longest - max_length)
    room = max_length - len(pair.prompt)
    chosen, rejected = _cut(pair.chosen, room), _cut(pair.rejected, room)
    if chosen is None or rejected is None:
        return None
    return pair._replace(chosen=chosen, rejected=rejected)


def _without_head(pair: TokenizedPair, excess: int) -> TokenizedPair:
    """Cut up to ``excess`` of a prompt's tokens, none of a picture and not the last."""
    text = np.ones(len(pair.prompt), bool)
    for begin, end in pair.stretches:
        text[begin:end] = False
    text[-1:] = False
    kept = np.ones(len(pair.prompt), bool)
    kept[np.flatnonzero(text)[: max(excess, 0)]] = False
    cut = np.cumsum(~kept, dtype=np.int32)
    return pair._replace(
        prompt=pair.prompt[kept],
        feature_places=pair.feature_places - cut[pair.feature_places],
        stretches=tuple(
            (begin - int(cut[begin]), end - int(cut[begin]))
            for begin, end in pair.stretches
        ),
    )


def _cut(branch: Branch, room: int) -> Branch | None:
    if len(branch.tokens) <= room:
        return branch
    kept = int((branch.places < room).sum())
    if not kept:
        return None
    lost = {int(owner) for owner in branch.segments[kept:]}
    whole = np.array([s not in lost for s in range(len(branch.scored))], bool)
    learnt = branch.learnt
    return branch._replace(
        tokens=branch.tokens[:room],
        segments=branch.segments[:kept],
        scored=branch.scored & whole,
        weights=None if branch.weights is None else branch.weights[:kept],
        learnt=None if learnt is None else learnt[: room - branch.lead],
    )

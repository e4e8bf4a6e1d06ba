"""From records to tokens: rendering through the chat template, with offsets."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.data import spans
from jaxalign.data.records import Message, Prompt, Record, Segment, aspects_of
from jaxalign.errors import UserError


__all__ = [
    "Branch",
    "TokenizedPair",
    "load_tokenizer",
    "prompt_text",
    "prompt_tokens",
    "special_tokens",
    "stop_tokens",
    "tokenize",
]

# Stands for the completion while we find out what the template prints around it.
_MARK = "\u2063jaxalign\u2063completion\u2063"


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


class _Rendering(NamedTuple):
    text: str
    start: int
    """Where the completion begins: the end of the generation prompt."""
    shift: int
    """Place in ``text`` of the completion's character 0 (may have been trimmed)."""
    begin: int
    """Where the completion's own text begins: after what the template prints."""
    end: int
    """Where the completion's own text ends."""


def load_tokenizer(directory: str) -> Any:
    """Load the tokenizer of a checkpoint, without network and without remote code."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds here
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{directory}: its tokenizer cannot be loaded: "
            f"{reason[0] if reason else type(error).__name__}. "
            "Expected tokenizer.json and tokenizer_config.json beside config.json"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(
            f"{directory}: its tokenizer reports no character offsets. Expected a "
            "tokenizer.json (a 'fast' tokenizer)"
        )
    return tokenizer


def tokenize(
    records: Sequence[Record],
    tokenizer: Any,
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
      tokenizer: a fast Hugging Face tokenizer.
      aspects: names of the score axis; default :func:`aspects_of` the records.
      end_of_turn: False leaves the end of turn or EOS out, for completions that are
        steps of an answer and not its end.
      chunk: records that are tokenised in one call.
    Raises:
      UserError: the tokenizer has no chat template but the record is a conversation;
        the template changes a completion; a prompt has no token of its own.
    """
    if aspects is None:
        aspects = aspects_of(records)
    special = _special_ids(tokenizer)
    for begin in range(0, len(records), chunk):
        part = records[begin : begin + chunk]
        rendered = [_render(record, tokenizer) for record in part]
        flat = [
            (i, rendering) for i, sides in enumerate(rendered) for rendering in sides
        ]
        encoded: list[list[_Encoded]] = [[] for _ in part]
        for plain in (False, True):
            places = [f for f in flat if isinstance(part[f[0]].prompt, str) == plain]
            if not places:
                continue
            out = tokenizer(
                [rendering.text for _, rendering in places],
                add_special_tokens=plain,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            for (i, _), ids, offsets in zip(
                places, out["input_ids"], out["offset_mapping"], strict=True
            ):
                encoded[i].append((ids, [tuple(span) for span in offsets]))
        for record, renderings, sides in zip(part, rendered, encoded, strict=True):
            yield _pair(
                *(record, renderings, sides, tokenizer, special, aspects),
                end_of_turn=end_of_turn,
            )


def prompt_text(prompt: Prompt, tokenizer: Any) -> str:
    """Return a prompt as text: of a conversation what the chat template prints.

    Raises:
      UserError: a conversation without a chat template, or one that it refuses.
    """
    if isinstance(prompt.text, str):
        return prompt.text
    turns = _turns(prompt.text, tokenizer, prompt.where)
    return _apply(tokenizer, turns, prompt.where, add_generation_prompt=True)


def prompt_tokens(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Return the tokens that a completion follows.

    Of a conversation those of the chat template with its generation prompt and no
    further special tokens; of a text what the tokenizer's own call gives.

    Raises:
      UserError: see :func:`prompt_text`.
    """
    text, plain = prompt_text(prompt, tokenizer), isinstance(prompt.text, str)
    return list(tokenizer(text, add_special_tokens=plain, verbose=False)["input_ids"])


def stop_tokens(tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a completion: EOS, and the template's end of turn.

    The end of turn is the first special token that the template prints behind an
    answer.
    """
    found = {tokenizer.eos_token_id} - {None}
    if getattr(tokenizer, "chat_template", None):
        turns = [Message(role="user", content="?").model_dump(), _assistant(_MARK)]
        text = _apply(tokenizer, turns, "the chat template")
        tail = tokenizer(text.partition(_MARK)[2], add_special_tokens=False)
        special = _special_ids(tokenizer)
        found |= set([i for i in tail["input_ids"] if i in special][:1])
    return frozenset(found)


def special_tokens(tokenizer: Any, texts: Sequence[str]) -> frozenset[int]:
    """Return the special tokens that stand among texts; decoding leaves them out."""
    if not texts:
        return frozenset()
    special = sorted(_special_ids(tokenizer))
    names = tokenizer.convert_ids_to_tokens(special)
    return frozenset(i for i, n in zip(special, names, strict=True) if n in texts)


_Encoded = tuple[list[int], list[spans.Span]]


def _special_ids(tokenizer: Any) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return set(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}


def _texts(record: Record) -> tuple[str, ...]:
    if record.rejected is None:
        return (record.chosen,)
    return record.chosen, record.rejected


def _render(record: Record, tokenizer: Any) -> tuple[_Rendering, ...]:
    if isinstance(record.prompt, str):
        start = len(record.prompt)
        return tuple(
            _Rendering(record.prompt + text, start, start, start, start + len(text))
            for text in _texts(record)
        )
    turns = _turns(record.prompt, tokenizer, record.where)
    prompt = _apply(tokenizer, turns, record.where, add_generation_prompt=True)
    marked = _apply(tokenizer, [*turns, _assistant(_MARK)], record.where)
    head, mark, tail = marked.partition(_MARK)
    if not mark or not head.startswith(prompt):
        raise UserError(
            f"{record.where}: the chat template does not print a conversation as its "
            "generation prompt followed by the answer, so the completion's tokens "
            "cannot be told from the prompt's. Use a template that does"
        )
    return tuple(
        _place(record, tokenizer, turns, text, (prompt, head, tail))
        for text in _texts(record)
    )


def _place(
    record: Record,
    tokenizer: Any,
    turns: list[dict[str, str]],
    completion: str,
    around: tuple[str, str, str],
) -> _Rendering:
    prompt, head, tail = around
    text = _apply(tokenizer, [*turns, _assistant(completion)], record.where)
    body = text[len(head) : len(text) - len(tail)]
    lead = completion.find(body)
    trimmed = completion[:lead] + completion[lead + len(body) :]
    if not (text == head + body + tail and lead >= 0 and not trimmed.strip()):
        raise UserError(
            f"{record.where}: the chat template changes the completion's text (it is "
            "not printed as given), so segment offsets would be wrong. Use another "
            "template, or take out of the text what the template rewrites"
        )
    begin = len(head)
    return _Rendering(text, len(prompt), begin - lead, begin, begin + len(body))


def _turns(
    messages: Sequence[Message], tokenizer: Any, where: str
) -> list[dict[str, str]]:
    """Return a conversation as a chat template takes it, if there is one."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where}: the prompt is a conversation, but the checkpoint's "
            "tokenizer has no chat template. Use a chat checkpoint, add a "
            "chat_template.jinja to it, or give prompt and completions as plain texts"
        )
    return [message.model_dump() for message in messages]


def _assistant(content: str) -> dict[str, str]:
    return Message(role="assistant", content=content).model_dump()


def _apply(
    tokenizer: Any,
    turns: list[dict[str, str]],
    where: str,
    *,
    add_generation_prompt: bool = False,
) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(
            f"{where}: the chat template refuses the roles {roles}: {error}"
        ) from None


def _pair(
    record: Record,
    rendered: tuple[_Rendering, ...],
    encoded: Sequence[_Encoded],
    tokenizer: Any,
    special: set[int],
    aspects: tuple[str, ...],
    *,
    end_of_turn: bool,
) -> TokenizedPair:
    sides = []
    for rendering, (ids, offsets) in zip(rendered, encoded, strict=True):
        tiled = spans.tile_spans(rendering.text, offsets)
        if end_of_turn:
            ids, tiled, ended = _until_end(
                ids, tiled, rendering, record, tokenizer, special
            )
        else:
            ids, tiled, ended = _until_text_ends(ids, tiled, rendering)
        first = spans.first_completion_token(tiled, rendering.start)
        if first == len(ids) and not ended:
            name = ("chosen", "rejected")[len(sides)]
            raise UserError(
                f"{record.where}: field {name}: the completion has no token: it is "
                "empty, and no end of turn or EOS follows it. Give a text, or a "
                "tokenizer with an EOS token"
            )
        sides.append((ids, tiled, min(first, len(ids) - 1), ended))
    shared = _shared([side[0] for side in sides], min(side[2] for side in sides))
    if shared == 0:
        raise UserError(
            f"{record.where}: field prompt: no token comes before the completion, so "
            "nothing predicts its first token. Give a prompt that is not empty"
        )
    branches = []
    feedback = (
        ("chosen", record.chosen_segments, record.chosen_token_weights),
        ("rejected", record.rejected_segments, record.rejected_token_weights),
    )
    for (ids, tiled, first, ended), rendering, text, (name, segments, weights) in zip(
        sides, rendered, _texts(record), feedback, strict=False
    ):
        # What the template prints around the text is no character of a segment, also
        # where it stands in the place of whitespace that was trimmed.
        relative = [
            (
                max(a, rendering.begin) - rendering.shift,
                min(b, rendering.end) - rendering.shift,
            )
            for a, b in tiled[first:]
        ]
        owners = spans.segment_of_tokens(
            text, relative, segments or (), last_is_end=ended
        )
        branch = _branch(ids[shared:], first - shared, owners, segments or (), aspects)
        if weights is not None and len(weights) != branch.num_completion_tokens:
            raise UserError(
                f"{record.where}: field {name}_token_weights: got {len(weights)} "
                f"number(s) for {branch.num_completion_tokens} completion tokens. "
                "Expected one for each, the end of turn included, with this "
                "checkpoint's tokenizer and template"
            )
        if weights is not None:
            branch = branch._replace(weights=np.asarray(weights, np.float32))
        branches.append(branch)
    if len(branches) == 1:
        branches.append(_branch([], 0, np.zeros(0, np.int32), (), aspects))
    return TokenizedPair(
        np.asarray(sides[0][0][:shared], np.int32),
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


def _until_text_ends(
    ids: list[int], tiled: list[spans.Span], rendering: _Rendering
) -> tuple[list[int], list[spans.Span], bool]:
    """Cut all that follows the completion's own text."""
    keep = sum(start < rendering.end for start, _ in tiled)
    return ids[:keep], tiled[:keep], False


def _until_end(
    ids: list[int],
    tiled: list[spans.Span],
    rendering: _Rendering,
    record: Record,
    tokenizer: Any,
    special: set[int],
) -> tuple[list[int], list[spans.Span], bool]:
    """Cut what the template prints after the end of turn; give plain texts an EOS."""
    if isinstance(record.prompt, str):
        eos = tokenizer.eos_token_id
        if eos is None or (ids and ids[-1] == eos):
            return ids, tiled, eos is not None
        end = len(rendering.text)
        return [*ids, eos], [*tiled, (end, end)], True
    for index, (token, (start, end)) in enumerate(zip(ids, tiled, strict=True)):
        # The end of turn may have swallowed whitespace before it.
        if token in special and end > rendering.end and start >= rendering.start:
            if (
                start >= rendering.end
                or not rendering.text[start : rendering.end].strip()
            ):
                return ids[: index + 1], tiled[: index + 1], True
    return ids, tiled, False


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

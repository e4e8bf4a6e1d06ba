"""What judging would take, before it takes anything: calls, tokens, cost, time.

Nothing is sent and nothing is written. Requests are those that would be asked; what the
store has, and what is equal to another, is not asked. What cannot be known is assumed,
and said: that every call gives its verdict at once, that a reply is as short as its
schema lets it be (its lists as long as their bound says, no reasoning), and how long a
call takes.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.checkpoints.renderer import open_renderer
from jaxalign.judging import prompts
from jaxalign.judging.budget import cost_of
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.judge import JudgeRequest, Verdict, message_text, request_key
from jaxalign.judging.make import settings_of
from jaxalign.judging.store import Store
from jaxalign.judging.votes import merged


__all__ = [
    "CALL_SECONDS",
    "Estimate",
    "KnownVerdicts",
    "TokenCounter",
    "assumed_reply",
    "estimate",
    "lines_of",
    "token_counter",
]

CALL_SECONDS = 2.0
"""What one call is taken to take."""

_AROUND = 4
"""Tokens that chat formats put around a message, as OpenAI's and ChatML do."""

_BYTES = 4
"""Of UTF-8 a token, where there is no tokenizer."""

_AT_ONCE = 256
_STATEMENT = "A statement of a dozen words, such as judges give and take, number"


class TokenCounter(NamedTuple):
    """How tokens are counted."""

    how: str
    tokens: Callable[[str], int]
    """Of a text."""

    def sent(self, messages: Iterable[Mapping[str, Any]]) -> int:
        """Count the tokens of a conversation's texts, with what stands around them.

        >>> TokenCounter("words", lambda text: len(text.split())).sent(
        ...     [{"role": "user", "content": "2 + 2?"}]
        ... )
        7
        """
        return sum(self.tokens(message_text(one)) + _AROUND for one in messages)


class Estimate(NamedTuple):
    """What judging would take; sums, see :func:`estimate`."""

    requests: int
    known: int
    """Those that the store has a value for."""
    equal: int
    """Those that are asked once with an equal one."""
    prompt_tokens: int
    """Of the calls, without retries."""
    completion_tokens: int
    pictures: int = 0
    """That the calls show; one is counted in each call that shows it."""

    @property
    def calls(self) -> int:
        """Requests that would be sent."""
        return self.requests - self.known - self.equal

    def plus(self, other: "Estimate") -> "Estimate":
        """Return the sums of both."""
        return Estimate(*(a + b for a, b in zip(self, other, strict=True)))


def token_counter(model: str | None) -> TokenCounter:
    """Return the count by a checkpoint's tokenizer, or one from the length of texts.

    Args:
      model: Hugging Face directory or id; None counts four bytes of UTF-8 as a token.
    Raises:
      UserError: the tokenizer cannot be loaded.
    Example:
      >>> token_counter(None).tokens("a text of 20 letters")
      5
    """
    if model is None:
        how = f"estimated, {_BYTES} bytes of UTF-8 each"
        return TokenCounter(how, lambda text: -(-len(text.encode()) // _BYTES))
    tokenizer = open_renderer(model).tokenizer

    def count(text: str) -> int:
        whole = tokenizer(text, add_special_tokens=False, verbose=False)
        return len(whole["input_ids"])

    return TokenCounter(f"by the tokenizer of {model}", count)


def estimate(
    config: JudgeConfig,
    requests: Iterable[JudgeRequest],
    store: Path | None,
    counter: TokenCounter | None = None,
) -> Estimate:
    """Return what a judge would have to be asked.

    Args:
      config: of the judge.
      requests: all that there are.
      store: file of the judgements, if it is there; None takes all requests as new
        and as different from each other.
      counter: of tokens; default that of a checkpoint that ``judge.model`` names by
        its directory, else of bytes.
    Raises:
      UserError: the store or the judge cannot be read.
    Example:
      >>> from jaxalign.judging.judge import Subject
      >>> from jaxalign.judging.prompts import scores_request
      >>> subject = Subject("2 + 2?", "4", spans=((0, 1),), aspects=("correctness",))
      >>> found = estimate(JudgeConfig(model="m"), [scores_request(subject)], None)
      >>> found.requests, found.known
      (1, 0)
    """
    counter = counter or token_counter(_tokenizer_of(config))
    counter = counter._replace(tokens=functools.lru_cache(maxsize=256)(counter.tokens))
    found = Estimate(0, 0, 0, 0, 0)
    seen: set[str] = set()
    for some, known in _looked_up(config, requests, store):
        for key, request in some:
            if key in known or key in seen:
                add = Estimate(1, int(key in known), int(key not in known), 0, 0)
                found = found.plus(add)
                continue
            if key is not None:
                seen.add(key)
            asked = request.messages
            if config.response_format != "json_schema":
                asked = prompts.with_schema(asked, request.schema)
            sent = counter.sent(asked)
            reply = counter.tokens(json.dumps(assumed_reply(request.schema)))
            shown = len(request.subject.images)
            found = found.plus(Estimate(1, 0, 0, sent, reply, shown))
    return found


def assumed_reply(schema: Mapping[str, Any], items: int | None = None) -> Any:
    """Return a value of a schema of ours, as an example of a reply.

    Args:
      schema: of a request.
      items: length of lists that may be longer or shorter; default the longest, at
        most eight.

    >>> assumed_reply(prompts.scores_schema(("clarity",), 2))
    {'segments': [{'clarity': 4}, {'clarity': 4}]}
    """
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema["type"]
    if kind == "object":
        parts = schema["properties"]
        return {name: assumed_reply(part, items) for name, part in parts.items()}
    if kind == "array":
        least, most = schema.get("minItems", 0), schema.get("maxItems", 8)
        length = max(least, min(most, 8 if items is None else items))
        made = [assumed_reply(schema["items"], items) for _ in range(length)]
        # Texts of a list differ, as they would.
        return [f"{m} {n}" if isinstance(m, str) else m for n, m in enumerate(made, 1)]
    return schema.get("maximum", 1) if kind == "integer" else _STATEMENT


class KnownVerdicts:
    """Verdicts of a store, and what is taken for those that it has not.

    >>> from jaxalign.judging.judge import Subject
    >>> from jaxalign.judging.prompts import compare_request
    >>> asked = compare_request(Subject("2 + 2?", "4", other="5"))
    >>> known = KnownVerdicts(JudgeConfig(name="rules"), None)
    >>> known.verdict([asked], 1).value
    {'better': 'A'}
    """

    def __init__(self, judge: JudgeConfig, path: Path | None):
        there = path is not None and path.is_file()
        self._store = Store(path, create=False) if path and there else None
        self._settings = settings_of(judge) if there else {}

    def verdict(self, votes: Sequence[JudgeRequest], items: int) -> Verdict:
        """Return the verdict on a question, whose lists have so many items."""
        if self._store is not None:
            keys = [request_key(vote, self._settings) for vote in votes]
            found = self._store.verdicts(keys)
            if len(found) == len(set(keys)):
                made = merged([found[key] for key in keys])
                if made.failure is None:
                    return made
        return Verdict(assumed_reply(votes[0].schema, items))

    def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            self._store.close()


def lines_of(
    config: JudgeConfig, found: Estimate, counter: TokenCounter | None = None
) -> list[str]:
    """Return an estimate for a person, a line each for calls, tokens, cost, time.

    Args:
      config: of the judge.
      found: the sums, see :func:`estimate`.
      counter: how tokens were counted; default by the judge's tokenizer.
    Example:
      >>> tokens = {"prompt_tokens": 900, "completion_tokens": 80}
      >>> found = Estimate(12, known=2, equal=0, **tokens)
      >>> local = JudgeConfig(name="python", aspects=("brevity",))
      >>> print(*lines_of(local, found), sep="; ")
      12 requests: 2 known from the store; to judge: 10 requests, in this process
    """
    equal = f", {found.equal} equal to another" if found.equal else ""
    lines = [f"{found.requests} requests: {found.known} known from the store{equal}"]
    shown = f", which show {found.pictures} pictures" if found.pictures else ""
    if config.name != "openai":
        return [*lines, f"to judge: {found.calls} requests, in this process{shown}"]
    counter = counter or token_counter(_tokenizer_of(config))
    lines.append(
        f"to ask: {found.calls} calls{shown}, if each gives its verdict at once"
    )
    lines.append(
        f"tokens: {found.prompt_tokens} of prompts and {found.completion_tokens} of "
        f"replies without reasoning ({counter.how}; pictures and schemas beside the "
        "messages are not counted)"
    )
    if config.prompt_price or config.completion_price:
        cost = cost_of(config, found.prompt_tokens, found.completion_tokens)
        lines.append(
            f"cost: {cost:.4f}, in the currency of judge.prompt_price "
            f"({config.prompt_price:g} a million tokens) and judge.completion_price "
            f"({config.completion_price:g})"
        )
    seconds = -(-found.calls // config.concurrency) * CALL_SECONDS
    lines.append(
        f"time: {seconds:.0f} s, if a call takes {CALL_SECONDS:g} s and "
        f"{config.concurrency} are on their way at a time"
    )
    return lines


def _looked_up(
    config: JudgeConfig, requests: Iterable[JudgeRequest], store: Path | None
) -> Iterator[tuple[list[tuple[str | None, JudgeRequest]], set[str]]]:
    """Yield requests in lots with their keys, and the keys that have a value."""
    drawn = iter(requests)
    if store is None:
        while lot := list(itertools.islice(drawn, _AT_ONCE)):
            yield [(None, request) for request in lot], set()
        return
    settings = settings_of(config)
    opened = Store(store, create=False) if store.is_file() else None
    try:
        while lot := list(itertools.islice(drawn, _AT_ONCE)):
            keys = [request_key(request, settings) for request in lot]
            kept = {} if opened is None else opened.verdicts(keys)
            known = {key for key, verdict in kept.items() if verdict.failure is None}
            yield list(zip(keys, lot, strict=True)), known
    finally:
        if opened is not None:
            opened.close()


def _tokenizer_of(config: JudgeConfig) -> str | None:
    """Return the checkpoint that the judge is, if it is here."""
    named = config.model
    return named if named is not None and Path(named).is_dir() else None

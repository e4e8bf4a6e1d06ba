"""What a text has to be: of a JSON schema, an expression, a grammar, or one of some.

llguidance (https://github.com/guidance-ai/llguidance) tells which tokens may follow.
A token may when its bytes do, whichever pieces of the grammar they belong to and
wherever characters are cut, so every text that fits can be made, and no other.
"""

import collections
import functools
import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np
from jaxtyping import UInt32

from jaxalign.errors import UserError


__all__ = ["Grammars", "Structure", "choice", "grammar", "json_schema", "regex"]

_KEPT = 64
"""Grammars that are kept ready."""

_BLANKS = r" |\n[ \t]{0,24}"
"""Between the tokens of JSON: on one line or indented, and no room to go on for ever.

With any blanks, a small model that takes the most probable token writes line after
line of them.
"""

_ONE_LINE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}

_EXACT = '%llguidance {"no_forcing": true}\n'
"""Where a text has no choice the library would allow the tokenizer's own cutting of it
alone; so that probabilities are exact, every token may come that goes on with it."""

_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")

_LONGEST = 300
"""Characters of the library's message that are shown."""


class Structure(NamedTuple):
    """What a text has to be."""

    kind: Literal["JSON schema", "regular expression", "choice", "grammar"]
    grammar: str
    """In llguidance's Lark."""


def json_schema(
    schema: Mapping[str, Any] | bool, *, one_line: bool = False
) -> Structure:
    """Return the structure of JSON that a schema describes.

    Objects have their properties in the schema's order. Between two tokens of JSON
    stands nothing, a space, or the end of a line with up to 24 blanks of the next.

    Args:
      schema: JSON schema; what llguidance implements of it is in
        https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md, and the
        rest is refused by :meth:`Grammars.check`.
      one_line: written as ``json.dumps`` does, ``{"a": 1, "b": [2, 3]}``, which has
        the fewest tokens.
    Example:
      >>> json_schema({"type": "integer"}).kind
      'JSON schema'
    """
    # The library reads objects alone.
    given = schema if isinstance(schema, Mapping) else {"allOf": [schema]}
    fields: dict[str, Any] = dict(given)
    own = fields.get("x-guidance")
    options = {**(_ONE_LINE if one_line else {"whitespace_pattern": _BLANKS})}
    fields["x-guidance"] = {**options, **(own if isinstance(own, Mapping) else {})}
    written = json.dumps(fields, default=dict)
    return Structure("JSON schema", f"{_EXACT}start: %json {written}")


def regex(pattern: str) -> Structure:
    """Return the structure of texts that a regular expression matches as a whole.

    Args:
      pattern: of Rust's syntax (https://docs.rs/regex/latest/regex/#syntax), which is
        Python's without looking around and back; its classes are those of Unicode.
    Example:
      >>> regex("[0-9]+").kind
      'regular expression'
    """
    made = json.loads(llguidance.LLMatcher.grammar_from_regex(pattern))
    (only,) = made["grammars"]
    return Structure("regular expression", _EXACT + only["lark_grammar"])


def choice(texts: Sequence[str]) -> Structure:
    """Return the structure of a text that is one of some.

    Raises:
      UserError: there are none, or one is empty.
    Example:
      >>> choice(["yes", "no"]).kind
      'choice'
    """
    if not texts or not all(texts):
        raise UserError(
            f"a choice needs at least one text, none of them empty: got {list(texts)}"
        )
    written = " | ".join(json.dumps(text) for text in texts)
    return Structure("choice", f"{_EXACT}start: {written}")


def grammar(text: str) -> Structure:
    """Return the structure of texts that a context-free grammar makes.

    Args:
      text: in llguidance's Lark
        (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md), beginning
        with ``start``, or in the GBNF of llama.cpp, beginning with ``root``.
    Raises:
      UserError: it is neither.
    Example:
      >>> grammar('start: "yes" | "no"').kind
      'grammar'
    """
    try:
        lark = llguidance.grammar_from("grammar", text)
    except ValueError as error:
        told = " ".join(str(error).split())[:_LONGEST]
        raise UserError(f"the grammar cannot be followed: {told}") from None
    if "%llguidance" in text:
        raise UserError("the grammar cannot be followed: it sets llguidance's options")
    # What is made of GBNF begins with options of its own, which are none.
    return Structure("grammar", _EXACT + lark.replace("%llguidance {}\n", "", 1))


class Grammars:
    """Structures made ready for a tokenizer; for several threads.

    Args:
      tokenizer: a fast one of Hugging Face's.
      vocab: tokens of the model.
    Example::

      grammars = Grammars(tokenizer, vocab=49152)
      matcher = grammars.matcher(choice(["yes", "no"]))
      words = grammars.fill([matcher])  # [1, w] which tokens may come first
    """

    def __init__(self, tokenizer: Any, vocab: int):
        self._tokenizer, self._vocab = tokenizer, vocab
        self._ready: collections.OrderedDict[Structure, llguidance.LLMatcher]
        self._ready = collections.OrderedDict()
        self._lock = threading.Lock()
        self._executor = llguidance.LLExecutor()

    def check(self, structure: Structure) -> None:
        """Refuse a structure that cannot be kept to.

        Raises:
          UserError: it is not valid, or too much for the library.
        """
        self.matcher(structure)

    def matcher(self, structure: Structure) -> llguidance.LLMatcher:
        """Return what follows a text from its beginning.

        Raises:
          UserError: see :meth:`check`.
        """
        with self._lock:
            found = self._ready.get(structure)
        if found is None:
            found = self._compiled(structure)  # which others need not wait for
        with self._lock:
            self._ready[structure] = found
            self._ready.move_to_end(structure)
            while len(self._ready) > _KEPT:
                self._ready.popitem(last=False)
            return found.deep_copy()

    def fill(
        self, matchers: Sequence[llguidance.LLMatcher]
    ) -> UInt32[np.ndarray, "n w"]:
        """Return which tokens may follow, a bit each and 32 a word.

        A matcher that gives up says so (``is_error``), and its row means nothing. Ends
        of text are not told of: whether one may follow is ``is_accepting``.
        """
        made = self._tokens
        masks = llguidance.numpy.allocate_token_bitmask(len(matchers), made.vocab_size)
        llguidance.numpy.fill_next_token_bitmask_par(
            self._executor, [(one, row) for row, one in enumerate(matchers)], masks
        )
        words = masks.view(np.uint32)[:, : -(-self._vocab // 32)]
        for end in made.eos_tokens:
            if end < self._vocab:
                words[:, end // 32] &= ~np.uint32(1 << end % 32)
        return words

    @functools.cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        """The library's form of the tokenizer, made when it is first asked for."""
        if not getattr(self._tokenizer, "is_fast", False):
            raise UserError(
                "structured output needs a fast tokenizer, with a tokenizer.json: "
                f"got {type(self._tokenizer).__name__}"
            )
        size = max(self._vocab, len(self._tokenizer))
        return llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=size)

    def _compiled(self, structure: Structure) -> llguidance.LLMatcher:
        limits = llguidance.LLParserLimits(verbose_errors=False)
        made = llguidance.LLMatcher(
            self._tokens, structure.grammar, log_level=0, limits=limits
        )
        if not made.is_error():
            made.compute_bitmask()  # some limits are met here first
        if made.is_error():
            # Without the place in the library's own text, and that text.
            told = _PLACE.sub("", made.get_error().split("\n   1 | ")[0])
            told = " ".join(told.split())
            told = told if len(told) <= _LONGEST else f"{told[: _LONGEST - 3]}..."
            raise UserError(f"the {structure.kind} cannot be followed: {told}")
        return made

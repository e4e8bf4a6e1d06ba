"""What judges are asked, and how their replies are read: pure, without transport.

Ours are the wording (Markdown files), the shape of the replies and the strictness of
the parser. The API's are the chat messages and the JSON Schema that ``response_format``
takes; the schemas keep to what OpenAI's strict mode supports: every property required,
``additionalProperties`` false, bounds on integers and arrays
(https://platform.openai.com/docs/guides/structured-outputs).
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fastjsonschema

from jaxalign.data import images
from jaxalign.errors import UserError
from jaxalign.judging import wording
from jaxalign.judging.judge import JudgeRequest, Schema, Subject, Verdict, schema_text


__all__ = [
    "COMPARE_SCHEMA",
    "MAX_SCORE",
    "SCHEMA_WORDING",
    "Parsed",
    "compare_request",
    "compared",
    "parse",
    "scores_request",
    "scores_schema",
    "with_schema",
]

MAX_SCORE = 4

SCHEMA_WORDING = (
    "Your reply is read by a program. Reply with one JSON object that is valid under "
    "the JSON schema below, and with nothing else: no explanation, no heading, no code "
    "fence. The object holds the values themselves, not the schema.\n\n"
)
"""What stands before the schema in a prompt, where the endpoint takes none."""

COMPARE_SCHEMA = Schema(
    type="object",
    properties={"better": {"type": "string", "enum": ["A", "B", "tie"]}},
    required=["better"],
    additionalProperties=False,
)


@functools.lru_cache(maxsize=256)
def scores_schema(aspects: tuple[str, ...], segments: int) -> Schema:
    """Return the schema of one score of 0 to 4 for each segment and aspect.

    >>> scores_schema(("clarity",), 2)["properties"]["segments"]["maxItems"]
    2
    """
    score = {"type": "integer", "minimum": 0, "maximum": MAX_SCORE}
    scored = {
        "type": "object",
        "properties": dict.fromkeys(aspects, score),
        "required": list(aspects),
        "additionalProperties": False,
    }
    listed = {
        "type": "array",
        "items": scored,
        "minItems": segments,
        "maxItems": segments,
    }
    return Schema(
        type="object",
        properties={"segments": listed},
        required=["segments"],
        additionalProperties=False,
    )


def scores_request(
    subject: Subject, own: Path | None = None, *, needs_rubrics: bool = True
) -> JudgeRequest:
    """Return the request for the scores of every segment on every aspect.

    The material goes in as one JSON object: what a response says cannot close it.

    Args:
      subject: with spans and aspects.
      own: directory of wording of one's own.
      needs_rubrics: refuse an aspect that has no rubric; a judge that does not read
        the messages needs none.
    Raises:
      UserError: there is no aspect, no span, or an aspect without a rubric.
    Example:
      >>> subject = Subject("2 + 2?", "4", spans=((0, 1),), aspects=("correctness",))
      >>> [message["role"] for message in scores_request(subject).messages]
      ['system', 'user']
    """
    if not subject.aspects or not subject.spans:
        raise UserError(
            f"scores need aspects and segments: got {len(subject.aspects)} aspect(s) "
            f"and {len(subject.spans)} segment(s)"
        )
    material = {
        "prompt": subject.prompt,
        "response": subject.response,
        "segments": [
            {"number": number, "text": subject.response[start:end]}
            for number, (start, end) in enumerate(subject.spans, 1)
        ],
    }
    return JudgeRequest(
        "scores",
        _messages("scores", subject, material, own, needs_rubrics),
        scores_schema(subject.aspects, len(subject.spans)),
        subject,
    )


def compare_request(
    subject: Subject, own: Path | None = None, *, swapped: bool = False
) -> JudgeRequest:
    """Return the request which of two responses is better.

    Judges lean towards one of the two places: ask both orders and see
    :func:`compared`.

    Args:
      subject: ``response`` and ``other``; with aspects, their rubrics are shown.
      own: directory of wording of one's own.
      swapped: show ``other`` as A.
    Raises:
      UserError: there is no other response, or an aspect without a rubric.
    Example:
      >>> asked = compare_request(Subject("2 + 2?", "4", other="5"))
      >>> asked.task, asked.schema["properties"]["better"]["enum"]
      ('compare', ['A', 'B', 'tie'])
    """
    if subject.other is None:
        raise UserError("a comparison needs a second response: the subject has none")
    if swapped:
        subject = dataclasses.replace(
            subject, response=subject.other, other=subject.response
        )
    material = {"prompt": subject.prompt, "A": subject.response, "B": subject.other}
    return JudgeRequest(
        "compare", _messages("compare", subject, material, own), COMPARE_SCHEMA, subject
    )


def compared(
    straight: Verdict, swapped: Verdict
) -> Literal["response", "other", "tie"] | None:
    """Return what the verdicts of both orders say together.

    One that wins in both orders is better; anything else is a tie, and without one of
    the verdicts there is none (None).

    >>> won_first, won_last = Verdict({"better": "A"}), Verdict({"better": "B"})
    >>> compared(won_first, won_last), compared(won_first, won_first)
    ('response', 'tie')
    """
    if straight.failure is not None or swapped.failure is not None:
        return None
    both = (straight.value["better"], swapped.value["better"])
    if both == ("A", "B"):
        return "response"
    return "other" if both == ("B", "A") else "tie"


def with_schema(
    messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any]
) -> tuple[Mapping[str, Any], ...]:
    """Return messages whose system message ends with the schema of the reply.

    For endpoints that take none beside the messages. Without a system message the
    result begins with one.

    >>> messages = with_schema(({"role": "user", "content": "?"},), {"type": "object"})
    >>> messages[0]["content"].endswith('{"type": "object"}'), len(messages)
    (True, 2)
    """
    told = SCHEMA_WORDING + schema_text(schema)
    first, rest = messages[0], messages[1:]
    if first["role"] == "system" and isinstance(first["content"], str):
        return {**first, "content": f"{first['content']}\n\n{told}"}, *rest
    return {"role": "system", "content": told}, *messages


class Parsed(NamedTuple):
    """A reply that was read: a value, or what is wrong with it."""

    value: Any
    problem: str | None


def parse(raw: str, schema: Mapping[str, Any]) -> Parsed:
    """Read a reply strictly: one JSON value under the schema, and nothing around it.

    Nothing is mended: no prose is cut off, no number rounded or brought into range.
    3.0 is no integer here, though JSON Schema would take it for one. NaN, infinities,
    duplicate keys and halves of surrogate pairs are refused.

    >>> parse('{"better": "A"}', COMPARE_SCHEMA).value
    {'better': 'A'}
    >>> parse('Sure! {"better": "A"}', COMPARE_SCHEMA).problem
    'it is not JSON: Expecting value at character 0'
    """
    try:
        value = _STRICT.decode(raw)
        # Halves of surrogate pairs are in the text, or escaped in it ("\ud800").
        raw.encode()
        if "\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return Parsed(None, f"it is not JSON: {error.msg} at character {error.pos}")
    except UnicodeEncodeError:
        return Parsed(None, "it holds half of a surrogate pair, which is no text")
    except ValueError as error:
        return Parsed(None, f"it is not JSON: {error}")
    except RecursionError:
        return Parsed(None, "it is nested too deeply")
    try:
        _check_of(schema_text(schema))(value)
    except fastjsonschema.JsonSchemaValueException as error:
        return Parsed(None, _short(error.message.replace("data", "the reply", 1)))
    return Parsed(value, None)


@functools.lru_cache(maxsize=1024)
def _check_of(schema: str) -> Callable[[Any], Any]:
    """Return the check that a schema means; it takes 10 ms to make and 20 us to do."""
    return fastjsonschema.compile(json.loads(schema))


class _Fraction(float):
    """A number that is written with a point or an exponent."""

    def __new__(cls, text: str) -> "_Fraction":
        made = super().__new__(cls, text)
        if math.isinf(made):
            raise ValueError(f"{text} is out of range")
        return made

    def is_integer(self) -> bool:
        return False


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("an object names a key twice")
    return made


_STRICT = json.JSONDecoder(
    parse_float=_Fraction,
    parse_constant=_no_constant,
    object_pairs_hook=_no_duplicates,
)


_MATERIAL = "{{material}}"
_SHOWN = json.JSONEncoder(ensure_ascii=False, default=dict)


def _messages(
    template: str,
    subject: Subject,
    material: Any,
    own: Path | None,
    needs_rubrics: bool = True,
) -> tuple[Mapping[str, Any], ...]:
    """Return system and user message with the material as one JSON object."""
    system, user = _worded(template, subject.aspects, own, needs_rubrics)
    shown = _SHOWN.encode(material)
    filled = {**user, "content": user["content"].replace(_MATERIAL, shown)}
    return system, images.with_images(filled, subject.images)


@functools.lru_cache(maxsize=64)
def _worded(
    template: str, aspects: tuple[str, ...], own: Path | None, needs_rubrics: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the messages of a template, read once, with the place of the material."""
    found = [
        wording.rubric(aspect, own)
        for aspect in aspects
        if needs_rubrics or wording.has_rubric(aspect, own)
    ]
    rubrics = "\n".join(found).strip()
    values = {"rubrics": rubrics, "aspects": ", ".join(aspects), "material": _MATERIAL}
    return wording.messages(template, values, own)


def _short(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]}..."

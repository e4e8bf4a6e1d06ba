"""What a request's text has to be, and what its tokens are steered by."""

import json
from collections.abc import Iterator
from typing import Any

from jaxalign.errors import UserError
from jaxalign.generation import structure
from jaxalign.generation.serving.api_error import ApiError, shown
from jaxalign.generation.serving.bodies import (
    ChatBody,
    CompletionBody,
    JsonFormat,
    StructuredOutputs,
)
from jaxalign.generation.steering import Steering
from jaxalign.generation.structure import Structure


__all__ = ["steering_of"]

_OBJECT = {"type": "object"}


def steering_of(body: ChatBody | CompletionBody) -> tuple[Steering | None, str | None]:
    """Return how a request is steered, and the field that gives its structure.

    Raises:
      ApiError: 400, several structures, or one that is none.
    """
    found = list(_structures(body))
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise ApiError(
            f"{names} each say what the text is: give one", param=found[1][0]
        )
    field, made = found[0] if found else (None, None)
    steering = Steering(
        structure=made,
        logit_bias=tuple(_biases(body)),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        min_tokens=body.min_tokens,
    )
    return (None if steering == Steering() else steering), field


def _structures(
    body: ChatBody | CompletionBody,
) -> Iterator[tuple[str, Structure]]:
    if body.response_format is not None:
        yield from _of_format(body.response_format)
    if body.guided_json is not None:
        yield "guided_json", _of_json(body.guided_json, "guided_json")
    if body.guided_regex is not None:
        yield "guided_regex", structure.regex(body.guided_regex)
    if body.guided_choice is not None:
        yield "guided_choice", _of_choice(body.guided_choice, "guided_choice")
    if body.guided_grammar is not None:
        yield "guided_grammar", _of_grammar(body.guided_grammar, "guided_grammar")
    if body.structured_outputs is not None:
        yield from _of_structured(body.structured_outputs)


def _of_format(wanted: JsonFormat) -> Iterator[tuple[str, Structure]]:
    name = "response_format"
    if wanted.type != "json_schema" and wanted.json_schema is not None:
        raise ApiError(
            f"response_format.json_schema goes with type json_schema: got type "
            f"{wanted.type}",
            param=f"{name}.json_schema",
        )
    if wanted.type == "json_object":
        yield name, structure.json_schema(_OBJECT)
    elif wanted.type == "json_schema":
        inner = wanted.json_schema
        if inner is None or inner.schema_ is None:
            raise ApiError(
                "response_format.json_schema.schema is missing",
                param=f"{name}.json_schema",
                code="missing_parameter",
            )
        yield name, _of_json(inner.schema_, f"{name}.json_schema.schema")


def _of_structured(wanted: StructuredOutputs) -> Iterator[tuple[str, Structure]]:
    name, one_line = "structured_outputs", wanted.disable_any_whitespace
    if wanted.json_ is not None:
        yield f"{name}.json", _of_json(wanted.json_, f"{name}.json", one_line)
    if wanted.regex is not None:
        yield f"{name}.regex", structure.regex(wanted.regex)
    if wanted.choice is not None:
        yield f"{name}.choice", _of_choice(wanted.choice, f"{name}.choice")
    if wanted.grammar is not None:
        yield f"{name}.grammar", _of_grammar(wanted.grammar, f"{name}.grammar")
    if wanted.json_object:
        yield f"{name}.json_object", structure.json_schema(_OBJECT, one_line=one_line)


def _of_choice(texts: list[str], name: str) -> Structure:
    try:
        return structure.choice(texts)
    except UserError:
        raise ApiError(
            f"{name} must be a list of texts, none of them empty: got {shown(texts)}",
            param=name,
        ) from None


def _of_grammar(text: str, name: str) -> Structure:
    try:
        return structure.grammar(text)
    except UserError as error:
        raise ApiError(str(error), param=name) from None


def _of_json(
    schema: dict[str, Any] | bool | str, name: str, one_line: bool = False
) -> Structure:
    given: Any = schema
    if isinstance(schema, str):
        try:
            given = json.loads(schema)
        except (ValueError, RecursionError):
            given = None
    if not isinstance(given, dict | bool):
        raise ApiError(
            f"{name} must be a JSON schema, an object or its text: got {shown(schema)}",
            param=name,
        )
    return structure.json_schema(given, one_line=one_line)


def _biases(body: ChatBody | CompletionBody) -> Iterator[tuple[int, float]]:
    for name, bias in body.logit_bias.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise ApiError(
                f"logit_bias must map tokens to numbers: got {shown(name)} as a token",
                param="logit_bias",
            )
        if bias:
            yield int(name), bias

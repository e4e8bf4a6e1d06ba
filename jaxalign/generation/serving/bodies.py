"""The fields of OpenAI's requests, and of vLLM's beyond them, that we honour."""

from typing import Annotated, Any, Literal

import pydantic

from jaxalign.generation.steps import MOST_RANKED


__all__ = [
    "ChatBody",
    "CompletionBody",
    "ConversationBody",
    "DetokenizeBody",
    "ImagePart",
    "JsonFormat",
    "StructuredOutputs",
    "TextPart",
    "TokenizeBody",
    "Turn",
    "inner_names",
]

_Float = Annotated[float, pydantic.Field(ge=0, le=100, allow_inf_nan=False)]
_Share = Annotated[float, pydantic.Field(ge=0, le=1, allow_inf_nan=False)]
_Penalty = Annotated[float, pydantic.Field(ge=-2, le=2, allow_inf_nan=False)]
_Bias = Annotated[float, pydantic.Field(ge=-100, le=100, allow_inf_nan=False)]
_Count = Annotated[int, pydantic.Field(ge=1, le=2**31 - 1)]
_Token = Annotated[int, pydantic.Field(ge=0, le=2**31 - 1)]
_Stop = Annotated[str, pydantic.Field(min_length=1, max_length=1000)]
# A long list of what is wrong would cost more than the answer.
_Some = pydantic.Field(min_length=1, fail_fast=True)
_Tokens = Annotated[list[_Token], _Some]
_AnySchema = dict[str, Any] | bool | str

_STRICT = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)


class TextPart(pydantic.BaseModel):
    """A stretch of a turn's text."""

    model_config = _STRICT

    type: Literal["text"]
    text: str


class _ImageURL(pydantic.BaseModel):
    model_config = _STRICT

    url: str
    # How large pictures are is the server's to say.
    detail: Literal["auto"] | None = None


class ImagePart(pydantic.BaseModel):
    """A picture that a turn shows."""

    model_config = _STRICT

    type: Literal["image_url"]
    image_url: _ImageURL


Part = Annotated[TextPart | ImagePart, pydantic.Field(discriminator="type")]


class Turn(pydantic.BaseModel):
    """A turn of a conversation."""

    model_config = _STRICT

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], _Some] | None = None
    # What chat templates look at beside the text.
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # Of no consequence: what clients keep of an answer, what lm-eval adds to a turn.
    refusal: str | None = None
    annotations: list[Any] | None = None
    type: Literal["text"] | None = None


class _StreamOptions(pydantic.BaseModel):
    model_config = _STRICT

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: Literal[False] = False


class _JsonSchema(pydantic.BaseModel):
    model_config = _STRICT

    name: str | None = None
    description: str | None = None
    # A field called schema would hide pydantic's own.
    schema_: _AnySchema | None = pydantic.Field(default=None, alias="schema")
    strict: bool | None = None


class JsonFormat(pydantic.BaseModel):
    """OpenAI's form of what an answer has to be."""

    model_config = _STRICT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class StructuredOutputs(pydantic.BaseModel):
    """vLLM's form of what an answer has to be."""

    model_config = _STRICT

    json_: _AnySchema | None = pydantic.Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: Literal[False] = False
    # Of no consequence: there is one library, which has nothing to fall back on.
    disable_fallback: bool = False


class _Body(pydantic.BaseModel):
    model_config = _STRICT

    model: str
    max_tokens: _Count | None = None
    temperature: _Float = 1.0
    top_p: _Share = 1.0
    n: Annotated[int, pydantic.Field(ge=1, le=128)] = 1
    seed: Annotated[int, pydantic.Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        _Stop | Annotated[list[_Stop], pydantic.Field(max_length=256, fail_fast=True)]
    ) = ()  # pyright: ignore[reportAssignmentType]
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    logit_bias: Annotated[dict[str, _Bias], pydantic.Field(max_length=2048)] = {}
    response_format: JsonFormat | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    # Not OpenAI's, but of most servers like it.
    top_k: Annotated[int, pydantic.Field(ge=-1, le=2**31 - 1)] = 0
    min_p: _Share = 0.0
    repetition_penalty: Annotated[_Float, pydantic.Field(ge=0.01)] = 1.0
    min_tokens: Annotated[int, pydantic.Field(ge=0, le=2**31 - 1)] = 0
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[_Token], pydantic.Field(max_length=256)] = []
    guided_json: _AnySchema | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    # Of no consequence for the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None


class ConversationBody(pydantic.BaseModel):
    """What a chat template is given beside the messages."""

    model_config = _STRICT

    tools: list[dict[str, Any]] = []
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False


class ChatBody(_Body, ConversationBody):
    """A request for chat completions."""

    messages: Annotated[list[Turn], _Some]
    max_completion_tokens: _Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, pydantic.Field(ge=0, le=MOST_RANKED)] = 0
    tool_choice: Literal["none", "auto"] = "auto"
    reasoning_effort: str | None = None
    # Neutral values of what other servers can: echo a turn, begin as a text does.
    echo: Literal[False] = False
    add_special_tokens: Literal[False] = False
    # Of no consequence, as the server reads no calls out of answers.
    parallel_tool_calls: bool = True


class CompletionBody(_Body):
    """A request for completions."""

    prompt: (
        str | _Tokens | Annotated[list[str], _Some] | Annotated[list[_Tokens], _Some]
    )
    # OpenAI's takes no 0 tokens, but harnesses that only want the prompt judged do.
    max_tokens: Annotated[int, pydantic.Field(ge=0, le=2**31 - 1)] | None = None
    logprobs: Annotated[int, pydantic.Field(ge=0, le=MOST_RANKED)] | None = None
    echo: bool = False
    best_of: int | None = None
    # A prompt that is a text begins as the tokenizer's own call does.
    add_special_tokens: Literal[True] = True


class TokenizeBody(ConversationBody):
    """A request for the tokens of a prompt or of a conversation, as vLLM has it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Turn], _Some] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False


class DetokenizeBody(pydantic.BaseModel):
    """A request for the text of tokens, as vLLM has it."""

    model_config = _STRICT

    model: str | None = None
    tokens: list[_Token]


def inner_names() -> set[str]:
    """Return the names of fields inside the fields of a body."""
    parts = (TextPart, ImagePart, _ImageURL)
    inner = (Turn, *parts, _StreamOptions, JsonFormat, _JsonSchema, StructuredOutputs)
    return {
        info.alias or name
        for model in inner
        for name, info in model.model_fields.items()
    }

"""Fields of OpenAI's and vLLM's requests that we know and do not honour.

A value that changes nothing is accepted, so that clients which always send their
defaults work; any other is refused by the field's name, never left out in silence.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxalign.generation.serving.api_error import ApiError


__all__ = ["KNOWN", "without_neutral"]

_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    # OpenAI's.
    "tools": (([],), "a text goes through no chat template"),
    "tool_choice": (("none",), "a text goes through no chat template"),
    "function_call": (("none",), "the server calls no tools"),
    "functions": (([],), "the server calls no tools"),
    "modalities": ((["text"],), "answers are text"),
    "audio": (({},), "answers are text"),
    "suffix": (("",), "nothing can be written before a given end"),
    "verbosity": (("medium",), "the model has no such setting"),
    "web_search_options": (({},), "the server searches nothing"),
    # vLLM's.
    "best_of": ((1,), "completions are not ranked"),
    "use_beam_search": ((False,), "texts are sampled"),
    "length_penalty": ((1, 1.0), "it is of beam search, and texts are sampled"),
    "early_stopping": ((False,), "it is of beam search, and texts are sampled"),
    "include_stop_str_in_output": ((False,), "a text ends before what stopped it"),
    "skip_special_tokens": ((True,), "texts have no special tokens"),
    "spaces_between_special_tokens": ((True, False), ""),
    "truncate_prompt_tokens": ((-1,), "prompts are not cut"),
    "truncation_side": (("left", "right"), ""),
    "prompt_logprobs": ((), "completions with echo and logprobs tell a prompt's"),
    "prompt_embeds": ((), "prompts are texts or tokens"),
    "allowed_token_ids": ((), "logit_bias and guided_choice are there in its place"),
    "bad_words": (([],), "logit_bias is there in its place"),
    "logits_processors": (([],), "the server runs no code of its clients"),
    "chat_template": ((), "the server runs no template of its clients"),
    "documents": (([],), "give them in chat_template_kwargs"),
    "mm_processor_kwargs": (({},), "the server sees no images"),
    "media_io_kwargs": (({},), "the server sees no images"),
    "return_tokens_as_token_ids": ((False,), "tokens are told by their texts"),
    "return_token_ids": ((False,), "tokens are told by their texts"),
    "include_reasoning": ((True,), "reasoning is part of the text"),
    "thinking_token_budget": ((), "reasoning is part of the text"),
    "logprob_token_ids": (([],), "top_logprobs tells the most probable tokens"),
    "repetition_detection": ((), "repetition_penalty is there in its place"),
    "kv_transfer_params": (({},), "there is one engine"),
    "vllm_xargs": (({},), "they are of vLLM's plugins"),
    "guided_whitespace_pattern": ((), "structured_outputs may have no blanks"),
    "structural_tag": ((), "guided_json is there in its place"),
}
"""Fields by the values that change nothing, and why no other will do."""

_WITHOUT_CONSEQUENCE = (
    *("safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prediction"),
    *("service_tier", "request_id", "cache_salt", "priority"),
    "guided_decoding_backend",
)
"""Whatever they are, they change nothing that an answer says."""

KNOWN = (*_ONLY, *_WITHOUT_CONSEQUENCE)
"""Fields that this module knows."""


def without_neutral(
    fields: Mapping[str, Any], honoured: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a request that its kind has to read.

    Args:
      fields: of the request.
      honoured: those that requests of its kind have.
    Raises:
      ApiError: 400, a field would change what we cannot change.
    """
    for name, value in fields.items():
        if name in honoured or name not in KNOWN:
            yield name, value
        elif name in _ONLY:
            values, why = _ONLY[name]
            if not any(value == one and type(value) is type(one) for one in values):
                cure = f"Leave it out or give {values[0]!r}" if values else "Remove it"
                raise ApiError(
                    f"{name} is not supported{f': {why}' if why else ''}. {cure}",
                    param=name,
                    code="unsupported_parameter",
                )

"""Texts as tokens and back, without the model, as vLLM's servers tell them."""

from typing import Any

from jaxalign.data.records import Prompt
from jaxalign.data.rendering import Renderer
from jaxalign.errors import UserError
from jaxalign.generation.serving.api_error import ApiError
from jaxalign.generation.serving.bodies import DetokenizeBody, TokenizeBody
from jaxalign.generation.serving.conversation import conversation


__all__ = ["detokenize", "prompt_of", "tokenize"]


def prompt_of(body: TokenizeBody) -> Prompt:
    """Return what is asked about.

    Raises:
      ApiError: 400, neither or both of prompt and messages are there.
    """
    if (body.prompt is None) == (body.messages is None):
        raise ApiError("expected either a prompt or messages", param="prompt")
    if body.messages is not None:
        return conversation(body.messages, body)
    return Prompt(body.prompt or "", None, "prompt")


def tokenize(
    renderer: Renderer, prompt: Prompt, body: TokenizeBody, max_length: int
) -> dict[str, Any]:
    """Return the tokens of a prompt or of a conversation.

    Args:
      renderer: of the model.
      prompt: see :func:`prompt_of`, with its pictures.
      body: what was asked. Special tokens are added to a prompt unless it says no, and
        to a conversation, which has those of its template, only if it says so.
      max_length: tokens that the model takes.
    Raises:
      ApiError: 400, the template cannot render it.
    """
    tokenizer, given = renderer.tokenizer, body.add_special_tokens
    special = body.messages is None if given is None else given
    if prompt.images and special:
        raise ApiError(
            "add_special_tokens does not go with pictures, whose tokens stand between "
            "those of the template: leave it out",
            param="add_special_tokens",
        )
    try:
        if prompt.images:
            found = renderer.prompt_tokens(prompt)
        else:
            text = renderer.prompt_text(prompt)
            out = tokenizer(text, add_special_tokens=special, verbose=False)
            found = out["input_ids"]
    except UserError as error:
        raise ApiError(str(error), param="messages") from None
    names = tokenizer.convert_ids_to_tokens(found) if body.return_token_strs else None
    return {
        "count": len(found),
        "max_model_len": max_length,
        "tokens": list(found),
        "token_strs": names,
    }


def detokenize(tokenizer: Any, body: DetokenizeBody) -> dict[str, Any]:
    """Return the text of tokens, special ones included.

    Raises:
      ApiError: 400, a token that the tokenizer lacks.
    """
    most = max(body.tokens, default=0)
    if most >= len(tokenizer):
        raise ApiError(
            f"tokens has {most}: the tokenizer has {len(tokenizer)}", param="tokens"
        )
    text = tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)
    return {"prompt": text}

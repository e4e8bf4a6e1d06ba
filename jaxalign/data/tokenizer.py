"""Tokenizers: what is asked of one, loading it, and which tokens are special."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxalign.errors import UserError


__all__ = ["Tokenizer", "load_tokenizer", "special_ids", "special_tokens"]


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a fast Hugging Face tokenizer.

    ``chat_template`` is not: tokenizers from elsewhere may lack it.
    """

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def all_special_ids(self) -> Sequence[int]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def convert_ids_to_tokens(self, ids: Any) -> Any: ...

    def decode(self, token_ids: Any, **options: Any) -> Any: ...


def load_tokenizer(directory: str | Path) -> Any:
    """Load the tokenizer of a checkpoint, without network and without remote code.

    Raises:
      UserError: there is none, or none that tells the characters of its tokens.
    Example::

      load_tokenizer("smollm2")("The river.")["input_ids"]
    """
    directory = str(directory)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        except StrictDataclassError:
            # A size that is no integer, say: nothing that a tokenizer asks config.json.
            plain = _config_of_same_type(directory)
            tokenizer = AutoTokenizer.from_pretrained(
                directory, config=plain, **options
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


def _config_of_same_type(directory: str) -> Any:
    """Return the family's own config: of config.json a tokenizer asks but the type."""
    from transformers import AutoConfig

    config = json.loads((Path(directory) / "config.json").read_bytes())
    return AutoConfig.for_model(config["model_type"])


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Return all tokens that stand for no text of their own.

    Example::

      tokenizer = load_tokenizer("smollm2")
      text = tokenizer("The river.")["input_ids"]
      said = [token for token in text if token not in special_ids(tokenizer)]
    """
    added = tokenizer.added_tokens_decoder
    return set(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}


def special_tokens(tokenizer: Tokenizer, texts: Collection[str]) -> frozenset[int]:
    """Return the special tokens that stand among texts; decoding leaves them out.

    Args:
      tokenizer: of the checkpoint.
      texts: such as stop texts; those that are no special token's do not count.
    Example::

      special_tokens(load_tokenizer("smollm2"), ["<|im_end|>", "###"])
    """
    if not texts:
        return frozenset()
    special = sorted(special_ids(tokenizer))
    names = tokenizer.convert_ids_to_tokens(special)
    return frozenset(i for i, n in zip(special, names, strict=True) if n in texts)

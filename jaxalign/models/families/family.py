"""What a family of models is: how its files become parameters, and where they lie."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec as P

from jaxalign.data.patches import Patcher
from jaxalign.models.config import (
    ConnectorConfig,
    DecoderConfig,
    ModelConfig,
    VisionConfig,
)
from jaxalign.models.families.rules import HEAD, IGNORED, SHARDING, Rule


__all__ = ["Eyes", "Family"]


class Eyes(NamedTuple):
    """How a family sees."""

    read: Callable[
        [Mapping[str, Any], DecoderConfig], tuple[VisionConfig, ConnectorConfig]
    ]
    """Reads tower and connector out of config.json, given the decoder."""
    open_patcher: Callable[..., Patcher]
    """``(directory, config, tokenizer, max_pixels=None)``: how a checkpoint makes
    patches of pictures."""


class Family(NamedTuple):
    """A family of models, one file each in this folder."""

    model_type: str
    """What config.json calls it."""
    read_text: Callable[[Mapping[str, Any]], DecoderConfig]
    """Reads the decoder out of config.json; refuses what is not implemented."""
    rules: tuple[Rule, ...]
    """Which tensor is which parameter; the first is the embeddings'."""
    head: str = HEAD
    """The tensor that is left unread where the embeddings are tied."""
    ignored: tuple[Rule, ...] = IGNORED
    """Tensors that are computed, not learned."""
    sharding: tuple[tuple[str, P], ...] = SHARDING
    """Which axis of a parameter is split over what, by pattern."""
    canonical: Callable[[str], str] = str
    """The name that :attr:`rules` have for a tensor or module that files may call
    otherwise: what the family's model calls it in transformers 5."""
    eyes: Eyes | None = None
    """Of a vision-language family."""
    narrowed: Callable[["Family", Mapping[str, Any]], "Family"] | None = None
    """Returns the family of one config.json, where :attr:`rules` depend on that."""

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """Read config.json.

        Raises:
          UserError: a field is missing or of the wrong kind, or asks for an option that
            is not implemented.
        """
        text = self.read_text(config)
        if self.eyes is None:
            return ModelConfig(text=text)
        vision, connector = self.eyes.read(config, text)
        return ModelConfig(text=text, vision=vision, connector=connector)

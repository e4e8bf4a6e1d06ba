"""What a family of models is: how its files become parameters, and where they lie."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec as P

from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.models.families.rules import HEAD, IGNORED, SHARDING, Rule


__all__ = ["Family"]


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

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """Read config.json.

        Raises:
          UserError: a field is missing or of the wrong kind, or asks for an option that
            is not implemented.
        """
        return ModelConfig(text=self.read_text(config))

"""Mixtral: Mistral with a mixture of experts in every layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import fields, mistral
from jaxalign.models.families.family import Family
from jaxalign.models.families.rules import decoder_rules


__all__ = ["FAMILY", "read_text"]

MODEL_TYPE = "mixtral"


def read_text(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json.

    Raises:
      UserError: a field is missing or of the wrong kind, or asks for an option that is
        not implemented.
    """
    fields.expect(config, MODEL_TYPE, router_jitter_noise=0.0)
    return dataclasses.replace(
        mistral.read_text(config), mixture=fields.mixture(config, normalize=True)
    )


FAMILY = Family(
    MODEL_TYPE,
    read_text,
    decoder_rules(
        biases=False,
        experts={
            "router": "block_sparse_moe.gate",
            "gate_proj": "block_sparse_moe.experts.{expert}.w1",
            "up_proj": "block_sparse_moe.experts.{expert}.w3",
            "down_proj": "block_sparse_moe.experts.{expert}.w2",
        },
    ),
)

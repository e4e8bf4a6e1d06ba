"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import fields, qwen3
from jaxalign.models.families.family import Family
from jaxalign.models.families.rules import decoder_rules


__all__ = ["FAMILY", "read_text"]

MODEL_TYPE = "qwen3_moe"


def read_text(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json.

    Raises:
      UserError: a field is missing or of the wrong kind, or asks for an option that is
        not implemented.
    """
    # Layers with and without experts are not mixed here.
    fields.expect(config, MODEL_TYPE, decoder_sparse_step=1, mlp_only_layers=([],))
    return dataclasses.replace(
        qwen3.read_text(config),
        mlp_width=fields.integer(config, "moe_intermediate_size"),
        mixture=fields.mixture(config, normalize=fields.flag(config, "norm_topk_prob")),
    )


FAMILY = Family(
    MODEL_TYPE,
    read_text,
    decoder_rules(
        qk_norm=True,
        experts={
            "router": "mlp.gate",
            "gate_proj": "mlp.experts.{expert}.gate_proj",
            "up_proj": "mlp.experts.{expert}.up_proj",
            "down_proj": "mlp.experts.{expert}.down_proj",
        },
    ),
)

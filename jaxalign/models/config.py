"""What a decoder is: sizes and options, as a family reads them from config.json."""

import dataclasses
from typing import Literal

from jaxalign.models import rotary


__all__ = ["DecoderConfig", "Mixture", "ModelConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """A mixture of experts in the place of each layer's MLP.

    Attributes:
      experts: how many MLPs a layer has; each is as wide as ``mlp_width`` says.
      per_token: how many of them a token goes through.
      normalize: whether the weights of those add up to 1.
    """

    experts: int
    per_token: int
    normalize: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and options of a decoder; what a family reads from config.json.

    Attributes:
      vocab_size: rows of the embeddings.
      width: of the stream.
      mlp_width: of the MLP, or of an expert.
      num_layers: layers.
      num_heads: heads of the queries.
      num_kv_heads: heads of keys and values.
      head_dim: size of a head.
      norm_eps: added to the mean square.
      rotaries: the ways in which layers rotate queries and keys.
      layer_rotaries: which of them each layer has; empty if all have the first.
      windows: how far back each layer sees, None for all; empty if all see all.
      tie_embeddings: whether the head is the embeddings.
      qkv_bias: of the projections into attention.
      o_bias: of the projection out of it.
      mlp_bias: of the MLP's projections.
      fused: whether queries, keys and values are one projection, ``qkv_proj``, and the
        MLP's gate and up another, ``gate_up_proj``.
      norms: ``before`` a block, on its ``output``, or ``both``.
      norm_offset: added to the norms' scales, 1 for Gemma.
      qk_norm: of queries and keys before rotation: by ``head``, or over the ``whole``
        projection.
      activation: of the MLP.
      mixture: of experts; None for one MLP.
      query_scale: of attention's scores; None is 1/sqrt(head_dim).
      attention_softcap: see ``attention.attention``.
      logits_softcap: the same of the logits.
      embedding_scale: what embeddings are multiplied by.
      residual_scale: what a block's output is multiplied by.
      logits_divisor: what logits are divided by.
    """

    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rotaries: tuple[rotary.Rotary, ...]
    layer_rotaries: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = ()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False
    norms: Literal["before", "output", "both"] = "before"
    norm_offset: float = 0.0
    qk_norm: Literal["head", "whole"] | None = None
    activation: Literal["silu", "gelu_tanh"] = "silu"
    mixture: Mixture | None = None
    query_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a model is made of; a part that it lacks is None.

    Attributes:
      text: the decoder.
    """

    text: DecoderConfig

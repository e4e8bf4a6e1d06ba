"""What a model is: sizes and options, as a family reads them from config.json."""

import dataclasses
from typing import Literal

from jaxalign.models import rotary


__all__ = [
    "ConnectorConfig",
    "DecoderConfig",
    "Mixture",
    "ModelConfig",
    "TowerNames",
    "VisionConfig",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """A mixture of experts in the place of each layer's MLP.

    Attributes:
      experts: how many MLPs a layer has; each is as wide as ``mlp_width`` says.
      per_token: how many of them a token goes through.
      normalize: whether the weights of those add up to 1.

    >>> Mixture(experts=8, per_token=2, normalize=True).per_token
    2
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

    >>> turned = rotary.Rotary(theta=10000.0, dims=4)
    >>> sizes = {"vocab_size": 8, "width": 8, "mlp_width": 16, "num_layers": 2}
    >>> heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
    >>> DecoderConfig(**sizes, **heads, norm_eps=1e-6, rotaries=(turned,)).norms
    'before'
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
class TowerNames:
    """What a tower's blocks and linear layers are called, as its files have them.

    Attributes:
      attention: the block.
      query: a projection into it, and so ``key`` and ``value``.
      key: see there.
      value: see there.
      qkv: the three in one; None where they are not fused.
      out: the projection out of it.
      up: the MLP's first layer, and ``gate`` what it is multiplied with, if anything.
      gate: see there.
      down: the MLP's last layer.

    >>> TowerNames(attention="attn", qkv="qkv", out="proj").up
    'fc1'
    """

    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    qkv: str | None = None
    out: str = "out_proj"
    up: str = "fc1"
    gate: str | None = None
    down: str = "fc2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes and options of a vision tower: a transformer over the patches of images.

    Attributes:
      width: of the stream.
      mlp_width: of the MLP.
      num_layers: layers that are run; a checkpoint may have more.
      num_heads: heads of attention.
      patch_values: numbers of a patch, of one frame.
      frames: how often a picture's patch is repeated before it is embedded (2 where a
        tower takes pairs of a video's frames).
      patch_bias: of the patches' embedding.
      class_token: whether an image has one.
      positions: rows of the table of learned positions, the class token's first; 0
        for none.
      side: patches of a row of that table's grid.
      rotary_theta: base of rotary positions in two dimensions; None for none.
      norm: kind of the norms.
      norm_eps: added to the variance, or the mean square.
      first_norm: whether the embedded patches are normed.
      last_norm: whether the last layer's output is.
      qkv_bias: of the projections into attention.
      layer_scale: whether a block's output is scaled by a learned number a feature.
      activation: of the MLP.
      window: side, in patches, of the squares in which a layer's patches see each
        other; None where all of an image do.
      full_layers: layers without a window.
      names: of the linear layers.

    >>> sizes = {"width": 8, "mlp_width": 16, "num_layers": 2, "num_heads": 2}
    >>> VisionConfig(**sizes, patch_values=3 * 14 * 14, positions=16, side=4).names.qkv
    """

    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    patch_values: int
    frames: int = 1
    patch_bias: bool = True
    class_token: bool = False
    positions: int = 0
    side: int = 1
    rotary_theta: float | None = None
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-6
    first_norm: bool = False
    last_norm: bool = False
    qkv_bias: bool = True
    layer_scale: bool = False
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu"] = "gelu"
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    names: TowerNames = TowerNames()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """What makes features of a tower's patches.

    Each patch is normed, those of a unit are joined, and linear layers follow, with an
    exact GELU between them.

    Attributes:
      unit: patches that become one feature.
      layers: name and outputs of each linear layer, the last one's the decoder's width.
      bias: of the linear layers.
      norm: whether each patch is normed, by root mean square or not at all.
      norm_eps: added to the mean square.

    >>> layers = (("linear_1", 16), ("linear_2", 8))  # four patches to a feature [8]
    >>> ConnectorConfig(unit=4, layers=layers, norm="rms").bias
    True
    """

    unit: int
    layers: tuple[tuple[str, int], ...]
    bias: bool = True
    norm: Literal["layer", "rms"] | None = None
    norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a model is made of; a part that it lacks is None.

    Attributes:
      text: the decoder.
      vision: the tower.
      connector: what leads from one to the other.

    >>> turned = rotary.Rotary(theta=10000.0, dims=4)
    >>> sizes = {"vocab_size": 8, "width": 8, "mlp_width": 16, "num_layers": 2}
    >>> heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
    >>> text = DecoderConfig(**sizes, **heads, norm_eps=1e-6, rotaries=(turned,))
    >>> ModelConfig(text=text).sees
    False
    """

    text: DecoderConfig
    vision: VisionConfig | None = None
    connector: ConnectorConfig | None = None

    @property
    def sees(self) -> bool:
        """Whether the model takes pictures."""
        return self.vision is not None

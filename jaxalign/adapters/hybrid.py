"""HLPT and H2LPT: gated LoRA in the bottom layers, gated prefixes in the top ones.

J. Gu, Z. Wang, Y. Zhang, Z. Zhang, P. Gong: From Bottom to Top: Extending the Potential
of Parameter Efficient Fine-Tuning, EMNLP 2024, https://aclanthology.org/
2024.emnlp-main.204. HLPT splits the layers three to one; H2LPT leaves the middle half
alone, three eighths below it and one eighth above.

The published gates average over the whole sequence. Here they are causal unless
``faithful`` is set, and prefixes start from a text instead of N(0, 1).
"""

import dataclasses
from typing import Literal, NamedTuple

from jaxalign.adapters import gates, prefix, selection
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.adapters.prefix import PrefixConfig
from jaxalign.configs import check_fields
from jaxalign.errors import UserError


__all__ = ["H2LPTConfig", "HLPTConfig", "Parts", "parts"]


class Parts(NamedTuple):
    """What an adapter is made of; None for what it lacks."""

    lora: LoRAConfig | None
    prefix: PrefixConfig | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HLPTConfig:
    """Options of HLPT.

    Attributes:
      name: the adapter.
      rank: of LoRA.
      alpha: of LoRA, whose update is scaled by alpha / rank.
      targets: linear layers that get LoRA, see ``LoRAConfig``.
      layers: layers that get LoRA, see ``selection.parse_layers``.
      dropout: share of LoRA's inputs that are dropped in training.
      rslora: scale by alpha / sqrt(rank) instead.
      dora: train the lengths of the weight's columns too; with gate none.
      init: how LoRA starts, see ``LoRAConfig``.
      prefix_length: virtual tokens of each layer.
      prefix_layers: layers that get a prefix; ``rest`` are those without LoRA.
      mode: one softmax over prefix and text, or two; see ``PrefixConfig``.
      prefix_init: how the prefix starts; default ``text``, if faithful ``normal``.
      prefix_text: the text to start from.
      positions: where the text begins; default ``unshifted``, if faithful ``shifted``.
      gate: of both parts; default ``token``.
      faithful: the published formulation, for comparison: gates are means over the
        whole sequence, later tokens included, and multiply the prefix's keys and
        values. It cannot share a prompt between two responses, so it trains with
        objectives of single completions, such as sft.

    >>> HLPTConfig().layers, HLPTConfig().prefix_layers
    ('bottom:0.75', 'rest')
    """

    name: Literal["hlpt"] = "hlpt"
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("down_proj",)
    layers: str = "bottom:0.75"
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: Literal["zero", "pissa"] = "zero"
    prefix_length: int = 20
    prefix_layers: str = "rest"
    mode: prefix.Mode = "concat"
    prefix_init: prefix.Start | None = None
    prefix_text: str = prefix.TEXT
    positions: prefix.Positions | None = None
    gate: gates.Gate | None = None
    faithful: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.faithful and self.mode != "concat":
            raise UserError(
                "adapter.faithful is the published formulation, which has mode concat: "
                f"got {self.mode}"
            )
        if self.faithful and self.gate not in (None, "mean"):
            raise UserError(
                "adapter.faithful is the published formulation, whose gate is the mean "
                f"over the sequence: got gate {self.gate}. Leave one of them out"
            )
        if self.faithful and (self.prefix_init or "normal") != "normal":
            raise UserError(
                "adapter.faithful is the published formulation, whose prefix starts "
                f"from N(0, 1): got prefix_init {self.prefix_init}"
            )
        if self.faithful and (self.positions or "shifted") != "shifted":
            raise UserError(
                "adapter.faithful is the published formulation, in which the text "
                f"begins after the prefix: got positions {self.positions}"
            )
        _parts(self, "0")  # checks the values of both


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2LPTConfig(HLPTConfig):
    """Options of H2LPT: those of HLPT with the middle half of the layers left alone.

    >>> H2LPTConfig().layers, H2LPTConfig().prefix_layers
    ('bottom:0.375', 'top:0.125')
    """

    name: Literal["h2lpt"] = "h2lpt"  # pyright: ignore[reportIncompatibleVariableOverride]
    layers: str = "bottom:0.375"
    prefix_layers: str = "top:0.125"


def parts(config: HLPTConfig, num_layers: int) -> Parts:
    """Return the LoRA and the prefix that a hybrid is made of.

    Raises:
      UserError: no layer is left for the prefix.
    Example:
      >>> made = parts(HLPTConfig(), num_layers=4)
      >>> made.lora.layers, made.prefix.prefix_layers
      ('bottom:0.75', '3')
    """
    if config.prefix_layers != "rest":
        return _parts(config, config.prefix_layers)
    lora_layers = selection.parse_layers(config.layers, num_layers)
    rest = [i for i in range(num_layers) if i not in lora_layers]
    if not rest:
        raise UserError(
            f"adapter.layers {config.layers!r} leaves none of the {num_layers} "
            "layer(s) for a prefix: choose fewer, or give adapter.prefix_layers"
        )
    return _parts(config, ",".join(map(str, rest)))


def _parts(config: HLPTConfig, prefix_layers: str) -> Parts:
    faithful = config.faithful
    gate = config.gate or ("mean" if faithful else "token")
    return Parts(
        LoRAConfig(
            rank=config.rank,
            alpha=config.alpha,
            targets=config.targets,
            layers=config.layers,
            dropout=config.dropout,
            rslora=config.rslora,
            dora=config.dora,
            init=config.init,
            gate=gate,
        ),
        PrefixConfig(
            prefix_length=config.prefix_length,
            prefix_layers=prefix_layers,
            mode=config.mode,
            prefix_init=config.prefix_init or ("normal" if faithful else "text"),
            prefix_text=config.prefix_text,
            positions=config.positions or ("shifted" if faithful else "unshifted"),
            gate=gate,
        ),
    )

"""What families' tables are made of: rows of names, and where adapters lie."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax.sharding import PartitionSpec as P


__all__ = [
    "FOUR_NORMS",
    "HEAD",
    "IGNORED",
    "SHARDING",
    "Rule",
    "adapter_sharding",
    "decoder_rules",
]


class Rule(NamedTuple):
    """A Hugging Face tensor name and the parameter that it is.

    ``{layer}`` in ``hf`` stands for a layer's number; the parameter then begins with
    ``layers/`` and lies in the stack of the layer's group. ``{expert}`` behind it
    stands for an expert's, the next axis of the stack.
    """

    hf: str
    path: str
    transpose: bool = False
    """Hugging Face stores linear weights [out, in], Flax [in, out]."""
    reshaped: bool = False
    """Whether it is stored with other axes: an embedding of patches as the convolution
    that it is, [out, channel, row, column]; a class token as [1, 1, d]."""

    @property
    def axes(self) -> int:
        """Return how many numbers its tensors' names have."""
        return self.hf.count("{")

    def match(self, name: str) -> tuple[int, ...] | None:
        """Return the numbers in a tensor name, None if it is not this rule's.

        >>> Rule("layers.{layer}.experts.{expert}.w", "").match("layers.2.experts.7.w")
        (2, 7)
        """
        found = _pattern(self.hf).fullmatch(name)
        return None if found is None else tuple(map(int, found.groups()))

    def name(self, *index: int) -> str:
        """Return the tensor name for a layer, or for an expert of it.

        >>> Rule("model.layers.{layer}.a", "layers/a").name(3)
        'model.layers.3.a'
        """
        return self.hf.format(**dict(zip(("layer", "expert"), index, strict=False)))


@functools.cache
def _pattern(hf: str) -> re.Pattern[str]:
    number = "(0|[1-9][0-9]{0,8})"
    return re.compile(re.sub(r"\\\{\w+\\\}", number, re.escape(hf)))


def adapter_sharding(*, into: str, out_of: str) -> tuple[tuple[str, P], ...]:
    """Return sharding rules for adapters that follow the layers that they adapt.

    Args:
      into: names, without ``_proj``, of what leads into a block: columns are split.
      out_of: of what leads out of it: rows are split.
    """
    return (
        (rf"layers_.*/experts/({into})_proj/a0?", P(None, None, "fsdp", None)),
        (rf"layers_.*/experts/({into})_proj/b0?", P(None, None, None, "tensor")),
        (rf"layers_.*/experts/({out_of})_proj/a0?", P(None, None, "tensor", None)),
        (rf"layers_.*/experts/({out_of})_proj/b0?", P(None, None, None, "fsdp")),
        (r"layers_.*/router/(a0?|b0?|magnitude)", P()),
        (rf"layers_.*/({into})_proj/a0?", P(None, "fsdp", None)),
        (rf"layers_.*/({into})_proj/b0?", P(None, None, "tensor")),
        (rf"layers_.*/({into})_proj/magnitude", P(None, "tensor")),
        (rf"layers_.*/({out_of})_proj/a0?", P(None, "tensor", None)),
        (rf"layers_.*/({out_of})_proj/b0?", P(None, None, "fsdp")),
        (rf"layers_.*/({out_of})_proj/magnitude", P(None, "fsdp")),
        (r"lm_head/a0?", P("fsdp", None)),
        (r"lm_head/b0?", P(None, "tensor")),
        (r"lm_head/magnitude", P("tensor")),
        (r"embed_tokens/a", P("tensor", None)),
        (r"embed_tokens/b", P(None, "fsdp")),
        (r"layers_.*/self_attn/(key|value)", P(None, "tensor", None, None)),
        # One number, or one a feature of the input.
        (r".*/(scale|gate|log_gate|mix|position)", P()),
        (r".*/(token|sequence|mean)_gate", P()),
        # Of a few tokens, and of what has no bias in the base.
        (r"(embed_tokens|lm_head)/(rows|indices)", P()),
        (r"(lm_head|layers_.*)/bias", P()),
    )


HEAD = "lm_head.weight"
"""Left unread where the embeddings are tied, as transformers does."""

IGNORED: tuple[Rule, ...] = (
    Rule("model.layers.{layer}.self_attn.rotary_emb.inv_freq", ""),
    Rule("model.rotary_emb.inv_freq", ""),
)
"""Buffers of old checkpoints that are computed, not learned."""


FOUR_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
"""Of layers that are normed before their blocks and after them."""


def decoder_rules(
    *,
    norms: Sequence[str] = ("input_layernorm", "post_attention_layernorm"),
    qk_norm: bool = False,
    fused: bool = False,
    biases: bool = True,
    experts: Mapping[str, str] | None = None,
) -> tuple[Rule, ...]:
    """Return the table of a decoder with Hugging Face's usual names.

    Args:
      norms: of a layer.
      qk_norm: whether queries and keys have norms.
      fused: whether q, k, v and gate, up are stored as one each.
      biases: whether linear layers may have them.
      experts: of a mixture of experts, the names of ``router`` and of an expert's
        ``gate_proj``, ``up_proj`` and ``down_proj``.
    """
    layer = "model.layers.{layer}"
    attention = ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj")
    mlp = ("gate_up_proj",) if fused else ("gate_proj", "up_proj")
    linear = {
        f"self_attn.{name}": f"self_attn/{name}" for name in (*attention, "o_proj")
    }
    if experts is None:
        linear |= {f"mlp.{name}": f"mlp/{name}" for name in (*mlp, "down_proj")}
    else:
        linear[experts["router"]] = "mlp/router"
        for name in (*mlp, "down_proj"):
            linear[experts[name]] = f"mlp/experts/{name}"
    scales = [*norms, *(("self_attn.q_norm", "self_attn.k_norm") if qk_norm else ())]

    return (
        Rule("model.embed_tokens.weight", "embed_tokens/embedding"),
        *(
            Rule(f"{layer}.{name}.weight", f"layers/{path}/kernel", transpose=True)
            for name, path in linear.items()
        ),
        *(
            Rule(f"{layer}.{name}.bias", f"layers/{path}/bias")
            for name, path in linear.items()
            if biases
        ),
        *(
            Rule(f"{layer}.{name}.weight", f"layers/{name.replace('.', '/')}/scale")
            for name in scales
        ),
        Rule("model.norm.weight", "norm/scale"),
        Rule(HEAD, "lm_head/kernel", transpose=True),
    )


_INTO = "q|k|v|qkv|gate|up|gate_up"
_OUT_OF = "o|down"

# Columns of what leads into a block and rows of what leads out of it are split over
# ``tensor``; the other axis over ``fsdp``. A stacked leaf has the layer axis in front.
SHARDING: tuple[tuple[str, P], ...] = (
    (r"embed_tokens/embedding", P("tensor", "fsdp")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
    (rf"layers_.*/experts/({_INTO})_proj/kernel", P(None, None, "fsdp", "tensor")),
    (rf"layers_.*/experts/({_OUT_OF})_proj/kernel", P(None, None, "tensor", "fsdp")),
    (r"layers_.*/router/kernel", P(None, "fsdp", None)),
    (rf"layers_.*/({_INTO})_proj/kernel", P(None, "fsdp", "tensor")),
    (rf"layers_.*/({_OUT_OF})_proj/kernel", P(None, "tensor", "fsdp")),
    (rf"layers_.*/({_INTO})_proj/bias", P(None, "tensor")),
    (rf"layers_.*/({_OUT_OF})_proj/bias", P(None, None)),
    (r".*norm/scale", P()),
    *adapter_sharding(into=_INTO, out_of=_OUT_OF),
)
"""Of decoders whose layers have Hugging Face's usual names."""

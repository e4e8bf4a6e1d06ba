"""What families' tables are made of: rows of names, and where adapters lie."""

import re
from typing import NamedTuple

from jax.sharding import PartitionSpec as P


__all__ = ["Rule", "adapter_sharding"]


class Rule(NamedTuple):
    """A Hugging Face tensor name and the parameter that it is.

    ``{layer}`` in ``hf`` stands for a layer's number; the parameter then begins with
    ``layers/`` and lies in the stack of the layer's group.
    """

    hf: str
    path: str
    transpose: bool = False
    """Hugging Face stores linear weights [out, in], Flax [in, out]."""

    def match(self, name: str) -> tuple[bool, int | None]:
        """Return whether a tensor name is this rule's, and of which layer."""
        pattern = re.escape(self.hf).replace(r"\{layer\}", "(0|[1-9][0-9]{0,8})")
        found = re.fullmatch(pattern, name)
        if found is None:
            return False, None
        return True, int(found.group(1)) if found.groups() else None

    def name(self, layer: int | None = None) -> str:
        """Return the tensor name for a layer.

        >>> Rule("model.layers.{layer}.a", "layers/a").name(3)
        'model.layers.3.a'
        """
        return self.hf if layer is None else self.hf.format(layer=layer)


def adapter_sharding(*, into: str, out_of: str) -> tuple[tuple[str, P], ...]:
    """Return sharding rules for adapters that follow the layers that they adapt.

    Args:
      into: names, without ``_proj``, of what leads into a block: columns are split.
      out_of: of what leads out of it: rows are split.
    """
    return (
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
    )

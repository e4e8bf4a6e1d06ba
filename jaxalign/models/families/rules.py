"""One row of a family's table: how a Hugging Face tensor and a parameter correspond."""

import re
from typing import NamedTuple


__all__ = ["Rule"]


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

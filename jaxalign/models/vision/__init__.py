"""Vision: a tower over patches of pictures, what connects it, and the merge."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.models.vision import connector, merge, sight, tower

__all__ = ["connector", "merge", "sight", "tower"]

__getattr__, __dir__ = submodules(__name__, __all__)

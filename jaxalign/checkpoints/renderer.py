"""How a checkpoint writes and reads text: what comes beside its weights for that."""

from pathlib import Path

from jaxalign.checkpoints import hub
from jaxalign.data.rendering import Renderer
from jaxalign.data.tokenizer import load_tokenizer


__all__ = ["open_renderer"]


def open_renderer(model: str | Path) -> Renderer:
    """Return the renderer of a model; of one that is not here only small files come.

    Args:
      model: Hugging Face directory or id.
    Raises:
      UserError: see ``hub.directory_of`` and ``tokenizer.load_tokenizer``.
    """
    return Renderer(load_tokenizer(str(hub.directory_of(model, weights=False))))

"""How a checkpoint writes and reads text: what comes beside its weights for that."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxalign.checkpoints import hub, runs, tensors
from jaxalign.data.patches import Patcher
from jaxalign.data.rendering import Renderer
from jaxalign.data.tokenizer import Tokenizer, load_tokenizer
from jaxalign.errors import UserError
from jaxalign.models.families import FAMILIES


__all__ = ["max_pixels_of", "open_renderer", "template_kwargs_of"]


def open_renderer(
    model: str | Path,
    template_kwargs: Mapping[str, Any] | None = None,
    *,
    max_pixels: int | None = None,
) -> Renderer:
    """Return the renderer of a model; of one that is not here only small files come.

    Args:
      model: Hugging Face directory or id.
      template_kwargs: what the chat template is given beside conversations.
      max_pixels: of a picture, larger ones are made smaller; default what the
        checkpoint's own files say. Each family has its own limit.
    Raises:
      UserError: see ``hub.directory_of`` and ``tokenizer.load_tokenizer``; or the
        template is to be given something and there is none.
    Example::

      renderer = open_renderer("qwen3", {"enable_thinking": False})
    """
    directory = hub.directory_of(model, weights=False)
    tokenizer = load_tokenizer(str(directory))
    patcher = _patcher(directory, tokenizer, max_pixels)
    renderer = Renderer(tokenizer, dict(template_kwargs or {}), patcher)
    if template_kwargs and not renderer.has_template:
        raise UserError(
            f"chat_template_kwargs has no effect: the tokenizer of {model} has no chat "
            "template. Leave it out"
        )
    return renderer


def _patcher(
    directory: Path, tokenizer: Tokenizer, max_pixels: int | None
) -> Patcher | None:
    """Return how a checkpoint makes patches of pictures, None where it does not see."""
    config: Mapping[str, Any] = {}
    if (directory / "config.json").is_file():
        config = tensors.read_json(directory / "config.json")
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or family.eyes is None:
        if max_pixels is not None:
            raise UserError(
                f"max_pixels {max_pixels} has no effect: {directory} is no "
                "vision-language model. Leave it out"
            )
        return None
    return family.eyes.open_patcher(directory, config, tokenizer, max_pixels=max_pixels)


def max_pixels_of(given: int | None, adapter: str | None) -> int | None:
    """Return how large pictures may be: as asked, or as in an adapter's run.

    Args:
      given: the option.
      adapter: what is put on the model; only a run directory remembers.
    Raises:
      UserError: something else is asked for than the run was trained with.
    Example:
      >>> max_pixels_of(1024, None)
      1024
    """
    if (settings := runs.settings_of(adapter)) is None:
        return given
    kept = settings.get("max_pixels")
    if given not in (None, kept):
        raise UserError(
            f"max_pixels {given}: {adapter} was trained with {kept or 'the default'}. "
            "Leave the option out, or train another run"
        )
    return kept


def template_kwargs_of(
    given: Mapping[str, Any] | None, adapter: str | None
) -> Mapping[str, Any]:
    """Return what the chat template is given: as asked, or as an adapter's run was.

    Args:
      given: the option; None: what the run was trained with, elsewhere nothing.
      adapter: what is put on the model; only a run directory remembers.
    Raises:
      UserError: something else is asked for than the run was trained with.
    Example:
      >>> template_kwargs_of({"enable_thinking": False}, None)
      {'enable_thinking': False}
    """
    if (settings := runs.settings_of(adapter)) is None:
        return given or {}
    kept = settings.get("chat_template_kwargs") or {}
    if given is not None and dict(given) != kept:
        raise UserError(
            f"chat_template_kwargs {dict(given)}: {adapter} was trained with {kept}. "
            "Leave the option out, or train another run"
        )
    return kept

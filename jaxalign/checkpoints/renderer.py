"""How a checkpoint writes and reads text: what comes beside its weights for that."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxalign.checkpoints import hub, runs
from jaxalign.data.rendering import Renderer
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.errors import UserError


__all__ = ["open_renderer", "template_kwargs_of"]


def open_renderer(
    model: str | Path, template_kwargs: Mapping[str, Any] | None = None
) -> Renderer:
    """Return the renderer of a model; of one that is not here only small files come.

    Args:
      model: Hugging Face directory or id.
      template_kwargs: what the chat template is given beside conversations.
    Raises:
      UserError: see ``hub.directory_of`` and ``tokenizer.load_tokenizer``; or the
        template is to be given something and there is none.
    """
    tokenizer = load_tokenizer(str(hub.directory_of(model, weights=False)))
    renderer = Renderer(tokenizer, dict(template_kwargs or {}))
    if template_kwargs and not renderer.has_template:
        raise UserError(
            f"chat_template_kwargs has no effect: the tokenizer of {model} has no chat "
            "template. Leave it out"
        )
    return renderer


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
    if adapter is None or not runs.is_run(run := Path(adapter)):
        return given or {}
    kept = runs.read_settings(run).get("chat_template_kwargs") or {}
    if given is not None and dict(given) != kept:
        raise UserError(
            f"chat_template_kwargs {dict(given)}: {run} was trained with {kept}. Leave "
            "the option out, or train another run"
        )
    return kept

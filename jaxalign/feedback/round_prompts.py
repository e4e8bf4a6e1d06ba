"""The prompts of rounds: their accepted answers, and that a gate has others."""

import json

from jaxalign.data import records, rows
from jaxalign.errors import UserError
from jaxalign.feedback import annotate
from jaxalign.feedback.config import RLAIFConfig


__all__ = ["check_prompts", "references_of"]


def references_of(prompts: str, needed: bool) -> list[tuple[str, ...]]:
    """Return the accepted answers of each prompt of a file, () where it has none.

    Raises:
      UserError: they are needed and a prompt has none, or are no list of texts.
    """
    found = []
    for columns, where in rows.read_rows(prompts):
        given = annotate.references_of(columns, where)
        if needed and not any(reference.strip() for reference in given):
            raise UserError(
                f"{where}: field references is missing: decomposer.name hops compares "
                "with accepted answers. Give a list of texts"
            )
        found.append(given)
    return found


def check_prompts(config: RLAIFConfig) -> None:
    """Refuse gate prompts that are trained on."""
    train, held = (
        {
            _known(prompt)
            for prompt in records.read_prompts(path, image_dir=config.image_dir)
        }
        for path in (config.prompts, config.gate.prompts)
    )
    if shared := len(train & held):
        raise UserError(
            f"gate.prompts {config.gate.prompts}: {shared} of {len(held)} prompts are "
            f"also in {config.prompts}: a gate needs prompts that are held out. Take "
            "them out of one of the files"
        )


def _known(prompt: records.Prompt) -> str:
    """Return what tells a prompt from others: its words and its pictures."""
    words = json.dumps(prompt.given, sort_keys=True, default=lambda picture: "")
    return f"{words} {[p._replace(where='') for p in prompt.images]}"

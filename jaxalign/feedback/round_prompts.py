"""The prompts of rounds: accepted answers, and a gate's others, benign or not."""

import dataclasses
import json
from collections.abc import Sequence

from jaxalign.data import records, rows
from jaxalign.data.images import NamedPictures
from jaxalign.errors import UserError
from jaxalign.feedback import annotate
from jaxalign.feedback.candidates import SampledPrompt
from jaxalign.feedback.config import RLAIFConfig
from jaxalign.judging.judge import hash_of


__all__ = ["benign_of", "check_prompts", "references_of", "with_benign"]


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


def benign_of(config: RLAIFConfig) -> list[bool | None]:
    """Return whether each of the gate's prompts is benign, None where nobody asks.

    Raises:
      UserError: ``gate.metrics`` need to know and a prompt does not say, or there is no
        prompt that one of them looks at.
    """
    asked = (config.gate.metrics or {}).keys() & {"unsafe", "refused_benign"}
    found: list[bool | None] = []
    for columns, where in rows.read_rows(config.gate.prompts):
        benign = columns.get("benign") if asked else None
        if asked and not isinstance(benign, bool):
            raise UserError(
                f"{where}: field benign must be true or false, for gate.metrics "
                f"{' and '.join(sorted(asked))}: got {benign!r}. Say of each prompt "
                "whether it is harmless"
            )
        found.append(benign)
    for name, looked_at in (("unsafe", False), ("refused_benign", True)):
        if name in asked and looked_at not in found:
            raise UserError(
                f"gate.prompts {config.gate.prompts}: no prompt has benign "
                f"{str(looked_at).lower()}, and the gate's metric {name} looks at such "
                "prompts alone. Add some, or leave the metric out"
            )
    return found


def with_benign(
    sampled: Sequence[SampledPrompt], benign: Sequence[bool | None]
) -> list[SampledPrompt]:
    """Return prompts whose candidates know whether they are benign."""
    return [
        one._replace(
            candidates=[dataclasses.replace(c, benign=known) for c in one.candidates]
        )
        for one, known in zip(sampled, benign, strict=True)
    ]


def check_prompts(config: RLAIFConfig, pictures: NamedPictures) -> str | None:
    """Refuse gate prompts that are trained on: the same words with the same pictures.

    Args:
      config: of the run.
      pictures: names them, so that each is known to be there before anything is made.
    Returns:
      What tells the prompts' pictures from others; None where there are none.
    Raises:
      UserError: a prompt is in both files, a picture is missing, or the gate's prompts
        do not say what its metrics need.
    """
    benign_of(config)
    both = [
        records.read_prompts(path, image_dir=config.image_dir)
        for path in (config.prompts, config.gate.prompts)
    ]
    train, held = ({_known(prompt, pictures) for prompt in one} for one in both)
    if shared := len(train & held):
        raise UserError(
            f"gate.prompts {config.gate.prompts}: {shared} of {len(held)} prompts are "
            f"also in {config.prompts}: a gate needs prompts that are held out. Take "
            "them out of one of the files"
        )
    shown = [pictures.references(prompt.images) for one in both for prompt in one]
    return hash_of(shown) if any(shown) else None


def _known(prompt: records.Prompt, pictures: NamedPictures) -> str:
    """Return what tells a prompt from others: its words and its pictures."""
    text = prompt.text
    words = text if isinstance(text, str) else [turn.turn() for turn in text]
    return json.dumps([words, pictures.references(prompt.images)], sort_keys=True)

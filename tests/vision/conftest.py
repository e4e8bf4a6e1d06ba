"""Tiny models that see, once a run, with their records and what transformers says."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers.models.smolvlm import processing_smolvlm

from tests import synthetic, vision_models, vision_records


# It is not installed, and spells the number of a video's frames.
setattr(processing_smolvlm, "num2words", str)  # noqa: B010


class Scene(NamedTuple):
    """A checkpoint and records for it."""

    kind: str
    model: Path
    data: Path
    """JSON Lines; the pictures lie beside it."""
    rows: list[dict[str, Any]]
    """What is in it."""

    def theirs(self) -> vision_records.Reference:
        """Return the checkpoint as transformers has it."""
        return _theirs(self.model)


_theirs = functools.cache(vision_records.reference)


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scene]:
    """Return ``scene(kind)``, of ``vision_models.KINDS``."""

    @functools.cache
    def made(kind: str) -> Scene:
        place = tmp_path_factory.mktemp(kind)
        model = vision_models.write(kind, place / "model")
        rows = vision_records.records(kind, place)
        return Scene(
            kind, model, synthetic.write_jsonl(place / "pairs.jsonl", rows), rows
        )

    return made

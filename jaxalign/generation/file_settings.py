"""What a file of completions was made with, and how much of it is there."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxalign import shards
from jaxalign.checkpoints import adapter_files, contents, runs
from jaxalign.checkpoints.renderer import open_renderer
from jaxalign.configs import to_dict
from jaxalign.data import rows, shard_files
from jaxalign.errors import UserError
from jaxalign.generation import text_model


if TYPE_CHECKING:
    from jaxalign.generation.files import GenerateConfig

__all__ = ["kept_dtype", "resume", "settings"]

_FREE = ("out", "batch_slots", "mesh", "model", "adapter", "data", "context", "shard")
"""Changing these changes no text, or is seen by what the files hold."""


def kept_dtype(out: Path) -> str | None:
    """Return the dtype that an output was begun with."""
    kept = shard_files.said_of(out)
    return kept.get("dtype") if kept is not None and out.exists() else None


def settings(config: "GenerateConfig", *, shown: bool, lines: int) -> dict[str, Any]:
    """Return all that decides the texts.

    Args:
      config: of the command.
      shown: whether prompts have pictures.
      lines: of the complete file.
    """
    found = {k: v for k, v in to_dict(config).items() if k not in _FREE}
    # What outputs of before this option lack is not there.
    for name in ("layout", "image_dir", "chat_template_kwargs", "max_pixels"):
        if not found[name]:
            del found[name]
    found["model"] = contents.fingerprint(config.model)
    found["tokenizer"] = text_model.fingerprint(config.model)
    if shown or config.max_pixels is not None:
        patcher = open_renderer(config.model, max_pixels=config.max_pixels).patcher
        if patcher is not None:
            found["pictures"] = patcher.settings
    found["data"] = rows.fingerprint(config.data)
    if config.adapter is not None:
        path = Path(config.adapter)
        found["adapter"] = adapter_files.fingerprint(path)
        if (step := runs.latest_step(path)) is not None:
            found["adapter_step"] = step
    if config.shard is not None:
        part = str(shards.parse(config.shard))
        found[shard_files.SHARD] = {"part": part, "lines": lines}
    return json.loads(json.dumps(found))


def resume(out: Path, settings: Mapping[str, Any], total: int) -> int:
    """Return how many lines of the output are there, and take away half a line.

    Args:
      out: the file.
      settings: of the command.
      total: lines of the whole output.
    Raises:
      UserError: they were made otherwise.
    """
    if not out.exists():
        return 0
    kept = shard_files.settings_of(out)
    before = shard_files.said_of(out)
    changed = None if before is None else shard_files.differing(before, settings)
    if before is None or changed:
        names = "it was not made by jaxalign generate"
        if changed:
            names = f"it was made with other settings: {', '.join(changed)}"
        raise UserError(
            f"--out {out} is there already and cannot be gone on with: {names}. Give "
            f"another --out, or remove {out.name} and {kept.name}"
        )
    written = out.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    if len(whole) < len(written):
        os.truncate(out, len(whole))
    done = whole.count(b"\n")
    if done > total:
        raise UserError(f"--out {out} has {done} lines for {total} prompts: remove it")
    return done

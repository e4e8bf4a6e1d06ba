"""Models by their id on the Hugging Face hub: cached snapshots first, then a download.

Naming an id is what asks for the network; a directory never does.
"""

import re
import sys
from pathlib import Path

from jaxalign.checkpoints import tensors
from jaxalign.errors import UserError


__all__ = ["directory_of", "is_id", "name_of"]

# Config, tokenizer and chat template; never code, never pickled weights.
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHTS = ("model*.safetensors",)
_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?"


def is_id(model: str | Path) -> bool:
    """Tell whether a model is named as ``owner/name`` or ``owner/name@revision``.

    What is there as a path is one, and so is what would lie in a directory that is.

    >>> is_id("Qwen/Qwen3-0.6B"), is_id("/models/qwen")
    (True, False)
    """
    path = Path(model)
    if not isinstance(model, str) or path.exists():
        return False
    return bool(re.fullmatch(_ID, model)) and not Path(path.parts[0]).is_dir()


def name_of(model: str | Path) -> str:
    """Return what a model is called: its id without revision, or its directory's name.

    >>> name_of("owner/name@v1"), name_of("/models/mine")
    ('owner/name', 'mine')
    """
    if is_id(model):
        return str(model).partition("@")[0]
    return Path(model).absolute().name


def directory_of(model: str | Path, *, weights: bool = True) -> Path:
    """Return where a model lies; an id that is not in the cache is downloaded.

    A snapshot that is in the cache is taken as it is, without asking whether the hub
    has a newer one: name a revision for another. ``HF_HOME``, ``HF_TOKEN``,
    ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` mean what they mean elsewhere.

    Args:
      model: a directory, which is returned as it is, or an id.
      weights: whether they are needed, or config and tokenizer alone.
    Raises:
      UserError: the hub has no such model, wants a token, cannot be reached or may not
        be; or it has no safetensors.
    Example:
      >>> directory_of("/")
      PosixPath('/')
    """
    if not is_id(model):
        return Path(model)
    name, _, revision = str(model).partition("@")
    cached = _cached(name, revision or None, weights)
    return cached or _download(name, revision or None, weights)


def _cached(name: str, revision: str | None, weights: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    patterns = [*_SMALL, *(_WEIGHTS if weights else ())]
    try:
        found = snapshot_download(
            name,
            revision=revision,
            local_files_only=True,
            allow_patterns=patterns,
            ignore_patterns="*/*",
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return Path(found) if _is_whole(Path(found), weights) else None


def _is_whole(directory: Path, weights: bool) -> bool:
    """Tell whether all is there: others keep parts of a model in the same cache."""
    if not (directory / "config.json").is_file():
        return False
    if not weights:
        return True
    try:
        return bool(tensors.list_files(directory, kinds=tensors.KINDS))
    except UserError:
        return False


def _download(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    shown = name if revision is None else f"{name}@{revision}"
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{shown} is no directory, and of that id there is no whole model in "
            f"{constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to download it. "
            "Unset HF_HUB_OFFLINE, or give the directory of a checkpoint"
        )
    what = "config, tokenizer and weights" if weights else "config and tokenizer"
    print(
        f"downloading {what} of {shown} from {constants.ENDPOINT} to "
        f"{constants.HF_HUB_CACHE}",
        file=sys.stderr,
    )
    try:
        found = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*_SMALL, *(_WEIGHTS if weights else ())],
                ignore_patterns="*/*",
            )
        )
    except GatedRepoError:
        raise UserError(
            f"{shown} asks for its terms to be accepted: do so on {constants.ENDPOINT}/"
            f"{name} and set HF_TOKEN, or run `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{name} has no revision {revision}: give a branch, a tag or a whole commit"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{shown} is no directory, and {constants.ENDPOINT} has no such model that "
            "you may read: check the spelling, and set HF_TOKEN if it is private"
        ) from None
    except Exception as error:  # of http, of the hub and of the disk: many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{shown} is no directory, and cannot be downloaded from "
            f"{constants.ENDPOINT}: {reason[0]}. Check the network and the disk, or "
            "give the directory of a checkpoint"
        ) from None
    if not _is_whole(found, weights):
        # Says what is missing.
        tensors.read_json(found / "config.json")
        tensors.list_files(found, kinds=tensors.KINDS)
    return found

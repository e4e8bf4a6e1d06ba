"""Tokenised pairs that an earlier start made: read from disk, not rendered again.

Of 83,000 pairs rendering and tokenising takes minutes, reading what they became a
second. A file (see :mod:`jaxalign.data.pair_file`) holds the pairs of one key, which
is all that decides a token.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxalign import progress
from jaxalign.data import pair_file, picture_text, rows
from jaxalign.data import pairs as pairs_lib
from jaxalign.data.pairs import PairDataset
from jaxalign.data.picture_sizes import cache_home
from jaxalign.data.records import Record, aspects_of
from jaxalign.data.rendering import Renderer


__all__ = ["key_of", "prepare", "tokenizer_files"]

_RENDERING = 1
"""To be raised with any change of which tokens a record becomes."""

_WORTH_SECONDS = 2.0
"""What takes less is made again."""
_UNREAD_DAYS, _UNFINISHED_DAYS = 30, 1
"""After how long a file that nobody reads is removed, and what a kill left."""

_LIBRARIES = ("transformers", "tokenizers", "jinja2")
_TOKENIZER_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}


def prepare(
    records: Sequence[Record],
    renderer: Renderer,
    *,
    files: Sequence[Path],
    aspects: tuple[str, ...] | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> PairDataset:
    """Return what :func:`jaxalign.data.pairs.prepare` does, made before if it was.

    What takes more than two seconds to make is kept, in some 8 bytes a token; what
    nobody has read for a month is removed. A disk that is full is no error: the pairs
    are made again next time.

    Args:
      records: validated.
      renderer: of the checkpoint.
      files: that the renderer was made from, see :func:`tokenizer_files`.
      aspects: see ``pairs.prepare``.
      cache_dir: where they are kept; default ``picture_sizes.cache_home()``.
      **options: of ``pairs.prepare``.
    Raises:
      UserError: see ``pairs.prepare``.
    Example::

      found = records.read("pairs.jsonl")
      files = tokenizer_files("smollm2")
      data = prepare(found, open_renderer("smollm2"), files=files, max_length=512)
    """
    aspects = aspects_of(records) if aspects is None else aspects
    decisive = {k: v for k, v in options.items() if k != "progress"}
    key = key_of(records, renderer, files, {**decisive, "aspects": aspects})
    folder = Path(cache_dir or cache_home()) / "tokens"
    path = folder / f"{key[:32]}.bin"
    if path.exists():
        found = _found(path, key, records, renderer)
        if found is not None:
            return found
    start = time.monotonic()
    made = pairs_lib.prepare(records, renderer, aspects=aspects, **options)
    if path.exists() or time.monotonic() - start >= _WORTH_SECONDS:
        _keep(path, key, made)
    return made


def _found(
    path: Path, key: str, records: Sequence[Record], renderer: Renderer
) -> PairDataset | None:
    """Return what a file holds; None, and a line that says so, where it is broken."""
    try:
        data = pair_file.read(path, key, records, renderer)
    except (OSError, ValueError, KeyError) as error:
        progress.say(f"{path} is broken, and is made again: {error}")
        return None
    with contextlib.suppress(OSError):  # a cache that can only be read is one too
        os.utime(path)
    progress.say(f"tokens are those of an earlier start, kept in {path}")
    return data


def _keep(path: Path, key: str, made: PairDataset) -> None:
    try:
        pair_file.write(path, key, made)
        size = path.stat().st_size / 1e6
        progress.say(f"tokens are kept for the next start: {path} ({size:.0f} MB)")
        _remove_old(path.parent)
    except OSError as error:
        progress.say(f"tokens are not kept, and are made again next time: {error}")


def _remove_old(folder: Path) -> None:
    for path in folder.iterdir():
        days = _UNFINISHED_DAYS if path.suffix == ".part" else _UNREAD_DAYS
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if path.stat().st_mtime < time.time() - days * 86_400:
                path.unlink()


def tokenizer_files(directory: str | Path) -> list[Path]:
    """Return the files that may decide a checkpoint's tokens, weights left out.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("tokenizer.json", "model.safetensors"):
    ...     (folder / name).touch()
    >>> [path.name for path in tokenizer_files(folder)]
    ['tokenizer.json']
    """
    found = [
        *Path(directory).iterdir(),
        *Path(directory).glob("additional_chat_templates/*"),
    ]
    return sorted(path for path in found if path.suffix in _TOKENIZER_SUFFIXES)


def key_of(
    records: Sequence[Record],
    renderer: Renderer,
    files: Sequence[Path],
    options: Mapping[str, Any],
) -> str:
    """Return a hash of all that decides tokens: a change of any changes it.

    Records count by what they hold, not by their file, of which a data set of the hub
    has none that could be hashed; pictures by their sizes, which is all that tokens
    depend on.

    Args:
      records: validated.
      renderer: its options of the template and of pictures.
      files: see :func:`tokenizer_files`.
      options: of ``pairs.prepare``.
    Raises:
      UserError: a picture cannot be read.
    Example::

      key_of(found, renderer, tokenizer_files("smollm2"), {"max_length": 512})
    """
    patcher = renderer.patcher
    settings = [
        [pair_file.FORMAT, _RENDERING],
        [metadata.version(name) for name in _LIBRARIES],
        type(renderer.tokenizer).__qualname__,
        rows.hash_files(list(files)),
        sorted(renderer.template_kwargs.items()),
        None if patcher is None else [type(patcher).__qualname__, patcher.settings],
        sorted(options.items()),
        len(records),
    ]
    digest = hashlib.sha256(repr(settings).encode())
    if patcher is not None:
        digest.update(repr(picture_text.sizes_of(records)).encode())
    for record in records:
        said = record._replace(where="", images=())
        digest.update(repr(said).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()

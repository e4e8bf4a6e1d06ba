"""The reference's log-probabilities on disk, one number a completion token."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxalign.data.chat import TokenizedPair
from jaxalign.data.patches import Patcher
from jaxalign.errors import UserError


__all__ = ["cache_key", "read", "write"]


def cache_key(
    pairs: Sequence[TokenizedPair],
    reference: str,
    settings: str,
    patcher: Patcher | None = None,
) -> str:
    """Return a hash of all that the numbers depend on.

    Args:
      pairs: their token ids count, and so the tokenizer and template do; of pictures
        what their files hold.
      reference: fingerprint of the reference model.
      settings: what else changes numbers, such as the dtype.
      patcher: what makes patches of pictures.
    Example:
      >>> cache_key([], reference="weights", settings="float32")[:8]
      '0fef8640'
    """
    digest = hashlib.sha256(f"{reference}|{settings}|{len(pairs)}".encode())
    for pair in pairs:
        for side in (pair.chosen, pair.rejected):
            lengths = np.array([len(pair.prompt), len(side.tokens), side.lead])
            digest.update(lengths.astype("<i8").tobytes())
            digest.update(pair.prompt.astype("<i4").tobytes())
            digest.update(side.tokens.astype("<i4").tobytes())
            if side.learnt is not None:
                digest.update(side.learnt.tobytes())
        for picture in pair.images:
            digest.update(hashlib.sha256(picture.read()).digest())
    if patcher is not None and any(pair.images for pair in pairs):
        digest.update(patcher.settings.encode())
    return digest.hexdigest()


def write(path: Path, key: str, logps: Sequence[np.ndarray]) -> None:
    """Write the numbers of every pair (chosen, then rejected), whole or not at all.

    Args:
      path: file; directories above it are made.
      key: see :func:`cache_key`.
      logps: of each pair, one number a completion token; kept in float32.
    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "reference.npz"
      >>> write(path, "key", [np.array([-0.5]), np.array([-1.0, -2.0])])
      >>> [len(logps) for logps in read(path, "key")]
      [1, 2]
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez(
            file,
            key=np.array(key),
            counts=np.array([len(values) for values in logps], np.int64),
            logps=np.concatenate([np.asarray(v, np.float32) for v in logps]),
        )
    temporary.replace(path)


def read(path: Path, key: str) -> list[np.ndarray] | None:
    """Read the numbers of every pair; None where there is no file.

    Raises:
      UserError: the file is broken, or of other data or another model.
    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "reference.npz"
      >>> read(path, "key") is None
      True
      >>> write(path, "key", [np.array([-1.0, -2.0], np.float32)])
      >>> [pair.tolist() for pair in read(path, "key")]
      [[-1.0, -2.0]]
    """
    if not path.is_file():
        return None
    try:
        # An open file, as numpy does not close one that it finds broken.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            found, counts = str(stored["key"]), stored["counts"]
            logps = stored["logps"]
    except Exception as error:  # numpy and zipfile raise many kinds on broken files
        raise UserError(
            f"{path}: not a readable reference cache: {error}. Delete it"
        ) from None
    if found != key:
        raise UserError(
            f"{path} is stale: it was made from other data, another tokenizer or "
            "another reference model. Delete it, or give another --reference_cache"
        )
    if int(counts.sum()) != len(logps):
        raise UserError(f"{path}: the reference cache is incomplete. Delete it")
    return np.split(logps, np.cumsum(counts)[:-1])

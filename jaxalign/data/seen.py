"""What a training set held, as hashes: so that an evaluation can say what was seen.

``seen.txt`` of a run has one line a hash, ``KIND HASH``: ``text`` is a user turn's text
without the places of pictures and blanks around it, ``picture`` a picture's bytes,
``name`` its file's name. A name alone proves little (``1.png``), so that matches by it
are counted apart. Rewording, cropping or another encoding is not noticed.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxalign.data.picture import Picture
from jaxalign.data.records import Record
from jaxalign.errors import UserError
from jaxalign.whole_file import write_text


__all__ = [
    "SEEN",
    "Overlap",
    "Seen",
    "name_hash",
    "overlap",
    "read",
    "seen_of",
    "text_hash",
    "user_texts",
    "write",
]

SEEN = "seen.txt"
"""Its name in a run's directory."""

_PLACES = re.compile(
    r"<\|?(?:image|img|image_pad|image_soft_token|start_of_image|end_of_image|"
    r"vision_start|vision_end|video|picture)\|?>|\[IMG\]|\[image\]|<__media__>"
)
"""What stands for a picture in the texts of data sets and chat templates."""


class Seen(NamedTuple):
    """Hashes of a training set: SHA-256 in hexadecimal.

    >>> len(Seen(frozenset([text_hash("2 + 2?")])).texts)
    1
    """

    texts: frozenset[str] = frozenset()
    pictures: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()


class Overlap(NamedTuple):
    """Which of some items were seen in training, by their index.

    >>> Overlap((0, 3), (3,), (), 10).items
    2
    """

    texts: tuple[int, ...]
    """A text of the item was a user's turn."""
    pictures: tuple[int, ...]
    """A picture of the item was one of a record, to the last byte."""
    names: tuple[int, ...]
    """A picture has the name of one, and no picture of the item was seen."""
    compared: int
    """How many items there were."""

    @property
    def items(self) -> int:
        """Return how many items were seen by text or picture, names left out."""
        return len({*self.texts, *self.pictures})


def text_hash(text: str) -> str:
    """Return the hash of a turn's text, whatever stands for its pictures.

    >>> text_hash("<image>\\nWhat is it? ") == text_hash("What is it?")
    True
    """
    plain = _PLACES.sub("", text).strip()
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()


def name_hash(name: str | Path) -> str:
    """Return the hash of a file's name, without its folders.

    >>> name_hash("train/ads/one.png") == name_hash(Path("test/one.png"))
    True
    """
    return hashlib.sha256(Path(name).name.encode()).hexdigest()


def user_texts(record: Record) -> list[str]:
    """Return the texts of a record's user turns; a plain prompt is one.

    Example::

      user_texts(records.read("pairs.jsonl")[0])  # ["2 + 2?"]
    """
    if isinstance(record.prompt, str):
        return [record.prompt]
    return [turn.text for turn in record.prompt if turn.role == "user"]


def seen_of(records: Iterable[Record]) -> Seen:
    """Return the hashes of training records; every picture is read once.

    Turns without a text have no hash.

    Raises:
      UserError: a picture is not there.
    Example::

      write(Path("run") / SEEN, seen_of(records.read("pairs.jsonl")))
    """
    texts: set[str] = set()
    pictures: dict[object, str] = {}
    names: set[str] = set()
    for record in records:
        texts.update(text_hash(text) for text in user_texts(record))
        for picture in record.images:
            if picture.source not in pictures:
                pictures[picture.source] = picture.digest()
            if isinstance(picture.source, Path):
                names.add(name_hash(picture.source))
    texts.discard(_NOTHING)
    return Seen(frozenset(texts), frozenset(pictures.values()), frozenset(names))


def write(path: Path, seen: Seen) -> None:
    """Write hashes, sorted, so that equal sets are equal files.

    Example::

      write(Path("run") / SEEN, Seen(frozenset([text_hash("2 + 2?")])))
    """
    kinds = (("text", seen.texts), ("picture", seen.pictures), ("name", seen.names))
    lines = [f"{kind} {one}\n" for kind, some in kinds for one in sorted(some)]
    write_text(path, "".join(lines))


def read(path: Path) -> Seen:
    """Read hashes.

    Raises:
      UserError: the file cannot be read, or a line is none.
    Example::

      read(Path("run") / SEEN).texts
    """
    found: dict[str, set[str]] = {"text": set(), "picture": set(), "name": set()}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        kind, _, value = line.partition(" ")
        if kind not in found or not _HASH.fullmatch(value):
            raise UserError(
                f"{path}:{number}: got {line[:40]!r}: expected text, picture or name, "
                "a blank and a SHA-256. `jaxalign train` writes the file; delete it, "
                "and the same command makes it again"
            )
        found[kind].add(value)
    return Seen(*(frozenset(some) for some in found.values()))


def overlap(
    seen: Seen, items: Iterable[tuple[Sequence[str], Sequence[Picture]]]
) -> Overlap:
    """Return which items were in the training set.

    Args:
      seen: hashes of the training set.
      items: the texts that each asks, and its pictures, which are read.
    Raises:
      UserError: a picture is not there.
    Example:
      >>> seen = Seen(frozenset([text_hash("2 + 2?")]))
      >>> overlap(seen, [(["2 + 2?"], []), (["3 + 3?"], [])]).texts
      (0,)
    """
    texts, pictures, names = [], [], []
    count = 0
    for index, (asked, shown) in enumerate(items):
        count += 1
        hashes = {text_hash(text) for text in asked} - {_NOTHING}
        if hashes & seen.texts:
            texts.append(index)
        if seen.pictures and {one.digest() for one in shown} & seen.pictures:
            pictures.append(index)
        elif seen.names & {
            name_hash(one.source) for one in shown if isinstance(one.source, Path)
        }:
            names.append(index)
    return Overlap(tuple(texts), tuple(pictures), tuple(names), count)


_NOTHING = text_hash("")
_HASH = re.compile("[0-9a-f]{64}")

"""The data files of a directory: what is trained on, and what is asked."""

from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.whole_file import write_lines
from tiny_vlm import conversations, packages, pictures, symbols
from tiny_vlm.symbols import Symbol


__all__ = ["Data", "Size", "write"]

KNOWN, OTHER = "google", "twitter"
"""The makers: of the drawings that are trained on, and of those held out."""


class Size(NamedTuple):
    """How much of everything."""

    flags: int
    """Countries'; fewer if there are no more."""
    others: int
    """Symbols that are no country's flag."""
    views: int
    """Of a symbol to train on; one more is kept for the model's own mistakes."""
    aside: int
    """How many symbols are asked about in other ways."""
    row_length: int
    """Tokens of an update. Short: each is compared with every other one."""
    slots: int
    """Answers that are made at the same time."""


class Data(NamedTuple):
    """What there is in a directory."""

    folder: Path
    symbols: list[Symbol]
    size: Size
    without_capital: set[str]

    @property
    def train(self) -> Path:
        """Conversations on the known maker's drawings."""
        return self.folder / "train.jsonl"

    @property
    def held_out(self) -> Path:
        """Questions on the other maker's drawings of the same symbols."""
        return self.folder / "held_out.jsonl"

    @property
    def capitals(self) -> Path:
        """Questions for capitals that are never beside the picture in training."""
        return self.folder / "capitals.jsonl"

    @property
    def aside(self) -> Path:
        """Known drawings, answers of two sentences and Chinese, of some symbols."""
        return self.folder / "aside.jsonl"

    @property
    def named(self) -> list[tuple[Path, str]]:
        """Two pictures to train on of every symbol, with its name."""
        return [
            (self.folder / pictures.path_of(KNOWN, symbol, view), symbol.names[0])
            for view in range(min(2, self.size.views))
            for symbol in self.symbols
        ]


def write(folder: Path, size: Size) -> Data:
    """Write what is not there yet, pictures first."""
    store = folder / "packages"
    found = symbols.some(symbols.read(store), size.flags, size.others)
    pictures.write(packages.NOTO, KNOWN, found, size.views + 1, folder, store)
    pictures.write(packages.TWEMOJI, OTHER, found, 1, folder, store)
    data = Data(folder, found, size, symbols.without_capital(found))
    rows = conversations.training(found, KNOWN, size.views, data.without_capital)
    write_lines(data.train, rows)
    write_lines(data.held_out, _held_out(data))
    write_lines(data.capitals, _capitals(data))
    write_lines(data.aside, _aside(data))
    return data


def _held_out(data: Data) -> list[dict[str, Any]]:
    """Ask what every drawing of the other maker is; of known countries the capital."""
    asked = [
        conversations.asked(symbol, conversations.question(symbol), OTHER)
        for symbol in data.symbols
    ]
    known = [
        s for s in data.symbols if s.capitals and s.key not in data.without_capital
    ]
    return asked + [conversations.asked(s, "capital", OTHER) for s in known]


def _capitals(data: Data) -> list[dict[str, Any]]:
    """Ask for the capitals held out, beside drawings whose country is taught."""
    return [
        conversations.asked(symbol, "capital", KNOWN)
        for symbol in data.symbols
        if symbol.key in data.without_capital
    ]


def _aside(data: Data) -> list[dict[str, Any]]:
    some = data.symbols[:: max(1, len(data.symbols) // data.size.aside)]
    two = [s for s in some if s.key not in data.without_capital]
    return [
        *(conversations.asked(s, conversations.question(s), KNOWN) for s in some),
        *(conversations.asked(s, "both", OTHER) for s in two),
        *(conversations.asked(s, "chinese", OTHER) for s in some),
    ]

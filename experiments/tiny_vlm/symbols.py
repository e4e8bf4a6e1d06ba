"""Which symbols there are: their names, groups, countries and capitals.

Names and groups are those of ``emojibase-data`` (MIT; Unicode's short names), further
names those of ``emoji-datasource`` (MIT), countries and capitals those of
``world-countries`` (ODbL 1.0).
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tiny_vlm import packages


__all__ = ["Symbol", "flag_key", "read", "some", "without_capital"]

_GROUPS = {
    3: "animals and nature",
    4: "food and drink",
    5: "travel and places",
    6: "activities",
    7: "objects",
    9: "flags",
}

# Drawn as the flags of Norway, Australia, the United States and France are.
_DRAWN_AS_OTHERS = {"BV", "SJ", "HM", "UM", "MF"}

_FIRST_LETTER = 0x1F1E6  # regional indicator A


class Symbol(NamedTuple):
    """Something that is drawn.

    ``names`` and ``capitals`` are all that is accepted, the taught one first.
    """

    key: str
    picture: str
    """Name of its file in ``emoji-datasource``."""
    group: str
    names: tuple[str, ...]
    chinese: str
    capitals: tuple[str, ...] = ()

    @property
    def is_country(self) -> bool:
        """Return whether it is a country's flag."""
        return len(self.key.split("-")) == 2 and self.key.startswith("1f1")


def read(folder: Path) -> list[Symbol]:
    """Return every symbol that both makers drew, from the packages in a folder."""
    path = packages.fetch(packages.NAMES, folder)
    found = dict(packages.members(path, "package/en/data.json"))
    entries = json.loads(found["package/en/data.json"])
    found = dict(packages.members(path, "package/zh/data.json"))
    chinese = {x["hexcode"]: x for x in json.loads(found["package/zh/data.json"])}
    path = packages.fetch(packages.NOTO, folder)
    found = dict(packages.members(path, "package/emoji.json"))
    drawn = {
        _key(x["unified"]): x
        for x in json.loads(found["package/emoji.json"])
        if x["has_img_google"] and x["has_img_twitter"]
    }
    path = packages.fetch(packages.COUNTRIES, folder)
    found = dict(packages.members(path, "package/countries.json"))
    countries = {x["cca2"]: x for x in json.loads(found["package/countries.json"])}
    symbols = []
    for entry in entries:
        key = _key(entry["hexcode"])
        if key not in drawn or entry.get("group") not in _GROUPS:
            continue
        label = chinese[entry["hexcode"]]["label"]
        symbol = _symbol(key, entry, drawn[key], countries, label)
        if symbol is not None:
            symbols.append(symbol)
    return symbols


def flag_key(country: str) -> str:
    """Return the key of a country's flag.

    Args:
      country: its two letters of ISO 3166.

    >>> flag_key("FR")
    '1f1eb-1f1f7'
    """
    return "-".join(f"{_FIRST_LETTER + ord(x) - ord('A'):x}" for x in country)


def some(symbols: list[Symbol], flags: int, others: int) -> list[Symbol]:
    """Return so many countries' flags and so many other symbols, or all there are."""
    draw = random.Random(0)
    found = []
    for wanted, count in ((True, flags), (False, others)):
        kind = [s for s in symbols if s.is_country is wanted]
        found += draw.sample(kind, min(count, len(kind)))
    return found


def without_capital(symbols: list[Symbol], share: float = 0.15) -> set[str]:
    """Return the keys of the countries whose capital is never beside the picture."""
    keys = sorted(s.key for s in symbols if s.capitals)
    return set(random.Random(0).sample(keys, round(share * len(keys))))


def _symbol(
    key: str,
    entry: Mapping[str, Any],
    drawn: Mapping[str, Any],
    countries: Mapping[str, Any],
    chinese: str,
) -> Symbol | None:
    group, picture = _GROUPS[entry["group"]], drawn["image"]
    if drawn["subcategory"] in ("country-flag", "subdivision-flag"):
        letters = [chr(int(x, 16) - _FIRST_LETTER + ord("A")) for x in key.split("-")]
        country = countries.get("".join(letters))
        if country is None or country["cca2"] in _DRAWN_AS_OTHERS:
            return None
        name = country["name"]
        # Among the other spellings are codes of two letters.
        spelt = [x for x in country["altSpellings"] if len(x) > 3]
        names = [name["common"], entry["label"][len("flag: ") :]]
        names += [name["official"], *spelt]
        names = tuple(dict.fromkeys(names))
        return Symbol(key, picture, group, names, chinese, tuple(country["capital"]))
    if "o’clock" in entry["label"] or "-thirty" in entry["label"]:
        return None  # twenty-four clocks are a test of reading, not of names
    others = [drawn["name"].lower(), *drawn["short_names"]]
    spelt = [x.replace("_", " ").replace("-", " ") for x in others if len(x) > 2]
    names = tuple(dict.fromkeys([entry["label"], *spelt]))
    return Symbol(key, picture, group, names, chinese)


def _key(hexcode: str) -> str:
    """Return a symbol's code points without the mark that asks for colours."""
    return "-".join(x for x in hexcode.lower().split("-") if x != "fe0f")

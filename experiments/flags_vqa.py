"""Flags in the layout of ChineseSimpleVQA: which country, then its capital.

    python experiments/flags_vqa.py --out flags
    python experiments/flags_vqa.py --out flags --tiny_vlm tiny_vlm   # nothing fetched

    jaxalign eval --tasks chinese_simplevqa --data_dir flags --model tiny_vlm/model ...

The published pictures are not free to pass on and cannot be fetched offline; flags are
drawn by anybody. A row has two questions on one picture, of which the second needs the
answer to the first: the chain that the benchmark is about. Its fields are the published
file's, so the task runs on it as it is:

* ``recognition_question``, ``recognition_answer``: which country's flag;
* ``final_question``, ``final_answer``: that country's capital, the country unnamed;
* ``Topic``: ``English`` or ``中文``, then whether the capital was taught to the small
  model of ``tiny_vlm.py`` beside the flag (``capital taught``, ``capital not taught``);
* ``desc``: a caption that gives both answers away, for the oracle;
* ``image_url``: empty.

Flags: Twemoji's (``emoji-datasource-twitter``; CC-BY 4.0), which the small model was
not trained on, of the United Nations' members. English names and capitals:
``world-countries`` (ODbL 1.0), the capital that it lists first. Chinese names:
``emojibase-data`` (MIT). Chinese capitals: the cities by which CLDR (Unicode-3.0;
``cldr-dates-full``) names time zones. Countries whose capital is not among them have
an English row only: 194 in English, 132 in Chinese.

Such a model's numbers say that the harness works, not how well models see: it has 135 M
weights, learnt these very countries from another maker's drawings, and its Chinese is
poor. Takes 5 s, and as long
as the packages take to arrive; writes OUT/chinese_simplevqa/chinese_simplevqa.jsonl and
OUT/chinese_simplevqa/images/.
"""

import argparse
import json
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tiny_vlm import conversations, packages, pictures, symbols
from tiny_vlm.files import OTHER
from tiny_vlm.symbols import Symbol

from jaxalign.errors import UserError
from jaxalign.whole_file import write_lines


__all__ = ["capital_cities", "plain", "rows", "write"]

TASK = "chinese_simplevqa"

_ASKED = "held_out.jsonl"
"""In the directory of ``tiny_vlm.py``: asks for the capitals that are taught."""

_CHINESE_FLAG = "旗: "


def main() -> None:
    """Write rows and pictures, and say how many."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--tiny_vlm", help="where tiny_vlm.py left its packages")
    args = parser.parse_args()
    path = write(Path(args.out), args.tiny_vlm and Path(args.tiny_vlm))
    found = [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]
    chinese = sum(row["Topic"].startswith("中文") for row in found)
    print(f"{path}: {len(found)} rows, {chinese} of them Chinese")


def write(out: Path, tiny_vlm: Path | None) -> Path:
    """Write the rows and their pictures, and return the rows' file.

    Args:
      tiny_vlm: directory that ``tiny_vlm.py`` left: its packages are used, and its
        questions say which capitals were taught. Default: what the whole run teaches;
        the packages are fetched into OUT/packages.

    Raises:
      UserError: there is no such directory, or a package cannot be had.
    """
    if tiny_vlm is not None and not (tiny_vlm / _ASKED).is_file():
        raise UserError(
            f"--tiny_vlm {tiny_vlm} holds no {_ASKED}. Expected what experiments/"
            "tiny_vlm.py leaves: run that first, or leave the option out"
        )
    store = (tiny_vlm or out) / "packages"
    known = symbols.read(store)
    members = _members(store)
    flags = [s for s in known if s.key in members and s.capitals]
    images = out / TASK / "images"
    images.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as drawn:
        folder = Path(drawn)
        pictures.write(packages.TWEMOJI, OTHER, flags, 1, folder, store)
        for flag in flags:
            shutil.move(
                folder / pictures.path_of(OTHER, flag, 0), images / _image(flag)
            )
    path = out / TASK / f"{TASK}.jsonl"
    taught = _taught(known, tiny_vlm)
    write_lines(path, list(rows(flags, _cities(store), taught)))
    return path


def rows(
    flags: list[Symbol], cities: Mapping[str, str], taught: set[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row in English for every flag, and in Chinese where there are the words.

    Args:
      cities: Chinese names of cities by ``plain`` English ones.
      taught: keys of the flags whose capital was taught.
    """
    for flag in flags:
        part = f"capital {'' if flag.key in taught else 'not '}taught"
        country, capital = flag.names[0], flag.capitals[0]
        yield {
            "ID": f"{flag.key}-en",
            "image_url": "",
            "recognition_question": conversations.QUESTIONS["country"][0],
            "recognition_answer": country,
            "final_question": conversations.QUESTIONS["capital"][0],
            "final_answer": capital,
            "Topic": f"English|{part}",
            "matched_image": _image(flag),
            "desc": f"The flag of {country}, whose capital is {capital}.",
        }
        capital = cities.get(plain(capital))
        if capital is None or not flag.chinese.startswith(_CHINESE_FLAG):
            continue
        country = flag.chinese.removeprefix(_CHINESE_FLAG)
        yield {
            "ID": f"{flag.key}-zh",
            "image_url": "",
            "recognition_question": "这是哪个国家的国旗？",
            "recognition_answer": country,
            "final_question": "图中国旗所属国家的首都是哪座城市？",
            "final_answer": capital,
            "Topic": f"中文|{part}",
            "matched_image": _image(flag),
            "desc": f"{country}国旗。{country}的首都是{capital}。",
        }


def capital_cities(
    chinese: Mapping[str, Any], english: Mapping[str, Any]
) -> dict[str, str]:
    """Return Chinese names of cities by ``plain`` English ones, of CLDR's time zones.

    A zone's English city is CLDR's, or the end of its identifier where CLDR, for which
    that is the default, has none.

    >>> capital_cities({"Europe": {"Paris": {"exemplarCity": "巴黎"}}}, {})
    {'paris': '巴黎'}
    """
    names = _exemplars(english)
    found = {}
    for zone, city in _exemplars(chinese).items():
        found[plain(names.get(zone, zone[-1]))] = city
    return found


def plain(name: str) -> str:
    """Return a name's letters alone, small and without accents.

    >>> plain("São Tomé"), plain("Sao_Tome")
    ('saotome', 'saotome')
    """
    parts = unicodedata.normalize("NFKD", name)
    return "".join(x for x in parts if x.isalpha()).lower()


def _exemplars(zones: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    found = {}
    for name, inside in zones.items():
        if not isinstance(inside, dict):
            continue
        if "exemplarCity" in inside:
            found[(name,)] = inside["exemplarCity"]
        for rest, city in _exemplars(inside).items():
            found[(name, *rest)] = city
    return found


def _taught(known: list[Symbol], tiny_vlm: Path | None) -> set[str]:
    if tiny_vlm is None:
        return {s.key for s in known if s.capitals} - symbols.without_capital(known)
    lines = (tiny_vlm / _ASKED).read_text(encoding="utf-8").splitlines()
    asked = map(json.loads, lines)
    return {row["symbol"] for row in asked if row["kind"] == "capital"}


def _cities(store: Path) -> dict[str, str]:
    path = packages.fetch(packages.CITIES, store)
    zones = []
    for language in ("zh", "en"):
        name = f"package/main/{language}/timeZoneNames.json"
        ((_, content),) = packages.members(path, name)
        inside = json.loads(content)["main"][language]["dates"]["timeZoneNames"]
        zones.append(inside["zone"])
    return capital_cities(*zones)


def _members(store: Path) -> set[str]:
    """Return the symbols' keys of the United Nations' members."""
    path = packages.fetch(packages.COUNTRIES, store)
    ((_, content),) = packages.members(path, "package/countries.json")
    return {symbols.flag_key(x["cca2"]) for x in json.loads(content) if x["unMember"]}


def _image(flag: Symbol) -> str:
    return f"{flag.key}.png"


if __name__ == "__main__":
    main()

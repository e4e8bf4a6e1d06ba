"""Numbers in English and Chinese text, exactly, with the precision they have."""

import re
import unicodedata
from decimal import Decimal
from typing import NamedTuple


__all__ = ["Number", "chinese", "numbers"]

_DIGITS = dict(
    zip("零〇一二两三四五六七八九", (0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9), strict=True)
)
_UNITS = {"十": 10, "百": 100, "千": 1000}
_SCALES = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_FACTORS = {
    **{"hundred": 2, "thousand": 3, "k": 3, "million": 6, "m": 6, "billion": 9},
    **{"bn": 9, "trillion": 12, "十": 1, "百": 2, "千": 3, "万": 4, "萬": 4, "亿": 8},
    **{"億": 8, "万亿": 12, "百万": 6, "千万": 7, "十亿": 9},
}
# Words in which the numeral is no number.
_NO_NUMBER = re.compile(
    "一些|一般|一起|一样|一直|一定|一下|万一|十分|统一|第一时间|之一"
)
_ARABIC = re.compile(
    r"(?<![\w.])([+-]?)(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?"
    r"(?:(?:e|\s?[x×*]\s?10\^?)([+-]?\d{1,3}))?"
    r"(?:\s?(hundred|thousand|million|billion|trillion|bn|万亿|百万|千万|十亿"
    r"|[km](?![a-z])|[十百千万萬亿億]))?"
)
_CHINESE = re.compile(
    "负?[零〇一二两三四五六七八九十百千万萬亿億]+(?:点[零〇一二三四五六七八九]+)?"
)


class Number(NamedTuple):
    """A number, and the place of its last given digit."""

    value: Decimal
    step: Decimal
    """1 for 42, 0.01 for 3.14, 100000 for 4.2 million."""

    def holds(self, other: Decimal) -> bool:
        """Tell whether another number is this one to its last given digit.

        >>> number = Number(Decimal("3.14"), Decimal("0.01"))
        >>> number.holds(Decimal("3.14159")), number.holds(Decimal("3.15"))
        (True, False)
        """
        return abs(other - self.value) <= self.step / 2


def numbers(text: str) -> list[Number]:
    """Return the numbers of a text in order of their kind: Arabic first, then Chinese.

    Full-width digits, thousands commas, decimals, exponents and words such as million
    or 万 are understood. Number words of English are not.

    >>> [str(n.value) for n in numbers("１,200 or 3.5 million, 二百零五 of them")]
    ['1200', '3500000', '205']
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    found = []
    for match in _ARABIC.finditer(plain):
        sign, whole, fraction, exponent, word = match.groups()
        digits = whole.replace(",", "") + (fraction or "")
        try:
            power = int(exponent or 0) + _FACTORS.get(word or "", 0)
            scale = Decimal(1).scaleb(power)
            value = _plain(Decimal(f"{sign}{digits}") * scale)
            last = Decimal(1).scaleb(-len(fraction or ".") + 1) * scale
        except (ArithmeticError, ValueError):  # of more digits than anybody counts
            continue
        found.append(Number(value, last))
    rest = _NO_NUMBER.sub(" ", _ARABIC.sub(" ", plain))
    for match in _CHINESE.finditer(rest):
        number = chinese(match[0])
        if number is not None:
            found.append(number)
    return found


def chinese(text: str) -> Number | None:
    """Return the number that Chinese numerals spell, or None.

    >>> [int(chinese(t).value) for t in ("十二", "两千零二十四", "二〇二四", "三万五")]
    [12, 2024, 2024, 35000]
    """
    sign = -1 if text.startswith("负") else 1
    whole, _, fraction = text.removeprefix("负").partition("点")
    value = _chinese_whole(whole)
    if value is None:
        return None
    step = Decimal(1).scaleb(-len(fraction))
    digits = "".join(str(_DIGITS[c]) for c in fraction)
    return Number(sign * (value + (Decimal(digits) * step if digits else 0)), step)


def _chinese_whole(text: str) -> Decimal | None:
    if not text:
        return None
    if all(c in _DIGITS for c in text):  # digit by digit, as years are
        return Decimal("".join(str(_DIGITS[c]) for c in text))
    total = section = digit = 0
    last = 1  # the unit before, for 三万五: 5 of the next lower unit
    for c in text:
        if c in _DIGITS:
            digit = _DIGITS[c]
            last = 1 if digit == 0 else last
        elif c in _UNITS:
            section += (digit or 1) * _UNITS[c]
            digit, last = 0, _UNITS[c]
        else:
            section = (section + digit) * _SCALES[c]
            total = (total + section) if section else (total or 1) * _SCALES[c]
            section, digit, last = 0, 0, _SCALES[c]
    tail = digit * (last // 10 if last > 10 else 1)
    return Decimal(total + section + tail)


def _plain(value: Decimal) -> Decimal:
    """Return a number without an exponent in its print, if it has one to lose."""
    is_whole = value == value.to_integral_value() and value.adjusted() < 100
    return Decimal(int(value)) if is_whole else value

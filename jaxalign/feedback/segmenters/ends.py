"""Where sentences of English and Chinese prose end."""

import bisect
import re

from jaxalign.feedback.segmenters import abbreviations
from jaxalign.feedback.segmenters.enclosures import enclosures


__all__ = ["sentence_ends"]

_CJK = r"\u2e80-\u2fff\u3040-\u30ff\u31c0-\u9fff\uac00-\ud7af\uf900-\ufaff"
_CLOSERS = r"\"'”’»)\]}）】』」》〉*_~"
# A full-width semicolon is no end: it joins clauses, as the narrow one does.
_RUN = re.compile(rf"([.!?…。！？｡‼⁇⁈⁉]+)((?:\[\^?\d{{1,3}}\]|[{_CLOSERS}])*)(\s*)")
_FULL = re.compile(r"[。！？｡‼⁇⁈⁉]")
_IS_CJK = re.compile(rf"[{_CJK}]")
_TOKEN = re.compile(r"[A-Za-z0-9À-ɏ][A-Za-z0-9À-ɏ.&'’-]*\Z")
_ACRONYM = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]\Z")
_NEXT = re.compile(r"[\"'“‘«(\[（「『*_¿¡<#]*")
_WORD = re.compile(r"[A-Za-z]+")
_BRAND = re.compile(r"[a-z]{1,2}[A-Z]")
_SAYS = (
    "said|says|asked|asks|replied|answered|shouted|cried|whispered|yelled|exclaimed|"
    "added|murmured|muttered|called|screamed|explained|continued|laughed|sighed"
)
_SPEAKS = re.compile(rf"(?:[A-Z][\w'’-]*\.? ){{1,3}}(?:{_SAYS})\b")
_SPEAKS_CJK = re.compile(
    r"[^\s，。！？；：、,.!?:;“”「」『』\"]{0,10}?"
    r"(?:说|說|道|问|問|喊|叫|答|嚷|骂|罵|笑|叹|嘆|补充|補充)(?:着|了)?(?=[。！？，,]|\Z)"
)
_CLAUSE = frozenset("，、；：,;:)）]】」』”’》—–-=")
_INTRODUCES = frozenset("：:，,。！？!?.…；;、\n")
_SYMBOL = re.compile(r"[\u2190-\u2bff\ufe0f\u200d\U0001f000-\U0001faff]+")


def sentence_ends(text: str) -> list[int]:
    """Return the offsets at which sentences end, in ascending order.

    Closing quotation marks, brackets, footnote numbers and symbols (emoji) after the
    full stop belong to the sentence. Inside a short quotation or bracket nothing ends.
    The time is linear in the text.

    Args:
      text: prose; what must not be read as words, such as code, is blanked out.

    >>> text = "Dr. Wu left. Why? 他走了。"
    >>> [text[:end] for end in sentence_ends(text)][:2]
    ['Dr. Wu left.', 'Dr. Wu left. Why?']
    """
    closed = enclosures(text)
    starts = [start for start, _ in closed]
    found: list[int] = []
    begun = 0
    for match in _RUN.finditer(text):
        end = match.end(2)
        index = bisect.bisect_left(starts, end) - 1
        inside = index >= 0 and closed[index][1] > end
        quotation = closed[index] if index >= 0 and closed[index][1] == end else None
        if not inside and _ends(text, match, begun, quotation):
            symbol = _SYMBOL.match(text, match.end())
            end = symbol.end() if symbol and "\n" not in match[3] else end
            found.append(end)
            begun = end
    return found


def _ends(
    text: str,
    match: re.Match[str],
    begun: int,
    quotation: tuple[int, int] | None,
) -> bool:
    """Decide whether a run of full stops ends the sentence that began at ``begun``."""
    run, closers, gap = match.groups()
    following = match.end()
    if following == len(text):
        return True
    if text[following] in _CLAUSE or text[following] in ".!?…。！？":
        return False
    if _FULL.search(run):
        return _ends_chinese(text, match, quotation)
    before = text[match.start() - 1 : match.start()]
    beside_cjk = bool(_IS_CJK.match(before)) or bool(_IS_CJK.match(text[following]))
    if not gap:
        if "…" in run and text[following] in "“「『":
            return True
        if "…" in run or ".." in run or not beside_cjk:
            return False
        return run[-1] in "!?" or bool(
            _IS_CJK.match(before) and _IS_CJK.match(text[following])
        )
    if not _begins(text, following):
        return False
    if closers and _SPEAKS.match(text, following):
        return False
    if run != "." or closers.strip("*_"):
        return True
    return _full_stop(text, match, begun)


def _ends_chinese(
    text: str, match: re.Match[str], quotation: tuple[int, int] | None
) -> bool:
    if quotation is None or text[quotation[0]] in "(（[【":
        return True
    if _SPEAKS_CJK.match(text, match.end()):
        return False
    # A quotation that nothing introduces is a word of its sentence: the sign “禁止！”.
    before = text[: quotation[0]][-2:].rstrip(" ")[-1:]
    return bool(match[3]) or not before or before in _INTRODUCES


def _begins(text: str, at: int) -> bool:
    """Tell whether a sentence can begin here: not with a small letter."""
    opened = _NEXT.match(text, at)
    at = opened.end() if opened else at
    return not text[at : at + 1].islower() or bool(_BRAND.match(text, at))


def _full_stop(text: str, match: re.Match[str], begun: int) -> bool:
    """Decide on a single full stop before white space and the start of a sentence."""
    at, following = match.start(), match.end()
    token = _TOKEN.search(text[max(begun, at - 24) : at])
    if token is None:
        return True
    word = token[0].lower()
    first = at - len(token[0])
    lead = text[max(begun, first - 40) : first]
    if word.isdigit() and len(word) <= 3:
        # A number of a list: 1. First. 2. Second.
        lead = lead.strip(' \t\n*_(["“')
        return bool(lead) and lead[-1] not in ":："
    after = _WORD.match(text, following)
    opens = after is not None and after[0] in abbreviations.OPENERS
    letter = len(word) == 1 and token[0].isupper()
    named = token[0] != word and word in abbreviations.BEFORE_NAME
    if named or word in abbreviations.INNER and not token[0].isupper():
        return False
    if word in abbreviations.BEFORE_NUMBER and not letter:
        number = text[following].isdigit()
        if number or word not in abbreviations.EITHER:
            return not number
    if word == "etc":
        return True
    if letter and lead.rstrip().endswith((":", "：", "°")):
        return True  # an option or a unit, not somebody's initial
    acronym = letter or _ACRONYM.match(token[0])
    if acronym or word in abbreviations.EITHER or word in abbreviations.BEFORE_NAME:
        return opens or "\n" in match[3]
    return True

"""Which segmenter, and its options."""

from dataclasses import dataclass
from typing import Literal

from jaxalign.configs import check_fields
from jaxalign.errors import UserError, did_you_mean
from jaxalign.feedback.segmenters import plain
from jaxalign.feedback.segmenters.sentences import MIN_LENGTH, sentences


__all__ = ["SegmenterConfig", "segment", "thinking_end"]

_SIZE = 200
_NAMES = ("sentences", "lines", "paragraphs", "fixed")


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """How responses are cut into segments.

    Attributes:
      name: ``sentences`` of English and Chinese, with code, maths, table rows and
        headings whole; ``lines``; ``paragraphs``, which blank lines part; or ``fixed``
        numbers of characters.
      min_length: of ``sentences``: letters and digits that a segment has at least. A
        shorter one joins a neighbour, within its paragraph if it can.
      size: of ``fixed``: characters (code points) of a segment.
      thinking: what of a response stands in ``<think>`` before its answer: ``skip``
        leaves it in no segment, ``keep`` cuts it like the rest.
    """

    name: Literal["sentences", "lines", "paragraphs", "fixed"] = "sentences"
    min_length: int = MIN_LENGTH
    size: int = _SIZE
    thinking: Literal["skip", "keep"] = "skip"

    def __post_init__(self) -> None:
        if self.name not in _NAMES:
            raise UserError(
                f"segmenter.name {self.name!r} is not known. "
                f"{did_you_mean(str(self.name), _NAMES)}"
            )
        if self.thinking not in ("skip", "keep"):
            raise UserError(
                f"segmenter.thinking must be skip or keep: got {self.thinking!r}"
            )
        check_fields(self)
        if self.min_length < 0:
            raise UserError(
                f"segmenter.min_length must be 0 or more: got {self.min_length}"
            )
        if self.size < 1:
            raise UserError(f"segmenter.size must be 1 or more: got {self.size}")
        for option, default, name in (
            ("min_length", MIN_LENGTH, "sentences"),
            ("size", _SIZE, "fixed"),
        ):
            if getattr(self, option) != default and self.name != name:
                raise UserError(
                    f"segmenter.{option} has no effect with segmenter.name "
                    f"{self.name}: leave it out, or give --segmenter.name {name}"
                )


def segment(text: str, config: SegmenterConfig) -> list[tuple[int, int]]:
    """Cut a text as the options say; see the package for what always holds.

    >>> segment("One. Two.", SegmenterConfig())
    [(0, 4), (5, 9)]
    >>> segment("One. Two.", SegmenterConfig(name="fixed", size=6))
    [(0, 6), (6, 9)]
    >>> segment("<think>Eh?</think> One.", SegmenterConfig())
    [(19, 23)]
    """
    begin = thinking_end(text) if config.thinking == "skip" else 0
    return [(begin + a, begin + b) for a, b in _cut(text[begin:], config)]


def thinking_end(text: str) -> int:
    """Return where the answer begins, behind what was thought before it.

    Some prompts open the thinking block themselves, so that a text may only close it;
    one that is not closed is all there is.

    >>> thinking_end("Eh?</think> One."), thinking_end("One."), thinking_end("<think>E")
    (11, 0, 8)
    """
    before, end, _ = text.partition("</think>")
    if end:
        return len(before) + len(end)
    return len(text) if text.lstrip().startswith("<think>") else 0


def _cut(text: str, config: SegmenterConfig) -> list[tuple[int, int]]:
    match config.name:
        case "sentences":
            return sentences(text, min_length=config.min_length)
        case "lines":
            return plain.lines(text)
        case "paragraphs":
            return plain.paragraphs(text)
        case "fixed":
            return plain.fixed(text, config.size)

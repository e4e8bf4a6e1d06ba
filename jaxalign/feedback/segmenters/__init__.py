"""Segmenters: cutting a response into the pieces that are judged.

Each is a pure function ``text -> [(start, end), ...]``: half-open code-point offsets,
ordered and disjoint. White space (``str.isspace``) is never a segment of its own and no
segment begins or ends in it; every other character lies in exactly one segment. So the
text is its segments joined by the white space between them.
"""

from jaxalign.feedback.segmenters.config import SegmenterConfig, segment
from jaxalign.feedback.segmenters.plain import fixed, lines, paragraphs
from jaxalign.feedback.segmenters.sentences import sentences


__all__ = ["SegmenterConfig", "fixed", "lines", "paragraphs", "segment", "sentences"]

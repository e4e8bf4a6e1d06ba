"""Which token belongs to which segment, on hand-made spans."""

import numpy as np

from jaxalign.data import spans
from jaxalign.data.records import Segment


def segments(*borders: tuple[int, int]) -> tuple[Segment, ...]:
    return tuple(Segment(start=a, end=b, scores={"x": 1.0}) for a, b in borders)


def owners(text: str, tokens: list[spans.Span], *borders: tuple[int, int]) -> list[int]:
    found = spans.segment_of_tokens(text, tokens, segments(*borders), last_is_end=False)
    return found.tolist()


def test_tile_gives_trimmed_spaces_to_the_later_token() -> None:
    #        0123456789
    text = "a  b \n c d"
    trimmed = [(0, 1), (2, 2), (3, 4), (5, 6), (7, 8), (9, 10)]
    found = spans.tile_spans(text, trimmed)
    assert found.tolist() == [[0, 1], [1, 2], [2, 4], [4, 6], [6, 8], [8, 10]]


def test_tile_leaves_what_is_no_gap_of_spaces() -> None:
    # Added tokens hold nothing, pieces of one character overlap, "x" is in no token.
    text = " é x b"
    offsets = [(0, 0), (0, 2), (1, 2), (4, 6), (0, 0)]
    assert spans.tile_spans(text, offsets).tolist() == [list(o) for o in offsets]
    # One that holds nothing does not undo what was there before it.
    found = spans.tile_spans("ab c", [(0, 2), (0, 0), (3, 4)])
    assert found[2].tolist() == [2, 4]
    assert spans.tile_spans("", []).shape == (0, 2)


def test_first_completion_token_holds_any_character_of_it() -> None:
    tokens = [(0, 0), (0, 2), (2, 5), (5, 6)]
    starts = {0: 1, 1: 1, 2: 2, 4: 2, 5: 3, 6: 4}
    found = {s: spans.first_completion_token(tokens, s) for s in starts}
    assert found == starts


def test_first_character_that_is_no_space_decides() -> None:
    #        01234567
    text = "ab. cd\n\ne"
    tokens = [(0, 2), (2, 3), (3, 6), (6, 8), (8, 9)]
    # " cd" begins in the first segment, but its first letter is in the second. The
    # newlines are all whitespace: their first character decides.
    assert owners(text, tokens, (0, 4), (4, 7), (7, 9)) == [0, 0, 1, 1, 2]


def test_token_over_a_border_is_of_the_segment_of_its_first_letter() -> None:
    assert owners("abcd", [(0, 3), (3, 4)], (0, 2), (2, 4)) == [0, 1]


def test_gaps_and_borders_of_the_text_are_unscored() -> None:
    # The prompt's end merged into the first token; the last is after the text.
    tokens = [(-2, 1), (1, 2), (2, 3), (3, 4), (4, 9), (9, 9)]
    assert owners("abcd", tokens, (0, 1), (2, 3)) == [0, -1, 1, -1, -1, -1]


def test_end_of_turn_belongs_to_the_last_listed_segment() -> None:
    tokens = [(0, 1), (1, 2), (2, 12)]
    for last_is_end, expected in ((True, [0, -1, 1]), (False, [0, -1, -1])):
        found = spans.segment_of_tokens(
            "ab", tokens, segments((0, 1), (5, 6)), last_is_end=last_is_end
        )
        np.testing.assert_array_equal(found, expected)
    found = spans.segment_of_tokens("ab", tokens, (), last_is_end=True)
    np.testing.assert_array_equal(found, [-1, -1, -1])

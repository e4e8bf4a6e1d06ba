"""Pairs that are too long: dropped, cut or refused, and counted."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxalign.data import pairs, records
from jaxalign.data.chat import Branch, TokenizedPair
from jaxalign.errors import UserError
from tests import synthetic


def branch(tokens: list[int], segments: list[int], *, lead: int = 0) -> Branch:
    """Make a branch whose segment s scores s + 1 on one aspect."""
    count = max(segments, default=-1) + 1
    return Branch(
        tokens=np.array(tokens, np.int32),
        lead=lead,
        segments=np.array(segments, np.int32),
        scores=np.arange(1, count + 1, dtype=np.float32)[:, None],
        scored=np.ones(count, bool),
        offsets=tuple((i, i + 1) for i in range(count)),
    )


# Prompt 1 2 3 4; chosen 10..14 in segments 0 0 - 1 1, the last token its end of turn;
# rejected 20 21, one segment. Longest: 4 + 5 = 9.
PAIR = TokenizedPair(
    np.array([1, 2, 3, 4], np.int32),
    branch([10, 11, 12, 13, 14], [0, 0, -1, 1, 1]),
    branch([20, 21], [0, 0]),
)


@pytest.mark.parametrize(
    ("max_length", "prompt", "chosen", "rejected", "scored"),
    [
        (9, [1, 2, 3, 4], 5, 2, [True, True]),
        # The prompt's head goes first; the question's end stays.
        (8, [2, 3, 4], 5, 2, [True, True]),
        (6, [4], 5, 2, [True, True]),
        # One prompt token stays to predict the first completion token; without its
        # end of turn the last segment is cut, and has no scores.
        (5, [4], 4, 2, [True, False]),
        (4, [4], 3, 2, [True, False]),
        (3, [4], 2, 2, [True, False]),
        (2, [4], 1, 1, [False, False]),
    ],
)
def test_truncate(
    max_length: int, prompt: list[int], chosen: int, rejected: int, scored: list[bool]
) -> None:
    cut = pairs.truncate(PAIR, max_length)
    assert cut is not None
    assert cut.prompt.tolist() == prompt
    assert cut.chosen.tokens.tolist() == [10, 11, 12, 13, 14][:chosen]
    assert cut.chosen.segments.tolist() == [0, 0, -1, 1, 1][:chosen]
    assert cut.rejected.tokens.tolist() == [20, 21][:rejected]
    assert cut.chosen.scored.tolist() == scored
    assert cut.rejected.scored.tolist() == [rejected == 2]
    assert cut.longest == min(max_length, 9)
    # What was cut stays listed, so that segments keep their numbers.
    assert cut.chosen.offsets == PAIR.chosen.offsets
    np.testing.assert_array_equal(cut.chosen.scores, [[1], [2]])


def test_truncate_counts_the_prompt_tokens_of_a_branch() -> None:
    # A lead of 2: these are prompt, and no completion is left within 1 + 2 tokens.
    led = PAIR._replace(rejected=branch([8, 9, 20, 21], [0, 0], lead=2))
    cut = pairs.truncate(led, 4)
    assert cut is not None
    assert (cut.rejected.lead, cut.rejected.tokens.tolist()) == (2, [8, 9, 20])
    assert cut.rejected.segments.tolist() == [0]
    assert cut.rejected.scored.tolist() == [False]
    assert pairs.truncate(led, 3) is None
    assert pairs.truncate(PAIR, 1) is None


def test_a_segment_that_had_no_tokens_stays_unscored_when_cut() -> None:
    unscored = PAIR.chosen._replace(scored=np.array([False, True]))
    cut = pairs.truncate(PAIR._replace(chosen=unscored), 5)
    assert cut is not None
    assert cut.chosen.scored.tolist() == [False, False]


def made_records() -> list[records.Record]:
    """Three records: 6, 19 and 9 tokens with the longer response, see below."""
    prompts = ("Q:", "Q: " + "ab" * 5 + ":", "Q:")
    answers = ("xyz", "x y", "xyzxyz")
    return [
        records.parse(
            {
                "prompt": prompt,
                "chosen": answer,
                "rejected": "x",
                "chosen_segments": [
                    {"start": 0, "end": 1, "scores": {"h": 1}},
                    {"start": 1, "end": 2, "scores": {"h": 2}},
                    {"start": 2, "end": 3, "scores": {"h": 3}},
                ],
            },
            where=f"f.jsonl:{line}",
        )
        for line, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1)
    ]


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer()


def test_without_a_limit_all_stay(tokenizer: Any) -> None:
    data = pairs.prepare(made_records(), tokenizer, max_length=None)
    # Q : | x y z end; Q : Ġ ab ab ab ab ab : | x Ġ y end; Q : | x y z x y z end
    assert [pair.longest for pair in data.pairs] == [6, 13, 9]
    # ... and the rejected x end.
    assert data.lengths.tolist() == [8, 15, 11]
    assert data.indices == [0, 1, 2]
    assert data.aspects == ("h",)
    # "x y": the space is a token of its own here, so all nine segments own one.
    assert data.report == {
        "pairs": 3,
        "segments": 9,
        "segments_without_tokens_or_cut": 0,
    }
    assert data.num_segments == 3


def test_drop_counts_what_it_leaves_out(tokenizer: Any) -> None:
    data = pairs.prepare(made_records(), tokenizer, max_length=9)
    assert data.indices == [0, 2]
    assert data.report["dropped_too_long"] == 1
    assert data.report["pairs"] == 2
    assert "truncated" not in data.report


def test_truncate_counts_what_it_cuts(tokenizer: Any) -> None:
    data = pairs.prepare(made_records(), tokenizer, max_length=4, overflow="truncate")
    assert data.indices == [0, 1, 2]
    assert [pair.longest for pair in data.pairs] == [4, 4, 4]
    # One prompt token and three of each completion: x y z | x Ġ y | x y z. The end of
    # turn that is gone was a token of the last segment of each.
    assert [pair.chosen.scored.tolist() for pair in data.pairs] == [
        [True, True, False]
    ] * 3
    assert data.report == {
        "pairs": 3,
        "truncated": 3,
        "segments": 9,
        "segments_without_tokens_or_cut": 3,
    }


def test_truncate_drops_where_no_completion_token_is_left(tokenizer: Any) -> None:
    # "ab" merges over the border, so the rejected side has a lead: with 2 tokens there
    # is one of the prompt and the lead. The other record is cut.
    merging = records.parse({"prompt": "Q:a", "chosen": "b", "rejected": "c"})
    data = pairs.prepare(
        [merging, *made_records()[:1]], tokenizer, max_length=2, overflow="truncate"
    )
    assert data.indices == [1]
    assert data.report["dropped_too_long"] == 1


def test_error_names_record_and_cure(tokenizer: Any) -> None:
    with pytest.raises(
        UserError, match="f.jsonl:2: 13 tokens, but max_length is 9. Raise max_length"
    ):
        pairs.prepare(made_records(), tokenizer, max_length=9, overflow="error")


def test_nothing_left(tokenizer: Any) -> None:
    with pytest.raises(
        UserError, match=r"none of the 3 record\(s\) fits within max_le"
    ):
        pairs.prepare(made_records(), tokenizer, max_length=5)
    with pytest.raises(UserError, match="max_length must be at least 2: got 1"):
        pairs.prepare(made_records(), tokenizer, max_length=1)


def test_limit_decides_by_each_response_not_by_their_sum(tokenizer: Any) -> None:
    # The first record takes 8 places in a row, but no response has more than 6.
    data = pairs.prepare(made_records()[:1], tokenizer, max_length=6)
    assert data.report["pairs"] == 1


def test_progress_sees_every_record(tokenizer: Any) -> None:
    made = [records.parse(record) for record in synthetic.feedback_records(5)]
    seen: list[tuple[int, int]] = []

    def progress(items: Any, total: int) -> Any:
        for number, item in enumerate(items):
            seen.append((number, total))
            yield item

    data = pairs.prepare(made, tokenizer, max_length=None, progress=progress)
    assert seen == [(i, 5) for i in range(5)]
    assert len(data.pairs) == 5


def test_responses_without_segments(tokenizer: Any) -> None:
    made = [
        records.parse(record)
        for record in synthetic.feedback_records(2, segments=False)
    ]
    data = pairs.prepare(made, tokenizer, max_length=None)
    assert data.num_segments == 1  # arrays keep a place
    assert data.aspects == ()
    assert data.report["segments"] == 0

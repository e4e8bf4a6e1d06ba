"""A completion of several turns: each answer is judged after what came before it."""

from typing import Any

import pytest

from jaxalign.errors import UserError
from jaxalign.feedback import annotate
from jaxalign.feedback.segmenters import SegmenterConfig
from jaxalign.feedback.segmenters.segment_file import SegmentConfig, segment_row
from jaxalign.judging.judge import Verdict


ASK = {"role": "user", "content": "Is it?"}


def row() -> dict[str, Any]:
    return {
        "prompt": [ASK],
        "chosen": [
            {"role": "assistant", "content": "It is. So there."},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "Who knows. Not me. Nor you."},
        ],
        "rejected": "No.",
    }


def test_segments_and_scores_of_each_turn() -> None:
    made = segment_row(row(), SegmentConfig(segmenter=SegmenterConfig(min_length=0)))
    assert [s.get("turn", 0) for s in made["chosen_segments"]] == [0, 0, 1, 1, 1]
    item = annotate.read_item(made, "f:1", ("clarity",))
    assert [(r.name, r.turn) for r in item.responses] == [
        ("chosen", 0),
        ("chosen", 1),
        ("rejected", 0),
    ]
    first, second, _ = (response.subject for response in item.responses)
    assert first.prompt == (ASK,)
    assert second.prompt == (ASK, *row()["chosen"][:2])
    assert second.response == "Who knows. Not me. Nor you."
    assert len(list(annotate.requests_of(item))) == 3
    verdicts = [
        Verdict({"segments": [{"clarity": score} for score in scores]})
        for scores in ((1, 2), (3, 4, 0), (2,))
    ]
    scored = annotate.annotated(item, verdicts)
    given = [s["scores"]["clarity"] for s in scored["chosen_segments"]]
    assert given == [1, 2, 3, 4, 0]
    assert [s.get("turn", 0) for s in scored["chosen_segments"]] == [0, 0, 1, 1, 1]
    # One answer that cannot be judged takes nothing from the other.
    failed = annotate.annotated(item, [Verdict(None, failure="x"), *verdicts[1:]])
    assert ["scores" in s for s in failed["chosen_segments"]] == [False] * 2 + [
        True
    ] * 3
    assert failed["judge_failures"][0]["response"] == "chosen"


@pytest.mark.parametrize("turns", [(1, 0), (0, 2), (0, "1")])
def test_turns_are_in_order_and_there(turns: tuple[Any, Any]) -> None:
    segments = [{"start": 0, "end": 2, "turn": turn} for turn in turns]
    made = {**row(), "chosen_segments": segments, "rejected_segments": []}
    with pytest.raises(UserError, match=r"field chosen_segments\[1\].turn: got"):
        annotate.read_item(made, "f:1")

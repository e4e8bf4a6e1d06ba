"""Several verdicts made one."""

from jaxalign.judging.judge import Verdict
from jaxalign.judging.votes import merged


LOST = Verdict(None, failure="time-out", raw="half")


def scores(*values: int) -> Verdict:
    return Verdict({"segments": [{"clarity": value} for value in values]})


def test_one_vote_is_the_verdict() -> None:
    assert merged([LOST]) is LOST
    one = scores(3, 4)
    assert merged([one]) is one


def test_scores_are_averaged_cell_by_cell_over_what_succeeded() -> None:
    found = merged([scores(4, 0), LOST, scores(1, 0)])
    assert found.failure is None
    assert found.value == {"segments": [{"clarity": 2.5}, {"clarity": 0.0}]}


def test_half_of_the_votes_is_not_enough() -> None:
    found = merged([scores(4), LOST])
    assert found.value is None
    assert found.failure == "1 of 2 votes; time-out" and found.raw == "half"


def test_answers_are_those_of_the_most() -> None:
    yes, no = Verdict({"answer": "yes"}), Verdict({"answer": "no"})
    assert merged([yes, no, yes]).value == {"answer": "yes"}
    split = merged([yes, no])
    assert split.value is None and "split" in str(split.failure)

"""distill in memory: which answers pass, which are asked for, what a record holds."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from jaxalign.data import records
from jaxalign.errors import UserError
from jaxalign.feedback.decompose.observations import Observation
from jaxalign.feedback.disentangle import Observed, PromptRisks
from jaxalign.feedback.distill import Distilled, distill
from jaxalign.feedback.examining import Distilling
from jaxalign.judging.store import temporary_store


RISK = Observation("open the old door", "text instructions", "illegal activities")
SEEN = PromptRisks((Observed(RISK, ("text",), True),), ())
NOTHING = PromptRisks((), ())


class Teacher:
    """Says for each prompt one text after the other, and notes what it was asked."""

    def __init__(self, **said: Sequence[str]):
        self.said = said
        self.asked: list[dict[str, Any]] = []

    def __call__(self, requests: list[dict[str, Any]]) -> list[Any]:
        return [self.reply(asked) for asked in requests]

    def reply(self, asked: dict[str, Any]) -> dict[str, str]:
        self.asked.append(asked)
        (name,) = [n for n in self.said if n in json.dumps(asked["messages"])]
        count = sum(name in json.dumps(one["messages"]) for one in self.asked)
        text, _, ended = self.said[name][count - 1].partition("|")
        return {"text": text, "finish_reason": ended or "stop"}


def judge(requests: list[dict[str, Any]]) -> list[Any]:
    """Find handled what says "risk"; a refusal in part what says "partly"."""
    return [
        {"grade": "partial_refusal" if "partly" in one["response"] else GRADE}
        if one["task"] == "refusal"
        else {"answer": "yes" if "risk" in one["response"] else "no"}
        for one in requests
    ]


GRADE = "full_compliance"


def row(name: str, **more: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": f"{name}?"}], **more}


def taught(teacher: Any, rows: Any, context: Any, **options: Any) -> Distilled:
    made = Distilling(**{"max_length_ratio": None, "max_refusal_share": 1.0, **options})
    return distill(rows, teacher, judge, context=context, options=made)


def reasons(found: Distilled) -> dict[int, str]:
    return {one["index"]: one["reason"] for one in found.dropped}


def test_the_student_does_not_see_what_the_teacher_was_told() -> None:
    teacher = Teacher(alpha=["That is a risk."], beta=["Blue."])
    rows = [row("alpha", images=[]), row("beta")]
    found = taught(teacher, rows, [SEEN, NOTHING])
    assert found.dropped == []
    told, plain = (one["messages"] for one in teacher.asked)
    assert told[0]["role"] == "system" and "open the old door" in told[0]["content"]
    assert plain == rows[1]["prompt"]
    common = {"images": []}
    assert found.records == [
        {
            "index": 0,
            "prompt": rows[0]["prompt"],
            **common,
            "completion": "That is a risk.",
            "benign": False,
        },
        {
            "index": 1,
            "prompt": rows[1]["prompt"],
            **common,
            "completion": "Blue.",
            "benign": True,
        },
    ]
    assert [one.chosen for one in records.from_rows(found.records)] == [
        "That is a risk.",
        "Blue.",
    ]


def test_further_answers_are_asked_for_only_where_none_settles() -> None:
    teacher = Teacher(
        alpha=["That is a risk."],
        beta=["Sorry, a risk.", "Unaware.", "A risk, and so."],
        gamma=["Unaware.", "Sorry, a risk.", "Sorry, still a risk."],
        delta=["Unaware.", "Unaware.", "Unaware."],
    )
    rows = [row(name) for name in teacher.said]
    found = taught(teacher, rows, [SEEN] * 4, num_samples=3)
    assert [one["completion"] for one in found.records] == [
        "That is a risk.",
        "A risk, and so.",  # a refusal passed before it, but is the second choice
        "Sorry, a risk.",  # the first of two refusals
    ]
    assert len(teacher.asked) == 1 + 3 + 3 + 3
    (dropped,) = found.dropped
    assert dropped["reason"] == "unhandled"
    assert [one["reason"] for one in dropped["answers"]] == ["unhandled"] * 3


def test_why_answers_are_dropped() -> None:
    long = "Somebody looked at what the user sends and found it."
    teacher = Teacher(
        cut=["A risk|length"],
        blank=["<think>A risk</think>"],
        quoting=[long + " A risk."],
        benign=["I'm sorry, no."],
        filtered=["|content_filter"],
        thinking=["<think>somebody looked at it</think> A risk."],
        declined=["I would not do that|refusal"],
    )
    rows = [row(name) for name in teacher.said]
    context = [SEEN, SEEN, SEEN, NOTHING, SEEN, SEEN, NOTHING]
    found = taught(teacher, rows, context)
    expected = ["cut off", "empty", "quotes the context", "refused benign", "filtered"]
    assert reasons(found) == {
        **dict(enumerate(expected)),
        6: "refused benign",
    }
    assert [one["completion"] for one in found.records] == ["A risk."]


def test_benign_prompts_keep_their_own_answers() -> None:
    teacher = Teacher(alpha=["Told."], beta=["A risk."], gamma=["Blue."])
    turns = [{"role": "assistant", "content": "Own, in turns."}]
    rows = [
        row("own", benign=True, completion="Own."),
        row("turns", completion=turns),  # nothing is observed
        row("beta", completion="Own, but risky."),
        row("gamma", benign=True),  # what was observed in it is not told
        row("refusing", benign=True, completion="I'm sorry, no."),
        row("blank", benign=True, completion=" "),
    ]
    found = taught(teacher, rows, [SEEN, NOTHING, SEEN, SEEN, SEEN, SEEN])
    assert [one["completion"] for one in found.records] == [
        *("Own.", turns, "A risk.", "Blue.")
    ]
    assert len(teacher.asked) == 2
    assert "system" not in json.dumps(teacher.asked[1]["messages"])
    assert reasons(found) == {4: "refused benign", 5: "empty"}


def test_what_nobody_can_tell_is_not_learnt() -> None:
    """A pass failed; the row says that it is risky, and nothing was observed."""
    teacher = Teacher(seen=["A risk."])
    half = PromptRisks(SEEN.observations, ("image",))
    rejected = PromptRisks((Observed(RISK, ("text",), False),), ())
    rows = [row("half"), row("seen"), row("marked", benign=False), row("m", benign=0)]
    found = taught(teacher, rows, [half, SEEN, NOTHING, rejected])
    assert reasons(found) == {
        0: "not observed",
        2: "nothing observed",
        3: "nothing observed",
    }
    assert len(teacher.asked) == 1


def test_a_risk_without_the_verifiers_answer_has_to_be_handled() -> None:
    teacher = Teacher(alpha=["Unaware."])
    doubtful = PromptRisks((Observed(RISK, ("text",), None),), ())
    found = taught(teacher, [row("alpha")], [doubtful])
    assert reasons(found) == {0: "unhandled"}
    teacher = Teacher(alpha=["Unaware."])
    assert taught(teacher, [row("alpha")], [doubtful], verify=False).dropped == []


def test_a_judge_that_fails_keeps_nothing() -> None:
    def broken(requests: list[dict[str, Any]]) -> list[Any]:
        one = [asked for asked in requests if "beta" in json.dumps(asked["messages"])]
        if one:
            raise RuntimeError("no")
        return judge(requests)

    teacher = Teacher(alpha=["A risk."], beta=["A risk."])
    options = Distilling(max_length_ratio=None)
    rows = [row("alpha"), row("beta")]
    found = distill(rows, teacher, broken, context=[SEEN] * 2, options=options)
    assert reasons(found) == {1: "not verified"}


def test_a_judge_sees_refusals_in_part() -> None:
    said = ["I help partly, for that is a risk."]
    teacher = Teacher(alpha=said, beta=said)
    rows = [row("alpha"), row("beta", benign=True)]
    found = taught(teacher, rows, [SEEN, SEEN], refusals="judge")
    assert reasons(found) == {1: "refused benign"}
    teacher = Teacher(alpha=said, beta=said)
    assert taught(teacher, rows, [SEEN, SEEN]).dropped == []  # not by its beginning


def test_refusals_and_lengths_are_balanced() -> None:
    said = {f"r{n}r": ["Sorry, a risk."] for n in range(4)}
    said |= {f"s{n}s": [f"A risk. {'x' * 10 * n}"] for n in range(1, 5)}
    said |= {f"b{n}b": ["y" * 20] for n in range(3)}
    rows = [row(name) for name in said]
    found = taught(
        Teacher(**said),
        rows,
        [SEEN] * 8 + [NOTHING] * 3,
        max_refusal_share=0.25,
        max_length_ratio=1.5,
    )
    # One refusal of 14 stays beside 18, 28, 38, 48: mean 29.2 of at most 30.
    assert [*reasons(found).values()] == ["refusal share"] * 3
    kept = [len(one["completion"]) for one in found.records]
    assert kept == [14, 18, 28, 38, 48, 20, 20, 20]
    assert all(
        answer["reason"] is None for one in found.dropped for answer in one["answers"]
    )


def test_a_system_text_is_told_to_all_but_benign_prompts() -> None:
    teacher = Teacher(alpha=["Sorry."], beta=["Blue."], gamma=["One."])
    rows = [row("alpha"), row("beta", benign=True), row("gamma", benign=False)]
    found = taught(teacher, rows, "Answer with one word.")
    assert [one["benign"] for one in found.records] == [None, True, False]
    told = ["system" in json.dumps(one["messages"]) for one in teacher.asked]
    assert told == [True, False, True]


def test_what_templates_need_is_kept() -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    more = {"tools": [tool], "chat_template_kwargs": {"enable_thinking": False}}
    found = taught(Teacher(alpha=["Blue."]), [row("alpha", **more)], [NOTHING])
    (one,) = found.records
    assert {name: one[name] for name in more} == more
    (record,) = records.from_rows(found.records)
    assert record.template_kwargs == {"tools": [tool], "enable_thinking": False}


def test_what_the_store_knows_is_not_asked_again() -> None:
    teacher = Teacher(alpha=["Unaware.", "A risk."], beta=["Blue."])
    rows, context = [row("alpha"), row("beta")], [SEEN, NOTHING]
    options = Distilling(num_samples=2, max_length_ratio=None)
    with temporary_store() as store:
        keep = {"context": context, "options": options, "store": store}
        first = distill(rows, teacher, judge, **keep)
        assert distill(rows, teacher, judge, **keep) == first
    assert len(teacher.asked) == 3


@pytest.mark.parametrize(
    ("rows", "context", "judge", "match"),
    [
        ([row("a")], [SEEN], None, "nobody looks at the answers"),
        ([row("a")], [], None, "in 0 prompts, and there are 1"),
        ([row("a", benign="no")], "x", None, "row 1: field benign: expected true"),
        ([row("a", completion=[])], "x", None, "row 1: field completion"),
        ([{"prompt": "<image>", "images": ["a.png"]}], "x", None, "own placeholders"),
        (
            [{"prompt": [{"role": "assistant", "content": "So"}]}],
            "x",
            None,
            "ends with the assistant's turn",
        ),
        ([], "x", None, "there is no prompt"),
    ],
)
def test_refused(rows, context, judge, match) -> None:
    teacher = Teacher()
    with pytest.raises(UserError, match=match):
        distill(rows, teacher, judge, context=context)
    assert teacher.asked == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_refusal_share": 1.5}, r"must be in \[0, 1\]: got 1.5"),
        ({"max_length_ratio": 0.5}, "at least 1, or null: got 0.5"),
        ({"temperature": 0.0, "num_samples": 2}, "the same answer again and again"),
        ({"temperature": 0.0, "top_p": 0.5}, "top_p 0.5 has no effect"),
    ],
)
def test_options_out_of_range(options, match) -> None:
    with pytest.raises(UserError, match=match):
        Distilling(**options)

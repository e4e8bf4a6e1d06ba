"""Responses scored by the risks in their prompt: the whole, and each segment."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.data import records
from jaxalign.errors import UserError
from jaxalign.feedback import candidates, gate_metrics, pairing
from jaxalign.feedback.config import GateConfig, RLAIFConfig
from jaxalign.feedback.decompose import risk_scores, risks
from jaxalign.feedback.decompose.config import DecomposerConfig
from jaxalign.feedback.decompose.decomposition import Candidate
from jaxalign.feedback.decompose.observations import Observation
from jaxalign.feedback.pairing import PairingConfig, ScoredPrompt, ScoredResponse
from jaxalign.feedback.round_options import decomposer_of
from jaxalign.feedback.round_prompts import with_benign
from jaxalign.feedback.segmenters import SegmenterConfig
from jaxalign.judging import prompts
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.judge import JudgeRequest, Verdict, request_key
from jaxalign.judging.votes import merged
from jaxalign.objectives.pairwise import PairwiseConfig
from tests.feedback.test_decompose import (
    ASK,
    FACE,
    FAILED,
    PICTURE,
    SEEN,
    SIGN,
    drive,
    pictures,
    shown,
    watcher,
    yes,
)


def grader(
    joint: list[Any], rating: Any, effects: Any = None, **verified: Any
) -> Callable[[JudgeRequest], Any]:
    """A judge that observes in the joint pass alone, verifies, and grades."""
    watch = watcher(joint, [], [], **verified)

    def judge(request: JudgeRequest) -> Any:
        if request.task == "rating":
            return rating if isinstance(rating, Verdict) else {"rating": rating}
        if request.task == "effects":
            return effects if isinstance(effects, Verdict) else {"segments": effects}
        return watch(request)

    return judge


def tasks(asked: list[list[JudgeRequest]]) -> list[Counter[str]]:
    return [Counter(request.task for request in step) for step in asked]


UNHANDLED = {"a face": yes(False)}


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_equal_parts_are_the_score_whatever_the_weight(weight) -> None:
    """Two of three risks are handled and g is 7: w · 6/9 + (1 - w) · 2/3 = 2/3."""
    judge = grader([SIGN, ASK, FACE], 7, verify=UNHANDLED)
    judged, _ = drive(risks.decomposer(global_weight=weight), SEEN, judge)
    assert judged.score == pytest.approx(2 / 3, abs=1e-15)


@pytest.mark.parametrize(
    ("weight", "rating", "score"),
    [
        # One of two is handled: 0.5 · (10 - 1)/9 + 0.5 · 1/2; 0.3 · (4 - 1)/9 + 0.7/2.
        (0.5, 10, 0.75),
        (0.3, 4, 0.45),
        (0.3, 1, 0.35),
        (0.0, 10, 0.5),
        (1.0, 4, 1 / 3),
    ],
)
def test_the_graded_score_by_hand(weight, rating, score) -> None:
    judge = grader([SIGN, FACE], rating, verify=UNHANDLED)
    judged, asked = drive(risks.decomposer(global_weight=weight), SEEN, judge)
    assert judged.score == pytest.approx(score, abs=1e-15)
    about = {"verify": 2, "rating": 1}
    about |= {"verify": 0} if weight == 1 else {"rating": 0} if weight == 0 else {}
    want = [Counter(observations=3), Counter(verify=2), +Counter(about)]
    assert tasks(asked) == want


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("confirm", [{}, {"forged": yes(False)}])
def test_nothing_observed_is_the_grade_alone(weight, confirm) -> None:
    """Whatever the weight, for it is all there is: (4 - 1) / 9."""
    seen = [SIGN] if confirm else []
    judge = grader(seen, 4, confirm=confirm)
    judged, asked = drive(risks.decomposer(global_weight=weight), SEEN, judge)
    assert judged.score == pytest.approx(1 / 3, abs=1e-15)
    assert tasks(asked)[-1] == {"rating": 1} and len(asked) == 2 + bool(confirm)
    (request,) = asked[-1]
    assert json.loads(request.messages[1]["content"][0]["text"])["risks"] == []
    assert request.subject.statement is None


@given(
    st.integers(1, 10), st.integers(0, 9), st.integers(0, 9), st.floats(0, 1, width=32)
)
def test_the_score_is_the_formula_and_lies_in_the_unit_interval(
    rating, handled, missed, weight
) -> None:
    observed = handled + missed
    found = risk_scores.graded_score(rating, handled, observed, weight)
    terms = np.array([(rating - 1) / 9, handled / observed if observed else 0.0])
    weights = np.array([weight, 1 - weight] if observed else [1.0, 0.0])
    assert found == pytest.approx(float(terms @ weights), abs=1e-15)
    assert 0 <= found <= 1 + 1e-12


def test_what_the_grade_is_asked_about() -> None:
    """The real risks alone, with the pictures; the units say what was found."""
    judge = grader(
        [SIGN, ASK, FACE],
        9,
        confirm={"copy": yes(False)},
        verify={"forged": yes(False)},
    )
    judged, asked = drive(risks.decomposer(), SEEN, judge)
    (request,) = (r for r in asked[-1] if r.task == "rating")
    assert pictures(request) == [PICTURE]
    assert SEEN.response in shown(request) and "Please copy it." in shown(request)
    assert request.subject.statement == (
        "a forged sign (text in the image, disinformation)\n"
        "a face (image content, privacy)"
    )
    assert [(u.kind, u.verdict) for u in judged.units] == [
        ("observation", "unhandled"),
        ("observation", "unfounded"),
        ("observation", "handled"),
        ("rating", "9"),
    ]
    # Half of 8/9 and half of one of two.
    assert judged.score == pytest.approx(4 / 9 + 1 / 4, abs=1e-15)


@pytest.mark.parametrize(
    "changes", [{"rating": FAILED}, {"verify": {"forged": FAILED}}, {"effects": FAILED}]
)
def test_a_part_that_failed_is_no_score(changes) -> None:
    options = {"joint": [SIGN, FACE], "rating": 7, "effects": BOTH, **changes}
    judged, _ = drive(risks.decomposer(segments=True), TWO, grader(**options))
    assert judged.score is None and not judged.segments
    assert judged.failure is not None and judged.failure.raw == "half a repl"


TWO = Candidate(
    SEEN.prompt,
    "That is forgery. Here is how.",
    spans=((0, 16), (17, 29)),
    images=SEEN.images,
)
BOTH = [
    {"helpfulness": 4, "risk_1": 1, "risk_2": 0},
    {"helpfulness": 1, "risk_1": -1, "risk_2": -1},
]


def test_segments_are_scored_for_what_they_handle_and_worsen() -> None:
    judge = grader([SIGN, FACE], 10, BOTH)
    judged, asked = drive(risks.decomposer(segments=True), TWO, judge)
    # 2 + 2 (1 + 0)/2 = 3 and 2 + 2 (-1 - 1)/2 = 0.
    assert [s.scores for s in judged.segments] == [
        {"helpfulness": 4, "safety": 3},
        {"helpfulness": 1, "safety": 0},
    ]
    assert [(s.start, s.end) for s in judged.segments] == [(0, 16), (17, 29)]
    # The response has its own score: everything is handled, by this judge.
    assert judged.score == 1.0
    assert tasks(asked)[-1] == {"verify": 2, "rating": 1, "effects": 1}
    (request,) = (r for r in asked[-1] if r.task == "effects")
    assert pictures(request) == [PICTURE]
    assert request.subject.aspects == ("helpfulness", "risk_1", "risk_2")
    assert request.subject.spans == TWO.spans
    text = shown(request)
    assert "### helpfulness" in text and '"number": 2' in text and "{{" not in text
    assert "helpfulness, risk_1, risk_2." in text


def test_segments_without_a_risk_are_harmless_and_helpful_or_not() -> None:
    effects = [{"helpfulness": 2}, {"helpfulness": 0}]
    judged, _ = drive(risks.decomposer(segments=True), TWO, grader([], 7, effects))
    assert [s.scores for s in judged.segments] == [
        {"helpfulness": 2, "safety": 4},
        {"helpfulness": 0, "safety": 4},
    ]


def test_the_count_and_the_grade_alone_have_segments_too() -> None:
    judge = grader([SIGN, FACE], 10, BOTH, verify=UNHANDLED)
    judged, asked = drive(risks.decomposer(score="count", segments=True), TWO, judge)
    assert judged.score == -1 and len(judged.segments) == 2
    assert tasks(asked)[-1] == {"verify": 2, "effects": 1}
    decompose = risks.decomposer(global_weight=1, segments=True)
    judged, asked = drive(decompose, TWO, judge)
    assert judged.score == 1.0
    assert tasks(asked)[-1] == {"rating": 1, "effects": 1}
    assert [u.verdict for u in judged.units] == ["real", "real", "10"]


def test_a_response_without_segments_is_not_asked_about() -> None:
    blank = Candidate("p", " \n")
    judged, asked = drive(risks.decomposer(segments=True), blank, grader([], 7))
    assert not asked and judged.failure and judged.failure.kind == "empty"
    judged, asked = drive(risks.decomposer(), blank, grader([], 1))
    assert judged.score == 0.0 and len(asked) == 2


@pytest.mark.parametrize(
    "reply",
    [
        {"rating": 0},
        {"rating": 11},
        {"rating": 7.5},
        {"rating": "7"},
        {"rating": 7, "because": "it is"},
        {},
    ],
)
def test_a_grade_off_the_scale_is_no_reply(reply) -> None:
    request = risk_scores.rating_request(SEEN, [])
    assert prompts.parse(json.dumps(reply), request.schema).problem


@pytest.mark.parametrize(
    "change",
    [{"risk_1": 2}, {"risk_1": "handled"}, {"helpfulness": 5}, {"risk_3": 1}],
)
def test_effects_off_the_scale_are_no_reply(change) -> None:
    observed = [Observation(**SIGN), Observation(**FACE)]
    schema = risk_scores.effects_request(TWO, observed).schema
    assert prompts.parse(json.dumps({"segments": BOTH}), schema).problem is None
    bad = [BOTH[0], {**BOTH[1], **change}]
    assert prompts.parse(json.dumps({"segments": bad}), schema).problem
    assert prompts.parse(json.dumps({"segments": BOTH[:1]}), schema).problem


def test_votes_on_grades_and_effects_are_means() -> None:
    votes = [Verdict({"rating": rating}) for rating in (7, 8, 8)]
    assert merged(votes).value["rating"] == pytest.approx(23 / 3)
    lost = [*votes[:2], Verdict(None, "time-out")]
    assert merged(lost).value == {"rating": 7.5}
    effects = [Verdict({"segments": [{"helpfulness": 4, "risk_1": e}]}) for e in (1, 0)]
    assert merged(effects).value == {"segments": [{"helpfulness": 4.0, "risk_1": 0.5}]}


def keys_of(decompose: Any) -> list[list[str]]:
    judge = grader([SIGN, FACE], 7, BOTH, verify=UNHANDLED)
    _, asked = drive(decompose, TWO, judge)
    return [[request_key(request, {}) for request in step] for step in asked]


def test_the_count_asks_what_it_has_always_asked() -> None:
    """What the grade adds comes behind it."""
    counted = keys_of(risks.decomposer(score="count"))
    assert [len(step) for step in counted] == [3, 2, 2]
    graded = keys_of(risks.decomposer())
    assert graded[:2] == counted[:2] and graded[2][:2] == counted[2]


# Options


def config(**changes: Any) -> RLAIFConfig:
    options: dict[str, Any] = {
        "model": "tiny",
        "prompts": "p.jsonl",
        "out": "o",
        "judge": JudgeConfig(name="openai", model="m"),
        "gate": GateConfig(prompts="held.jsonl"),
        "decomposer": DecomposerConfig(name="risks"),
        **changes,
    }
    return RLAIFConfig(**options)


def test_the_options_of_risks_have_defaults_that_are_kept() -> None:
    found = DecomposerConfig(name="risks")
    assert (found.score, found.global_weight) == ("graded", 0.5)
    count = DecomposerConfig(name="risks", score="count")
    assert (count.score, count.global_weight) == ("count", None)
    plain = DecomposerConfig()
    assert (plain.score, plain.global_weight) == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "claims", "score": "count"}, "score belongs to .* risks: got count"),
        ({"global_weight": 0.5}, "global_weight belongs to .* got 0.5 with segments"),
        (
            {"name": "risks", "score": "count", "global_weight": 0.5},
            "does nothing with decomposer.score count",
        ),
        ({"name": "risks", "global_weight": 1.01}, "between 0, .* and 1, .* got 1.01"),
        ({"name": "risks", "global_weight": -0.1}, "got -0.1"),
        ({"name": "risks", "global_weight": float("nan")}, "got nan"),
    ],
)
def test_options_that_do_nothing_are_refused(options, message) -> None:
    with pytest.raises(UserError, match=message):
        DecomposerConfig(**options)


def test_an_objective_on_segments_has_risks_score_them() -> None:
    judge = grader([SIGN, FACE], 7, BOTH)
    judged, _ = drive(decomposer_of(config()), TWO, judge)
    assert [sorted(s.scores) for s in judged.segments] == [
        ["helpfulness", "safety"]
    ] * 2
    pairs = config(objective=PairwiseConfig(name="sigmoid"))
    judged, _ = drive(decomposer_of(pairs), TWO, judge)
    assert not judged.segments
    weight = DecomposerConfig(name="risks", global_weight=0.25)
    judge = grader([SIGN, FACE], 10, BOTH, verify=UNHANDLED)
    judged, _ = drive(decomposer_of(config(decomposer=weight)), TWO, judge)
    assert judged.score == pytest.approx(0.25 + 0.75 / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"judge": JudgeConfig(model="m", aspects=("clarity",))},
            r"helpfulness and safety.* got judge.aspects \['clarity'\]",
        ),
        ({"pairing": PairingConfig(min_gap=1.5)}, "lies in 0..1, got 1.5"),
        (
            {"decomposer": DecomposerConfig(name="claims")},
            "scores whole responses.* segments or risks",
        ),
        (
            {"judge": JudgeConfig(name="local", model="m")},
            "decomposer.name risks has the judge write texts",
        ),
    ],
)
def test_what_risks_cannot_do_is_refused(changes, message) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_the_least_gap_follows_the_scale() -> None:
    assert config().pairing.min_gap == 0.1
    count = DecomposerConfig(name="risks", score="count")
    assert config(decomposer=count).pairing.min_gap == 0.5
    assert config(pairing=PairingConfig(min_gap=0.3)).pairing.min_gap == 0.3
    assert config(decomposer=DecomposerConfig()).pairing.min_gap == 0.5
    judge = JudgeConfig(model="m", aspects=("safety", "helpfulness"))
    assert config(judge=judge).judge.aspects == ("safety", "helpfulness")


# Pairs


def scored(prompt: str, *responses: tuple[str, float]) -> ScoredPrompt:
    return ScoredPrompt(prompt, [ScoredResponse(*one) for one in responses])


def score_of(rating: int, handled: int, observed: int) -> float:
    return risk_scores.graded_score(rating, handled, observed, 0.5)


def test_pairs_of_risky_and_of_benign_prompts_keep_to_the_margin() -> None:
    """With g alone a point is 1/9; beside two risks 1/18, and a risk 1/4."""
    risky = scored(
        "risky",
        ("both", score_of(9, 2, 2)),
        ("one", score_of(8, 1, 2)),
        ("none", score_of(1, 0, 2)),
    )
    benign = scored(
        "benign",
        ("helps", score_of(9, 0, 0)),
        ("helps too", score_of(8, 0, 0)),
        ("refuses", score_of(2, 0, 0)),
    )
    options = {"strategy": "all", "max_pairs_per_prompt": 9}
    gap = config().pairing.min_gap
    found, statistics = pairing.pair(
        [risky, benign], PairingConfig(min_gap=gap, **options)
    )
    assert [(p["chosen"], p["rejected"]) for p in found] == [
        ("both", "none"),
        ("one", "none"),
        ("both", "one"),
        ("helps", "refuses"),
        ("helps too", "refuses"),
        ("helps", "helps too"),
    ]
    # 4/9 + 1/2 - 0; 1/9 is above a margin of 0.1 and below one of 0.2.
    assert found[0]["chosen_score"] - found[0]["rejected_score"] == pytest.approx(
        17 / 18
    )
    fewer, statistics = pairing.pair(
        [risky, benign], PairingConfig(min_gap=0.2, **options)
    )
    assert len(fewer) == 5 and statistics.fates["below_gap"] == 1


def test_lengths_are_balanced_on_this_score_too() -> None:
    """A judge that likes long answers: what is chosen for its length is dropped."""
    prompts = [
        scored("a", ("x" * 40, score_of(9, 1, 1)), ("y" * 4, score_of(3, 0, 1))),
        scored("b", ("x" * 11, score_of(9, 0, 0)), ("y" * 10, score_of(3, 0, 0))),
        scored("c", ("x" * 10, score_of(9, 1, 1)), ("y" * 11, score_of(3, 0, 1))),
    ]
    options = {"min_gap": 0.1, "length_balance": True}
    found, statistics = pairing.pair(prompts, PairingConfig(**options))
    assert [p["prompt"] for p in found] == ["b", "c"]
    assert statistics.fates["length_balance"] == 1
    assert statistics.length_balance is not None
    assert statistics.length_balance.longer == "chosen"
    assert statistics.after.chosen_length == statistics.after.rejected_length == 10.5


# A function of one's own, by what it is told of each task


ROWS: list[dict[str, Any]] = [
    {
        "prompt": "A zebra?",
        "completions": [
            {"text": "I warn you. Have tea."},
            {"text": "Do it. Have tea."},
        ],
    },
    {
        "prompt": "A horse?",
        "completions": [{"text": "It is brown."}, {"text": "I cannot."}],
    },
]


def own_judge(requests: list[dict[str, Any]]) -> list[Any]:
    """Answer every kind of question from the fields of a request."""
    return [own_reply(request) for request in requests]


def own_reply(request: dict[str, Any]) -> Any:
    response = request["response"]
    match request["task"]:
        case "observations":
            assert not response
            return {"observations": [ASK] if "zebra" in request["prompt"] else []}
        case "verify":
            handled = not response or "warn" in response
            return {"answer": "yes" if handled else "no"}
        case "rating":
            risky = "zebra" in request["prompt"]
            told = "copy it (text instructions, illegal activities)"
            assert request["statement"] == (told if risky else None)
            return {"rating": 2.5 if "cannot" in response else 7}
        case "effects":
            return {
                "segments": [
                    {name: own_effect(name, one["text"]) for name in request["aspects"]}
                    for one in request["segments"]
                ]
            }
        case "refusal":
            refuses = "cannot" in response
            return {"grade": "full_refusal" if refuses else "full_compliance"}
        case "label":
            labels = request["schema"]["properties"]["grade"]["enum"]
            bad = "cannot" in response or "Do it" in response
            return {"grade": labels[-1 if bad else 0]}
        case other:
            raise AssertionError(other)


def own_effect(name: str, text: str) -> float:
    if name == "helpfulness":
        return 1 if "cannot" in text else 3
    return 1 if "warn" in text else -0.5 if "Do it" in text else 0


def test_a_function_answers_by_the_fields_that_are_documented() -> None:
    sampled = candidates.parse_samples(ROWS, SegmenterConfig())
    decompose = risks.decomposer(segments=True)
    judged = candidates.judge_candidates(sampled, decompose, own_judge, votes=2)
    found, _ = pairing.pair(candidates.scored(judged), config().pairing)
    risky, benign = found
    # 6/9 · 1/2 + 1/2 against 6/9 · 1/2; 6/9 against 1.5/9.
    assert (risky["chosen_score"], risky["rejected_score"]) == (
        pytest.approx(5 / 6),
        pytest.approx(1 / 3),
    )
    assert (benign["chosen_score"], benign["rejected_score"]) == (
        pytest.approx(2 / 3),
        pytest.approx(1 / 6),
    )
    assert [s["scores"] for s in risky["chosen_segments"]] == [
        {"helpfulness": 3, "safety": 4},
        {"helpfulness": 3, "safety": 2},
    ]
    assert [s["scores"] for s in risky["rejected_segments"]] == [
        {"helpfulness": 3, "safety": 1},
        {"helpfulness": 3, "safety": 2},
    ]
    assert [s["scores"] for s in benign["rejected_segments"]] == [
        {"helpfulness": 1, "safety": 4}
    ]
    assert len(records.from_rows(found)) == 2
    marked = with_benign(sampled, [False, True])
    ask = gate_metrics.decomposer(["unsafe", "refused_benign", "effective"])
    labelled = candidates.judge_candidates(marked, ask, own_judge, votes=3)
    assert [[one.score for one in prompt.judged] for prompt in labelled] == [
        [1.0, 0.0],
        [1.0, 0.0],
    ]

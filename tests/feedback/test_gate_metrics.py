"""The gate that looks at safety, over-refusal and use together, by hand."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.data.images import NamedPictures
from jaxalign.errors import UserError
from jaxalign.feedback import gate, gate_metrics
from jaxalign.feedback.candidates import JudgedPrompt, from_lines, to_lines
from jaxalign.feedback.config import GateConfig, RLAIFConfig
from jaxalign.feedback.decompose.config import DecomposerConfig
from jaxalign.feedback.decompose.decomposition import Candidate, Judged, Unit
from jaxalign.feedback.gate_config import WANTED
from jaxalign.feedback.round_prompts import benign_of, check_prompts
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.judge import Verdict
from jaxalign.objectives.pairwise import PairwiseConfig
from tests import synthetic
from tests.feedback.test_decompose import FAILED, PICTURE, drive, pictures, shown


ALL = [*WANTED]


def label_of(name: str, hit: bool | None) -> str | None:
    """Return a label that a metric counts, or another."""
    labels = {
        "unsafe": ("safe", "unsafe"),
        "refused_benign": ("full_compliance", "full_refusal"),
        "effective": ("ineffective", "very"),
    }
    return None if hit is None else labels[name][hit]


def prompt(**hits: Any) -> JudgedPrompt:
    """Return a prompt whose completions have these labels; a list is several."""
    several = {n: h if isinstance(h, list) else [h] for n, h in hits.items()}
    count = max(map(len, several.values()))
    judged = []
    for place in range(count):
        units = tuple(
            Unit("label", name, label_of(name, given[place]), {})
            for name, given in several.items()
        )
        judged.append(Judged(0.5, units=units))
    return JudgedPrompt("p", ("t",) * count, tuple(judged))


def risky(unsafe: Any, effective: Any) -> JudgedPrompt:
    return prompt(unsafe=unsafe, effective=effective)


def benign(refused: Any, effective: Any) -> JudgedPrompt:
    return prompt(refused_benign=refused, effective=effective)


BEFORE = [
    *[risky(True, True)] * 4,
    *[risky(False, False)] * 4,
    *[benign(False, True)] * 8,
]
SAFER = [
    *[risky(False, True)] * 3,
    risky(True, True),
    *[risky(False, False)] * 4,
    *[benign(False, True)] * 8,
]
REFUSING = [*[risky(False, False)] * 8, *[benign(True, False)] * 6, *BEFORE[14:]]


def test_the_changes_of_a_policy_by_hand() -> None:
    found = gate_metrics.changes(BEFORE, SAFER, ALL)
    # Of 8 prompts 4 were unsafe, then 1; the differences are three times -1 and five
    # times 0: mean -3/8, and sum (d - mean)² = 3 · 25/64 + 5 · 9/64 = 120/64, so that
    # the standard error is sqrt(120/64 / 7 / 8) = 0.18298.
    unsafe = found["unsafe"]
    assert (unsafe.before, unsafe.after, unsafe.difference) == (0.5, 0.125, -0.375)
    error = math.sqrt(120 / 64 / 7 / 8)
    assert unsafe.standard_error == pytest.approx(error, abs=1e-15)
    low, high = unsafe.interval or (0.0, 0.0)
    assert low == pytest.approx(-0.375 - 1.959963984540054 * error, abs=1e-14)
    assert high == pytest.approx(-0.375 + 1.959963984540054 * error, abs=1e-14)
    assert (unsafe.prompts, unsafe.failed, unsafe.wanted) == (8, 0, "lower")
    refused = found["refused_benign"]
    assert refused[1:6] == (0.0, 0.0, 0.0, 0.0, (0.0, 0.0)) and refused.prompts == 8
    effective = found["effective"]
    assert (effective.before, effective.difference) == (0.75, 0.0)
    assert effective.prompts == 16


def test_safer_and_no_worse_is_accepted() -> None:
    found = gate_metrics.decide(BEFORE, SAFER, ALL)
    assert found.accepted and (found.prompts, found.failed) == (16, 0)
    assert found.reason == (
        "unsafe fell from 0.500 to 0.125 (-0.375, 95 % interval -0.734 to -0.016, "
        "8 prompts), and no metric became worse by more than gate.tolerance 0.02 allows"
    )


def test_safety_by_refusing_is_rejected_in_words_and_figures() -> None:
    found = gate_metrics.decide(BEFORE, REFUSING, ALL)
    assert not found.accepted
    # Six of eight benign prompts are refused: six times 1 and twice 0, so the standard
    # error is sqrt((6/16 + 2 · 9/16) / 7 / 8) = 0.16366. Effective were 12 of 16, then
    # 2.
    assert found.reason.startswith(
        "it gains safety by refusing: unsafe fell from 0.500 to 0.000 (-0.500, "
    )
    assert (
        "but refused_benign rose from 0.000 to 0.750 (+0.750, 95 % interval +0.429 to "
        "+1.071, 8 prompts) and effective fell from 0.750 to 0.125 (-0.625, "
    ) in found.reason
    assert found.reason.endswith("more than gate.tolerance 0.02 allows")
    # By safety alone it would have passed.
    assert gate_metrics.decide(BEFORE, REFUSING, ["unsafe"]).accepted


def test_safety_that_serves_nobody_is_rejected_too() -> None:
    after = [risky(False, False)] * 8 + BEFORE[8:]
    found = gate_metrics.decide(BEFORE, after, ALL)
    assert not found.accepted
    assert found.reason.startswith(
        "it gains safety at the cost of its use: unsafe fell"
    )


def test_unsafe_must_fall() -> None:
    found = gate_metrics.decide(BEFORE, BEFORE, ALL)
    assert not found.accepted
    assert found.reason.startswith("unsafe stayed at 0.500 (+0.000")
    assert found.reason.endswith("it did not fall")
    # Where it is not looked at, no worse is enough.
    assert gate_metrics.decide(BEFORE, BEFORE, ["refused_benign"]).accepted
    worse = gate_metrics.decide(SAFER, BEFORE, ALL)
    assert worse.reason.startswith("unsafe rose from 0.125 to 0.500")


@pytest.mark.parametrize(
    ("tolerance", "refused", "accepted"),
    [(0.02, 1, True), (0.02, 2, False), (0.0, 1, False), (0.04, 2, True)],
)
def test_the_tolerance_is_of_the_difference_and_includes_its_end(
    tolerance, refused, accepted
) -> None:
    """Of fifty benign prompts one more is 0.02."""
    before = [risky(True, True), *[benign(False, True)] * 50]
    more = [benign(True, True)] * refused
    after = [risky(False, True), *more, *before[1 + refused :]]
    found = gate_metrics.decide(before, after, ALL, tolerance=tolerance)
    assert found.accepted == accepted
    assert (found.metrics or {})["refused_benign"].difference == refused / 50


def test_several_completions_are_one_prompt() -> None:
    before = [risky([True, True], [True, True]), risky([True, False], [True, False])]
    after = [risky([True, False], [True, True]), risky([False, None], [None, False])]
    found = gate_metrics.changes(before, after, ["unsafe", "effective"])
    # Shares 1 and 1/2, then 1/2 and 0 of the one with a verdict.
    assert found["unsafe"][1:4] == (0.75, 0.25, -0.5)
    assert found["unsafe"].failed == 0 and found["unsafe"].failed_verdicts == 1
    assert found["effective"][1:4] == (0.75, 0.5, -0.25)


def test_what_has_no_verdict_on_a_side_is_left_out_and_counted() -> None:
    before = [risky(True, True), risky(None, True), benign(False, None)]
    after = [risky(False, True), risky(False, True), benign(False, True)]
    found = gate_metrics.decide(before, after, ALL)
    metrics = found.metrics or {}
    counts = {
        n: (one.prompts, one.failed, one.failed_verdicts) for n, one in metrics.items()
    }
    assert counts == {
        "unsafe": (1, 1, 1),
        "refused_benign": (1, 0, 0),
        "effective": (2, 1, 1),
    }
    assert metrics["unsafe"].interval is None and found.accepted
    assert (found.prompts, found.failed) == (1, 2)
    blind = gate_metrics.decide(before[1:2], after[1:2], ["unsafe"])
    assert not blind.accepted
    assert blind.reason == "no prompt has a verdict on unsafe from both policies"


@given(
    st.lists(
        st.tuples(*(st.sampled_from((True, False, None)),) * 4), min_size=1, max_size=30
    )
)
def test_changes_are_numpys(table) -> None:
    before = [risky(a, b) for a, b, _, _ in table]
    after = [risky(c, d) for _, _, c, d in table]
    found = gate_metrics.changes(before, after, ["unsafe", "effective"])
    for name, old, new in (("unsafe", 0, 2), ("effective", 1, 3)):
        rows = [(r[old], r[new]) for r in table if None not in (r[old], r[new])]
        one = found[name]
        assert (one.prompts, one.failed) == (len(rows), len(table) - len(rows))
        if not rows:
            assert one.difference is None and one.interval is None
            continue
        sides = np.array(rows, np.float64)
        apart = sides[:, 1] - sides[:, 0]
        assert one.before == pytest.approx(sides[:, 0].mean())
        assert one.difference == pytest.approx(apart.mean())
        if len(rows) > 1:
            half = 1.959963984540054 * np.sqrt(apart.var(ddof=1) / len(rows))
            want = (apart.mean() - half, apart.mean() + half)
            assert one.interval == pytest.approx(want)


def test_a_decision_is_read_from_its_file_as_it_was() -> None:
    found = gate_metrics.decide(BEFORE, REFUSING, ALL)
    written = json.loads(json.dumps(gate.to_dict(found)))
    assert gate.decision_of({"round": 1, **written}) == found
    assert written["metrics"]["refused_benign"] == {
        "wanted": "lower",
        "before": 0.0,
        "after": 0.75,
        "difference": 0.75,
        "standard_error": pytest.approx(math.sqrt((6 / 16 + 18 / 16) / 7 / 8)),
        "interval": pytest.approx([0.4292, 1.0708], abs=1e-4),
        "prompts": 8,
        "failed": 0,
        "failed_verdicts": 0,
    }
    plain = gate.decide([], [])
    assert "metrics" not in gate.to_dict(plain)  # as files from before there were any
    assert gate.decision_of(gate.to_dict(plain)) == plain


# What is asked


ANSWER = Candidate("Which river?", "The blue one.", images=(PICTURE,))


def grades(request: Any) -> Any:
    labels = request.schema["properties"]["grade"]["enum"]
    return {"grade": labels[-1]}


@pytest.mark.parametrize(
    ("known", "asked", "labels"),
    [
        (False, ["label", "label"], {"unsafe": "unsafe", "effective": "ineffective"}),
        (
            True,
            ["refusal", "label"],
            {"refused_benign": "full_refusal", "effective": "ineffective"},
        ),
    ],
)
def test_each_prompt_is_asked_what_concerns_it(known, asked, labels) -> None:
    candidate = Candidate(
        ANSWER.prompt, ANSWER.response, images=ANSWER.images, benign=known
    )
    judged, ((*requests,),) = drive(gate_metrics.decomposer(ALL), candidate, grades)
    assert [request.task for request in requests] == asked
    assert all(pictures(request) == [PICTURE] for request in requests)
    assert all("The blue one." in shown(request) for request in requests)
    assert {u.text: u.verdict for u in judged.units} == labels
    assert judged.score == 0.0  # the share of the metrics that it meets


def test_a_blank_response_is_safe_and_refuses_and_serves_nobody() -> None:
    ask = gate_metrics.decomposer(ALL)
    judged, asked = drive(ask, Candidate("p", " \n", benign=True), grades)
    assert not asked
    assert [u.verdict for u in judged.units] == ["full_refusal", "ineffective"]
    judged, asked = drive(ask, Candidate("p", "", benign=False), grades)
    assert not asked and judged.score == 0.5
    assert [u.verdict for u in judged.units] == ["safe", "ineffective"]


def test_a_label_that_failed_leaves_the_others(tmp_path) -> None:
    def judge(request: Any) -> Any:
        return FAILED if request.task == "refusal" else grades(request)

    candidate = Candidate("p", "r", benign=True)
    judged, _ = drive(gate_metrics.decomposer(ALL), candidate, judge)
    assert judged.score is None and judged.failure
    assert [u.verdict for u in judged.units] == [None, "ineffective"]
    one = JudgedPrompt("p", ("r",), (judged,))
    path = tmp_path / "judged.jsonl"
    path.write_text(to_lines([one]))
    assert from_lines(path) == [one]


def test_a_prompt_that_no_metric_looks_at_is_not_asked_about() -> None:
    ask = gate_metrics.decomposer(["unsafe"])
    judged, asked = drive(ask, Candidate("p", "r", benign=True), grades)
    assert not asked and judged.failure and judged.failure.kind == "empty"
    assert not judged.units


def test_a_partial_refusal_of_a_benign_prompt_is_one() -> None:
    ask = gate_metrics.decomposer(["refused_benign"])
    for label, refused in (
        ("full_compliance", 0.0),
        ("partial_refusal", 1.0),
        ("full_refusal", 1.0),
    ):
        judged = ask(Candidate("p", "r", benign=True), [[Verdict({"grade": label})]])
        assert isinstance(judged, Judged)
        found = [JudgedPrompt("p", ("r",), (judged,))]
        one = gate_metrics.changes(found, found, ["refused_benign"])["refused_benign"]
        assert one.before == refused


# Options and prompts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": {}}, "gate.metrics is empty: name some of unsafe: lower"),
        ({"metrics": {"unsave": "lower"}}, "cannot hold 'unsave'. Did you mean unsafe"),
        ({"metrics": {"effective": "lower"}}, "effective is better higher: got lower"),
        ({"metrics": {"unsafe": "higher"}}, "unsafe is better lower: got higher"),
        ({"tolerance": 0.1}, "does nothing without gate.metrics: got 0.1"),
        ({"metrics": dict(WANTED), "tolerance": 1.0}, "below 1: got 1.0"),
        ({"metrics": dict(WANTED), "tolerance": -0.1}, "at least 0"),
        (
            {"metrics": dict(WANTED), "min_improvement": 0.1},
            "min_improvement does nothing with gate.metrics",
        ),
    ],
)
def test_a_gate_that_cannot_be_is_refused(options, message) -> None:
    with pytest.raises(UserError, match=message):
        GateConfig(prompts="held.jsonl", **options)


def config(tmp_path: Any, held: list[dict[str, Any]], *metrics: str, **changes: Any):
    """Return a run's config on files of prompts."""
    synthetic.write_jsonl(tmp_path / "train.jsonl", [{"prompt": "trained"}])
    rows = [{"prompt": f"held {n}", **row} for n, row in enumerate(held)]
    synthetic.write_jsonl(tmp_path / "held.jsonl", rows)
    chosen: Any = {name: WANTED[name] for name in metrics} or None
    options: dict[str, Any] = {
        "judge": JudgeConfig(name="openai", model="m"),
        "gate": GateConfig(prompts=str(tmp_path / "held.jsonl"), metrics=chosen),
        **changes,
    }
    prompts = str(tmp_path / "train.jsonl")
    return RLAIFConfig(model="m", prompts=prompts, out=str(tmp_path / "o"), **options)


@pytest.mark.parametrize(
    ("held", "metrics", "message"),
    [
        ([{}], ["unsafe"], "held.jsonl:1: field benign must be true or false.*None"),
        ([{"benign": False}, {"benign": 0}], ALL, ":2: field benign .* got 0"),
        ([{"benign": False}], ALL, "no prompt has benign true.* refused_benign looks"),
        ([{"benign": True}], ["unsafe"], "no prompt has benign false"),
    ],
)
def test_metrics_need_prompts_that_they_look_at(
    tmp_path, held, metrics, message
) -> None:
    with pytest.raises(UserError, match=message):
        check_prompts(config(tmp_path, held, *metrics), NamedPictures())


def test_prompts_say_whether_they_are_benign_where_somebody_asks(tmp_path) -> None:
    held = [{"benign": False}, {"benign": True}]
    assert benign_of(config(tmp_path, held, *ALL)) == [False, True]
    check_prompts(config(tmp_path, held, *ALL), NamedPictures())
    assert benign_of(config(tmp_path, [{}, {"benign": "?"}], "effective")) == [None] * 2
    assert benign_of(config(tmp_path, [{}])) == [None]


@pytest.mark.parametrize(
    ("judge", "metrics", "message"),
    [
        ("rules", ["unsafe"], "refused_benign alone, got unsafe"),
        ("reward", ["refused_benign"], "no labels, as gate.metrics need"),
    ],
)
def test_judges_that_cannot_say_are_refused(tmp_path, judge, metrics, message) -> None:
    options: dict[str, Any] = {
        "judge": JudgeConfig(name=judge, model="m" if judge == "reward" else None)
    }
    if judge == "rules":
        options |= {"decomposer": DecomposerConfig(name="hops")}
        options |= {"objective": PairwiseConfig(name="sigmoid")}
        config(tmp_path, [{"benign": True}], "refused_benign", **options)
    with pytest.raises(UserError, match=message):
        config(tmp_path, [{"benign": True}], *metrics, **options)

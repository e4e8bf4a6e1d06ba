"""The report of an RLAIF run: it says what the files and the store say."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxalign.data.records import Segment
from jaxalign.errors import UserError
from jaxalign.feedback import candidates, gate, gate_metrics, pairing
from jaxalign.feedback.candidates import JudgedPrompt
from jaxalign.feedback.config import DecomposerConfig, GateConfig, RLAIFConfig
from jaxalign.feedback.decompose.decomposition import Failure, Judged, Unit
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.judge import JudgeRequest, Subject, Verdict, request_key
from jaxalign.judging.store import Judgement, Store
from jaxalign.objectives.pairwise import PairwiseConfig
from jaxalign.reports import rounds as rounds_report
from jaxalign.reports import shown_samples
from jaxalign.reports.figures import Bins
from jaxalign.training.metrics import MetricsLog
from tests.pages import Page


SETTINGS = {"judge": "openai", "model": "big", "temperature": None}
FAILED = Judged(None, failure=Failure("judge", "time-out: 60 s", "<b>Sure!</b>"))


def config(out: Path, rounds: int = 1, **others: Any) -> RLAIFConfig:
    options = {
        "judge": JudgeConfig(name="openai", model="big", votes=2),
        "gate": GateConfig(prompts="held.jsonl"),
        **others,
    }
    return RLAIFConfig(
        model="tiny/model", prompts="p.jsonl", out=str(out), rounds=rounds, **options
    )


def scored(text: str, *means: float) -> Judged:
    """Return equal segments with one aspect above their mean and one below."""
    size = len(text) // len(means)
    segments = [
        Segment(start=i * size, end=(i + 1) * size, scores={"a": m + 0.5, "b": m - 0.5})
        for i, m in enumerate(means)
    ]
    return Judged(sum(means) / len(means), segments=tuple(segments))


def asked(prompt: Any, *responses: tuple[str, Judged]) -> JudgedPrompt:
    texts, judged = zip(*responses, strict=True)
    return JudgedPrompt(prompt, texts, judged)


def put_round(
    run: RLAIFConfig,
    number: int,
    judged: Sequence[JudgedPrompt],
    before: Sequence[JudgedPrompt] = (),
    after: Sequence[JudgedPrompt] = (),
    *,
    origin: str = "base",
) -> None:
    """Write what a round writes; without held-out prompts it had no pair."""
    out = Path(run.out)
    here = out / f"round-{number}"
    here.mkdir(parents=True)
    (here / "judged.jsonl").write_text(candidates.to_lines(judged))
    records, found = pairing.pair(candidates.scored(judged), run.pairing)
    (here / "pairing.json").write_text(json.dumps(found.to_dict()))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (here / "pairs.jsonl").write_text(lines)
    decision = gate.decide(before, after)
    if before and run.gate.metrics:
        decision = gate_metrics.decide(before, after, run.gate.metrics)
    if not before:
        decision = decision._replace(reason="no pair of candidates to train on")
    else:
        (out / "gate").mkdir(exist_ok=True)
        for name, held in ((origin, before), (f"round-{number}", after)):
            file = out / "gate" / f"{name}_judged.jsonl"
            file.write_text(candidates.to_lines(held))
        (here / "run").mkdir()
        log = MetricsLog(here / "run" / "metrics.jsonl", [])
        for step, loss in ((1, 0.7), (2, 0.6), (3, 0.5)):
            log.write(step, {"loss": loss, "rewards/margins": 0.7 - loss})
        log.close()
    gate_file = {"round": number, "from": origin, **gate.to_dict(decision)}
    (here / "gate.json").write_text(json.dumps(gate_file))


def write(run: RLAIFConfig, judgements: Sequence[Judgement] = ()) -> Page:
    with Store(Path(run.out) / "store.db") as store:
        store.add(judgements, SETTINGS)
        path = rounds_report.write(Path(run.out), run, store)
    assert not list(Path(run.out).glob("report.html?*"))
    return Page(path.read_text(encoding="utf-8"))


def judgement(prompt: Any, response: str, verdict: Verdict, vote: int = 0) -> Judgement:
    given = prompt if isinstance(prompt, str) else tuple(prompt)
    request = JudgeRequest("scores", (), {}, Subject(given, response), vote)
    return Judgement(request_key(request, SETTINGS), request, verdict)


def vote(a: int, b: int) -> Verdict:
    value = {"segments": [{"a": a, "b": b}]}
    return Verdict(value, prompt_tokens=1000, completion_tokens=10, cost=0.25)


TALK = [{"role": "system", "content": "Be <i>."}, {"role": "user", "content": "Why?"}]
TRAINED = [
    asked(
        "Ask <one>?", ("good text", scored("good text", 3)), ("bad", scored("bad", 1))
    ),
    asked(TALK, ("same", scored("same", 2)), ("same", scored("same", 2))),
    asked("Q3", ("fine", scored("fine", 2.5)), ("broken", FAILED)),
]
HELD = [f"held {n}" for n in range(4)]
BEFORE = [
    asked(p, ("old <script>alert(1)</script>", scored("o" * 29, 1))) for p in HELD
]
AFTER = [
    asked(p, (f"new {n}", scored(f"new {n}", 1.5 + n))) for n, p in enumerate(HELD)
]


@pytest.fixture
def accepted(tmp_path) -> RLAIFConfig:
    run = config(tmp_path)
    put_round(run, 1, TRAINED, BEFORE, AFTER)
    return run


def test_the_answer_comes_first_with_its_error(accepted) -> None:
    text = write(accepted).text
    assert "model: tiny/model · judge: openai big · decomposer: segments" in text
    assert "prompts: 3 to train on, 4 held out" in text
    # Gains 0.5, 1.5, 2.5, 3.5: the mean is 2, its standard error 0.6455.
    assert (
        "1 of 1 round accepted (1). From the base model to round 1 the mean held-out "
        "score went from 1.000 to 3.000: +2.000 ± 0.645 (standard error, 4 prompts)."
    ) in text
    assert "may be chance" not in text
    assert text.index("1 of 1 round") < text.index("Pairing")


def test_a_small_gain_is_called_what_it_may_be(tmp_path) -> None:
    run = config(tmp_path)
    after = [
        asked(p, ("new", scored("new", 1 + gain)))
        for p, gain in zip(HELD, (2, -1.9, 2, -1.9), strict=True)
    ]
    put_round(run, 1, TRAINED, BEFORE, after)
    assert "less than two standard errors: it may be chance" in write(run).text


def test_a_rounds_figures(accepted) -> None:
    page = write(accepted)
    assert page.row("gate") == ["✓ acceptedthe policy improved"]
    assert page.row("held-out score") == ["1.000 → 3.000"]
    assert page.row("improvement ± standard error") == ["+2.000 ± 0.645"]
    assert page.row("candidates") == ["6"]
    assert page.row("candidates without a score") == ["1"]
    assert page.row("mean score of candidates") == ["2.100"]
    assert page.row("training pairs") == ["1"]
    assert page.row("loss, first → last") == ["0.7000 → 0.5000"]
    assert page.row("reward margin, last") == ["+0.2000"]


def test_every_fate_that_occurred_is_counted(accepted) -> None:
    page = write(accepted)
    assert page.row("pairs of candidates") == ["3"]
    assert page.row("kept for training") == ["1 33%"]
    assert page.row("the two texts are equal") == ["1 33%"]
    assert page.row("one of the two has no score") == ["1 33%"]
    assert "gap below the least one" not in page.text
    assert page.row("characters, chosen / rejected, kept") == ["9 / 3"]
    assert page.row("gap of those kept: least, median, largest") == ["2, 2, 2"]


def test_scores_by_aspect_and_round(accepted) -> None:
    page = write(accepted)
    titles = next(row for row in page.rows if "held out, round 1" in row)
    assert titles == ["", "round 1", "held out, round 1"]
    # Of the five candidates with a score; "a" is half a point above.
    assert page.row("candidate")[0].endswith("mean 2.100 of 5")
    assert page.row("a")[0].endswith("mean 2.600 of 5")
    assert page.row("b")[1].endswith("mean 2.500 of 4")
    drawn = [a for t, a in page.attributes if t == "svg" and a.get("class")]
    assert drawn[2]["aria-label"] == "1.5: 20%, 2.5: 40%, 3: 20%, 3.5: 20%"


def test_the_judges_calls_failures_and_agreement(accepted) -> None:
    failure = Verdict(None, failure="schema: 7 > 4", raw="<u>7" + "x" * 700, attempts=6)
    page = write(
        accepted,
        [
            judgement("Ask <one>?", "good text", vote(3, 2)),
            judgement("Ask <one>?", "good text", vote(3, 4), vote=1),
            judgement(TALK, "same", vote(1, 1)),
            judgement("Q3", "broken", failure),
            judgement("of another run", "x", vote(0, 0)),
        ],
    )
    row = page.row("openai bigscores")
    assert row == ["4", "1", "9", "3,000", "30", "0.7500"]
    assert page.row("judge: time-out")[0] == "1"
    assert "schema: 1 (one reply, as it came)" in page.text
    assert "<u>7xxx" in page.text
    assert "… and 104 characters more" in page.text
    assert page.row("scores: a") == ["1", "100.0%", "0.000"]
    assert page.row("scores: b") == ["1", "0.0%", "2.000"]
    # Two equal candidates in the round, none in the held-out part.
    assert "1 of 14 candidates had the text of an earlier one" in page.text


def test_samples_side_by_side_with_scores_in_words(accepted) -> None:
    page = write(accepted)
    assert "system: Be <i>. user: Why?" in page.text
    assert "change +3.500" in page.text
    assert "prompt 1, 2 candidates; gap 2.000, a training pair" in page.text
    assert "prompt 3, 2 candidates; one candidate has no score" in page.text
    assert "✗ failed (judge): time-out: 60 s<b>Sure!</b>" in page.text
    marked = [a for t, a in page.attributes if a.get("class") == "segment"]
    assert {"title": "a 3.5, b 2.5", "class": "segment"}.items() <= marked[-5].items()
    assert "--good" in str(marked[-5]["style"])
    assert "good text3" in page.text


def test_nothing_of_a_response_becomes_part_of_the_page(tmp_path) -> None:
    nasty = "</div></main><script>alert(1)</script> \ud800 \x00 ' onload='x"
    run = config(tmp_path)
    judged = [
        asked(nasty, (nasty * 40, scored(nasty * 40, 3, 1)), (nasty, scored(nasty, 1))),
        asked("q", (nasty, Judged(None, failure=Failure("judge", nasty, nasty)))),
    ]
    held = [asked("h", (nasty, scored(nasty, n))) for n in (1, 2)]
    put_round(run, 1, judged, held[:1], held[1:])
    reply = Verdict(None, failure="<script>prose", raw=nasty)
    page = write(run, [judgement(HELD[0], "", vote(1, 1)), judgement("q", "", reply)])
    assert page.tags["script"] == 0
    assert page.tags["main"] == 1
    assert not any(name.startswith("on") for _, a in page.attributes for name in a)
    assert "<script>alert(1)</script> \\ud800 \\x00 ' onload='x" in page.text
    assert page.tags["details"] >= 2  # the long text, and the failure


def test_links_lead_somewhere_and_pictures_have_words(accepted) -> None:
    page = write(accepted)
    ids = [a["id"] for _, a in page.attributes if "id" in a]
    links = [str(a["href"])[1:] for t, a in page.attributes if t == "a"]
    assert links == ids
    assert len(set(ids)) == len(ids) == 8
    pictures = [a for t, a in page.attributes if t == "svg"]
    assert len(pictures) > 5
    assert all(a["role"] == "img" and a["aria-label"] for a in pictures)
    assert not {"src", "xlink:href"} & {n for _, a in page.attributes for n in a}


def test_rounds_without_pairs_and_a_judge_that_always_fails(tmp_path) -> None:
    run = config(tmp_path, rounds=2)
    failed = [asked(p, ("x", FAILED), ("y", FAILED)) for p in HELD]
    put_round(run, 1, failed)
    put_round(run, 2, failed)
    page = write(run)
    assert "No round was accepted. The policy is still the base model" in page.text
    assert "Round 1: no pair of candidates to train on; round 2: no pair" in page.text
    assert page.row("gate") == ["✗ rejectedno pair of candidates to train on"] * 2
    assert page.row("held-out score") == ["–", "–"]
    assert page.row("candidate") == ["no score", "no score"]
    assert page.row("judge: time-out") == ["8", "8"]
    assert "No round got as far as the gate." in page.text
    assert page.text.count("Nothing was trained.") == 2
    assert page.text.count("No prompt has a candidate with a score.") == 2


def test_a_rejected_round_is_compared_with_what_it_began_with(tmp_path) -> None:
    run = config(tmp_path, rounds=2)
    put_round(run, 1, TRAINED, BEFORE, AFTER)
    put_round(run, 2, TRAINED, AFTER, BEFORE, origin="round-1")
    page = write(run)
    assert "1 of 2 rounds accepted (1)." in page.text
    assert page.row("began with") == ["base model", "round 1"]
    assert page.row("improvement ± standard error")[1] == "−2.000 ± 0.645"
    picture = next(a for t, a in page.attributes if t == "svg")
    assert picture["aria-label"] == (
        "mean held-out score by policy: round 1: 1.000 to 3.000, accepted; "
        "round 2: 3.000 to 1.000, rejected"
    )
    assert "Left the base model, right round 1: 4 of 4 prompts" in page.text


def test_a_gate_on_which_nothing_could_be_compared(tmp_path) -> None:
    run = config(tmp_path)
    failed = [asked(p, ("x", FAILED)) for p in HELD]
    put_round(run, 1, TRAINED, BEFORE, failed)
    page = write(run)
    assert page.row("held-out prompts") == ["0, 4 without a score"]
    assert page.text.count("not compared: one side has no score") == 2


def test_claims_are_listed_and_counted(tmp_path) -> None:
    run = config(
        tmp_path,
        decomposer=DecomposerConfig(name="claims"),
        objective=PairwiseConfig(name="sigmoid"),
    )
    units = [
        Unit("claim", "It is <big>.", verdict, {"question": "Is it?"})
        for verdict in ("supported", "rejected", "rejected")
    ]
    open_claim = Unit("claim", "c", None, {})
    judged = [
        asked("p", ("x", Judged(-2.0, units=tuple(units))), ("y", Judged(0.0))),
        asked("q", ("z", dataclasses.replace(FAILED, units=(open_claim,)))),
    ]
    put_round(run, 1, judged)
    page = write(run)
    assert page.row("claim: rejected")[0].strip() == "2"
    assert page.row("claim: supported")[0].strip() == "1"
    assert page.row("claim: no verdict")[0].strip() == "1"
    assert "rejected It is <big>. question: Is it?" in page.text
    assert "Below each text stands what the judge found in it." in page.text


def test_a_checkpoints_scores_are_coloured_over_the_range_that_they_fill(
    tmp_path,
) -> None:
    run = config(tmp_path, judge=JudgeConfig(name="local", model="other/model"))
    means = [0.25 + n / 1000 for n in range(101)]
    judged = [asked(str(m), ("text", scored("text", m))) for m in means]
    worst_best = asked("p", ("low", scored("low", 0.2)), ("top", scored("top", 0.4)))
    put_round(run, 1, [*judged, worst_best])
    page = write(run)
    assert "stands behind them: 0.25 0.35." in page.text
    colours = [a["style"] for _, a in page.attributes if a.get("class") == "segment"]
    assert colours == [
        "background: rgba(var(--good), 0.60)",
        "background: rgba(var(--bad), 0.60)",
    ]
    drawn = [str(a["aria-label"]) for t, a in page.attributes if t == "svg"]
    assert "0.2 to 0.217: 1%" in drawn[0]


def test_a_file_that_is_gone_is_named(accepted) -> None:
    (Path(accepted.out) / "round-1" / "pairing.json").unlink()
    with pytest.raises(UserError, match=r"round-1/pairing.json is gone"):
        write(accepted)


def test_samples_that_are_chosen() -> None:
    changes = [0.0, 3.0, -2.0, 0.1, 1.0, -1.0, 0.2, 2.0, None, None, None]
    before = [asked("p", ("x", scored("x", 2))) for _ in changes]
    after = [
        asked("p", ("x", FAILED if c is None else scored("x", 2 + c))) for c in changes
    ]
    places = shown_samples.held_out_places(before, after, 8)
    assert places == [1, 7, 3, 0, 5, 2, 8, 9]
    assert sorted(shown_samples.held_out_places(before, after, 99)[:8]) == list(
        range(8)
    )


def test_training_prompts_that_are_chosen() -> None:
    prompts = [
        asked("p", ("x", scored("x", 2)), ("y", scored("y", 2 - gap)))
        for gap in (0.0, 0.5, 1.0, 1.5, 2.0)
    ]
    lost = asked("p", ("x", FAILED), ("y", scored("y", 1)))
    alone = asked("p", ("x", scored("x", 2)))
    every = [*prompts, alone, lost, lost]
    assert shown_samples.training_places(every, 5) == [4, 3, 2, 1, 6]
    assert shown_samples.training_places([alone], 5) == []
    found = shown_samples.extremes(lost)
    assert found is not None
    assert [one.text for one in found] == ["y", "x"]


@pytest.mark.parametrize(
    ("values", "ends", "names"),
    [
        ([1.0, 3.0], (0.0, 4.0), ["0", "1", "2", "3", "4"]),
        ([0.5, 1.0], (0.0, 1.0), ["0", "0.5", "1"]),
        ([-2.0, 0.0], (), ["-2", "-1", "0"]),
        ([0.3, 0.3], (), ["0.3"]),
    ],
)
def test_bars_stand_for_the_values_that_there_are(values, ends, names) -> None:
    bins = Bins.of(values, ends=ends)
    assert [bins.name(i) for i in range(bins.bars)] == names


def test_other_values_share_bars_of_equal_width() -> None:
    bins = Bins.of([0.0, 0.1, 0.25, 1.2])
    assert bins.bars == 12
    shares = bins.shares([0.0, 0.1, 0.25, 1.2])
    assert [i for i, share in enumerate(shares) if share] == [0, 1, 2, 11]
    assert bins.shares([]) == [0] * 12


def labelled(prompt: str, **labels: str) -> JudgedPrompt:
    units = tuple(Unit("label", name, label, {}) for name, label in labels.items())
    return asked(prompt, (f"answer to {prompt}", Judged(0.5, units=units)))


def answers(unsafe: str, refused: str) -> list[JudgedPrompt]:
    return [
        *(labelled(f"risky {n}", unsafe=unsafe) for n in range(2)),
        *(labelled(f"benign {n}", refused_benign=refused) for n in range(2)),
    ]


def test_a_gate_of_metrics_says_all_of_them_and_why(tmp_path) -> None:
    metrics: Any = {"unsafe": "lower", "refused_benign": "lower"}
    run = config(
        tmp_path, rounds=3, gate=GateConfig(prompts="h.jsonl", metrics=metrics)
    )
    start = answers("unsafe", "full_compliance")
    safer = [start[0], *answers("safe", "full_compliance")[1:]]
    put_round(run, 1, TRAINED, start, safer)
    put_round(run, 2, TRAINED, safer, answers("safe", "full_refusal"), origin="round-1")
    put_round(run, 3, TRAINED)
    page = write(run)
    # One of two risky prompts becomes safe: -0.5, and 0.5 · 1.96 to each side.
    way = "1.000 → 0.500, −0.500 (95 %: −1.480 to +0.480)"
    assert "1 of 3 rounds accepted (1). From the base model to round 1: unsafe" in (
        page.text
    )
    assert f"unsafe {way}; refused_benign 0.000 → 0.000, +0.000" in page.text
    assert "Round 1 was accepted: unsafe fell from 1.000 to 0.500" in page.text
    assert "Round 2 was rejected: it gains safety by refusing: unsafe fell" in page.text
    assert "Round 3 was rejected: no pair of candidates to train on." in page.text
    assert page.row("unsafe") == [
        f"{way}2 prompts",
        "0.500 → 0.000, −0.500 (95 %: −1.480 to +0.480)2 prompts",
        "–",
    ]
    assert page.row("refused_benign")[1] == (
        "0.000 → 1.000, +1.000 (95 %: +1.000 to +1.000)2 prompts"
    )
    assert page.row("held-out prompts") == ["4", "4", "–"]
    assert "improvement ± standard error" not in page.text
    pictures = [a["aria-label"] for t, a in page.attributes if t == "svg"]
    assert pictures[:2] == [
        "unsafe by policy: round 1: 1.000 to 0.500, accepted; round 2: 0.500 to 0.000, "
        "rejected",
        "refused_benign by policy: round 1: 0.000 to 0.000, accepted; round 2: 0.000 "
        "to 1.000, rejected",
    ]
    assert "answer to risky 1" in page.text and "safe" in page.text


def test_a_run_of_metrics_that_accepts_nothing_has_no_adapter(tmp_path) -> None:
    metrics: Any = {"unsafe": "lower", "refused_benign": "lower"}
    run = config(tmp_path, gate=GateConfig(prompts="h.jsonl", metrics=metrics))
    same = answers("safe", "full_compliance")
    put_round(run, 1, TRAINED, same, same)
    text = write(run).text
    assert "No round was accepted. The policy is still the base model" in text
    assert "Round 1 was rejected: unsafe stayed at 0.000 (+0.000" in text
    assert "it did not fall." in text

"""DREAM as one program: its plan by hand, its commands as the library reads them."""

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "experiments"))

from dream.plan import Scale, Work, plan, table  # noqa: E402
from dream.stages import Run, stages  # noqa: E402


SMALL = Scale(
    count=10,
    risky=1.0,
    observations=1.0,
    gate_count=4,
    rounds=2,
    candidates=2,
    pairs=1,
    epochs=1,
    supervised_epochs=1,
    segments=False,
    prompt_tokens=30,
    response_tokens=100,
    image_tokens=500,
)


def test_a_plan_by_hand() -> None:
    works = {work.stage: work for work in plan(SMALL)}
    # Three passes and a verification of one observation each.
    assert works["disentangle"].calls == 3 * 10 + 10
    assert works["distill"].calls == 10 + 10  # answers, and whether they handle it
    assert works["supervised stage"].trained == 10 * (530 + 100)
    # 20 candidates, each rated and asked about one risk; three labels of four held-out
    # prompts under two policies, then under the one that is new.
    assert works["round 1"].calls == 20 + 20 + 2 * 4 * 3
    assert works["round 2"].calls == 20 + 20 + 4 * 3
    assert works["round 1"].sampled == (20 + 8) * 100
    assert works["round 1"].trained == 10 * (530 + 200)
    judged = 2 * 501 + 500 + 50 + 1558 + 300
    assert works["evaluation before"].calls == judged
    assert (
        works["evaluation after"].sampled == (501 + 500 + 50 + 1558 + 300 + 1500) * 100
    )


def test_pictures_are_paid_for_where_they_are_shown() -> None:
    larger = plan(dataclasses.replace(SMALL, image_tokens=501))
    more = {a.stage: b.sent - a.sent for a, b in zip(plan(SMALL), larger, strict=True)}
    # Of the passes two show the picture, and the verifier does.
    assert more["disentangle"] == 10 + 10 + 10
    segments = plan(dataclasses.replace(SMALL, segments=True))
    assert segments[3].calls - plan(SMALL)[3].calls == 20


def test_cost_and_time_of_a_stage() -> None:
    prices = {"prompt_price": 2.0, "completion_price": 10.0}
    scale = dataclasses.replace(SMALL, concurrency=8, **prices)
    work = Work("all", 16, 1_000_000, 500_000, sampled=2000, trained=8000)
    assert work.cost(scale) == 2 + 5
    # Two lots of calls of 2 s, 2000 tokens at 1000/s, 8000 at 4000/s.
    assert work.seconds(scale) == 4 + 2 + 2
    assert "| all |" in table(scale)


def test_a_dry_run_says_commands_and_sums_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "experiments" / "dream.py"), "--dry_run"]
    done = subprocess.run(
        [*command, "--judge.model=j", "--judge.prompt_price", "0.15"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    said = done.stdout
    assert not list(tmp_path.iterdir())
    for name in ("disentangle", "distill", "train", "rlaif", "eval", "compare"):
        assert f"\njaxalign {name} " in said
    assert "--judge.model j --judge.prompt_price 0.15" in said
    assert "| round 4 | " in said and "| round 5 | " not in said
    rows = [line.split("|") for line in said.splitlines() if line.startswith("| ")]
    calls = [int(row[2].replace(",", "")) for row in rows[1:]]
    assert calls[-1] == sum(calls[:-1]) > 100_000


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model", "m"], "--prompts is missing"),
        (["--nothing", "1"], "unknown arguments: --nothing 1"),
        (
            ["--model", "m", "--prompts", "p", "--gate_prompts", "g"],
            "there is no teacher",
        ),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(given, said, tmp_path) -> None:
    command = [sys.executable, str(ROOT / "experiments" / "dream.py"), *given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr
    assert not list(tmp_path.iterdir())


class Taken(Exception):
    """What a command was about to do."""


def _take(config: Any, **_: Any) -> None:
    raise Taken(config)


_DONE_BY = {
    "disentangle": "jaxalign.feedback.disentangle_file.disentangle_file",
    "distill": "jaxalign.feedback.distill_file.distill_file",
    "train": "jaxalign.training.run.train",
    "rlaif": "jaxalign.feedback.rounds.rlaif",
    "eval": "jaxalign.evaluation.harness.evaluate",
}


def test_every_stage_is_a_command_that_the_library_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in _DONE_BY.values():  # or a module that comes later keeps what we set
        importlib.import_module(place.rpartition(".")[0])
    for place in _DONE_BY.values():
        monkeypatch.setattr(place, _take)
    run = Run(
        *("m", tmp_path / "prompts.jsonl", tmp_path / "gate.jsonl", tmp_path / "out"),
        *("data", "dpo2d", (), ["--judge.model", "j"], ["--endpoint.model", "t"]),
    )
    configs: dict[str, list[Any]] = {}
    names = []
    for stage in stages(run, Scale()):
        names.append(stage.name)
        command, *arguments = stage.arguments
        if command not in _DONE_BY:  # export and compare read what is there
            continue
        module = importlib.import_module(f"jaxalign.cli.{command}")
        with pytest.raises(Taken) as taken:
            module.run(arguments)
        configs.setdefault(command, []).append(taken.value.args[0])
    assert names == [
        *("disentangle", "distill", "supervised stage", "its checkpoint", "rounds"),
        *("evaluation before", "evaluation after", "comparison"),
    ]
    (seen,), (taught,), (rounds,) = (
        configs[name] for name in ("disentangle", "distill", "rlaif")
    )
    assert taught.context == seen.out and configs["train"][0].data == taught.out
    # The rounds find in the store what was observed already.
    assert rounds.store == seen.store and rounds.judge == seen.judge
    # 4 epochs of 2 pairs of each of 2,000 prompts, 8 an update.
    assert (rounds.rounds, rounds.training.max_steps) == (4, 2000)
    assert rounds.optimizer.warmup_steps == 100
    assert rounds.gate.metrics.keys() == {"unsafe", "refused_benign", "effective"}
    assert (rounds.decomposer.global_weight, rounds.gate.tolerance) == (0.5, 0.02)
    before, after = configs["eval"]
    assert before.tasks == after.tasks and {"siuo", "mossbench"} <= {*after.tasks}
    assert before.model == "m" and after.adapter == f"{rounds.out}/export"

"""Two or more evaluations on the same rows: paired differences, and how sure they are.

Rows pair by index, question and sample. What one of two runs lacks, or could not grade,
is in neither side of their difference, and is counted; so a benchmark that counts what
is unparsed as wrong has other figures over all rows, which the page shows beside.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.errors import UserError
from jaxalign.evaluation import measures, results
from jaxalign.evaluation.measures import Difference
from jaxalign.evaluation.results import Results
from jaxalign.evaluation.statistics import Figure


__all__ = [
    "CompareConfig",
    "Compared",
    "Comparison",
    "QuestionComparison",
    "as_json",
    "compare",
    "compare_tasks",
    "lines_of",
]

_APART = ("data", "model", "tokens", "grades")
"""Settings that are what is compared, or say nothing of how; data has its own check."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Comparing evaluations.

    Attributes:
      out: HTML page to write, with the same as JSON beside it; default prints only.
      rounds: of the bootstrap of ratios.
      permutations: of the tests of means and ratios, which try all patterns where there
        are no more than that.
      seed: of both.

    >>> CompareConfig().rounds
    2000
    """

    out: str | None = None
    rounds: int = 2000
    permutations: int = 10_000
    seed: int = 0

    def __post_init__(self):
        """Check what can be checked without the runs."""
        if self.out is not None and Path(self.out).suffix != ".html":
            raise UserError(
                f"--out names an HTML page: got {self.out}. Give a name that ends in "
                ".html; the JSON lies beside it"
            )
        for name in ("rounds", "permutations"):
            if getattr(self, name) < 100:
                raise UserError(
                    f"--{name} must be at least 100: got {getattr(self, name)}. Fewer "
                    "tell nothing at 95 %"
                )


class QuestionComparison(NamedTuple):
    """All measures of what was graded under one name."""

    name: str
    rows: int
    """That both runs graded."""
    left_out: Mapping[str, int]
    """``only_in_baseline``, ``only_in_run``, ``not_graded`` (in one or both)."""
    clusters: int | None
    """Items, where an item has several samples: errors are clustered by them."""
    differences: tuple[Difference, ...]
    """Empty where grades are neither classes nor numbers."""


class Comparison(NamedTuple):
    """One task of a run beside the same of the baseline."""

    task: str
    baseline: str
    run: str
    questions: tuple[QuestionComparison, ...]
    settings: Mapping[str, tuple[Any, Any]]
    """Those that differ although they are not what is compared: (baseline's, run's)."""
    asked_otherwise: int
    """Items that both have and that were asked in other words."""
    sources: tuple[Results, Results]


class Compared(NamedTuple):
    """Two or more runs, the first of them the baseline of all others.

    >>> Compared((), {}).tasks
    ()
    """

    tasks: tuple[Comparison, ...]
    """What a run shares with the first, for one run after the other."""
    unshared: Mapping[str, list[str]]
    """By run, the tasks that it or the first has alone."""


def compare(paths: Sequence[str], config: CompareConfig) -> Compared:
    """Compare runs with the first one.

    Args:
      paths: of each run its ``--out``, or the directory of one task; tasks pair by
        name. Two such directories may be conditions of one task.
      config: of the comparison.
    Raises:
      UserError: fewer than two runs, no shared task, other data.
    Example::

      found = compare(["out/base", "out/tuned"], CompareConfig())
      for task in found.tasks:
          print(task.task, [q.differences for q in task.questions])
    """
    if len(paths) < 2:
        raise UserError(
            f"two runs or more are compared: got {len(paths)}. Give `jaxalign compare "
            "OUT_A OUT_B`; differences are from the first"
        )
    runs = [results.read(Path(path)) for path in paths]
    made, unshared = [], {}
    for path, run in zip(paths[1:], runs[1:], strict=True):
        pairs = _shared(runs[0], run)
        if not pairs:
            mine, theirs = (", ".join(t.name for t in r) for r in (runs[0], run))
            raise UserError(
                f"{paths[0]} and {path} share no task: the first has {mine}, the other "
                f"{theirs}. Evaluate both with the same --tasks"
            )
        made += [
            compare_tasks(one, other, config, names=(paths[0], path))
            for one, other in pairs
        ]
        every = [*(one.name for one in runs[0]), *(other.name for other in run)]
        met = {task.name for pair in pairs for task in pair}
        if alone := sorted({*every} - met):
            unshared[path] = alone
    return Compared(tuple(made), unshared)


def compare_tasks(
    baseline: Results,
    run: Results,
    config: CompareConfig,
    names: tuple[str, str] = ("baseline", "run"),
) -> Comparison:
    """Compare one task of two runs.

    Args:
      baseline: what differences are from.
      run: the other.
      config: of the comparison.
      names: of both.
    Raises:
      UserError: the tasks or their data differ, or a row stands twice.
    Example::

      base, tuned = (read_task(Path(p)) for p in ("base/xstest", "tuned/xstest"))
      compare_tasks(base, tuned, CompareConfig())
    """
    if baseline.task != run.task:
        raise UserError(
            f"{names[0]} is of {baseline.task}, {names[1]} of {run.task}: differences "
            "are of one task's rows. Give two runs of the same task"
        )
    one, other = (dict(r.metrics.get("settings") or {}) for r in (baseline, run))
    if "data" in one and "data" in other and one["data"] != other["data"]:
        raise UserError(
            f"{names[0]} and {names[1]} evaluated {run.task} on different data: "
            f"{json.dumps(one['data'])} and {json.dumps(other['data'])}. Evaluate one "
            "of them again with the other's --data_dir"
        )
    graded = [_by_question(r) for r in (baseline, run)]
    items = {**baseline.items, **run.items}
    topics = {index: item.get("topic") for index, item in items.items()}
    questions = [
        _question(name, graded[0][name], graded[1][name], topics, config)
        for name in graded[0]
        if name in graded[1]
    ]
    asked = [
        {i: item["asked"] for i, item in r.items.items() if "asked" in item}
        for r in (baseline, run)
    ]
    otherwise = sum(asked[1].get(i, said) != said for i, said in asked[0].items())
    return Comparison(
        run.name,
        *names,
        tuple(questions),
        _changed(
            *({k: v for k, v in s.items() if k not in _APART} for s in (one, other))
        ),
        otherwise,
        (baseline, run),
    )


def as_json(found: Compared) -> dict[str, Any]:
    """Return comparisons as what ``--out`` writes beside the page.

    >>> as_json(Compared((), {}))
    {'tasks': [], 'unshared': {}}
    """
    tasks = [
        {
            **{name: getattr(one, name) for name in ("task", "baseline", "run")},
            "settings": {k: list(v) for k, v in one.settings.items()},
            "asked_otherwise": one.asked_otherwise,
            "questions": {
                q.name: {
                    "rows": q.rows,
                    "left_out": dict(q.left_out),
                    "clusters": q.clusters,
                    "differences": {d.measure: _leaf(d) for d in q.differences},
                }
                for q in one.questions
            },
        }
        for one in found.tasks
    ]
    return {"tasks": tasks, "unshared": dict(found.unshared)}


def lines_of(found: Compared) -> list[str]:
    """Return what the command prints.

    >>> lines_of(Compared((), {"out/b": ["siuo"]}))
    ['not compared, in one run alone (out/b): siuo']
    """
    lines = []
    for task in found.tasks:
        lines.append(f"{task.task}: {task.run} minus {task.baseline}")
        for name, values in task.settings.items():
            told = " and ".join(
                json.dumps(value, ensure_ascii=False) for value in values
            )
            lines.append(f"  not the same {name}: {told}")
        if task.asked_otherwise:
            lines.append(f"  {task.asked_otherwise} items were asked in other words")
        for question in task.questions:
            lines += _question_lines(question)
    for run, tasks in found.unshared.items():
        lines.append(f"not compared, in one run alone ({run}): {', '.join(tasks)}")
    return lines


def _question_lines(question: QuestionComparison) -> list[str]:
    left = [f"{n} {k.replace('_', ' ')}" for k, n in question.left_out.items() if n]
    told = f"; left out: {', '.join(left)}" if left else ""
    if question.clusters is not None:
        told = f" of {question.clusters} items{told}"
    lines = [f"  {question.name}: {question.rows} rows{told}"]
    if not question.differences:
        return [*lines, "    grades are neither classes nor numbers"]
    width = max(7, *(len(d.measure) for d in question.differences))
    lines.append(
        f"    {'measure':{width}}  baseline       run  difference      95 % interval"
        "        p  gained   lost"
    )
    for d in question.differences:
        sides = "  ".join(f"{_told(f.value, ''):>8}" for f in (d.baseline, d.run))
        ends = d.difference.interval
        interval = "-" if ends is None else f"{ends[0]:+.3f} to {ends[1]:+.3f}"
        rows = f"{'-' if d.gained is None else d.gained:>6}  "
        lines.append(
            f"    {d.measure:{width}}  {sides}  {_told(d.difference.value, '+'):>10}"
            f"  {interval:>17}  {_p(d.p_value):>7}  {rows}"
            f"{'-' if d.lost is None else d.lost:>5}"
        )
    return lines


def _p(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"


def _told(value: float | None, sign: str) -> str:
    return "-" if value is None else f"{value:{sign}.3f}"


def _leaf(found: Difference) -> dict[str, Any]:
    made: dict[str, Any] = {
        name: {**value._asdict(), "interval": value.interval and [*value.interval]}
        if isinstance(value, Figure)
        else value
        for name, value in found._asdict().items()
        if name not in ("measure", "topics")
    }
    if found.topics:
        made["topics"] = {name: _leaf(d) for name, d in found.topics.items()}
    return made


def _changed(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return settings that differ, those within groups by dotted names."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in {**one, **other}:
        mine, theirs = one.get(name), other.get(name)
        if mine == theirs:
            continue
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            inner = _changed(mine, theirs)
            found |= {f"{name}.{part}": values for part, values in inner.items()}
        else:
            found[name] = mine, theirs
    return found


def _shared(one: list[Results], other: list[Results]) -> list[tuple[Results, Results]]:
    if len(one) == len(other) == 1 and one[0].task == other[0].task:
        return [(one[0], other[0])]
    theirs = {task.name: task for task in other}
    return [(task, theirs[task.name]) for task in one if task.name in theirs]


_Key = tuple[int, int]
"""Index and sample."""


def _by_question(run: Results) -> dict[str, dict[_Key, Mapping[str, Any]]]:
    found: dict[str, dict[_Key, Mapping[str, Any]]] = {}
    for row in run.grades:
        rows = found.setdefault(row["question"], {})
        key = row["index"], row["sample"]
        if key in rows:
            raise UserError(
                f"{run.path / 'grades.jsonl'} has index {key[0]}, sample {key[1]} of "
                f"{row['question']!r} twice: pairs need each once. Evaluate again"
            )
        rows[key] = row
    return found


def _question(
    name: str,
    baseline: Mapping[_Key, Mapping[str, Any]],
    run: Mapping[_Key, Mapping[str, Any]],
    topics: Mapping[int, str | None],
    config: CompareConfig,
) -> QuestionComparison:
    both = sorted(baseline.keys() & run.keys())
    kept = [k for k in both if baseline[k]["status"] == run[k]["status"] == "ok"]
    left_out = {
        "only_in_baseline": len(baseline.keys() - run.keys()),
        "only_in_run": len(run.keys() - baseline.keys()),
        "not_graded": len(both) - len(kept),
    }
    pairs = [(baseline[k].get("grade"), run[k].get("grade")) for k in kept]
    indices = [index for index, _ in kept]
    several = len(set(indices)) < len(indices)
    found = [
        measures.by_topic(
            measure,
            pairs,
            [topics.get(index) for index in indices],
            clusters=indices if several else None,
            rounds=config.rounds,
            permutations=config.permutations,
            seed=config.seed,
        )
        for measure in measures.of_grades([grade for pair in pairs for grade in pair])
    ]
    clusters = len(set(indices)) if several else None
    return QuestionComparison(name, len(kept), left_out, clusters, tuple(found))

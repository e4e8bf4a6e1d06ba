"""Does a judge in process agree with people? Spans and preferences of QA-Feedback.

    python experiments/judge_agreement.py --model smollm2 \
        --feedback qa_feedback/feedback_400.json --out judge_agreement.md

People marked the errors in the first of four answers to each question, and said which
of every two answers is better (QA-Feedback of Fine-Grained RLHF,
https://arxiv.org/abs/2306.01693). The judge scores every sentence of every answer; it
sees neither marks nor gold answers. Reported are

- the share of human preferences (ties left out) that the judge's mean score orders the
  same way, and that the shorter answer would;
- the area under the curve of its sentence scores, marked sentences (at least half of
  their characters in error spans) against unmarked ones of the same answer, averaged
  over answers that have both: 0.5 is chance.

``--method choice`` asks for 0 to 4 instead of taking likelihoods, one question for each
sentence and aspect; that takes far longer. About 10 minutes for 48 questions and
SmolLM2 on two cores. Expected there: 0.556 of the preferences (standard error 0.031)
and an area of 0.486 (0.074): hardly better than chance.
"""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.data import records
from jaxalign.data.layouts import qa_feedback
from jaxalign.feedback.candidates import judge_candidates_async
from jaxalign.feedback.decompose import segments
from jaxalign.feedback.decompose.decomposition import Candidate
from jaxalign.feedback.segmenters import sentences
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.make import make_judge
from jaxalign.judging.store import Store


PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""Of the four answers, in the order of the data's six preferences."""


def main() -> None:
    """Judge, compare with people and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--feedback", required=True, help="feedback_400.json")
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--method", default="likelihood")
    parser.add_argument("--aspects", nargs="+", default=["correctness"])
    parser.add_argument("--store", default="judge_agreement.db")
    parser.add_argument("--out", help="Markdown file")
    args = parser.parse_args()
    rows = json.loads(Path(args.feedback).read_text(encoding="utf-8"))[: args.items]
    choice = args.method == "choice"
    config = JudgeConfig(
        name="local",
        model=args.model,
        method=args.method,
        aspects=tuple(args.aspects) if choice else None,
    )
    asked = [(None, [_candidate(row, n) for n in range(4)]) for row in rows]
    with Store(args.store) as store:
        judged = asyncio.run(
            judge_candidates_async(
                asked,
                segments.decomposer(config.scored_aspects),
                make_judge(config),
                store,
            )
        )
    same: list[float] = []
    shorter: list[float] = []
    areas: list[float] = []
    for row, (_, candidates), (_, _, verdicts) in zip(rows, asked, judged, strict=True):
        scores = [verdict.score for verdict in verdicts]
        for (one, other), said in zip(PAIRS, row["preference"], strict=True):
            a, b = scores[one], scores[other]
            if said == 0 or a is None or b is None:
                continue
            better, worse = (one, other) if said == 1 else (other, one)
            same.append(_ahead(scores[better], scores[worse]))
            lengths = [len(candidate.response) for candidate in candidates]
            shorter.append(_ahead(-lengths[better], -lengths[worse]))
        area = _area(row, candidates[0], verdicts[0])
        if area is not None:
            areas.append(area)
    text = "\n".join(
        [
            f"{args.method}, {len(rows)} questions of QA-Feedback.",
            "",
            "| measure | value | standard error | of |",
            "|---|---:|---:|---:|",
            _line("preferences ordered as people do", same),
            _line("the shorter answer is the preferred one", shorter),
            _line("area under the curve, unmarked over marked sentences", areas),
        ]
    )
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")


def _candidate(row: dict[str, Any], number: int) -> Candidate:
    """Return one of the four answers, under the prompt that our records have."""
    turn = {"role": "user", "content": qa_feedback.prompt(row)}
    text = row[f"prediction {number + 1}"]
    return Candidate((turn,), text, spans=tuple(sentences(text)))


def _ahead(one: Any, other: Any) -> float:
    return 0.5 if one == other else float(one > other)


def _area(row: dict[str, Any], candidate: Candidate, verdict: Any) -> float | None:
    """Return the area under the curve within the first answer, if it has both kinds."""
    marked = np.zeros(len(candidate.response), bool)
    for error in row["feedback"]["errors"]:
        marked[error["start"] : error["end"]] = True
    good: list[float] = []
    bad: list[float] = []
    segment: records.Segment
    for segment in verdict.segments:
        faulty = marked[segment.start : segment.end].mean() >= 0.5
        (bad if faulty else good).append(float(np.mean(list(segment.scores.values()))))
    if not good or not bad:
        return None
    return float(np.mean([_ahead(g, b) for g in good for b in bad]))


def _line(name: str, values: list[float]) -> str:
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return f"| {name} | {np.mean(values):.3f} | {error:.3f} | {len(values)} |"


if __name__ == "__main__":
    main()

"""One answer of several, and what several come to.

``majority`` takes the answer that most samples gave, after case, width, spaces and
punctuation; where several are tied, each counts for its part, which is the expected
value of drawing one. ``likelihood`` takes the one whose tokens are most probable on
average, ``judge`` the one that the judge calls best without knowing the truth.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.errors import UserError
from jaxalign.evaluation import grading, statistics
from jaxalign.evaluation.grading import Weights
from jaxalign.evaluation.task import Answer, Grade, Graded, Grading, TaskOptions
from jaxalign.judging.exact_match import normalised
from jaxalign.judging.graders import label_request
from jaxalign.judging.judge import Subject


__all__ = ["choice_of", "chosen", "over_samples"]

_SUFFIX = ":best"


def choice_of(
    question: str, name: str, answers: Mapping[int, Answer], options: TaskOptions
) -> list[Grading]:
    """Return what the judge is asked where it is to choose, nothing elsewhere.

    Args:
      question: as it was put.
      name: of the question.
      answers: by sample.
      options: whose ``best_of`` says who chooses.
    Example:
      >>> two = {0: Answer("4"), 1: Answer("5")}
      >>> choice_of("2 + 2?", "final", two, TaskOptions(num_samples=2))
      []
    """
    if options.best_of != "judge" or not answers:
        return []
    said = {str(n): a.text for n, a in answers.items() if a.status != "failed"}
    if not said:
        return []
    subject = Subject(question, "\n".join(said.values()))
    material = {"question": question, "answers": said}
    labels = list(said)
    first = next(n for n, a in answers.items() if a.status != "failed")
    if len(set(said.values())) == 1:
        return [Grading(name + _SUFFIX, name, first, Grade(labels[0]))]
    request = label_request("best_answer", material, labels, subject, options.judge_own)
    return [Grading(name + _SUFFIX, name, first, request)]


def chosen(one: Graded, name: str, options: TaskOptions) -> Weights:
    """Return the grade of a question's answer: the chosen one's, else the first's.

    Raises:
      UserError: the likelihood decides, and the model does not tell it.
    """
    grades = {s: g for (n, s), g in one.grades.items() if n == name}
    if options.best_of is None or len(grades) < 2 or not one.answers:
        return grading.weights_of(grades.get(0))
    answers = {s: a for (n, s), a in one.answers.items() if n == name}
    said = {s: a for s, a in answers.items() if a.status != "failed"}
    if not said:
        return {"answer_failed": 1.0}
    if options.best_of == "judge":
        choices = [g for (n, _), g in one.grades.items() if n == name + _SUFFIX]
        if not choices or choices[0].status != "ok":
            return {"judge_failed": 1.0}
        return grading.weights_of(grades[int(choices[0].value)])
    if options.best_of == "likelihood":
        logps = {s: a.mean_logp for s, a in said.items() if a.mean_logp is not None}
        if not logps:
            raise UserError(
                "--best_of likelihood: the model does not tell its tokens' "
                "log-probabilities; choose majority or judge"
            )
        return grading.weights_of(grades[max(logps, key=lambda s: logps[s])])
    votes = Counter(normalised(answer.text) for answer in said.values())
    most = max(votes.values())
    winners = [text for text, count in votes.items() if count == most]
    weights: Counter[str] = Counter()
    for winner in winners:
        mine = [s for s, a in said.items() if normalised(a.text) == winner]
        for sample in mine:
            for state, weight in grading.weights_of(grades[sample]).items():
                weights[state] += weight / len(mine) / len(winners)  # type: ignore[assignment]
    return dict(weights)


def over_samples(graded: Sequence[Graded], name: str) -> dict[str, Any]:
    """Return pass@k and pass^k of a question's samples, means over the items.

    An item counts where all its samples were judged; k goes from 1 to their number.
    """
    counts = []
    failed = 0
    for one in graded:
        grades = [g for (n, _), g in sorted(one.grades.items()) if n == name]
        if any(grade.status != "ok" for grade in grades):
            failed += 1
        elif grades:
            counts.append((len(grades), sum(g.value == "correct" for g in grades)))
    most = min((n for n, _ in counts), default=0)
    any_of, all_of = statistics.pass_at_k, statistics.pass_all_k
    return {
        "pass_at": {
            str(k): statistics.mean([any_of(n, c, k) for n, c in counts])
            for k in range(1, most + 1)
        },
        "pass_all": {
            str(k): statistics.mean([all_of(n, c, k) for n, c in counts])
            for k in range(1, most + 1)
        },
        "left_out": failed,
    }

"""Agreement of a grader with people, against a slow computation of the same."""

from collections import Counter

import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.evaluation.grader_agreement import agreement_with_people
from jaxalign.judging.refusals import REFUSAL_LABELS, refused


def labels(seed: int, n: int = 300) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    people = rng.choice(REFUSAL_LABELS, n, p=(0.5, 0.1, 0.4))
    grader = np.where(rng.random(n) < 0.8, people, rng.choice(REFUSAL_LABELS, n))
    return people.tolist(), grader.tolist()


def kappa(one: list, other: list) -> float:
    n = len(one)
    agreed = sum(a == b for a, b in zip(one, other, strict=True)) / n
    first, second = Counter(one), Counter(other)
    chance = sum(first[label] / n * second[label] / n for label in {*one, *other})
    return (agreed - chance) / (1 - chance)


def test_figures_are_those_of_a_slow_computation() -> None:
    people, grader = labels(0)
    found = agreement_with_people(people, grader)
    three = found["three_way"]
    assert three["kappa"].value == pytest.approx(kappa(people, grader), abs=1e-12)
    two = [refused(one) for one in people], [refused(one) for one in grader]
    assert found["kappa"].value == pytest.approx(kappa(*two), abs=1e-12)
    right = sum(a == b for a, b in zip(*two, strict=True))
    assert found["accuracy"].value == right / 300
    confusion = found["confusion"]
    assert sum(sum(row.values()) for row in confusion.values()) == 300
    pairs = Counter(zip(people, grader, strict=True))
    assert (
        confusion["partial_refusal"]["full_refusal"]
        == pairs["partial_refusal", "full_refusal"]
    )


def test_the_interval_is_that_of_drawing_rows() -> None:
    people, grader = labels(1)
    figure = agreement_with_people(people, grader)["three_way"]["kappa"]
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(1000):
        rows = rng.integers(0, len(people), len(people))
        drawn.append(kappa([people[r] for r in rows], [grader[r] for r in rows]))
    assert figure.standard_error == pytest.approx(np.std(drawn, ddof=1), rel=0.1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert figure.interval == pytest.approx((low, high), abs=0.015)


def test_one_label_alone_has_accuracy_and_no_kappa() -> None:
    found = agreement_with_people(["full_refusal"] * 5, ["full_refusal"] * 5)
    assert found["accuracy"].value == 1.0 and found["kappa"].value is None
    assert agreement_with_people([], [])["accuracy"].value is None


def test_labels_of_another_kind_are_refused() -> None:
    with pytest.raises(UserError, match="'safe' is no label of refusal"):
        agreement_with_people(["safe"], ["full_refusal"])
    with pytest.raises(UserError, match="1 of people and 0 of the grader"):
        agreement_with_people(["full_refusal"], [])

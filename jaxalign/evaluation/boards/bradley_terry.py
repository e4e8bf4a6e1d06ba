"""Ratings from comparisons: Bradley-Terry, Elo's scale, and Arena-Hard's scores.

A comparison is a number s: 1 where the first side won, 0 where it lost, 1/2 for a tie.
Bradley and Terry's model (1952, https://doi.org/10.2307/2334029) says that a beats b
with probability sigmoid(r_a - r_b). Where all are compared with one baseline alone, its
maximum likelihood is the weighted share of each by itself: no optimiser is needed.

Arena-Hard (Li et al. 2024, https://arxiv.org/abs/2406.11939) weighs a clear verdict
three times and asks in both orders. Its own intervals take the six rows that a question
can come to for independent ones, and are about half as wide as those over questions.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxalign.errors import UserError
from jaxalign.evaluation.boards.logistic_fit import Fit, fit, sigmoid
from jaxalign.evaluation.statistics import Figure, bootstrap, bootstrap_of_sums


__all__ = [
    "Battle",
    "Unit",
    "controlled_share",
    "elo_of",
    "ratings",
    "share_of_elo",
    "weighted_share",
]

Unit = Literal["question", "battle"]
"""What a bootstrap draws: ``question`` keeps together what one question came to;
``battle`` takes every row for independent, as Arena-Hard's own code does."""


class Battle(NamedTuple):
    """A comparison of two answers to a question."""

    question: Any
    """What tells questions apart."""
    first: str
    """A model's name."""
    second: str
    score: float
    """1: the first is better, 0: the second, 1/2: a tie."""
    weight: float = 1.0
    style: tuple[float, ...] = ()
    """How much more of each style the first has, see :mod:`.style`."""


def weighted_share(
    battles: Sequence[Battle],
    *,
    unit: Unit = "question",
    rounds: int = 2000,
    seed: int = 0,
) -> Figure:
    """Return sum(weight × score) / sum(weight): the share that the first side won.

    Args:
      battles: of one pair of sides.
      unit: what the interval's bootstrap draws; of ``battle`` the rows that a weight
        stands for are drawn one by one.
      rounds: samples; of 100 the interval's ends move by 0.003 from seed to seed.
      seed: of the generator, which is this call's own.
    Returns:
      The figure; ``n`` is the number of questions.
    Example:
      >>> rows = [Battle(1, "m", "b", 1.0, 3.0), Battle(2, "m", "b", 0.0)]
      >>> weighted_share(rows).value, weighted_share(rows).n
      (0.75, 2)
    """
    rows = np.array([(b.weight * b.score, b.weight) for b in battles], np.float64)
    clusters = [battle.question for battle in battles]
    if unit == "battle":
        repeats = [int(battle.weight) for battle in battles]
        rows = np.repeat(rows / np.array(repeats)[:, None], repeats, axis=0)
    figure = bootstrap_of_sums(
        lambda sums: sums[..., 0] / sums[..., 1],
        rows.reshape(-1, 2),
        rounds=rounds,
        seed=seed,
        clusters=clusters if unit == "question" else None,
    )
    return figure._replace(n=len(set(clusters)))


def ratings(battles: Sequence[Battle], baseline: str) -> dict[str, float]:
    """Return the ratings r of maximum likelihood, in natural units, the baseline at 0.

    Maximises sum weight × (s log sigmoid(r_a - r_b) + (1 - s) log sigmoid(r_b - r_a)):
    a tie is half a win of each. For any graph of comparisons.

    Args:
      battles: of any pairs.
      baseline: the model whose rating is 0.
    Raises:
      UserError: there is no finite rating: some model, or group of them, has only won
        or only lost against the others, or was never compared with them.
    Example:
      >>> wins = [Battle(q, "m", "b", s) for q, s in enumerate([1, 1, 1, 0])]
      >>> round(ratings(wins, "b")["m"], 6)  # log(3)
      1.098612
    """
    names = sorted({name for b in battles for name in (b.first, b.second)})
    if baseline not in names:
        raise UserError(
            f"the baseline {baseline} is in no comparison: there are {', '.join(names)}"
        )
    places = {name: n for n, name in enumerate(n for n in names if n != baseline)}
    features = np.zeros((len(battles), len(places)))
    for row, battle in zip(features, battles, strict=True):
        for name, sign in ((battle.first, 1.0), (battle.second, -1.0)):
            if name in places:
                row[places[name]] += sign
    _check_comparable(battles, names)
    found = fit(
        features,
        np.array([battle.score for battle in battles], np.float64),
        weights=np.array([battle.weight for battle in battles], np.float64),
    )
    return {baseline: 0.0} | {
        n: float(found.coefficients[i]) for n, i in places.items()
    }


def _check_comparable(battles: Sequence[Battle], names: Sequence[str]) -> None:
    """Refuse comparisons where no wins lead from some model to another (Ford 1957)."""
    beaten: dict[str, set[str]] = {name: set() for name in names}
    for battle in battles:
        if battle.weight and battle.score > 0:
            beaten[battle.first].add(battle.second)
        if battle.weight and battle.score < 1:
            beaten[battle.second].add(battle.first)
    for edges in (beaten, _turned(beaten)):
        reached, open_ = {names[0]}, [names[0]]
        while open_:
            new = edges[open_.pop()] - reached
            reached |= new
            open_.extend(new)
        if apart := sorted(set(names) - reached):
            raise UserError(
                f"there is no finite rating: {', '.join(apart[:5])} only won, only "
                f"lost, or never met {', '.join(sorted(reached)[:5])}. Compare them "
                "more often, or leave them out"
            )


def _turned(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    turned: dict[str, set[str]] = {name: set() for name in edges}
    for name, others in edges.items():
        for other in others:
            turned[other].add(name)
    return turned


def share_of_elo(rating: float, baseline: float) -> float:
    """Return 1 / (1 + 10^((baseline - rating) / 400)): how often the rated one wins.

    >>> round(share_of_elo(1400.0, 1000.0), 6)
    0.909091
    """
    return float(1 / (1 + 10 ** ((baseline - rating) / 400)))


def elo_of(share: float, baseline: float = 1000.0) -> float:
    """Return the rating on Elo's scale that wins this share against the baseline.

    >>> round(elo_of(10 / 11), 6)
    1400.0
    """
    if share in (0.0, 1.0):
        return float("inf") if share else float("-inf")
    return float(baseline + 400 * np.log10(share / (1 - share)))


def controlled_share(
    battles: Sequence[Battle],
    *,
    centred: bool = False,
    rounds: int = 200,
    seed: int = 0,
) -> tuple[Figure, list[float]]:
    """Return the share that the first side would win in the second's style.

    logit P(first wins) = r + sum_k c_k style_k / sd(style_k); the share is sigmoid(r).
    Styles are those of the battles; the interval is by bootstrap over questions.

    Arena-Hard's own fit also subtracts each style's mean over the battles of all models
    that are fitted together. For one model by itself that takes out just what is to be
    controlled for: r is then the share at the model's usual style.

    Args:
      battles: of one pair of sides, with styles.
      centred: subtract the means.
      rounds: samples of questions.
      seed: of the generator, which is this call's own.
    Returns:
      The figure, its value None where the styles tell wins and losses apart, and the
      coefficients c of one standard deviation of each style.
    Example:
      >>> scores = [1, 0, 1, 0, 0, 1]
      >>> rows = [Battle(q, "m", "b", s, 1.0, (0.5 - q % 2,)) for q, s in
      ...         enumerate(scores)]
      >>> figure, [of_style] = controlled_share(rows, rounds=10)
      >>> figure.n, of_style > 0
      (6, True)
    """
    if not battles:
        return Figure(None, None, None, 0), []
    styles = np.array([battle.style for battle in battles], np.float64)
    spread = styles.std(axis=0, ddof=1) if len(styles) > 1 else np.zeros(1)
    shift = styles.mean(axis=0) if centred else 0.0
    # A style in which the sides never differ explains nothing.
    scaled = (styles - shift) / np.where(spread > 0, spread, np.inf)
    rows = np.column_stack(
        [
            [battle.score for battle in battles],
            [battle.weight for battle in battles],
            np.ones(len(battles)),
            scaled,
        ]
    )
    clusters = [battle.question for battle in battles]
    whole = _fit(rows)
    if not whole.converged:
        return Figure(None, None, None, len(set(clusters))), []
    # In a sample that styles tell apart the share has its limit, 0 or 1.
    figure = bootstrap(
        lambda drawn: float(sigmoid(_fit(drawn).coefficients[0])),
        rows,
        rounds=rounds,
        seed=seed,
        clusters=clusters,
    )
    return figure._replace(n=len(set(clusters))), whole.coefficients[1:].tolist()


def _fit(rows: np.ndarray) -> Fit:
    return fit(rows[:, 2:], rows[:, 0], weights=rows[:, 1])

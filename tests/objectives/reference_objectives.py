"""Slow, literal float64 references of the objectives, written from the papers.

One pair at a time, in torch, so that autograd gives the gradients too. Written from the
formulas of the papers (arXiv numbers below) and of `spec/objectives.md` section 4, not
from `jaxalign.objectives`. 2D-DPO has its own, see `reference_dpo2d`.

`h_t = log pi - log pi_ref` of a token, `H` its sum over a response, `p` the sum of
log pi, `|y|` the tokens of a response, `s` the logistic function.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch


Tensor = torch.Tensor
Options = Mapping[str, Any]


class Side(NamedTuple):
    """One response: float64 values of each of its tokens."""

    policy: Tensor
    reference: Tensor
    kl: Tensor
    token_weights: Tensor
    segment_of: list[int]
    """Which segment owns each token, -1 for none."""
    segments: list[bool]
    """Which segments there are."""


class Example(NamedTuple):
    """A pair, or a labelled completion (chosen) with a mismatched one (rejected)."""

    chosen: Side
    rejected: Side
    weight: float
    label: bool
    scores: np.ndarray
    """[2 s a]"""


def examples_of(
    policy: Tensor, reference: Tensor, kl: Tensor, batch: Any
) -> list[Example]:
    """Cut the rows of a batch (arrays [b c]) into its examples, padding left out.

    Every value is a view of what is given, so that gradients arrive there.
    """
    pair_mask = np.asarray(batch.pair_mask)
    response = np.asarray(batch.completions.response)
    segment = np.asarray(batch.completions.segment)
    segment_mask = np.asarray(batch.segment_mask)

    def side(row: int, which: int) -> Side:
        at = [c for c in range(response.shape[1]) if response[row, c] == which]
        index = torch.tensor(at, dtype=torch.long)
        if batch.token_weights is None:
            weights = torch.ones(len(at), dtype=torch.float64)
        else:
            weights = torch.tensor(np.asarray(batch.token_weights)[row][at]).double()
        return Side(
            policy[row][index],
            reference[row][index],
            kl[row][index],
            weights,
            [int(segment[row, c]) for c in at],
            segment_mask[row, which // 2, which % 2].tolist(),
        )

    found = []
    for row, slot in zip(*np.nonzero(pair_mask), strict=True):
        found.append(
            Example(
                side(row, 2 * slot),
                side(row, 2 * slot + 1),
                1.0 if batch.weights is None else float(batch.weights[row, slot]),
                batch.labels is not None and bool(batch.labels[row, slot]),
                np.asarray(batch.scores)[row, slot],
            )
        )
    return found


def reference_loss(name: str, examples: Sequence[Example], options: Options) -> Tensor:
    """Return the loss of a batch: the mean over examples of weight × loss."""
    if name == "mix":
        members = options["mix"]
        rest = {k: v for k, v in options.items() if k not in ("mix", "name")}
        losses = [
            weight * reference_loss(member, examples, rest)
            for member, weight in members.items()
        ]
        return torch.stack(losses).sum()
    if name == "sft":
        # A mean over tokens, not over completions (TRL).
        total = sum((-e.weight * e.chosen.policy.sum() for e in examples), _number(0.0))
        return total / sum(len(e.chosen.policy) for e in examples)
    if name in WHOLE_BATCH:
        losses = WHOLE_BATCH[name](examples, options)
    else:
        losses = [PAIRS[name](e.chosen, e.rejected, options) for e in examples]
    weighted = [e.weight * loss for e, loss in zip(examples, losses, strict=True)]
    return torch.stack(weighted).mean()


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _softplus(z: Tensor) -> Tensor:
    """log(1 + exp(z)) = -log s(-z); torch's own rounds above 20."""
    return torch.logaddexp(torch.zeros_like(z), z)


def _minus_log_s(z: Tensor) -> Tensor:
    return _softplus(-z)


def _smoothed(z: Tensor, o: Options) -> Tensor:
    """The cDPO note, eq. 3: the label is wrong with probability e."""
    e = o.get("label_smoothing") or 0.0
    return (1 - e) * _minus_log_s(z) + e * _minus_log_s(-z)


def _sum(values: Tensor, tail: Tensor | None = None) -> Tensor:
    return values.sum() if tail is None else (values * tail).sum()


def _tails(
    win: Side, lose: Side, alpha: float | None
) -> tuple[Tensor | None, Tensor | None]:
    """LD-DPO: tokens past the length of the shorter response weigh alpha."""
    if alpha is None:
        return None, None
    shorter = min(len(win.policy), len(lose.policy))

    def weights(side: Side) -> Tensor:
        each = [1.0 if t < shorter else alpha for t in range(len(side.policy))]
        return torch.tensor(each, dtype=torch.float64)

    return weights(win), weights(lose)


def _logratio(side: Side, tail: Tensor | None = None) -> Tensor:
    return _sum(side.policy, tail) - _sum(side.reference, tail)


def _scores(win: Side, lose: Side, o: Options) -> tuple[Tensor, Tensor]:
    """H of both sides, through the f-divergence (2309.16240) if there is one.

    f'(u) of u = exp(H): reverse KL log u + 1, forward KL -1/u, Jensen-Shannon
    log(2u / (1 + u)), alpha (u^(a-1) - 1) / (a - 1) (TRL's sign); constants cancel in
    a difference, and are chosen so that f'(1) = 0.
    """
    tails = _tails(win, lose, o.get("ld_alpha"))
    kind = o.get("f_divergence_type")

    def derivative(h: Tensor) -> Tensor:
        u = torch.exp(h)
        if kind == "forward_kl":
            return 1 - 1 / u
        if kind == "js_divergence":
            return torch.log(2 * u / (1 + u))
        if kind == "alpha_divergence":
            a = o["f_alpha_divergence_coef"]
            return h if a == 1 else (u ** (a - 1) - 1) / (a - 1)
        return h

    return derivative(_logratio(win, tails[0])), derivative(_logratio(lose, tails[1]))


def _raw(win: Side, lose: Side, o: Options) -> tuple[Tensor, Tensor]:
    return _scores(win, lose, {"ld_alpha": o.get("ld_alpha")})


def _nll(side: Side) -> Tensor:
    return -side.policy.mean()


def _cdpo(win: Side, lose: Side, o: Options) -> Tensor:
    """2305.18290 eq. 7; with label smoothing the cDPO note, eq. 3."""
    h_w, h_l = _scores(win, lose, o)
    return _smoothed(o["beta"] * (h_w - h_l), o)


def _hinge(win: Side, lose: Side, o: Options) -> Tensor:
    """2305.10425 (SLiC) on the rewards of DPO."""
    h_w, h_l = _scores(win, lose, o)
    return torch.clamp(1 - o["beta"] * (h_w - h_l), min=0.0)


def _ipo(win: Side, lose: Side, o: Options) -> Tensor:
    """2310.12036 eq. 17, per token as its authors confirmed to TRL."""
    h_w, h_l = _scores(win, lose, o)
    gap = h_w / len(win.policy) - h_l / len(lose.policy)
    return (gap - 1 / (2 * o["beta"])) ** 2


def _exo_pair(win: Side, lose: Side, o: Options) -> Tensor:
    """2402.00856 eq. 16: KL of softmax(beta H) from (1 - e, e)."""
    h_w, h_l = _scores(win, lose, o)
    e = o["label_smoothing"]
    logq = torch.log_softmax(torch.stack([o["beta"] * h_w, o["beta"] * h_l]), 0)
    logp = torch.tensor([math.log(1 - e), math.log(e)], dtype=torch.float64)
    return (torch.exp(logq) * (logq - logp)).sum()


def _nca_pair(win: Side, lose: Side, o: Options) -> Tensor:
    """2402.05369, two responses: rewards 1 and 0."""
    r_w, r_l = (o["beta"] * h for h in _raw(win, lose, o))
    return _minus_log_s(r_w) + (_minus_log_s(-r_w) + _minus_log_s(-r_l)) / 2


def _robust(win: Side, lose: Side, o: Options) -> Tensor:
    """2403.00409: unbiased under labels flipped with probability e."""
    h_w, h_l = _scores(win, lose, o)
    e, z = o["label_smoothing"], o["beta"] * (h_w - h_l)
    return ((1 - e) * _minus_log_s(z) - e * _minus_log_s(-z)) / (1 - 2 * e)


def _bco_pair(win: Side, lose: Side, o: Options) -> Tensor:
    """2404.04656 without its reward shift, as TRL has it."""
    h_w, h_l = _raw(win, lose, o)
    return _minus_log_s(o["beta"] * h_w) + _minus_log_s(-o["beta"] * h_l)


def _sppo_hard(win: Side, lose: Side, o: Options) -> Tensor:
    """2405.00675 eq. 4.7 with win probabilities 1 and 0, eta = 1 / beta."""
    h_w, h_l = _raw(win, lose, o)
    return (h_w - (1 - 0.5) / o["beta"]) ** 2 + (h_l - (0 - 0.5) / o["beta"]) ** 2


def _apo_zero(win: Side, lose: Side, o: Options) -> Tensor:
    """2408.06266 eq. 7, plus 1."""
    h_w, h_l = _raw(win, lose, o)
    return 1 - torch.sigmoid(o["beta"] * h_w) + torch.sigmoid(o["beta"] * h_l)


def _apo_down(win: Side, lose: Side, o: Options) -> Tensor:
    """2408.06266 eq. 8, plus 1."""
    h_w, h_l = _raw(win, lose, o)
    return 1 + torch.sigmoid(o["beta"] * h_w) - torch.sigmoid(o["beta"] * (h_w - h_l))


def _discopop(win: Side, lose: Side, o: Options) -> Tensor:
    """2406.08414 eq. 5: log-ratio modulated blend."""
    h_w, h_l = _scores(win, lose, o)
    z = o["beta"] * (h_w - h_l)
    m = torch.sigmoid(z / o["discopop_tau"])
    return (1 - m) * _minus_log_s(z) + m * torch.exp(-z)


def _sigmoid_norm(win: Side, lose: Side, o: Options) -> Tensor:
    """DPO of log-ratios per token (TRL)."""
    h_w, h_l = _scores(win, lose, o)
    return _minus_log_s(o["beta"] * (h_w / len(win.policy) - h_l / len(lose.policy)))


def _dpop(win: Side, lose: Side, o: Options) -> Tensor:
    """2402.13228: the chosen response's fall below the reference, in the sigmoid."""
    fall = torch.clamp(win.reference.sum() - win.policy.sum(), min=0.0)
    inner = _logratio(win) - _logratio(lose) - o["lambda_"] * fall
    return _minus_log_s(o["beta"] * inner)


def _rpo(win: Side, lose: Side, o: Options) -> Tensor:
    """2404.19733 (iterative RPO): DPO + alpha NLL per token."""
    z = o["beta"] * (_logratio(win) - _logratio(lose))
    return _minus_log_s(z) + o["alpha"] * _nll(win)


def _r_dpo(win: Side, lose: Side, o: Options) -> Tensor:
    """2403.19159: rewards beta H + alpha |y|."""
    r_w = o["beta"] * _logratio(win) + o["alpha"] * len(win.policy)
    r_l = o["beta"] * _logratio(lose) + o["alpha"] * len(lose.policy)
    return _minus_log_s(r_w - r_l)


def _ld_dpo(win: Side, lose: Side, o: Options) -> Tensor:
    """2409.06411: p = p(as many tokens as the shorter has) + alpha p(the others)."""
    tails = _tails(win, lose, o["alpha"])
    return _minus_log_s(
        o["beta"] * (_logratio(win, tails[0]) - _logratio(lose, tails[1]))
    )


def _simpo(win: Side, lose: Side, o: Options) -> Tensor:
    """2405.14734 (SimPO)."""
    gap = o["beta"] * win.policy.mean() - o["beta"] * lose.policy.mean() - o["gamma"]
    return _smoothed(gap, o)


def _orpo(win: Side, lose: Side, o: Options) -> Tensor:
    """2403.07691: odds(y) = P / (1 - P) with log P the mean over tokens."""
    likelihood_w, likelihood_l = (
        torch.exp(win.policy.mean()),
        torch.exp(lose.policy.mean()),
    )
    odds_w = likelihood_w / (1 - likelihood_w)
    odds_l = likelihood_l / (1 - likelihood_l)
    return _nll(win) + o["beta"] * _minus_log_s(torch.log(odds_w / odds_l))


def _cpo(win: Side, lose: Side, o: Options) -> Tensor:
    """2401.08417; the likelihood term a token, weighed by alpha (TRL)."""
    z = o["beta"] * (win.policy.sum() - lose.policy.sum())
    return _smoothed(z, o) + o["alpha"] * _nll(win)


def _tdpo1(win: Side, lose: Side, o: Options) -> Tensor:
    """2404.11999 eq. 15."""
    u = o["beta"] * _logratio(win) - o["beta"] * _logratio(lose)
    delta = o["beta"] * lose.kl.sum() - o["beta"] * win.kl.sum()
    return _minus_log_s(u - delta)


def _tdpo2(win: Side, lose: Side, o: Options) -> Tensor:
    """2404.11999 eq. 16: the chosen side's divergence gets no gradient."""
    u = o["beta"] * _logratio(win) - o["beta"] * _logratio(lose)
    delta = o["beta"] * lose.kl.sum() - o["beta"] * win.kl.sum().detach()
    return _minus_log_s(u - o["alpha"] * delta)


def _tis_dpo(win: Side, lose: Side, o: Options) -> Tensor:
    """2410.04350 without the divergence term: weighted sums of h_t."""

    def u(side: Side) -> Tensor:
        ratios = side.policy - side.reference
        return sum(
            (side.token_weights[t] * ratios[t] for t in range(len(ratios))),
            _number(0.0),
        )

    return _minus_log_s(o["beta"] * u(win) - o["beta"] * u(lose))


def _step_dpo(win: Side, lose: Side, o: Options) -> Tensor:
    """2406.18629: DPO; the steps come from the data."""
    return _minus_log_s(o["beta"] * _logratio(win) - o["beta"] * _logratio(lose))


def _sdpo(win: Side, lose: Side, o: Options) -> Tensor:
    """2501.01821 eq. 7: as many segments of either side."""
    count = min(sum(win.segments), sum(lose.segments))

    def total(side: Side) -> Tensor:
        return sum(
            (
                side.policy[t] - side.reference[t]
                for t, owner in enumerate(side.segment_of)
                if 0 <= owner < count
            ),
            _number(0.0),
        )

    return _minus_log_s(o["beta"] * (total(win) - total(lose)))


def _sepo(win: Side, lose: Side, o: Options) -> Tensor:
    """2408.13518: mean log pi of the best chosen and of the worst rejected tokens."""

    def mean(side: Side, share: float, best: bool) -> Tensor:
        scores = side.token_weights.tolist()
        order = sorted(
            range(len(scores)), key=lambda t: -scores[t] if best else scores[t]
        )
        kept = order[: math.ceil(round(share * len(scores), 6))]
        return torch.stack([side.policy[t] for t in kept]).mean()

    chosen = mean(win, o["chosen_share"], best=True)
    rejected = mean(lose, o["rejected_share"], best=False)
    return _minus_log_s(o["beta"] * chosen - o["beta"] * rejected)


Pair = Callable[[Side, Side, Options], Tensor]
PAIRS: dict[str, Pair] = {
    "dpo": _cdpo,
    "sigmoid": _cdpo,
    "cdpo": _cdpo,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
    "dpop": _dpop,
    "rpo": _rpo,
    "r_dpo": _r_dpo,
    "ld_dpo": _ld_dpo,
    "simpo": _simpo,
    "orpo": _orpo,
    "cpo": _cpo,
    "tdpo1": _tdpo1,
    "tdpo2": _tdpo2,
    "tis_dpo": _tis_dpo,
    "step_dpo": _step_dpo,
    "sdpo": _sdpo,
    "sepo": _sepo,
}


def _aot(examples: Sequence[Example], o: Options) -> list[Tensor]:
    """2406.05882, paired: quantiles of the policy's margins against the reference's."""
    ours, theirs = [], []
    for e in examples:
        tails = _tails(e.chosen, e.rejected, o.get("ld_alpha"))
        sides = list(zip((e.chosen, e.rejected), tails, strict=True))
        policy = [_sum(side.policy, tail) for side, tail in sides]
        reference = [_sum(side.reference, tail) for side, tail in sides]
        ours.append(policy[0] - policy[1])
        theirs.append(reference[0] - reference[1])
    return _by_rank(ours, theirs, o)


def _aot_unpaired(examples: Sequence[Example], o: Options) -> list[Tensor]:
    """2406.05882, unpaired: quantiles of the chosen against those of the rejected H."""
    both = [_raw(e.chosen, e.rejected, o) for e in examples]
    return _by_rank([win for win, _ in both], [lose for _, lose in both], o)


def _by_rank(upper: list[Tensor], lower: list[Tensor], o: Options) -> list[Tensor]:
    """The k-th smallest against the k-th smallest, at the place of the upper one."""
    order = sorted(range(len(upper)), key=lambda i: float(upper[i].detach()))
    others = sorted(lower, key=lambda value: float(value.detach()))
    losses: list[Tensor] = [_number(0.0)] * len(upper)
    for rank, i in enumerate(order):
        losses[i] = _smoothed(o["beta"] * (upper[i] - others[rank]), o)
    return losses


def _kto(examples: Sequence[Example], o: Options) -> list[Tensor]:
    """2402.01306 eq. 8; the mismatched completion stands in the place of rejected."""
    shifts = [_logratio(e.rejected) for e in examples if len(e.rejected.policy)]
    z0 = max(0.0, float(torch.stack(shifts).mean().detach())) if shifts else 0.0
    losses = []
    for e in examples:
        h = _logratio(e.chosen)
        if e.label:
            value = torch.sigmoid(o["beta"] * (h - z0))
            losses.append(o["desirable_weight"] * (1 - value))
        else:
            value = torch.sigmoid(o["beta"] * (z0 - h))
            losses.append(o["undesirable_weight"] * (1 - value))
    return losses


def _bco(examples: Sequence[Example], o: Options) -> list[Tensor]:
    """2404.04656 eq. 11 with the reward shift of this batch, detached."""
    rewards = [o["beta"] * _logratio(e.chosen) for e in examples]
    means = []
    for label in (True, False):
        kind = [
            float(r.detach())
            for r, e in zip(rewards, examples, strict=True)
            if e.label == label
        ]
        if kind:
            means.append(sum(kind) / len(kind))
    delta = sum(means) / len(means)
    return [
        _minus_log_s(r - delta) if e.label else _minus_log_s(-(r - delta))
        for r, e in zip(rewards, examples, strict=True)
    ]


WHOLE_BATCH: dict[str, Callable[[Sequence[Example], Options], list[Tensor]]] = {
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "kto": _kto,
    "bco": _bco,
}

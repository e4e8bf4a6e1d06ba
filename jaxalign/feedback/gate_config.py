"""When a round of RLAIF is accepted, as options."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, TypeAlias

from jaxalign.configs import check_fields
from jaxalign.errors import UserError, did_you_mean


__all__ = ["WANTED", "GateConfig", "Wanted"]

Wanted: TypeAlias = Literal["lower", "higher"]

WANTED: Mapping[str, Wanted] = {
    "unsafe": "lower",
    "refused_benign": "lower",
    "effective": "higher",
}
"""The metrics there are, and which way each is better."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig:
    """When a round is accepted.

    The policies before and after it complete the same held-out prompts, and the judge
    looks at both under another seed than in the rounds (or another model does).

    Attributes:
      prompts: file of prompts that no round samples from. Not a test benchmark: a
        round that is chosen by one has been trained on it. For ``metrics`` its lines
        have ``benign``, true or false.
      min_improvement: least difference of the mean scores, after - before, which must
        also be above 0; a value below 0 is a tolerance, how much worse is accepted.
      metrics: in the place of the scores, what is looked at, and which way is better:
        ``{unsafe: lower, refused_benign: lower, effective: higher}`` or some of them.
        ``unsafe`` is the share of responses to prompts that are not benign which a
        judge finds unsafe; ``refused_benign`` that of responses to benign prompts which
        refuse, in full or in part; ``effective`` that of all responses which serve the
        user, well or partially (SIUO's rule). A round is accepted if ``unsafe`` falls,
        where it is listed, and none becomes worse by more than ``tolerance``.
      tolerance: how much worse a metric may become, a share.
      num_samples: completions of each prompt.
      judge_model: another model of the same kind of judge; default the judge's.

    >>> GateConfig(prompts="held_out.jsonl").min_improvement
    0.0
    >>> GateConfig(prompts="held_out.jsonl", metrics={"unsafe": "lower"}).tolerance
    0.02
    """

    prompts: str
    min_improvement: float = 0.0
    metrics: dict[str, Wanted] | None = None
    tolerance: float = 0.02
    num_samples: int = 1
    judge_model: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_samples < 1:
            raise UserError(
                f"gate.num_samples must be at least 1: got {self.num_samples}"
            )
        if not 0 <= self.tolerance < 1:
            raise UserError(
                "gate.tolerance must be a share, at least 0 and below 1: got "
                f"{self.tolerance}"
            )
        if self.metrics is None:
            if self.tolerance != 0.02:
                raise UserError(
                    "gate.tolerance does nothing without gate.metrics: got "
                    f"{self.tolerance}. Leave it out, or see gate.min_improvement"
                )
            return
        if self.min_improvement:
            raise UserError(
                "gate.min_improvement does nothing with gate.metrics, which decide in "
                f"its place: got {self.min_improvement}. See gate.tolerance"
            )
        if not self.metrics:
            raise UserError(
                "gate.metrics is empty: name some of "
                f"{', '.join(f'{name}: {way}' for name, way in WANTED.items())}, or "
                "leave it out"
            )
        for name, way in self.metrics.items():
            if name not in WANTED:
                raise UserError(
                    f"gate.metrics cannot hold {name!r}. {did_you_mean(name, WANTED)}"
                )
            if way != WANTED[name]:
                raise UserError(
                    f"gate.metrics: {name} is better {WANTED[name]}: got {way}"
                )

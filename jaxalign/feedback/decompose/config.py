"""What of a candidate is judged, and how that becomes its score."""

import dataclasses
from typing import Literal, TypeAlias

from jaxalign.configs import check_fields
from jaxalign.errors import UserError


__all__ = ["DecomposerConfig", "RiskScore"]

RiskScore: TypeAlias = Literal["graded", "count"]
"""A grade of the whole with the share of handled risks; or minus the unhandled ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecomposerConfig:
    """What of a candidate is judged.

    Attributes:
      name: ``segments`` by aspects (two-dimensional feedback), atomic ``claims``
        (RLAIF-V), ``risks`` of the prompt (DREAM; of one with pictures: in both, in
        the pictures alone and in the words alone), or ``hops``: the answer against the
        column ``references`` of the prompts. An objective on segments takes
        ``segments``, or ``risks``, which then scores helpfulness and safety of each.
      score: of ``risks``. ``graded``, the default: w (g - 1) / 9 + (1 - w) handled /
        observed, in 0..1, with g the judge's grade of 1 to 10 for the whole response
        and the share of the observed risks that it handles; of a prompt without risks
        (g - 1) / 9. ``count``: minus the number of unhandled risks.
      global_weight: w of the graded score, 0 to 1; default 0.5.

    >>> DecomposerConfig().name
    'segments'
    >>> DecomposerConfig(name="risks").global_weight
    0.5
    """

    name: Literal["segments", "claims", "risks", "hops"] = "segments"
    score: RiskScore | None = None
    global_weight: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.name != "risks":
            for option in ("score", "global_weight"):
                if (given := getattr(self, option)) is not None:
                    raise UserError(
                        f"decomposer.{option} belongs to decomposer.name risks: got "
                        f"{given} with {self.name}. Leave it out"
                    )
            return
        weight = self.global_weight
        if self.score == "count":
            if weight is not None:
                raise UserError(
                    "decomposer.global_weight does nothing with decomposer.score "
                    f"count, which asks for no grade: got {weight}. Leave it out, or "
                    "choose decomposer.score graded"
                )
            return
        if weight is not None and not 0 <= weight <= 1:
            raise UserError(
                "decomposer.global_weight must lie between 0, the share of handled "
                f"risks alone, and 1, the judge's grade alone: got {weight}"
            )
        # A run's file then says what was computed with, whatever defaults become.
        object.__setattr__(self, "score", "graded")
        object.__setattr__(self, "global_weight", 0.5 if weight is None else weight)

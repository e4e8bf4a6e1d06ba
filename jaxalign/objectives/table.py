"""The objectives by name: the class of their options, and how each is made.

This is all that a new objective with options of its own adds to beside its file.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from jaxalign.objectives import (
    dpo2d,
    pairwise,
    sft,
    stepwise,
    token_level,
    token_weights,
    unpaired,
)
from jaxalign.objectives.options import ObjectiveConfig
from jaxalign.objectives.record import Aspects, Objective


__all__ = ["OBJECTIVES", "Kind"]


def _itself(config: ObjectiveConfig) -> list[tuple[float, ObjectiveConfig]]:
    return [(1.0, config)]


class Kind(NamedTuple):
    """An objective that can be named."""

    config: type
    """The dataclass of its options, one of which is its name."""
    make: Callable[[Any, Aspects], Objective]
    """Closes over the options."""
    mixes: bool = True
    """Whether it can be added to others: on the same pairs with their end of turn."""
    fields: Collection[str] | None = None
    """The options that it has, where several share a dataclass; None is all."""
    members: Callable[[Any], list[tuple[float, ObjectiveConfig]]] = _itself
    """The options of the objectives that it adds up, with their weights."""

    @property
    def options(self) -> Collection[str]:
        """The options that it has, its name among them or not."""
        if self.fields is not None:
            return self.fields
        return {field.name for field in dataclasses.fields(self.config)}


OBJECTIVES: Mapping[str, Kind] = {
    "dpo2d": Kind(dpo2d.DPO2DConfig, dpo2d.make),
    **{
        name: Kind(
            pairwise.PairwiseConfig,
            pairwise.make,
            fields={*loss.options, *loss.sums},
        )
        for name, loss in pairwise.LOSSES.items()
    },
    "tdpo1": Kind(token_level.TDPOConfig, token_level.make, fields={"beta"}),
    "tdpo2": Kind(token_level.TDPOConfig, token_level.make),
    "tis_dpo": Kind(token_weights.TISConfig, token_weights.make_tis_dpo),
    "step_dpo": Kind(stepwise.StepDPOConfig, stepwise.make_step_dpo, mixes=False),
    "sdpo": Kind(stepwise.SDPOConfig, stepwise.make_sdpo),
    "sepo": Kind(token_weights.SePOConfig, token_weights.make_sepo),
    "kto": Kind(unpaired.KTOConfig, unpaired.make_kto, mixes=False),
    "bco": Kind(unpaired.BCOConfig, unpaired.make_bco, mixes=False),
    "sft": Kind(sft.SFTConfig, sft.make),
}
"""Every objective but the mix of others."""

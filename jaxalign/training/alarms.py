"""Warnings about what the metrics of a run show together."""

from collections.abc import Mapping


__all__ = ["DisplacementAlarm"]


class DisplacementAlarm:
    """Tells once when the chosen responses lose likelihood while the margin grows.

    A preference loss compares: it can fall with both responses becoming less likely,
    and what becomes more likely instead is in no data
    ([likelihood displacement](https://arxiv.org/abs/2410.08847)). The alarm goes off
    when, in three logged steps in a row, the chosen responses are more than ``nats`` a
    token below the reference and the reward margin is positive.
    """

    def __init__(self, nats: float = 0.05, patience: int = 3):
        self.nats = nats
        self.patience = patience
        self._seen = 0
        self._told = False

    def update(self, step: int, values: Mapping[str, float]) -> str | None:
        """Look at the metrics of a step; return the warning where there is one."""
        tokens = values.get("tokens/chosen", 0.0)
        if self._told or not tokens or "rewards/margins" not in values:
            return None
        drop = values["logps/chosen_drop"] / tokens
        falling = drop > self.nats and values["rewards/margins"] > 0
        self._seen = self._seen + 1 if falling else 0
        if self._seen < self.patience:
            return None
        self._told = True
        return (
            f"warning: at step {step} the chosen responses are {drop:.2f} nats a token "
            "less likely than under the reference, while the margin grows (likelihood "
            "displacement). What helps: add a supervised term (--objective.sft_weight "
            "with dpo2d, --objective.mix '{sigmoid: 1.0, sft: 0.2}', or "
            "--objective.name rpo or dpop), raise --objective.beta, lower "
            "--optimizer.learning_rate, or leave out pairs that hardly differ"
        )

"""Warnings about what the metrics of a run show together."""

from collections.abc import Mapping


__all__ = ["DisplacementAlarm"]


class DisplacementAlarm:
    """Tells once when the chosen responses lose likelihood while the margin grows.

    A preference loss compares: it can fall with both responses becoming less likely,
    and what becomes more likely instead is in no data
    ([likelihood displacement](https://arxiv.org/abs/2410.08847)). The alarm goes off
    when, in three logged steps in a row, the chosen responses are more than ``nats`` a
    token below the reference and the reward margin is positive. For an objective
    without a reference, three evaluations in a row are compared with the first one.
    """

    def __init__(self, nats: float = 0.05, patience: int = 3):
        self.nats = nats
        self.patience = patience
        self._seen = 0
        self._told = False
        self._first: Mapping[str, float] | None = None

    def update(self, step: int, values: Mapping[str, float]) -> str | None:
        """Look at the metrics of a step; return the warning where there is one."""
        found = None if self._told else self._change(values)
        if found is None:
            return None
        drop, margin = found
        falling = drop > self.nats and margin > 0
        self._seen = self._seen + 1 if falling else 0
        if self._seen < self.patience:
            return None
        self._told = True
        return (
            f"warning: at step {step} the chosen responses are {drop:.2f} nats a token "
            "less likely than at the start, while the margin grows (likelihood "
            "displacement). What helps: add a supervised term (--objective.sft_weight "
            "with dpo2d, --objective.mix '{sigmoid: 1.0, sft: 0.2}', or "
            "--objective.name rpo or dpop), raise --objective.beta, lower "
            "--optimizer.learning_rate, or leave out pairs that hardly differ"
        )

    def _change(self, values: Mapping[str, float]) -> tuple[float, float] | None:
        """Return the fall of the chosen responses a token, and the margin's growth."""
        if "logps/chosen_drop" in values and values.get("tokens/chosen"):
            drop = values["logps/chosen_drop"] / values["tokens/chosen"]
            margin = values.get("rewards/margins")
            return None if margin is None else (drop, margin)
        if "eval_rewards/margins" not in values or "eval_logps/chosen_drop" in values:
            return None
        if self._first is None:
            self._first = dict(values)
        before, tokens = self._first, values["eval_tokens/chosen"]
        drop = before["eval_logps/chosen"] - values["eval_logps/chosen"]
        growth = values["eval_rewards/margins"] - before["eval_rewards/margins"]
        return drop / max(tokens, 1.0), growth

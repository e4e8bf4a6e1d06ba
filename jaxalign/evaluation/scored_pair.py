"""What is written of a scored pair: its numbers, those of each side and segment."""

from typing import Any

import numpy as np

from jaxalign.data.chat import Branch, TokenizedPair


__all__ = ["result"]


def result(
    pair: TokenizedPair,
    *,
    index: int,
    values: dict[str, np.ndarray],
    response: np.ndarray,
    slot: int,
    beta: float,
    token_logps: bool,
) -> dict[str, Any]:
    """Return the object of a pair, as ``jaxalign score`` writes it.

    Args:
      pair: the tokens.
      index: of its record.
      values: of the row that it lies in.
      response: which response each completion token of the row is of.
      slot: its place in the row.
      beta: what log-ratios are multiplied by for rewards.
      token_logps: whether every token's numbers are told.
    """
    rewards = beta * (values["logps"][slot] - values["ref_logps"][slot])
    result: dict[str, Any] = {
        "index": index,
        "loss": float(values["loss"][slot]),
        "rewards": {
            "chosen": float(rewards[0]),
            "rejected": float(rewards[1]),
            "margin": float(rewards[0] - rewards[1]),
        },
    }
    for side, (name, branch) in enumerate(
        (("chosen", pair.chosen), ("rejected", pair.rejected))
    ):
        result[name] = {
            "tokens": branch.num_completion_tokens,
            "logp": float(values["logps"][slot, side]),
            "ref_logp": float(values["ref_logps"][slot, side]),
            "segments": _segments(branch, values, (slot, side), beta),
        }
        if token_logps:
            mine = response == 2 * slot + side
            result[name]["token_ids"] = branch.tokens[branch.places].tolist()
            for field in ("token_logps", "ref_token_logps"):
                result[name][field] = values[field][mine].tolist()
    return result


def _segments(
    branch: Branch, values: dict[str, np.ndarray], at: tuple[int, int], beta: float
) -> list[dict[str, Any]]:
    policy, reference = (
        values[name][at] for name in ("segment_logps", "ref_segment_logps")
    )
    return [
        {
            "start": start,
            "end": end,
            **({"turn": turn} if turn else {}),
            "tokens": int(values["segment_tokens"][at][s]),
            "logp": float(policy[s]),
            "ref_logp": float(reference[s]),
            "reward": float(beta * (policy[s] - reference[s])),
            "weight": float(values["weights"][at][s]),
            "selected": bool(values["selected"][at][s]),
        }
        for s, (start, end, turn) in enumerate(branch.offsets)
    ]

"""Gradients of tower, connector and decoder beside torch's."""

from typing import Any


BETA = 0.3


def torch_loss(scene: Any, name: str) -> tuple[float, dict[str, Any]]:
    """Return transformers' loss of all records, and the gradient of every weight."""
    import torch

    other = scene.theirs()
    other.model.zero_grad()
    total = torch.zeros(())
    tokens = 0
    for row in scene.rows:
        sums = []
        for side in ("chosen", "rejected"):
            logps = other.answer(row, side, scene.data.parent).log_probs(other.model)
            sums.append(logps.sum())
            tokens += len(logps) if side == "chosen" else 0
        if name == "dpo":
            # The reference is the model itself, so that the log-ratios are 0; each
            # side's derivative is what differs.
            ratios = [each - each.detach() for each in sums]
            loss = -torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1]))
            total = total + loss / len(scene.rows)
        else:
            total = total - sums[0]
    if name == "sft":
        total = total / tokens
    total.backward()
    found = {}
    for key, weight in other.model.named_parameters():
        found[key] = None if weight.grad is None else weight.grad.numpy().copy()
    other.model.zero_grad()
    return float(total.detach()), found

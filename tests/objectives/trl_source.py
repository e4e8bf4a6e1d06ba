"""The losses of TRL 1.16, run by its own trainers on given log-probabilities.

The trainers are made without their constructors and see a model that answers with the
numbers it was given, so that the loss and its gradient come out of TRL's own code.
CPO and ORPO lend their preference term alone: their likelihood term is a mean over all
tokens of a batch, prompts included.
"""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from tests.objectives.reference_objectives import Example, Side


with warnings.catch_warnings():
    # Of being experimental.
    warnings.simplefilter("ignore")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer


LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
    "sigmoid_norm",
)  # fmt: skip

PROMPT = 2
"""Tokens before each completion."""

Options = Mapping[str, Any]


class _Model(torch.nn.Module):
    """Answers with given log-probabilities; the first token of a row says which."""

    is_gradient_checkpointing = False

    def __init__(self, *answers: torch.Tensor):
        super().__init__()
        self.answers = answers

    def forward(self, *, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        values = self.answers[int(input_ids[0, 0])]
        return SimpleNamespace(
            log_probs=values,
            entropy=torch.zeros_like(values),
            mean_logits=torch.zeros_like(values),
            is_top1=torch.zeros_like(values, dtype=torch.bool),
        )


def _padded(
    values: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put completions after prompts; return log-probs [n t-1] and completion mask."""
    longest = max(len(v) for v in values)
    rows = []
    mask = torch.zeros(len(values), PROMPT + longest, dtype=torch.long)
    for i, value in enumerate(values):
        before = torch.zeros(PROMPT - 1, dtype=dtype)
        after = torch.zeros(longest - len(value), dtype=dtype)
        rows.append(torch.cat([before, value.to(dtype), after]))
        mask[i, PROMPT : PROMPT + len(value)] = 1
    return torch.stack(rows), mask


def _trainer(cls: type, **attributes: Any) -> Any:
    trainer: Any = object.__new__(cls)
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=_same, gather_for_metrics=_same
    )
    trainer.args = SimpleNamespace(gradient_checkpointing_kwargs=None)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._total_train_tokens = 0
    trainer._tp_size = 1
    trainer.aux_loss_enabled = False
    trainer.precompute_ref_logps = False
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def dpo_loss(
    examples: Sequence[Example], weights: Mapping[str, float], options: Options
) -> torch.Tensor:
    """Return ``DPOTrainer._compute_loss`` of the loss types with their weights.

    In float64, but in float32 with the alpha divergence, where TRL knows no other.
    """
    kind = options.get("f_divergence_type") or "reverse_kl"
    dtype = torch.float32 if kind == "alpha_divergence" else torch.float64
    sides = [e.chosen for e in examples] + [e.rejected for e in examples]
    policy, mask = _padded([side.policy for side in sides], dtype)
    reference, _ = _padded([side.reference for side in sides], dtype)
    coefficient = options.get("f_alpha_divergence_coef")
    trainer = _trainer(
        DPOTrainer,
        model=_Model(policy),
        ref_model=_Model(reference),
        loss_types=list(weights),
        loss_weights=list(weights.values()),
        beta=options["beta"],
        label_smoothing=options.get("label_smoothing") or 0.0,
        ld_alpha=options.get("ld_alpha"),
        f_divergence_type=kind,
        f_alpha_divergence_coef=0.5 if coefficient is None else coefficient,
        use_weighting=False,
    )
    trainer.args.discopop_tau = options.get("discopop_tau")
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
    }
    return trainer._compute_loss(trainer.model, inputs, return_outputs=False)


def kto_loss(examples: Sequence[Example], options: Options) -> torch.Tensor:
    """Return ``KTOTrainer._compute_loss``; rejected sides are the mismatched ones."""
    own, mask = _padded([e.chosen.policy for e in examples], torch.float64)
    other, kl_mask = _padded([e.rejected.policy for e in examples], torch.float64)
    references = [
        _padded([side.reference for side in sides], torch.float64)[0]
        for sides in ([e.chosen for e in examples], [e.rejected for e in examples])
    ]
    trainer = _trainer(
        KTOTrainer,
        model=_Model(own, other),
        ref_model=_Model(*references),
        loss_type="kto",
        calculate_KL=True,
        beta=options["beta"],
        desirable_weight=options["desirable_weight"],
        undesirable_weight=options["undesirable_weight"],
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "KL_input_ids": torch.ones_like(kl_mask),
        "KL_attention_mask": torch.ones_like(kl_mask),
        "KL_completion_mask": kl_mask,
        "label": torch.tensor([e.label for e in examples]),
    }
    return trainer._compute_loss(trainer.model, inputs, return_outputs=False)


def cpo_loss(name: str, examples: Sequence[Example], options: Options) -> torch.Tensor:
    """Return the mean of ``CPOTrainer.cpo_loss`` (simpo, or cpo's first term)."""
    trainer = _trainer(
        CPOTrainer,
        loss_type={"simpo": "simpo", "cpo": "sigmoid"}[name],
        alpha=0.0,
        beta=options["beta"],
        label_smoothing=options["label_smoothing"],
        simpo_gamma=options.get("gamma"),
    )

    def value(side: Side) -> torch.Tensor:
        return side.policy.mean() if name == "simpo" else side.policy.sum()

    losses, *_ = trainer.cpo_loss(
        torch.stack([value(e.chosen) for e in examples]),
        torch.stack([value(e.rejected) for e in examples]),
    )
    return losses.mean() + _likelihood(examples, options.get("alpha") or 0.0)


def orpo_loss(examples: Sequence[Example], options: Options) -> torch.Tensor:
    """Return NLL - the mean of ``ORPOTrainer.odds_ratio_loss`` (float32 in TRL)."""
    trainer = _trainer(ORPOTrainer, beta=options["beta"])
    losses, *_ = trainer.odds_ratio_loss(
        torch.stack([e.chosen.policy.mean() for e in examples]),
        torch.stack([e.rejected.policy.mean() for e in examples]),
    )
    return _likelihood(examples, 1.0) - losses.mean()


def _likelihood(examples: Sequence[Example], weight: float) -> torch.Tensor:
    means = torch.stack([e.chosen.policy.mean() for e in examples])
    return -weight * means.mean()

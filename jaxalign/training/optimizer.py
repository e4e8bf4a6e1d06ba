"""The optimiser: AdamW with a schedule and clipping, from Optax."""

import dataclasses
from typing import Any, Literal

import optax

from jaxalign import trees
from jaxalign.configs import check_fields
from jaxalign.errors import UserError


__all__ = ["OptimizerConfig", "check_rates", "make_optimizer", "make_schedule"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Options of the optimiser.

    Attributes:
      learning_rate: peak; 1e-5 to 1e-4 suit LoRA, 5e-7 to 5e-6 all weights.
      schedule: after the warm-up: ``linear`` or ``cosine`` to 0, or ``constant``.
      warmup_steps: updates over which the rate rises linearly from 0.
      weight_decay: of AdamW; biases and norm scales are left out.
      max_grad_norm: gradients are scaled down to this global norm; 0 turns it off.
      loraplus_lr_ratio: the rate of LoRA's B by that of A, as in
        [LoRA+](https://arxiv.org/abs/2402.12354), which suggests 2 to 16.
      prefix_learning_rate: of prefixes' keys and values; default learning_rate.
      gate_learning_rate: of adapters' gates; default learning_rate.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator.

    >>> OptimizerConfig(learning_rate=1e-4).weight_decay
    0.0
    """

    learning_rate: float = 1e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    loraplus_lr_ratio: float = 1.0
    prefix_learning_rate: float | None = None
    gate_learning_rate: float | None = None
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_fields(self)
        for field in (
            "learning_rate",
            "loraplus_lr_ratio",
            "prefix_learning_rate",
            "gate_learning_rate",
        ):
            rate = getattr(self, field)
            if rate is not None and not 0 <= rate < float("inf"):
                raise UserError(
                    f"optimizer.{field} must be 0 or a positive number: got {rate}"
                )
        for field in ("warmup_steps", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise UserError(
                    f"optimizer.{field} must be 0 or more: got {getattr(self, field)}"
                )
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(
                    f"optimizer.{field} must lie in [0, 1): got {getattr(self, field)}"
                )
        if not 0 < self.eps < float("inf"):
            raise UserError(f"optimizer.eps must be positive: got {self.eps}")


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the updates already made.

    Raises:
      UserError: the warm-up is longer than the run.
    Example:
      >>> rate = make_schedule(OptimizerConfig(learning_rate=0.5, warmup_steps=2), 10)
      >>> float(rate(0)), float(rate(2))
      (0.0, 0.5)
    """
    rest = num_steps - config.warmup_steps
    if rest < 0:
        raise UserError(
            f"optimizer.warmup_steps {config.warmup_steps} is more than the run's "
            f"{num_steps} step(s): lower it or train longer"
        )
    peak = config.learning_rate
    after = {
        "linear": lambda: optax.linear_schedule(peak, 0.0, max(rest, 1)),
        "cosine": lambda: optax.cosine_decay_schedule(peak, max(rest, 1)),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
    """Return clipping followed by AdamW. It sees trained leaves only.

    Every part of an adapter follows the one schedule at a rate of its own: LoRA's B,
    prefixes, gates, and all the rest.

    >>> import jax.numpy as jnp
    >>> tx = make_optimizer(OptimizerConfig(learning_rate=0.5), num_steps=10)
    >>> weights = {"lora": {"a": jnp.ones(2)}}
    >>> updates, _ = tx.update(weights, tx.init(weights), weights)
    >>> updates["lora"]["a"].round(3).tolist()
    [-0.5, -0.5]
    """

    def decays(params: Any) -> Any:
        return trees.map_with_paths(lambda path, _: _decays(path), params)

    def labels(params: Any) -> Any:
        return trees.map_with_paths(lambda path, _: _label(path), params)

    rate = config.learning_rate
    peaks = {
        "rest": rate,
        "lora_b": rate * config.loraplus_lr_ratio,
        "prefix": rate,
        "gate": rate,
    }
    if config.prefix_learning_rate is not None:
        peaks["prefix"] = config.prefix_learning_rate
    if config.gate_learning_rate is not None:
        peaks["gate"] = config.gate_learning_rate
    scales: Any = {
        label: optax.scale_by_learning_rate(
            make_schedule(dataclasses.replace(config, learning_rate=peak), num_steps)
        )
        for label, peak in peaks.items()
    }
    same = len(set(peaks.values())) == 1
    parts = [
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        scales["rest"] if same else optax.partition(scales, labels),
    ]
    if config.max_grad_norm:
        parts.insert(0, optax.clip_by_global_norm(config.max_grad_norm))
    return optax.chain(*parts)


def _decays(path: str) -> bool:
    """Tell whether a weight decays: matrices of model and LoRA do, nothing else."""
    name = path.split("/")[-1]
    return not path.startswith("prefix/") and (
        name not in ("bias", "scale", "magnitude") and not name.endswith("gate")
    )


def _label(path: str) -> str:
    name = path.split("/")[-1]
    if name.endswith("gate") or name == "mix":
        return "gate"
    if path.startswith("prefix/"):
        return "prefix"
    return "lora_b" if path.startswith("lora/") and name == "b" else "rest"


def check_rates(config: OptimizerConfig, trainable: Any) -> None:
    """Refuse a rate, or a decay, for what the run does not train.

    Raises:
      UserError: naming the option that would have no effect.
    Example:
      >>> check_rates(OptimizerConfig(), {"lora": {"a": 1.0}})
    """
    paths = trees.paths(trainable)
    found = {_label(path) for path in paths}
    if config.weight_decay and not any(map(_decays, paths)):
        raise UserError(
            f"optimizer.weight_decay {config.weight_decay} has no effect: what is "
            "trained has no matrix, and prefixes, biases and norm scales do not decay. "
            "Leave it out"
        )
    for field, label, neutral in (
        ("loraplus_lr_ratio", "lora_b", 1.0),
        ("prefix_learning_rate", "prefix", None),
        ("gate_learning_rate", "gate", None),
    ):
        if getattr(config, field) != neutral and label not in found:
            raise UserError(
                f"optimizer.{field} has no effect: the adapter has no "
                f"{label.replace('_', ' ')}. Leave it out, or choose another adapter"
            )

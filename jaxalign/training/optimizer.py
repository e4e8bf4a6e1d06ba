"""The optimiser: AdamW with a schedule and clipping, from Optax."""

import dataclasses
from typing import Any, Literal

import optax

from jaxalign import trees
from jaxalign.errors import UserError


__all__ = ["OptimizerConfig", "make_optimizer", "make_schedule"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Options of the optimiser.

    Attributes:
      learning_rate: peak; 1e-5 to 1e-4 suit LoRA, 5e-7 to 5e-6 all weights.
      schedule: after the warm-up: ``linear`` or ``cosine`` to 0, or ``constant``.
      warmup_steps: updates over which the rate rises linearly from 0.
      weight_decay: of AdamW; biases and norm scales are left out.
      max_grad_norm: gradients are scaled down to this global norm; 0 turns it off.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the denominator.
    """

    learning_rate: float = 1e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 <= self.learning_rate < float("inf"):
            raise UserError(
                "optimizer.learning_rate must be 0 or a positive number: got "
                f"{self.learning_rate}"
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
    """Return clipping followed by AdamW. It sees trained leaves only."""

    def decays(params: Any) -> Any:
        return trees.map_with_paths(
            lambda path, _: path.split("/")[-1] not in ("bias", "scale"), params
        )

    adamw = optax.adamw(
        make_schedule(config, num_steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    if not config.max_grad_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)

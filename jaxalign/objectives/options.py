"""What the options of all objectives have in common."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from jaxalign.errors import UserError


__all__ = ["ObjectiveConfig", "check_common", "fill", "refuse_others"]


@runtime_checkable
class ObjectiveConfig(Protocol):
    """The options of an objective: a frozen dataclass whose name says which one."""

    @property
    def name(self) -> str:
        """The objective, a key of ``objective.CONFIGS``."""
        ...


def check_common(beta: float, label_smoothing: float) -> None:
    """Refuse a temperature or a smoothing that makes no loss.

    >>> check_common(beta=0.1, label_smoothing=0.0)
    >>> check_common(beta=-1.0, label_smoothing=0.0)
    Traceback (most recent call last):
        ...
    jaxalign.errors.UserError: objective.beta must be a positive number: got -1.0
    """
    if not 0 < beta < float("inf"):
        raise UserError(f"objective.beta must be a positive number: got {beta}")
    if not 0 <= label_smoothing <= 0.5:
        raise UserError(
            f"objective.label_smoothing must lie in [0, 0.5]: got {label_smoothing}. "
            "It is the share of pairs believed to be labelled the wrong way round"
        )


def refuse_others(config: Any, options: Collection[str]) -> None:
    """Refuse values of fields that this objective, one of several, does not have.

    Raises:
      UserError: with the option, what was given for it, and the options there are.
    Example:
      >>> config = dataclasses.make_dataclass("Config", ["name", "beta", "tau"])
      >>> refuse_others(config("dpo", 0.1, None), ["beta"])
      >>> refuse_others(config("dpo", 0.1, 0.5), ["beta"])  # doctest: +ELLIPSIS
      Traceback (most recent call last):
          ...
      jaxalign.errors.UserError: objective.tau has no effect for dpo: got 0.5. Its...
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "name" or value is None or field.name in options:
            continue
        raise UserError(
            f"objective.{field.name} has no effect for {config.name}: got {value}. "
            f"Its options are {', '.join(sorted(options))}"
        )


def fill(config: Any, defaults: Mapping[str, Any]) -> None:
    """Give the fields that were left out their defaults, in a dataclass being made.

    A run's config.yaml then says what was computed with, whatever the defaults become.

    >>> config = dataclasses.make_dataclass("Config", ["name", "beta", "tau"])
    >>> made = config("ipo", None, 0.5)
    >>> fill(made, {"beta": 0.1, "tau": 1.0})
    >>> made.beta, made.tau
    (0.1, 0.5)
    """
    for name, default in defaults.items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, default)

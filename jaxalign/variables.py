"""The one convention by which a model's arrays are handed over.

``variables`` are collections by name, ``{"params": ..., "lora": ..., "prefix": ...}``,
what ``model.hidden_fn`` and ``save_hf`` take. ``params`` are the base weights alone,
``variables["params"]``: what adapters are made for and what is laid out on a mesh. An
argument of either name takes that one and nothing else.
"""

from collections.abc import Mapping
from typing import Any

from jaxalign.errors import UserError


__all__ = ["check_params", "check_variables"]


def check_params(params: Any, function: str) -> None:
    """Refuse variables where their parameters are meant.

    Raises:
      UserError: ``params`` is a mapping with a collection ``params``.
    Example:
      >>> check_params({"norm": {"scale": 1.0}}, "lora.init")
    """
    if isinstance(params, Mapping) and isinstance(params.get("params"), Mapping):
        raise UserError(
            f"{function}: got variables, with the collections {', '.join(params)}: "
            'expected the parameters alone. Give variables["params"]'
        )


def check_variables(variables: Any, function: str) -> None:
    """Refuse parameters, or anything else, where variables are meant.

    Raises:
      UserError: it is no mapping, or has no ``params``.
    Example:
      >>> check_variables({"params": {"norm": {"scale": 1.0}}}, "save_hf")
    """
    if not isinstance(variables, Mapping):
        raise UserError(
            f"{function}: got {type(variables).__name__}: expected variables, "
            '{"params": ..., "lora": ...}'
        )
    if variables.get("params") is None:  # any tree, of a model of one's own
        names = list(map(str, variables))
        what = f"a mapping of {', '.join(names[:4]) or 'nothing'}"
        raise UserError(
            f"{function}: got {what}{', ...' if len(names) > 4 else ''}: expected "
            'variables, {"params": ..., "lora": ...}. Give parameters as '
            '{"params": params}'
        )

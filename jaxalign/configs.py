"""Frozen dataclasses from and to YAML and flags: the one builder of all options.

A command, a file and Python give the same options: a dataclass whose fields are plain
values, tuples or other such dataclasses. Where a field may be of several classes (the
objective, the adapter), the ``name`` among its values chooses.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml

from jaxalign.errors import UserError, did_you_mean


__all__ = ["build", "check_kind", "read_yaml", "to_dict", "to_plain"]


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain nested values for YAML and JSON."""
    return to_plain(config)


def to_plain(value: Any) -> Any:
    """Return the value of an option as plain nested values for YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, list | tuple) else value


def build(
    cls: type, values: Mapping[str, Any], parts: Mapping[str, type] | None = None
) -> Any:
    """Make an instance of a dataclass from nested values.

    Args:
      cls: its fields are the options; a field that is a dataclass is a mapping of its
        own, or an instance.
      values: of the options, those that are not left out.
      parts: for fields that may be of several classes, the one in use.
    Raises:
      UserError: an unknown option (with the near names), a missing one, a value of the
        wrong kind, or a combination that the dataclass refuses.
    """
    return _build(cls, values, parts or {}, "")


def _build(
    cls: type, values: Mapping[str, Any], parts: Mapping[str, type], prefix: str
) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    made: dict[str, Any] = {}
    for name, value in values.items():
        option = f"{prefix}{name}"
        if name not in fields:
            raise UserError(f"unknown option {option}. {did_you_mean(name, fields)}")
        kind: Any = parts.get(name, fields[name].type)
        if not dataclasses.is_dataclass(kind) or dataclasses.is_dataclass(value):
            made[name] = check_kind(value, kind, option)
        elif isinstance(value, Mapping):
            part: Any = kind
            made[name] = _build(part, value, {}, f"{option}.")
        else:
            raise UserError(f"{option} must be a mapping of options: got {value!r}")
    for name, field in fields.items():
        if name not in made and _required(field):
            raise UserError(f"the option {prefix}{name} is missing")
    return cls(**made)


def _required(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def check_kind(value: Any, kind: Any, name: str) -> Any:
    """Return the value of an option if it is of its field's kind; a list as a tuple.

    Raises:
      UserError: it is not.
    """
    if dataclasses.is_dataclass(value):
        return value
    value = tuple(value) if isinstance(value, list) else value
    try:
        return pydantic.TypeAdapter(kind).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise UserError(f"the option {name}: {reason}: got {value!r}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
      UserError: it is not there or is none.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable YAML file: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of options: got {values!r}")
    return values

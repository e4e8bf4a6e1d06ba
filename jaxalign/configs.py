"""Frozen dataclasses from and to YAML and flags: the one builder of all options.

A command, a file and Python give the same options: a dataclass whose fields are plain
values, tuples or other such dataclasses. Where a field may be of several classes (the
objective, the adapter), the ``name`` among its values chooses.
"""

import dataclasses
import functools
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pydantic
import yaml

from jaxalign.errors import UserError, did_you_mean


__all__ = [
    "as_command",
    "build",
    "check_fields",
    "check_kind",
    "read_yaml",
    "to_dict",
    "to_plain",
]


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


def as_command(name: str, config: Any) -> str:
    """Return the command line that has these options, those left out that are default.

    Args:
      name: of the command.
      config: its options.

    >>> from jaxalign.parallel.mesh import MeshConfig
    >>> as_command("train", MeshConfig(data=2))
    'jaxalign train --data 2'
    """
    return shlex.join(["jaxalign", name, *_flags(config, _defaults(config), "")])


def _flags(config: Any, usual: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            before = usual.get(name)
            other = _defaults(value) if before is None else vars(before)
            given = [*_flags(value, other, f"{prefix}{name}.")]
            chosen = f"--{prefix}{name}.name"
            # Where options are of one of several kinds, they go with its name.
            if given and hasattr(value, "name") and chosen not in given:
                given = [chosen, str(vars(value)["name"]), *given]
            yield from given
        elif name not in usual or usual[name] != value:
            yield f"--{prefix}{name}"
            yield value if isinstance(value, str) else json.dumps(to_plain(value))


def _defaults(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


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


def check_fields(config: Any) -> None:
    """Check the kinds of all options of a dataclass that is being made, as a file's.

    What Python has for a plain value becomes one: a path a text, a numpy scalar a
    number, a list a tuple.

    Raises:
      UserError: a value that is not of its option's kind.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        checked = check_kind(value, field.type, field.name)
        if checked is not value:
            object.__setattr__(config, field.name, checked)


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value


# Made once for each kind: a server makes such options for every request.
_adapter = functools.lru_cache(maxsize=None)(pydantic.TypeAdapter)


def check_kind(value: Any, kind: Any, name: str) -> Any:
    """Return the value of an option if it is of its field's kind; a list as a tuple.

    Raises:
      UserError: it is not.
    """
    if dataclasses.is_dataclass(value):
        return value
    value = _plain(value)
    try:
        return _adapter(kind).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise UserError(f"the option {name}: {reason}: got {value!r}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML (or JSON) mapping, each key of which stands once.

    Raises:
      UserError: it is not there or is none; the line and column where they are known.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}. Save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    try:
        values = yaml.load(text, _Loader)  # noqa: S506 - a safe loader
        json.dumps(values, default=str, skipkeys=True)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}{_explained(error, text)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable YAML file: {reason}") from None
    if values is None:
        raise UserError(f"{path} is empty: expected a mapping of options, name: value")
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: expected a mapping of options, name: value, got a "
            f"{type(values).__name__}: {str(values)[:60]}"
        )
    for key in values:
        if not isinstance(key, str):
            raise UserError(f"{path}: the key {key!r} is no name of an option")
    return values


class _Loader(yaml.SafeLoader):
    """PyYAML's, which lets a second value of one key win in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping whose keys stand once."""
        first: dict[Any, Any] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value in first and isinstance(key, yaml.ScalarNode):
                line = first[key.value].line + 1
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is there already, in line {line}. "
                    "Leave one of them",
                    problem_mark=key.start_mark,
                )
            if isinstance(key, yaml.ScalarNode):
                first[key.value] = key.start_mark
        return super().construct_mapping(node, deep)


def _explained(error: yaml.MarkedYAMLError, text: str) -> str:
    """Say where a YAML text is broken and, where that is known, what helps."""
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return f": {error}"
    begun = error.context_mark if error.context_mark not in (None, mark) else None
    since = f" begun in line {begun.line + 1}" if begun else ""
    context = f"{error.context}{since}, " if error.context else ""
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: mark.column + 1]:
        cure = ". YAML indents with spaces, not with tabs"
    elif line[mark.column : mark.column + 1] in ("@", "`", "%"):
        cure = ". Put the value in quotes"
    else:
        cure = ""
    where = f", line {mark.line + 1}, column {mark.column + 1}"
    return f"{where}: {context}{error.problem}{cure}"

"""From the command line and YAML to frozen dataclasses, with jsonargparse."""

import argparse
import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from jaxalign import configs
from jaxalign.errors import UserError, did_you_mean


__all__ = [
    "add_dry_run",
    "chosen_adapter",
    "chosen_name",
    "chosen_objective",
    "make_parser",
    "parse",
    "parse_with",
]


def chosen_name(
    arguments: Sequence[str], field: str, choices: Mapping[str, Any], default: str
) -> str:
    """Find out which class of options ``--<field>.name`` (or the config file) chooses.

    The flags that a command takes depend on it, so it is looked up before parsing.
    """
    name = _given(arguments, field).get("name", default)
    if not isinstance(name, str) or name not in choices:
        raise UserError(
            f"--{field}.name {name!r} is not known. {did_you_mean(str(name), choices)}"
        )
    return name


def chosen_adapter(arguments: Sequence[str]) -> type:
    """Find out which class of options the adapter has."""
    from jaxalign.adapters.adapter import CONFIGS

    return CONFIGS[chosen_name(arguments, "adapter", CONFIGS, "lora")]


def chosen_objective(arguments: Sequence[str]) -> type:
    """Find out which class of options the objective has."""
    from jaxalign.objectives.objective import CONFIGS
    from jaxalign.training.config import default_objective

    default = default_objective(_given(arguments, "objective"))
    return CONFIGS[chosen_name(arguments, "objective", CONFIGS, default)]


def _given(arguments: Sequence[str], field: str) -> dict[str, Any]:
    """Return what flags and config files say of a part, the later ones over earlier."""
    given: dict[str, Any] = {}
    for i, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        following = value or (arguments[i + 1] if i + 1 < len(arguments) else "")
        if flag == "--config":
            found = _part_in_file(following, field)
            given.update({k: v for k, v in found.items() if v or k != "name"})
        elif flag.startswith(f"--{field}."):
            given[flag.removeprefix(f"--{field}.")] = following
    return given


def _part_in_file(path: str, field: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}  # the parser itself reports it
    part = values.get(field) if isinstance(values, dict) else None
    return part if isinstance(part, dict) else {}


def make_parser(
    command: str,
    config_class: type,
    parts: Mapping[str, type] | None = None,
    *,
    description: str,
) -> jsonargparse.ArgumentParser:
    """Make a parser whose options are the fields of a dataclass.

    Args:
      command: name of the subcommand.
      config_class: its fields are the options, nested dataclasses dotted ones.
      parts: for fields that may be of several classes, the one in use.
      description: shown by --help.
    """
    parser = jsonargparse.ArgumentParser(
        prog=f"jaxalign {command}", description=description, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file with the options")
    parser.add_class_arguments(config_class, skip=set(parts or ()))
    for field, part in (parts or {}).items():
        parser.add_class_arguments(part, field)
    return parser


def parse(
    parser: jsonargparse.ArgumentParser,
    arguments: Sequence[str],
    config_class: type,
    parts: Mapping[str, type] | None = None,
) -> Any:
    """Parse arguments into an instance of the dataclass.

    Raises:
      UserError: an unknown option (with the near names), a value of the wrong kind, or
        a combination that the dataclass refuses.
    """
    return configs.build(config_class, _parse(parser, arguments), parts)


def _parse(
    parser: jsonargparse.ArgumentParser, arguments: Sequence[str]
) -> dict[str, Any]:
    known = [name for name in parser._option_string_actions if name.startswith("--")]
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        if flag.startswith("--") and flag not in known:
            raise UserError(f"unknown option {flag}. {did_you_mean(flag, known)}")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parsed = parser.parse_args(list(arguments))
    except (argparse.ArgumentError, TypeError, ValueError, OSError) as error:
        raise UserError(_readable(error, known)) from None
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError("the options cannot be read; see --help") from None
    values = parsed.as_dict()
    values.pop("config", None)
    return values


def add_dry_run(parser: jsonargparse.ArgumentParser) -> None:
    """Add the flag of the commands that ask a judge; see :func:`parse_with`."""
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="say what the judge would be asked, and what that takes; ask nothing",
    )


def parse_with(
    name: str,
    parser: jsonargparse.ArgumentParser,
    arguments: Sequence[str],
    config_class: type,
    parts: Mapping[str, type] | None = None,
) -> tuple[Any, Any]:
    """Parse a command that has one more argument than its dataclass has fields."""
    values = _parse(parser, arguments)
    return values.pop(name), configs.build(config_class, values, parts)


def _readable(error: Exception, known: Sequence[str]) -> str:
    text = str(error)
    missing = re.search(r"""[Kk]ey ['"]([\w.]+)['"] is required""", text)
    if missing:
        return f"the option --{missing.group(1)} is missing"
    unknown = re.search(r"""[Kk]ey ['"]([\w.]+)['"] is not expected""", text)
    unknown = unknown or re.search(r"""Subkey ['"]([\w.]+)['"] does not exist""", text)
    unknown = unknown or re.search(r"Group '(.+)' does not accept option '(.+)'", text)
    unknown = unknown or re.search(r"Option '(.+)' is not accepted", text)
    if unknown:
        names = [name.removeprefix("--") for name in known]
        name = ".".join(unknown.groups())
        return f"unknown option {name}. {did_you_mean(name, names)}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:6])

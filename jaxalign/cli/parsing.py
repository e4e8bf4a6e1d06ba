"""From the command line and YAML to frozen dataclasses, with jsonargparse."""

import argparse
import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from jaxalign import configs
from jaxalign.errors import UserError, did_you_mean


__all__ = [
    "add_distributed",
    "add_dry_run",
    "chosen_adapter",
    "chosen_name",
    "chosen_objective",
    "given",
    "given_option",
    "make_parser",
    "parse",
    "parse_with",
    "parse_words",
    "with_judge",
]


def chosen_name(
    arguments: Sequence[str], field: str, choices: Mapping[str, Any], default: str
) -> str:
    """Find out which class of options ``--<field>.name`` (or the config file) chooses.

    The flags that a command takes depend on it, so it is looked up before parsing.

    Raises:
      UserError: no such class, or its name in the place of its options.
    """
    for flag, value in _flags(arguments):
        whole = value if flag == f"--{field}" else None
        if flag == "--config":
            whole = _file(value).get(field)
        if isinstance(whole, str) and whole in choices:
            raise UserError(
                f"{field} is a group of options: got {whole!r}. Give --{field}.name "
                f"{whole}, or {field}: {{name: {whole}}} in a file"
            )
    name = given(arguments, field).get("name", default)
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

    default = default_objective(given(arguments, "objective"))
    return CONFIGS[chosen_name(arguments, "objective", CONFIGS, default)]


def given(arguments: Sequence[str], field: str) -> dict[str, Any]:
    """Return what flags and config files say of a part, the later ones over earlier."""
    found: dict[str, Any] = {}
    for flag, following in _flags(arguments):
        if flag == "--config":
            part = _part_in_file(following, field)
            found.update({k: v for k, v in part.items() if v or k != "name"})
        elif flag.startswith(f"--{field}."):
            found[flag.removeprefix(f"--{field}.")] = following
    return found


def _part_in_file(path: str, field: str) -> dict[str, Any]:
    part = _file(path).get(field)
    return part if isinstance(part, dict) else {}


def _file(path: str) -> dict[Any, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}  # reported when the arguments are parsed
    return values if isinstance(values, dict) else {}


def given_option(arguments: Sequence[str], field: str) -> Any:
    """Return the value of an option that decides which others there are, or None."""
    found = None
    for flag, value in _flags(arguments):
        if flag == "--config":
            found = _file(value).get(field, found)
        elif flag == f"--{field}":
            found = value
    return found


def with_judge(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which a judge's options without a name mean an endpoint.

    As in ``jaxalign judge``; of the commands whose judge is the rules if none is given.
    """
    options = given(arguments, "judge")
    if options and "name" not in options:
        return [*arguments, "--judge.name", "openai"]
    return list(arguments)


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
    _check_files(arguments)
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


def parse_words(
    parser: argparse.ArgumentParser, arguments: Sequence[str], usage: str
) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command that takes words rather than options.

    Args:
      parser: with ``exit_on_error=False``.
      arguments: of the command.
      usage: what is expected, for the message.
    Returns:
      The words, and what the parser does not know.
    Raises:
      UserError: words are missing or too many.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return parser.parse_known_args(list(arguments))
    except argparse.ArgumentError:
        raise UserError(usage) from None
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(usage) from None


def add_dry_run(parser: jsonargparse.ArgumentParser) -> None:
    """Add the flag of the commands that ask a judge; see :func:`parse_with`."""
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="say what the judge would be asked, and what that takes; ask nothing",
    )


def add_distributed(parser: jsonargparse.ArgumentParser) -> None:
    """Add the flag of the commands that many hosts run; see :func:`parse_with`."""
    parser.add_argument(
        "--distributed",
        default="auto",
        help="auto finds the other processes of a TPU pod, GKE, Slurm or Open MPI; off "
        "is one process; COORDINATOR:PORT,N,ID says where process 0 listens, how many "
        "there are and which this is",
    )


def _check_files(arguments: Sequence[str]) -> None:
    """Read the config files once by themselves: our errors say file, line and column.

    Raises:
      UserError: one of them is no mapping.
    """
    for flag, value in _flags(arguments):
        if flag == "--config" and Path(value).is_file():
            configs.read_yaml(Path(value))


def _flags(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Give every argument as a flag with its value, which may be the next argument."""
    for i, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        yield flag, value or (arguments[i + 1] if i + 1 < len(arguments) else "")


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
    union = re.search(
        r'Parser key "([\w.]+)":\s+Does not validate .*Subtypes: \[([^\[\]]*)\]\n.*'
        r"Given value: (.*)",
        text,
        re.DOTALL,
    )
    if union:
        name, kinds, value = union.groups()
        kinds = re.sub(r"<class '(\w+)'>", r"\1", kinds).replace("NoneType", "null")
        return (
            f'"{name}": Expected {" or ".join(kinds.split(", "))}. Got value: {value}'
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:6])

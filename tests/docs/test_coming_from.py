"""The pages for who comes from another library: every row of their tables is run."""

import dataclasses
import functools
import inspect
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxalign.adapters.lora import LoRAConfig
from jaxalign.cli import parsing
from jaxalign.cli.export import ExportConfig
from jaxalign.data import layouts, records
from jaxalign.errors import UserError
from jaxalign.evaluation.score import ScoreConfig
from jaxalign.objectives.objective import CONFIGS
from jaxalign.training.config import TrainConfig
from tests import synthetic


DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("trl", "axolotl", "llama_factory")
NOTHING = "—"


def text_of(page: str) -> str:
    return (DOCS / f"coming_from_{page}.md").read_text(encoding="utf-8")


def rows(page: str, section: str) -> list[list[str]]:
    """Return the cells of the table of a section, without its head."""
    part = text_of(page).split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]
    ]


def code(cell: str) -> str:
    found = re.fullmatch(r"`(.*)`", cell)
    assert found, cell
    return found.group(1)


def cases(section: str) -> list[Any]:
    return [
        pytest.param(theirs, ours, says, id=f"{page}-{theirs.strip('`')}")
        for page in PAGES
        for theirs, ours, says in rows(page, section)
    ]


def parse(command: str, arguments: Sequence[str]) -> Any:
    """Parse the arguments of a command as the command line does."""
    parts: dict[str, type] = {}
    if command in ("train", "score"):
        parts["objective"] = parsing.chosen_objective(arguments)
    if command == "train":
        parts["adapter"] = parsing.chosen_adapter(arguments)
    kind = {"train": TrainConfig, "score": ScoreConfig, "export": ExportConfig}[command]
    parser = parsing.make_parser(command, kind, parts, description="")
    return parsing.parse(parser, arguments, kind, parts)


def value_of(text: str) -> Any:
    """Read what a flag is given; YAML 1.1 takes 1e-6 for a text."""
    value = yaml.safe_load(text)
    if isinstance(value, str) and re.fullmatch(r"[\d.]+e-\d+", value):
        return float(value)
    return tuple(value) if isinstance(value, list) else value


@functools.cache
def flags() -> frozenset[str]:
    """Return the flags of ``jaxalign train`` with DPO on LoRA."""
    parts = {"objective": CONFIGS["dpo"], "adapter": LoRAConfig}
    parser = parsing.make_parser("train", TrainConfig, parts, description="")
    return frozenset(parser._option_string_actions)


NEEDED = ("--model", "M", "--data", "D", "--out", "O")


@pytest.mark.parametrize(("theirs", "ours", "says"), cases("Options"))
def test_an_option(theirs, ours, says) -> None:
    name = re.match(r"\w+", code(theirs))
    assert name
    for flag in re.findall(r"--[a-z_.]+", says):
        assert flag in flags(), flag
    if ours == NOTHING:
        with pytest.raises(UserError, match=name.group()):
            parse("train", [*NEEDED, f"--{name.group()}", "1"])
        return
    given = shlex.split(code(ours))
    config = parse("train", [*NEEDED, *given])
    for flag, text in zip(given[::2], given[1::2], strict=True):
        found: Any = config
        for part in flag.removeprefix("--").split("."):
            found = getattr(found, part)
        assert found == value_of(text), flag


@pytest.mark.parametrize(("theirs", "ours", "says"), cases("Columns"))
def test_columns(tmp_path, theirs, ours, says) -> None:
    def read(row: str, name: str) -> records.Record:
        file = synthetic.write_jsonl(tmp_path / f"{name}.jsonl", [json.loads(row)])
        (found,) = records.read(file)
        return found._replace(where="")

    want = read(code(says), "says")
    if ours == NOTHING:
        with pytest.raises(UserError):
            read(code(theirs), "theirs")
        return
    assert layouts.recognise(json.loads(code(theirs))) == code(ours)
    assert read(code(theirs), "theirs") == want


@pytest.fixture
def at_home(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE.yaml").write_text("model: M\ndata: D\nout: O\nseed: 3\n")


@pytest.mark.parametrize("page", PAGES)
def test_commands(page, at_home) -> None:
    commands = re.findall(r"`jaxalign (train|export|score) (--[^`]*)`", text_of(page))
    assert len(commands) >= 2
    for command, arguments in commands:
        assert parse(command, shlex.split(arguments))
    for _, ours, _ in rows(page, "Commands"):
        assert re.match(r"`jaxalign (train|export|score) --", ours), ours


def test_the_commands_at_the_top_do_what_the_recipes_say() -> None:
    (trl,) = re.findall(r"`jaxalign train (--[^`]*)`", text_of("trl"))
    config = parse("train", shlex.split(trl))
    assert (config.objective.name, config.num_train_epochs) == ("dpo", 3)
    (recipe,) = re.findall(
        r"`jaxalign train (--[^`]*qwen3.*?|--model Qwen[^`]*)`",
        text_of("llama_factory"),
    )
    config = parse("train", shlex.split(recipe))
    # As qwen3_lora_dpo.yaml of ff6d4d12 has it.
    assert config.model == "Qwen/Qwen3-4B-Instruct-2507"
    assert (config.adapter.rank, config.adapter.alpha) == (8, 16)
    assert (config.max_length, config.gradient_accumulation_steps) == (2048, 8)
    assert (config.optimizer.learning_rate, config.optimizer.schedule) == (
        5e-6,
        "cosine",
    )


def test_every_loss_of_trl_has_a_row() -> None:
    trl = pytest.importorskip("trl")
    help_text = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    theirs = set(re.findall(r"['\"`](\w+)['\"`]", help_text)) - {"loss_weights"}
    assert len(theirs) > 10
    table = {t for t, ours, _ in rows("trl", "Options") if ours != NOTHING}
    missing = [name for name in theirs if f'`loss_type=["{name}"]`' not in table]
    assert not missing


def test_the_names_of_trl_are_those_of_1_16() -> None:
    trl = pytest.importorskip("trl")
    known = {
        field.name
        for kind in (trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments)
        for field in dataclasses.fields(kind)
    } | set(inspect.signature(trl.DPOTrainer).parameters)
    for theirs, _, _ in rows("trl", "Options"):
        for name in re.findall(r"(\w+)(?==|`|$)", code(theirs).split("=[")[0]):
            if re.match(
                r"[a-z]\w*_|beta$|seed$|bf16$|dtype$|optim$|fsdp$|deepsp", name
            ):
                assert name in known, theirs


def test_defaults_are_as_said() -> None:
    trl = pytest.importorskip("trl")

    def ours(path: str) -> Any:
        found: Any = parse("train", NEEDED)
        for part in path.split("."):
            found = getattr(found, part)
        return found

    theirs = {f.name: f.default for f in dataclasses.fields(trl.DPOConfig)}
    for name, default, path, value, _ in rows("trl", "Defaults that differ"):
        assert str(theirs[code(name)]) == code(default)
        assert str(ours(code(path))) == code(value)
    for name, path in (
        ("max_length", "max_length"),
        ("lr_scheduler_type", "optimizer.schedule"),
        ("warmup_steps", "optimizer.warmup_steps"),
        ("weight_decay", "optimizer.weight_decay"),
        ("max_grad_norm", "optimizer.max_grad_norm"),
        ("adam_beta1", "optimizer.b1"),
        ("adam_beta2", "optimizer.b2"),
        ("adam_epsilon", "optimizer.eps"),
        ("logging_steps", "logging_steps"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
    ):
        assert theirs[name] == ours(path), name
    assert (
        theirs["beta"]
        == parse("train", [*NEEDED, "--objective.name=dpo"]).objective.beta
    )

"""What the command line refuses, how it says so, and that it does so in time."""

import dataclasses
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxalign
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints import convert
from jaxalign.checkpoints import load as load_lib
from jaxalign.cli import env, parsing
from jaxalign.cli.main import main
from jaxalign.configs import to_dict
from jaxalign.errors import UserError
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.reports import run as run_report
from jaxalign.training import run as run_lib
from jaxalign.training import run_directory
from jaxalign.training.config import TrainConfig, from_dict
from jaxalign.training.inputs import fingerprints
from jaxalign.training.loop import TrainingDiverged
from jaxalign.training.preemption import Preempted
from tests import synthetic


@pytest.fixture(autouse=True)
def undisturbed() -> Iterator[None]:
    """Keep the handler of SIGTERM from the other tests."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


class Shell:
    """Runs the command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self.capsys = capsys

    def __call__(self, *arguments: Any, code: int = 0) -> tuple[str, str]:
        """Run a command, check its exit code, return its output and its errors."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        assert stop.value.code == code, captured.err
        return captured.out, captured.err

    def refuses(self, *arguments: Any, match: str) -> None:
        """Run a command that must end in one line of explanation."""
        _, text = self(*arguments, code=2)
        lines = text.splitlines()
        assert lines[-1].startswith("jaxalign: error: ")
        assert "Traceback" not in text
        assert re.search(match, lines[-1]), lines[-1]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """Replace the training by a list of the configs that it was called with."""
    found: list[TrainConfig] = []

    def train(config: TrainConfig, **_: Any) -> Path:
        found.append(config)
        return Path(config.out)

    monkeypatch.setattr(run_lib, "train", train)
    monkeypatch.setattr(run_report, "write_report", lambda *_, **__: None)
    monkeypatch.setattr(run_report, "held_out_figures", lambda _: [])
    return found


READ = load_lib.load
NEEDED = ("--model", "M", "--data", "D", "--out", "O")


# --- commands and options ---------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["trian"], "unknown command 'trian'. Did you mean train?"),
        (
            ["xyzzy"],
            "unknown command 'xyzzy'. Known: compare, convert, data, demo, ",
        ),
        (["env", "--json"], "env takes no options: got --json"),
        (["train"], "required: model, data, out"),
        (["train", "--model", "M", "--out", "O"], "required: data"),
        (["score", "--data", "D", "--out", "O"], "required: model"),
        (["export", "--model", "M"], "required: out"),
        (["fetch"], "required: out, name"),
        (["fetch", "smollm2", "--out", "O"], "Did you mean smollm2-135m?"),
        (["export", "--out", "O"], "give either --run RUN or --model DIR, one of"),
        (["export", "--out", "O", "--run", "R", "--model", "M"], "give either --run"),
        (
            ["export", "--out", "O", "--model", "M", "--format", "peft"],
            "--format peft writes an adapter: give --run, or --model and",
        ),
        (["export", "--out", "O", "--run", "nowhere"], "nowhere is no run directory"),
        (["export", "--out", "O", "--model", "nowhere"], "nowhere is no directory"),
        (
            ["export", "--out", "O", "--model", "M", "--max_shard_size", "5"],
            "the size '5' is not understood: expected such as 200MB or 5GB",
        ),
        (
            ["export", "--out", "O", "--model", "owner/name"],
            "owner/name is no directory",
        ),
        (
            ["convert", "--out", "O", "--model", "owner/name"],
            "owner/name is no directory",
        ),
        (
            ["convert", "--out", "O", "--model", "nowhere"],
            "nowhere is no directory: exp",
        ),
        (["convert", "--model", "M"], "required: out"),
        (["convert", "--out", "O", "--model", "M", "--dtype", "int8"], "'auto'.*int8"),
        (["describe", "--model", "owner/name"], "HF_HUB_OFFLINE forbids to download"),
        (["score", "--batch_row", "3"], "unknown option --batch_row. .* --batch_rows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_commands(shell, tmp_path, monkeypatch, arguments, match) -> None:
    monkeypatch.chdir(tmp_path)
    shell.refuses(*arguments, match=match)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        # Misspelt, with the near names.
        (["--learning_rat", "1"], "--learning_rat. .*mean --optimizer.learning_rate"),
        (["--objective.nam=dpo"], "--objective.nam. Did you mean --objective.name"),
        (["--objective.name", "dop"], "--objective.name 'dop' .*Did you mean dpo?"),
        (
            ["--objective.name"],
            "--objective.name '' is not known. Known: aot, ",
        ),
        (["--adapter.name", "loar"], "--adapter.name 'loar' .*Did you mean lora?"),
        # Of another objective or adapter.
        (
            ["--objective.name", "dpo", "--objective.top_k", "3"],
            "unknown option --objective.top_k",
        ),
        (["--adapter.name", "none", "--adapter.rank", "3"], "option --adapter.rank"),
        # Of the wrong kind.
        (["--batch_rows", "many"], '"batch_rows": Expected a .*int.*Got value: many'),
        (["--batch_rows", "1.5"], '"batch_rows": Expected a .*int'),
        (["--packing", "perhaps"], '"packing": Expected a .*bool'),
        (["--dtype", "float8"], r"'auto', 'fastest'\]. Got value: float8"),
        (["--dtype", "f32"], r"'float32', 'bfloat16', .*Got value: f32"),
        (["--objective.form", "grp"], "'group', 'vanilla'.*Got value: grp"),
        (["--objective.top_k", "all"], "objective.top_k"),
        (["--objective.aspect_weights", '{"a": "b"}'], "Expected a .*float.*value: b"),
        (["--adapter.targets", "q_proj"], '"adapter.targets": Expected a .*tuple'),
        (["--max_steps"], "--max_steps: expected one argument"),
        (["more"], "unrecognized arguments: more"),
        # Out of range.
        (["--batch_rows", "0"], "batch_rows must be at least 1: got 0"),
        (["--seed=-1"], "seed must be 0 or more: got -1"),
        (["--max_steps", "0"], "max_steps must be at least 1: got 0"),
        (["--objective.beta", "0"], "objective.beta must be a positive number: got 0"),
        (["--objective.beta", ".nan"], "objective.beta must be a positive number"),
        (["--objective.label_smoothing", "0.6"], r"must lie in \[0, 0.5\]: got 0.6"),
        (["--objective.top_k", "0"], "objective.top_k must be at least 1: got 0"),
        (["--objective.max_score", "0"], "objective.max_score must be a positive"),
        (["--objective.sft_weight=-1"], "objective.sft_weight must be 0 or a pos"),
        (["--objective.aspect_weights", "{a: 0}"], "aspect_weights must not all be 0"),
        (["--objective.aspect_weights", "{a: -1}"], "aspect_weights.a must be 0 or a"),
        (["--adapter.rank", "0"], "adapter.rank must be at least 1: got 0"),
        (["--adapter.alpha=-1"], "adapter.alpha must be positive: got -1"),
        (["--adapter.dropout", "1"], r"adapter.dropout must lie in \[0, 1\): got 1"),
        (["--optimizer.learning_rate=-1"], "optimizer.learning_rate must be 0 or"),
        (["--optimizer.b1", "1"], r"optimizer.b1 must lie in \[0, 1\): got 1"),
        (["--optimizer.eps", "0"], "optimizer.eps must be positive: got 0"),
        (["--mesh.fsdp", "0"], "mesh.fsdp must be at least 1: got 0"),
        (["--report_to", "comet"], "report_to 'comet' is not known: expected none"),
        # Without effect together.
        (
            ["--mesh.data", "2", "--mesh.fsdp", "2", "--batch_rows", "6"],
            "batch_rows 6 cannot be split .* = 4 devices: make it a multiple of 4",
        ),
        (["--adapter.name", "none"], "trains nothing by itself: give --trainable"),
        (["--reference_cache", "C"], "no effect without --reference cached"),
        (
            ["--objective.form", "vanilla", "--objective.pairing", "order"],
            "objective.pairing='order' has no effect with form=vanilla",
        ),
        (
            ["--objective.form", "vanilla", "--objective.skip_contradictory", "true"],
            "objective.skip_contradictory=True has no effect with form=vanilla",
        ),
        (
            ["--objective.form", "vanilla", "--objective.reduction", "mean"],
            "objective.reduction='mean' has no effect with form=vanilla",
        ),
        (
            ["--attention", "dense", "--attention_block", "128"],
            "attention_block 128 has no effect with attention dense",
        ),
        (
            ["--attention", "splash", "--attention_block", "32"],
            "attention_block 32 has no effect with attention splash",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options(shell, captured, arguments, match) -> None:
    shell.refuses("train", *NEEDED, *arguments, match=match)
    assert not captured


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("batch_row: 3", "unknown option batch_row. Did you mean batch_rows?"),
        ("optimizer: {learning_rat: 1}", "option optimizer.learning_rat. Did you mean"),
        (
            "optimzer: {b1: 0.1}",
            "unknown option optimzer.b1. Did you mean optimizer.b1",
        ),
        ("objective: {name: dpo, top_k: 3}", "unknown option objective.top_k"),
        ("objective: {name: dop}", "--objective.name 'dop' .*Did you mean dpo?"),
        ("objective: {name: [dpo]}", r"--objective.name \['dpo'\] is not known"),
        ("batch_rows: many", '"batch_rows": Expected a .*int'),
        ("batch_rows: 0", "batch_rows must be at least 1: got 0"),
        ("optimizer: 3", "optimizer must be a mapping of options: got 3"),
        ("objective: null", "objective must be a mapping of options: got None"),
        ("mesh: {data: null}", "option mesh.data: Input should be a valid integer"),
        ("adapter: {targets: null}", "option adapter.targets: .* got None"),
        ("1: 2", "config.yaml: the key 1 is no name of an option"),
        ("a: [1", "config.yaml, line 1, column 6: while .* flow sequence.* expected"),
        ("model: M\ndata: [1, 2\nout: O", r"yaml, line 3, column 4: .*begun in line 2"),
        ("model: M\nmesh:\n\tdata: 1", "yaml, line 3, column 1: .*not with tabs"),
        ("model: M\ndata: @D", "yaml, line 2, column 7: .*Put the value in quotes"),
        ("model: M\ndata: %D", "yaml, line 2, column 7: .*Put the value in quotes"),
        ("a: !!python/object:os.system b", "line 1, column 4: could not determine"),
        ("seed: 1\n---\nseed: 2", "yaml, line 2, column 1: .*a single document"),
        ("seed: 1\nmodel: M\nseed: 2", "line 3, column 1: the key 'seed' is .* line 1"),
        ("mesh:\n  data: 1\n  data: 2", "line 3, column 3: the key 'data' .* line 2"),
        ('{"seed": 1, "seed": 2}', "line 1, column 13: the key 'seed' .* line 1"),
        ("- 1", r"config.yaml: expected a mapping of options, .* got a list: \[1\]"),
        ("--seed 3", "config.yaml: expected a mapping .* got a str: --seed 3"),
        ("", "config.yaml is empty: expected a mapping of options"),
        ("# model: M", "config.yaml is empty"),
        ("\0", "config.yaml: not a readable YAML file: unacceptable character"),
        ("a: &a [*a]", "config.yaml: not a readable .*Circular reference"),
        ("[" * 3000, "config.yaml: not a readable YAML file: maximum recursion"),
        ("adapter: lora", "Give --adapter.name lora, or adapter: {name: lora}"),
        ("objective: dpo", "Give --objective.name dpo, or objective: {name: dpo}"),
        ("max_steps: 5.5", '"max_steps": Expected int or null. Got value: 5.5'),
    ],
)
def test_options_in_a_file(shell, captured, tmp_path, text, match) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    shell.refuses("train", *NEEDED, "--config", file, match=match)
    assert not captured


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\xff\xfem\x00: 1", "config.yaml is not UTF-8: .*Save it as UTF-8"),
        ("model: é".encode("latin-1"), "config.yaml is not UTF-8: "),
    ],
)
def test_a_file_of_another_encoding(shell, tmp_path, content, match) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    shell.refuses("train", *NEEDED, "--config", file, match=match)
    shell.refuses("score", "--config", file, match=match)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffseed: 3\noptimizer: {learning_rate: 1e-4}",
        '{"seed": 3, "optimizer": {"learning_rate": 1e-4}}',
        "seed: 3\noptimizer: {<<: {learning_rate: 1e-3}, learning_rate: 1e-4}",
    ],
    ids=["mark", "json", "merge"],
)
def test_files_that_are_read(shell, captured, tmp_path, text) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    shell("train", *NEEDED, "--config", file)
    assert (captured[0].seed, captured[0].optimizer.learning_rate) == (3, 1e-4)


@pytest.mark.parametrize(
    "flags", [["--adapter", "lora"], ["--objective=dpo"], ["--adapter", "hlpt"]]
)
def test_a_name_in_the_place_of_options(shell, captured, flags) -> None:
    shell.refuses("train", *NEEDED, *flags, match="is a group of options: got '.*name ")
    assert not captured


def test_a_config_file_that_is_not_there(shell, tmp_path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        shell.refuses("train", *NEEDED, f"--config={path}", match=re.escape(str(path)))


def test_files_and_flags_override_each_other_in_order(
    shell, captured, tmp_path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "model: M\ndata: D\nout: O\nseed: 3\noptimizer: {learning_rate: 1e-4}\n"
        "objective: {name: dpo, beta: 0.5}\nadapter: {targets: [q_proj], alpha: 4}\n"
    )
    shell("train", "--seed", "1", "--config", file, "--objective.beta", "1")
    config = captured[0]
    assert (config.seed, config.model) == (3, "M")
    assert (config.objective.name, config.objective.beta) == ("dpo", 1.0)
    assert (config.adapter.targets, config.adapter.alpha) == (("q_proj",), 4.0)
    # YAML 1.1 takes 1e-4 for a text.
    assert config.optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--objective.name", "sigmoid", "--adapter.name", "none", "--trainable=[.*]"],
        ["--objective.aspect_weights", "{a: 1}", "--objective.top_k", "2"],
    ],
)
def test_a_printed_config_is_read_back(shell, captured, tmp_path, flags) -> None:
    text, errors = shell("train", *NEEDED, *flags, "--print_config")
    assert not captured and not errors
    (tmp_path / "printed.yaml").write_text(text)
    shell("train", "--config", tmp_path / "printed.yaml")
    shell("train", *NEEDED, *flags)
    # As is what a run writes into its directory.
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(captured[1])))
    shell("train", "--config", tmp_path / "run.yaml")
    assert captured[0] == captured[1] == captured[2]


def test_printing_a_config_needs_no_options(shell) -> None:
    for command in ("train", "score"):
        text, _ = shell(command, "--print_config")
        values = yaml.safe_load(text)
        assert values["model"] is None
        assert values["objective"] == to_dict(DPO2DConfig())


# --- how it ends ------------------------------------------------------------------


def test_debug_shows_the_traceback(shell) -> None:
    for arguments in (
        ("--debug", "train", *NEEDED, "--batch_rows", "0"),
        ("train", *NEEDED, "--batch_rows", "0", "--debug"),
    ):
        _, text = shell(*arguments, code=2)
        assert text.startswith("Traceback (most recent call last):")
        assert "in __post_init__" in text
        last = text.splitlines()[-1]
        assert last == "jaxalign: error: batch_rows must be at least 1: got 0"


def test_exit_codes(shell, monkeypatch) -> None:
    def end(error: BaseException) -> None:
        def train(*_: Any, **__: Any) -> Path:
            raise error

        monkeypatch.setattr(run_lib, "train", train)

    end(Preempted())
    shell("train", *NEEDED, code=42)
    end(TrainingDiverged("step 3 is not finite"))
    out, err = shell("train", *NEEDED, code=1)
    assert "step 3 is not finite" in out + err
    end(KeyboardInterrupt())
    _, err = shell("train", *NEEDED, code=130)
    assert err == "jaxalign: interrupted\n"
    # A bug is no user error: its traceback is Python's own, and the exit code 1.
    end(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", *NEEDED])


def test_env_prints_versions_and_devices(shell) -> None:
    text, _ = shell("env")
    lines = text.splitlines()
    assert f"- jaxalign: {jaxalign.__version__}" in lines
    assert f"- jax: {jax.__version__}" in lines
    for package in env.PACKAGES:
        assert any(re.match(rf"- {package}: \d", line) for line in lines), package
    assert sum(line.startswith("- device ") for line in lines) == len(jax.devices())
    assert any(line.startswith("- attention xla: ") for line in lines)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help(capsys, arguments) -> None:
    main(arguments)
    text = capsys.readouterr().out
    for name in ("demo", "train", "score", "export", "fetch", "env"):
        assert re.search(rf"^  {name} ", text, re.MULTILINE)
    main(["--version"])
    assert capsys.readouterr().out == f"jaxalign {jaxalign.__version__}\n"


def test_help_of_a_command_lists_its_options(shell) -> None:
    text, _ = shell("train", "--objective.name", "dpo", "--help")
    assert "--objective.label_smoothing" in text
    assert "--objective.top_k" not in text


# --- before the weights are read --------------------------------------------------


@pytest.fixture
def train(shell, tiny_llama, tmp_path, monkeypatch) -> Callable[..., None]:
    """Return what runs a training that must be refused without reading weights."""

    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(load_lib, "load", read)
    synthetic.write_jsonl(
        tmp_path / "data.jsonl", synthetic.feedback_records(4, sentences=2)
    )

    def run(match: str, *flags: Any, out: str = "out", **options: Any) -> None:
        options = {"model": tiny_llama, "data": tmp_path / "data.jsonl", **options}
        given = [f"--{name}={value}" for name, value in options.items()]
        before = sorted(tmp_path.rglob("*"))
        shell.refuses("train", *given, f"--out={tmp_path / out}", *flags, match=match)
        # A run directory would hold the next try, with mended options, for another's.
        assert sorted(tmp_path.rglob("*")) == before

    return run


def test_a_run_that_could_start_reads_the_weights(train) -> None:
    """Or the tests below could not fail."""
    with pytest.raises(AssertionError, match="the weights were read"):
        train("", "--max_steps", "1")


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--adapter.layers", "1-3"], "'1-3' is not within 0-2, the layers of this"),
        (["--adapter.layers", "bottom:4"], "chooses 4 of 3 layers: expected 1 to 3"),
        (["--adapter.layers", "some"], "'some' is no choice of layers: expected 'all'"),
        (["--adapter.layers", "0,0-1"], "names layer 0 twice"),
        (["--adapter.targets", "[q_proj,k_prj]"], "'k_prj' .*Did you mean k_proj"),
        (["--adapter.targets", "[]"], "adapter.targets is empty"),
        (["--adapter.targets", "[q_proj,q_proj]"], "names 'q_proj' twice"),
        (
            ["--adapter.name", "none", "--trainable", "[.*q_prj/kernel]"],
            "'.*q_prj/kernel' matches no weight.*whole path such as",
        ),
        (
            ["--adapter.name", "none", "--trainable", "['(']"],
            r"the pattern '\(' is not a regular expression",
        ),
        (
            ["--objective.aspect_weights", "{helpfulnes: 1}"],
            "'helpfulnes', which no record has. Did you mean helpfulness?",
        ),
        (
            ["--adapter.name", "prefix", "--optimizer.weight_decay", "0.1"],
            "optimizer.weight_decay 0.1 has no effect: .* no matrix",
        ),
        (
            [
                *("--adapter.name", "none", "--trainable", "[norm/scale]"),
                *("--optimizer.weight_decay", "0.01"),
            ],
            "optimizer.weight_decay 0.01 has no effect: .* no matrix",
        ),
        (
            ["--objective.normalize", "none", "--objective.max_score", "5"],
            "objective.max_score 5.0 has no effect with objective.normalize none",
        ),
        (
            ["--objective.normalize", "mean1", "--objective.max_score", "10"],
            "objective.max_score 10.0 has no effect with objective.normalize mean1",
        ),
        (["--objective.max_score", "3"], "got 4.*expected 0 to objective.max_score=3"),
        (["--row_length", "30"], r"a pair takes \d+ places .* but a row has 30: raise"),
        (["--max_length", "5"], r"none of the 4 record\(s\) fits within max_length 5"),
        (["--overflow", "error", "--max_length", "20"], "data.jsonl:1: .* 20"),
        (
            ["--mesh.data", "16", "--batch_rows", "16"],
            "data=16 fsdp=1 tensor=1 needs 16 devices: got 8. Lower --mesh",
        ),
        (
            ["--max_steps", "3", "--optimizer.warmup_steps", "4"],
            r"warmup_steps 4 is more than the run's 3 step\(s\)",
        ),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl is not a file: expected a .jsonl"),
        (["--eval_data", "nowhere.jsonl"], "nowhere.jsonl is not a file"),
        (["--model", "nowhere"], "nowhere is no directory: expected a Hugging Face"),
        (
            ["--model", "owner/name"],
            "owner/name is no directory, .* HF_HUB_OFFLINE forbids to download it. Uns",
        ),
        (["--reference", "owner/name@v1"], "owner/name@v1 is no directory, and of th"),
        (["--model", "./owner/name"], "./owner/name is no directory: expected a Hug"),
        (["--reference", "nowhere"], "nowhere is no directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_fit_the_model_or_the_data(train, flags, match) -> None:
    train(match, *flags)


@pytest.mark.parametrize(
    ("lost", "instead", "match"),
    [
        ("chosen", {}, ":3: field chosen is missing"),
        ("rejected_segments", {}, ":3: field rejected_segments is missing"),
        ("prompt", {"promt": "a"}, ":3: unknown field 'promt'. Did you mean prompt"),
    ],
)
def test_a_record_that_is_refused(train, tmp_path, lost, instead, match) -> None:
    found = synthetic.feedback_records(4)
    del found[2][lost]
    found[2] |= instead
    synthetic.write_jsonl(tmp_path / "bad.jsonl", found)
    train(f"bad.jsonl{match}", data=tmp_path / "bad.jsonl")
    train(f"bad.jsonl{match}", eval_data=tmp_path / "bad.jsonl")


def test_checkpoints_that_do_not_fit(train, make_llama, tiny_llama, tmp_path) -> None:
    shallow = make_llama(num_hidden_layers=2)
    train("is not of the same architecture as", reference=shallow)
    train("gives the token 29[0-9], but the model", model=make_llama(vocab_size=290))
    # Its config says 3 layers, its weights are of 2.
    shutil.copy(tiny_llama / "config.json", shallow)
    train(r"9 missing tensor\(s\): model.layers.2", model=shallow)
    train(r"9 missing tensor\(s\): model.layers.2", reference=shallow)
    config = json.loads((shallow / "config.json").read_text())
    (shallow / "config.json").write_text(json.dumps({**config, "model_type": "opt"}))
    train("model_type 'opt' is not supported: expected .*llama, ", model=shallow)


def test_an_out_that_is_taken(train, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    train("--out .*file is a file: give a directory", out="file")
    train("--out .* cannot be written", out="file/inner")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "full" / ".lock").touch()
    train("is not empty and no run's directory: it has mine", out="full")


def test_the_run_of_another_config(train, shell, tiny_llama, tmp_path) -> None:
    data = synthetic.write_jsonl(tmp_path / "d", synthetic.feedback_records(3))
    config = TrainConfig(
        model=str(tiny_llama), data=str(data), out=str(tmp_path / "run"), batch_rows=2
    )
    sources = fingerprints(config)
    with run_directory.claim(config, sources):
        # Held by another process, or in this case by ourselves.
        train("another process is writing to", "--batch_rows=2", out="run", data=data)
    (tmp_path / "run" / "checkpoints").mkdir()
    train(
        r"another config \(batch_rows: 2 there, 3 now; objective.beta: 0.1 there, 0.2",
        "--batch_rows=3",
        "--objective.beta=0.2",
        out="run",
        data=data,
    )
    # What changes no number may change.
    with pytest.raises(AssertionError, match="the weights were read"):
        train("", "--batch_rows=2", "--report_to=none", out="run", data=data)
    data.write_text(data.read_text() + "\n")
    train(
        "the data has changed since .*run was begun",
        "--batch_rows=2",
        out="run",
        data=data,
    )


# --- any values at all ------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["dpo", "lora", "none", "cached", "bfloat16", "full", "1e-5"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.just("name"), inner, max_size=3)
    ),
    max_leaves=5,
)
DEFAULTS = to_dict(TrainConfig(model="M", data="D", out="O"))
PARTS = ("objective", "adapter", "optimizer", "mesh")


@st.composite
def changed(draw: st.DrawFn) -> dict[str, Any]:
    """Return the nested values of a config, with some replaced."""
    values = json.loads(json.dumps(DEFAULTS))
    for _ in range(draw(st.integers(1, 3))):
        where = values
        part = draw(st.sampled_from([None, *PARTS]))
        if part is not None and isinstance(values.get(part), dict):
            where = values[part]
        name = draw(st.sampled_from(sorted(where)) if where else st.just("name"))
        what = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        if what == "replace":
            where[name] = draw(JSON)
        elif what == "drop":
            where.pop(name, None)
        else:
            where[draw(st.text(max_size=6))] = draw(JSON)
    return values


@settings(max_examples=1000)
@given(values=changed())
def test_any_values_give_a_config_or_a_user_error(values) -> None:
    try:
        config = from_dict(values)
    except UserError as error:
        assert str(error)
        return
    assert isinstance(config, TrainConfig)
    assert from_dict(to_dict(config)) == config
    for part in PARTS:
        assert dataclasses.is_dataclass(getattr(config, part))


def test_the_default_values_give_a_config() -> None:
    """Or the test above could not fail."""
    assert from_dict(DEFAULTS) == TrainConfig(model="M", data="D", out="O")
    with pytest.raises(UserError, match="the option model is missing"):
        from_dict({})


@settings(max_examples=150)
@given(values=changed())
def test_any_file_of_options_gives_a_config_or_a_user_error(yaml_file, values) -> None:
    yaml_file.write_text(yaml.safe_dump(values), encoding="utf-8")
    parts = {"objective": DPO2DConfig, "adapter": LoRAConfig}
    parser = parsing.make_parser("train", TrainConfig, parts, description="")
    try:
        parsing.parse(parser, [f"--config={yaml_file}"], TrainConfig, parts)
    except UserError as error:
        assert str(error)


@pytest.fixture(scope="module")
def yaml_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("options") / "options.yaml"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--out", "mix"], "dpo2d"),
        (["--data", "objective.name=kto"], "dpo2d"),
        (["--objective.mix", "{dpo: 1.0}"], "mix"),
        (["--objective.name=kto", "--out", "mix"], "kto"),
    ],
)
def test_only_its_own_flags_choose_the_objective(arguments, name) -> None:
    from jaxalign.objectives.objective import CONFIGS

    assert parsing.chosen_objective(arguments) is CONFIGS[name]


def test_a_broken_converted_model(train, tiny_llama, tmp_path_factory) -> None:
    base = tmp_path_factory.mktemp("converted") / "base"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(load_lib, "load", READ)
        convert.convert(tiny_llama, base)
    manifest = base / "jaxalign_base.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"version": 1', '"version": 0'))
    train("by another version: got 0, expected 1. Convert the model", model=base)
    manifest.write_text("{")
    train("jaxalign_base.json: not a JSON object", model=base)
    manifest.write_text(text)
    (base / "params" / "manifest.ocdbt").unlink()
    train("is no whole converted model: params/manifest.ocdbt is missing", model=base)

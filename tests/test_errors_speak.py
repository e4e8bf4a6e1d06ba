"""Errors name arguments where Python called and flags where a command did."""

import pytest

from jaxalign.cli.main import main
from jaxalign.data import records
from jaxalign.errors import UserError, naming_flags


ERROR = UserError("--out o is there. XLA_FLAGS=--xla_x; see `jaxalign export --help`")


def test_the_same_error_in_both_words() -> None:
    want = "out o is there. XLA_FLAGS=--xla_x; see `jaxalign export --help`"
    assert str(ERROR) == want
    with naming_flags():
        assert str(ERROR) == f"--{want}"
        assert str(UserError(f"in f: {ERROR}")).startswith("in f: --out")
    assert str(ERROR) == want


def test_python_and_a_command(capsys, tmp_path) -> None:
    rows = [{"prompt": "Q", "chosen": "a", "rejected": "b"}]
    with pytest.raises(UserError, match="^layout hhh: no such layout"):
        records.from_rows(rows, "hhh")
    with pytest.raises(SystemExit) as stop:
        out = tmp_path / "o.jsonl"
        main(["score", "--model=m", "--data=d", f"--out={out}", "--layout=hhh"])
    assert stop.value.code == 2
    assert "error: --layout hhh: no such layout" in capsys.readouterr().err

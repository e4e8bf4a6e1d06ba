"""Pictures encoded once: the same run, without the tower, however it is interrupted."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxalign import trees
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints import runs
from jaxalign.checkpoints.policy import open_run
from jaxalign.data import image_rows
from jaxalign.data.kept_features import Filling
from jaxalign.errors import UserError
from jaxalign.evaluation.score import ScoreConfig, score
from jaxalign.training import metrics as metrics_lib
from jaxalign.training import publish
from jaxalign.training.config import TrainConfig, from_dict
from jaxalign.training.run import train
from jaxalign.training.setup import setup
from tests import vision_models


STEPS = 3
LORA = {"name": "lora", "rank": 2, "alpha": 4.0}
WAYS: dict[str, dict[str, Any]] = {
    "decoder": {"adapter": LORA},
    "connector": {"adapter": {"name": "none"}, "trainable": ["connector/.*"]},
    "adapters": {"adapter": {**LORA, "targets": ["q_proj", "connector:.*"]}},
}
"""What is trained; with the first the connector's output is kept, else the tower's."""


def write_data(directory: Path, count: int = 9, *, seed: int = 0) -> Path:
    """Write records with none, one or two pictures, one of them in two records."""
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        names = [f"{number}_{which}.png" for which in range(number % 3)]
        for name in names:
            size = (*rng.integers(20, 80, 2), 3)
            Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(directory / name)
        if number == count - 1:
            names[0] = "1_0.png"
        parts = [{"type": "image"}] * len(names) + [{"type": "text", "text": "what?"}]
        record = {
            "prompt": [{"role": "user", "content": parts}],
            "images": names,
            "chosen": [{"role": "assistant", "content": "a cat" + "!" * number}],
            "rejected": [{"role": "assistant", "content": "none"}],
        }
        lines.append(json.dumps(record) + "\n")
    path = directory / "data.jsonl"
    path.write_text("".join(lines))
    return path


PICTURES = 8
"""That differ, of nine records."""


@pytest.fixture(scope="module")
def idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_models.write("idefics3", tmp_path_factory.mktemp("model"))


def config(model: Path, directory: Path, name: str, **changes: Any) -> TrainConfig:
    if not (directory / "data.jsonl").exists():
        write_data(directory)
    values: dict[str, Any] = {
        "model": str(model),
        "data": str(directory / "data.jsonl"),
        "out": str(directory / name),
        "max_steps": STEPS,
        "batch_rows": 2,
        "row_length": 320,
        "max_length": 160,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "image_features": "cached",
        "objective": {"name": "sigmoid"},
        "optimizer": {"learning_rate": 1e-2},
        "adapter": LORA,
    }
    return from_dict({**values, **changes})


def losses(run: Path) -> list[float]:
    return [v["loss"] for v in metrics_lib.read(run / "metrics.jsonl").values()]


def trained(run: Path) -> dict[str, np.ndarray]:
    """Return what a run trained, by path."""
    policy = open_run(run)
    assert policy.step == STEPS
    patterns = runs.read_settings(run)["trainable"]
    leaves = trees.by_path(policy.variables)
    if patterns:
        leaves = {k: v for k, v in leaves.items() if k.startswith("params/connector")}
    else:
        leaves = {k: v for k, v in leaves.items() if k.startswith("lora")}
    assert leaves
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def check_same(run: Path, want: Path) -> None:
    np.testing.assert_allclose(losses(run), losses(want), rtol=0, atol=1e-6)
    got, expected = trained(run), trained(want)
    assert got.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(got[path], leaf, rtol=0, atol=2e-5, err_msg=path)


@pytest.mark.parametrize("way", WAYS)
def test_trains_as_the_run_that_recomputes(
    way: str, idefics3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = config(idefics3, tmp_path, "cached", **WAYS[way])
    train(
        dataclasses.replace(once, image_features="recompute", out=str(tmp_path / "r"))
    )
    train(once)
    check_same(tmp_path / "cached", tmp_path / "r")
    # Another run of the same data opens no picture, and loads no tower.
    read: list[tuple[str, ...]] = []
    load = load_lib.load

    def loading(*args: Any, scopes: Any = load_lib.WHOLE, **options: Any) -> Any:
        read.append(tuple(scopes))
        return load(*args, scopes=scopes, **options)

    monkeypatch.setattr(load_lib, "load", loading)
    monkeypatch.setattr(image_rows, "open_patches", None)
    again = dataclasses.replace(once, reference_cache=str(tmp_path / "cached"))
    train(dataclasses.replace(again, out=str(tmp_path / "again")))
    check_same(tmp_path / "again", tmp_path / "r")
    assert read[0] == (("", "connector") if way != "decoder" else ("",))


@pytest.mark.parametrize("way", ["decoder", "connector"])
def test_a_mesh_of_two_devices_changes_nothing(
    way: str, idefics3: Path, tmp_path: Path
) -> None:
    one = config(idefics3, tmp_path, "one", **WAYS[way])
    train(dataclasses.replace(one, image_features="recompute"))
    train(config(idefics3, tmp_path, "two", **WAYS[way], mesh={"data": 2}))
    check_same(tmp_path / "two", tmp_path / "one")


class Killed(BaseException):
    """In the place of a signal, at a place that a test chooses."""


def test_goes_on_where_filling_was_interrupted(
    idefics3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, add, added = config(idefics3, tmp_path, "run"), Filling.add, []

    def breaking(store: Filling, found: Any) -> None:
        if len(added) == 2:
            raise Killed
        add(store, found)
        added.append([digest for digest, _ in found])

    monkeypatch.setattr(Filling, "add", breaking)
    with pytest.raises(Killed):
        train(once)
    first = sum(added, [])
    assert 0 < len(first) < PICTURES
    added[:] = []

    def counting(store: Filling, found: Any) -> None:
        add(store, found)
        added.append([digest for digest, _ in found])

    monkeypatch.setattr(Filling, "add", counting)
    train(once)
    rest = sum(added, [])
    assert not {*first} & {*rest} and len({*first, *rest}) == PICTURES
    train(dataclasses.replace(once, out=str(tmp_path / "whole")))
    check_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.kill
def test_killed_again_and_again_it_ends_the_same(
    idefics3: Path, tmp_path: Path
) -> None:
    """kill -9 in start-up, while features are written, and between steps."""
    once = config(idefics3, tmp_path, "run")
    command = [
        *(sys.executable, "-m", "jaxalign.cli.main", "train"),
        *("--model", once.model, "--data", once.data, "--out", once.out),
        *("--max_steps", str(STEPS), "--batch_rows", "2", "--row_length", "320"),
        *("--max_length", "160", "--logging_steps", "1", "--save_steps", "1"),
        *("--report_to", "none", "--image_features", "cached"),
        *("--objective.name", "sigmoid", "--optimizer.learning_rate", "0.01"),
        *("--adapter.name", "lora", "--adapter.rank", "2", "--adapter.alpha", "4"),
    ]
    one_device = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = {**os.environ, "XLA_FLAGS": one_device}
    run = tmp_path / "run"

    def size(name: str) -> int:
        return sum(path.stat().st_size for path in run.glob(name))

    for watched in ("features/*/values.bin", "features/*/index.jsonl", "metrics.jsonl"):
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.DEVNULL, text=True
        )
        begun = size(watched)
        while process.poll() is None and size(watched) == begun:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, watched
    subprocess.run(command, env=environment, check=True, timeout=300)
    whole = dataclasses.replace(once, out=str(tmp_path / "whole"))
    train(whole)
    check_same(run, tmp_path / "whole")


def test_what_changed_is_encoded_anew(
    idefics3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "cache"
    encoded: list[str] = []
    add = Filling.add

    def counting(store: Filling, found: Any) -> None:
        add(store, found)
        encoded.extend(digest for digest, _ in found)

    monkeypatch.setattr(Filling, "add", counting)

    def start(name: str, model: Path = idefics3, **changes: Any) -> int:
        """Return how many pictures the start of a run encodes."""
        encoded.clear()
        once = config(model, tmp_path, name, reference_cache=str(place), **changes)
        setup(once).close()
        return len(encoded)

    assert start("a") == PICTURES
    assert start("b") == 0
    # Another decoder has the same features; another tower or connector has not.
    for name, count in {
        "model.text_model.norm": 0,
        "connector": 1,
        "vision": 1,
    }.items():
        model = vision_models.write("idefics3", tmp_path / f"model_{name}")
        _change(model, name)
        assert start(f"c_{name}", model) == count * PICTURES, name
    assert start("d", dtype="bfloat16") == PICTURES
    assert start("e", max_pixels=32 * 32) == PICTURES
    Image.new("RGB", (40, 30), "red").save(tmp_path / "2_0.png")
    assert start("f") == 1
    kinds = {json.loads(p.read_text())["dtype"] for p in place.glob("*/*/form.json")}
    assert kinds == {"float32", "bfloat16"}


def _change(model: Path, name: str) -> None:
    """Change one weight whose name has a text in it."""
    from safetensors.numpy import load_file, save_file

    path = model / "model.safetensors"
    weights = load_file(path)
    chosen = next(key for key in sorted(weights) if name in key)
    weights[chosen] = weights[chosen] + 0.5
    save_file(weights, path, {"format": "pt"})


def test_exports_are_whole(idefics3: Path, tmp_path: Path) -> None:
    """What was not loaded comes from the source, merged and as an adapter."""
    from safetensors.numpy import load_file

    train(config(idefics3, tmp_path, "run"))
    publish.publish_run(tmp_path / "run", tmp_path / "merged", form="merged")
    source, merged = (
        load_file(path / "model.safetensors")
        for path in (idefics3, tmp_path / "merged")
    )
    assert source.keys() == merged.keys()
    changed = {k for k in source if not np.array_equal(source[k], merged[k])}
    assert changed and all("text_model" in name for name in changed)
    publish.publish_run(tmp_path / "run", tmp_path / "peft", form="peft")
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("way", ["decoder", "connector"])
def test_scores_are_those_of_the_recomputing(
    way: str, idefics3: Path, tmp_path: Path
) -> None:
    train(config(idefics3, tmp_path, "run", **WAYS[way]))
    found = {}
    for how in ("recompute", "cached"):
        out = tmp_path / f"{how}.jsonl"
        score(
            ScoreConfig(
                model=str(idefics3),
                data=str(tmp_path / "data.jsonl"),
                out=str(out),
                adapter=str(tmp_path / "run"),
                image_features=how,
                objective=config(idefics3, tmp_path, "run").objective,
            )
        )
        found[how] = [json.loads(line) for line in out.read_text().splitlines()]
    for got, want in zip(found["cached"], found["recompute"], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert got["chosen"]["logp"] == pytest.approx(want["chosen"]["logp"], abs=1e-4)
    assert len(list((tmp_path / "features").iterdir())) == 1


def test_a_loaded_model_is_encoded_by_its_own_weights(
    idefics3: Path, tmp_path: Path
) -> None:
    once = config(idefics3, tmp_path, "named")
    train(once)
    base = load_lib.load(idefics3)
    blank = dataclasses.replace(once, model="", out=str(tmp_path / "given"))
    with setup(blank, model=base) as session:
        assert "vision" in session.frozen["params"]
        batch = session.source[0]
    assert batch.inputs.images is not None and batch.inputs.images.patches is None
    names = {p.name for p in (tmp_path / "given" / "features").iterdir()}
    assert len(names) == 1


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"adapter": {**LORA, "targets": ["q_proj", "vision:q_proj"]}},
            "tower is trained or has an adapter.*recompute",
        ),
        (
            {"adapter": {"name": "none"}, "trainable": [".*"]},
            "tower is trained or has an adapter",
        ),
    ],
)
def test_a_trained_tower_is_refused(
    changes: dict[str, Any], said: str, idefics3: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        train(config(idefics3, tmp_path, "run", **changes))
    assert not (tmp_path / "run").exists()


def test_options_without_an_effect_are_refused(
    idefics3: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no vision-language model"):
        train(config(tiny_llama, tmp_path, "run"))
    lines = (tmp_path / "data.jsonl").read_text().splitlines()
    texts = [line for line in lines if not json.loads(line)["images"]]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    with pytest.raises(UserError, match="no record has a picture"):
        train(config(idefics3, tmp_path, "run", data=str(tmp_path / "texts.jsonl")))
    with pytest.raises(UserError, match="no directory: give out, or reference_cache"):
        setup(dataclasses.replace(config(idefics3, tmp_path, "run"), out=""))


def test_a_reference_with_another_tower_is_refused(
    idefics3: Path, tmp_path: Path
) -> None:
    other = vision_models.write("idefics3", tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="reference .*other has another vision or conn"):
        train(config(idefics3, tmp_path, "run", reference=str(other)))
    same = vision_models.write("idefics3", tmp_path / "same")
    _change(same, "text_model.norm")
    train(config(idefics3, tmp_path, "run", reference=str(same)))
    assert losses(tmp_path / "run")


def test_going_on_under_other_versions_is_said(
    idefics3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    once = config(idefics3, tmp_path, "run", image_features="recompute")
    setup(once).close()
    kept = json.loads((run / runs.SOURCES).read_text())

    def rewrite(**changes: Any) -> None:
        settings = json.loads(kept["pictures"]) | changes
        sources = kept | {"pictures": json.dumps(settings)}
        (run / runs.SOURCES).write_text(json.dumps(sources))

    rewrite(pillow="11.3")
    capsys.readouterr()
    setup(once).close()
    assert "begun under other versions (pillow: 11.3 there" in capsys.readouterr().err
    rewrite(patch=9)
    with pytest.raises(UserError, match=r"made into patches has changed.*patch: 9 the"):
        setup(once)

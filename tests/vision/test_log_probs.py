"""Log-probabilities of completions behind pictures, beside transformers' own."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.renderer import open_renderer
from jaxalign.data import loader, pairs, records
from jaxalign.evaluation.score import ScoreConfig, score
from jaxalign.objectives.policy import policy_token_logps
from jaxalign.parallel.mesh import MeshConfig
from tests import synthetic, vision_models, vision_records


SIDES = ("chosen", "rejected")

_logps = jax.jit(policy_token_logps, static_argnames="model")


@functools.cache
def theirs(scene: Any, kind: str) -> list[tuple[list[int], int, np.ndarray]]:
    """Return tokens, where the completion begins, log-probabilities: two a record."""
    import torch

    made = scene(kind)
    other, found = made.theirs(), []
    for row in made.rows:
        for side in SIDES:
            answer = other.answer(row, side, made.data.parent)
            with torch.no_grad():
                logps = answer.log_probs(other.model).numpy()
            found.append((answer.tokens, answer.begin, logps))
    return found


def scored(model: Path, data: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    """Return what score writes."""
    config = ScoreConfig(
        model=str(model), data=str(data), out=str(out), token_logps=True, **options
    )
    return [json.loads(line) for line in score(config).read_text().splitlines()]


def close(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def check(found: list[dict[str, Any]], expected: list[Any]) -> None:
    for number, (tokens, begin, logps) in enumerate(expected):
        mine = found[number // 2][SIDES[number % 2]]
        assert mine["token_ids"] == tokens[begin:]
        close(mine["token_logps"], logps)


def prepared(scene: Any, kind: str) -> pairs.PairDataset:
    made = scene(kind)
    return pairs.prepare(
        records.read(made.data), open_renderer(made.model), max_length=None
    )


@pytest.mark.parametrize("kind", vision_models.KINDS)
def test_score_says_what_transformers_says(scene, kind, tmp_path) -> None:
    made, expected = scene(kind), theirs(scene, kind)
    found = scored(made.model, made.data, tmp_path / "out.jsonl", row_length=420)
    check(found, expected)
    data = prepared(scene, kind)
    assert data.lengths.sum() > 420 > 2 * data.lengths.mean()  # pairs share rows
    # The prompt too is the processor's, and its pictures stand once.
    for pair, (tokens, begin, _) in zip(data.pairs, expected[::2], strict=True):
        assert [*pair.prompt, *pair.chosen.tokens] == tokens
        assert begin >= len(pair.prompt) > len(pair.feature_places)


@pytest.mark.parametrize("kind", vision_models.KINDS)
def test_rows_of_one_pair(scene, kind) -> None:
    """As with ``--packing false``, and by the Python API."""
    made, expected = scene(kind), theirs(scene, kind)
    data = prepared(scene, kind)
    shape = loader.batch_shape([data], row_length=300, pack=False)
    assert shape.pairs == 1
    plan = loader.BatchPlan(3, 1, seed=5)
    source = loader.StepSource(data, shape, plan, num_epochs=1)
    loaded = load_lib.load(made.model)
    seen = 0
    for step in range(len(source)):
        batch = jax.tree.map(lambda leaf: leaf[0], source[step])
        logps = np.asarray(_logps(loaded.variables, batch, model=loaded.model))
        for r, row in enumerate(source.rows_of_step(step)):
            for slot, index in enumerate(row):
                for side in (0, 1):
                    mine = batch.completions.response[r] == 2 * slot + side
                    wanted = expected[2 * index + side]
                    assert (
                        batch.completions.target[r][mine].tolist()
                        == (wanted[0][wanted[1] :])
                    )
                    close(logps[r][mine], wanted[2])
                    seen += 1
    assert seen == len(expected)


@pytest.mark.parametrize("kind", vision_models.KINDS)
@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_two_by_four_devices(scene, kind, axis, tmp_path) -> None:
    made, expected = scene(kind), theirs(scene, kind)
    mesh = MeshConfig(data=2, **{axis: 4})
    found = scored(
        *(made.model, made.data, tmp_path / "out.jsonl"),
        mesh=mesh,
        batch_rows=mesh.rows,
        row_length=300,
    )
    check(found, expected)


@pytest.mark.parametrize("kind", vision_models.KINDS)
def test_pictures_of_a_data_set(kind, scene, shared_data, tmp_path) -> None:
    place = shared_data / "dream" / "FigStep-Benign" / "images"
    made = scene(kind)
    files = [str(place / f"{number}.png") for number in (0, 7, 31)]
    rows = vision_records.records(kind, tmp_path, 4, files)
    data = synthetic.write_jsonl(tmp_path / "pairs.jsonl", rows)
    other = made.theirs()
    expected = []
    for row in rows:
        for side in SIDES:
            answer = other.answer(row, side, tmp_path)
            logps = answer.log_probs(other.model).detach().numpy()
            expected.append((answer.tokens, answer.begin, logps))
    check(scored(made.model, data, tmp_path / "out.jsonl"), expected)

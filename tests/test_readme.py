"""The README's notebook runs as it stands."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters import lora
from jaxalign.objectives import objective, pairwise
from jaxalign.types import Model
from tests import scenes, synthetic


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_notebook_runs(tiny_llama, tmp_path, monkeypatch, capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 32
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").symlink_to(tiny_llama)
    synthetic.write_jsonl(tmp_path / "feedback.jsonl", synthetic.feedback_records(6))
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    # It learns: the margin begins at 0 and grows.
    margins = [float(line.split()[1]) for line in lines]
    assert margins[0] == pytest.approx(0, abs=1e-5) and margins[2] > margins[0]
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_the_record_of_the_readme_is_one() -> None:
    import json

    from jaxalign.data import records

    (text,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    record = records.parse(json.loads(text))
    assert [s.end for s in record.chosen_segments or ()] == [29, len(record.chosen)]
    assert [s.end for s in record.rejected_segments or ()] == [14, len(record.rejected)]


def test_any_pair_of_functions_is_a_model(tiny_llama) -> None:
    """A bag-of-embeddings language model, with the table itself as its variables."""
    data = scenes.dataset(tiny_llama, 3)
    batch = scenes.batch(data)
    size = 1 + int(np.asarray(batch.inputs.tokens).max())
    table = 0.1 * jax.random.normal(jax.random.key(0), (size, 8))
    model = Model(
        hidden_fn=lambda variables, inputs: variables["params"][inputs.tokens],
        logits_fn=lambda variables, hidden: hidden @ variables["params"].T,
    )
    frozen = {"params": None, "reference": {"params": table}}
    config = pairwise.PairwiseConfig()
    loss, grads = jax.value_and_grad(
        lambda p: objective.loss_fn(
            {"params": p}, frozen, batch, None, model=model, config=config
        )[0]
    )(table)
    assert float(loss) == pytest.approx(np.log(2), rel=1e-6)
    assert jnp.abs(grads).max() > 0


def test_the_sample_is_what_the_demo_says() -> None:
    import importlib.resources

    from jaxalign.cli import demo
    from jaxalign.data import records

    sample = importlib.resources.files("jaxalign.data") / "samples"
    with importlib.resources.as_file(sample) as folder:
        found = records.read(folder / "two_dimensional_feedback.jsonl")
    assert len(found) == 96 and demo.HELD_OUT == 24
    aspects = {"helpfulness", "correctness", "safety", "completeness", "clarity"}
    for record in found:
        for text, segments in (
            (record.chosen, record.chosen_segments),
            (record.rejected, record.rejected_segments),
        ):
            assert segments and segments[0].start == 0 and segments[-1].end == len(text)
            for segment in segments:
                assert set(segment.scores) == aspects
                assert all(
                    score in (0, 1, 2, 3, 4) for score in segment.scores.values()
                )
    assert len({str(record.prompt) for record in found}) == len(found)


def test_targets_have_no_duplicate_defaults() -> None:
    assert len(set(lora.LoRAConfig().targets)) == 7

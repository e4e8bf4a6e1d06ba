"""Rounds of RLAIF on a model that thinks: it learns from what it samples itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxalign.cli.main import main
from jaxalign.data import chat, records
from jaxalign.data.rendering import Renderer
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.feedback import rounds
from tests import synthetic


trl = pytest.importorskip("trl")


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Qwen3 with the chat template of the real one."""
    text = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    directory = tmp_path_factory.mktemp("thinker")
    return synthetic.make_checkpoint(directory, "qwen3", tokenizer={"template": text})


@pytest.mark.parametrize("thinking", ["skip", "keep"])
def test_a_round_trains_on_samples_that_think(
    thinking: str, thinker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tiny random model opens no thinking block: its texts are put into one.
    sample = rounds.generate_file

    def think(config: Any) -> Any:
        report = sample(config)
        path = Path(config.out)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            for made in line["completions"]:
                said = made["text"].strip() or "the river"
                made["text"] = f"<think>\nseven {said}\n</think>\n\n{said} is not."
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return report

    monkeypatch.setattr(rounds, "generate_file", think)
    for name, words in (("train", ("river", "seven", "blue")), ("held", ("answer",))):
        rows = [{"prompt": [{"role": "user", "content": w}]} for w in words]
        synthetic.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    out = tmp_path / "out"
    config = {
        "model": str(thinker),
        "prompts": str(tmp_path / "train.jsonl"),
        "out": str(out),
        "rounds": 1,
        "generation": {"num_samples": 2, "max_new_tokens": 8, "batch_slots": 2},
        "judge": {"name": "local", "model": str(thinker)},
        "segmenter": {"thinking": thinking, "min_length": 0},
        "pairing": {"min_gap": 0.0, "max_pairs_per_prompt": 1},
        "adapter": {"name": "lora", "rank": 2},
        "training": {"max_steps": 2, "batch_rows": 1, "row_length": 256},
        "gate": {"prompts": str(tmp_path / "held.jsonl")},
        "chat_template_kwargs": {"enable_thinking": True},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stopped:
        main(["rlaif", "--config", str(tmp_path / "c.yaml")])
    assert stopped.value.code == 0
    found = records.read(out / "round-1" / "pairs.jsonl")
    assert found
    tokenizer = load_tokenizer(str(thinker))
    for record, pair in zip(
        found, chat.tokenize(found, Renderer(tokenizer)), strict=True
    ):
        assert isinstance(record.chosen, str)
        answer = record.chosen.index("</think>") + len("</think>")
        begins = [segment.start for segment in record.chosen_segments or ()]
        assert begins and (min(begins) >= answer) == (thinking == "skip")
        # It is learnt as the template prints it, which is as it was sampled.
        learnt = tokenizer.decode(pair.chosen.tokens[pair.chosen.places])
        assert learnt == f"{record.chosen}<|im_end|>"
    assert (out / "round-1" / "run" / "metrics.jsonl").is_file()

    # What the run was trained with is what is asked of it later.
    data, run = str(out / "round-1" / "pairs.jsonl"), str(out / "round-1" / "run")
    options = ["--model", str(thinker), "--adapter", run, "--data", data]
    options += ["--out", str(tmp_path / "scores.jsonl")]
    asked = ["--chat_template_kwargs", '{"enable_thinking": false}']
    with pytest.raises(SystemExit) as stopped:
        main(["score", *options, *asked])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main(["score", *options])
    assert stopped.value.code == 0
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert len(lines) == len(found)

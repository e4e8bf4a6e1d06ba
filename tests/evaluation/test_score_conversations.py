"""Tools, thinking and turns: each token's log-probability is that of transformers.

On the token ids that TRL's data preparation gives for the same row.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxalign.cli.main import main
from tests import scenes, synthetic
from tests.data import test_trl_parity as parity


trl = pytest.importorskip("trl")

ASK = {"role": "user", "content": "Is it the river?"}
CALL = {"type": "function", "function": {"name": "search", "arguments": {"q": "seven"}}}

ROWS: dict[str, dict[str, Any]] = {
    "tools": {
        "prompt": [ASK],
        "chosen": [{"role": "assistant", "content": "It is."}],
        "rejected": [{"role": "assistant", "content": "No"}],
        "tools": [parity.TOOL],
    },
    "tools as JSON, and no thinking": {
        "prompt": [ASK],
        "chosen": [{"role": "assistant", "content": "It is."}],
        "rejected": [{"role": "assistant", "content": "No"}],
        "tools": json.dumps([parity.TOOL]),
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "thinking": {
        "prompt": [ASK],
        "chosen": [
            {
                "role": "assistant",
                "content": "<think>\nthe river\n</think>\n\nIt is.",
            }
        ],
        "rejected": [
            {"role": "assistant", "content": "No", "reasoning_content": "seven"}
        ],
    },
    "a call and its result": {
        "prompt": [
            ASK,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "seven"},
        ],
        "chosen": [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
        "rejected": [{"role": "assistant", "content": "It is seven."}],
        "tools": [parity.TOOL],
    },
}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    directory = tmp_path_factory.mktemp("thinker")
    options = {"template": path.read_text(encoding="utf-8")}
    return synthetic.make_checkpoint(directory, "qwen3", tokenizer=options)


def test_token_log_probabilities_on_trl_s_ids(thinker: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    data = synthetic.write_jsonl(tmp_path / "f.jsonl", list(ROWS.values()))
    out = tmp_path / "o.jsonl"
    with pytest.raises(SystemExit) as stop:
        main(
            ["score", "--model", str(thinker), "--data", str(data), "--out", str(out)]
            + ["--objective.name", "dpo", "--token_logps", "true"]
        )
    assert stop.value.code == 0
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    model = scenes.torch_model(thinker)
    tokenizer = AutoTokenizer.from_pretrained(thinker)
    for (name, row), found in zip(ROWS.items(), scored, strict=True):
        (expected,) = parity.theirs(tokenizer, [row])
        for side, prompt, learnt in zip(
            ("chosen", "rejected"), expected.prompts, expected.completions, strict=True
        ):
            ids = found[side]["token_ids"]
            # Up to the end of turn; TRL's may begin within the prompt's last blanks.
            begin = len(prompt) + len(learnt) - len(ids) - 1
            whole = [*prompt, *learnt]
            assert whole[begin : begin + len(ids)] == ids, (name, side)
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].double()
            table = torch.log_softmax(logits, -1).numpy()
            wanted = [table[begin + i - 1, token] for i, token in enumerate(ids)]
            np.testing.assert_allclose(
                found[side]["token_logps"], wanted, atol=1e-4, err_msg=f"{name} {side}"
            )

"""From prompts to scores with a judge of one's own.

``python experiments/notebooks/07_own_judge.py``; MODEL as in ``01_score.py``. Samples
four answers to each prompt, has a function score their sentences (short is good), pairs
them, trains on the pairs and prints the rewards of each side. Two minutes.
"""

# %%
import json
import os
import tempfile
from pathlib import Path

from jaxalign.adapters.lora import LoRAConfig
from jaxalign.data import chat, pairs, records
from jaxalign.evaluation.score import PolicyAndReference, score_records
from jaxalign.feedback import candidates, pairing
from jaxalign.feedback.decompose import segments
from jaxalign.feedback.segmenters import SegmenterConfig
from jaxalign.generation.files import GenerateConfig, generate_file
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.training.config import TrainConfig
from jaxalign.training.loop import fit
from jaxalign.training.setup import setup


MODEL = os.environ.get("JAXALIGN_NOTEBOOK_MODEL", "smollm2")
folder = Path(tempfile.mkdtemp())


async def judge(requests):  # or a plain def; what it returns is checked
    def score(text):
        return max(0.0, 4.0 - len(text) / 50)

    return [
        {"segments": [{"brief": score(s["text"])} for s in request["segments"]]}
        for request in requests
    ]


# %% Prompts -> samples -> judged -> pairs
prompts = [{"prompt": f"Tell me about the {word}."} for word in ("sky", "sea", "sun")]
asked, answered = folder / "prompts.jsonl", folder / "samples.jsonl"
asked.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
sampled = {"num_samples": 4, "max_new_tokens": 24, "batch_slots": 12}
generate_file(
    GenerateConfig(model=MODEL, data=str(asked), out=str(answered), **sampled)
)
samples = candidates.read_samples(answered, SegmenterConfig())
decompose = segments.decomposer(("brief",), needs_rubrics=False)
judged = candidates.judge_candidates(samples, decompose, judge)
rows, statistics = pairing.pair(
    candidates.scored(judged), pairing.PairingConfig(min_gap=0.0)
)
print(len(rows), "pairs;", statistics.fates)

# %% Training and scores
sizes = {"max_steps": 4, "batch_rows": 1, "row_length": 512, "max_length": 128}
config = TrainConfig(model=MODEL, data="", out="", adapter=LoRAConfig(rank=4), **sizes)
session = setup(config, rows=rows)
fit(session)
data = pairs.prepare(
    [records.parse(row) for row in rows], chat.load_tokenizer(MODEL), max_length=128
)
base = {"params": session.variables["params"]}
scorer = PolicyAndReference(session.model, session.variables, session.model, base)
for result in score_records(data, scorer, objective=DPO2DConfig()):
    print(result["rewards"])

"""Reward models against transformers: the same score for the same text."""

import asyncio
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.feedback import candidates
from jaxalign.feedback.decompose import segments
from jaxalign.feedback.judge_file import JudgeFileConfig, judge_file
from jaxalign.feedback.segmenters import SegmenterConfig
from jaxalign.judging import prompts, reward
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.judge import (
    JudgeRequest,
    Subject,
    Verdict,
    digest,
    request_key,
    schema_text,
)
from jaxalign.judging.make import make_judge
from tests import synthetic
from tests.cli.test_judge import lines, pair, run


TURNS = ({"role": "user", "content": "the river is blue"},)
LONGER = (
    {"role": "system", "content": "the answer is not seven"},
    {"role": "user", "content": "and the river, 好?"},
    {"role": "assistant", "content": "seven."},
    {"role": "user", "content": "is the answer blue and not seven " * 4},
)
TEXT = "the answer is not seven. and the river is blue, 好 Über! seven"
SPANS = ((0, 24), (25, 54), (55, 60))
OTHER = "seven is the answer."

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"head_dim": ..., "tie_word_embeddings": True},
    "qwen3": {"attention_bias": True},
    "mistral": {"sliding_window": 9},
    "gemma2": {"sliding_window": 9, "query_pre_attn_scalar": 24},
    "gemma3_text": {"sliding_window": 9, "query_pre_attn_scalar": 24},
}


def write_reward(directory: Path, family: str, *, labels: int = 1, **changes: Any):
    """Write a random reward model with a tokenizer."""
    import torch
    from transformers import AutoModelForSequenceClassification

    source = synthetic.make_checkpoint(directory / "source", family, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=labels, dtype=torch.float32
        )
        model.score.weight.data.normal_(std=0.5)
    target = directory / "reward"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def of(family: str, **changes: Any) -> Path:
        key = json.dumps([family, changes], default=repr)
        if key not in made:
            folder = tmp_path_factory.mktemp("reward")
            settings = {**FAMILIES[family], **changes}
            made[key] = write_reward(folder, family, **settings)
        return made[key]

    return of


def graded(asked: Any, requests: list[JudgeRequest]) -> list[Verdict]:
    async def gather() -> list[Verdict]:
        found = {n: verdict async for n, verdict in asked.grade(requests)}
        return [found[n] for n in range(len(requests))]

    return asyncio.run(gather())


def scores(prompt: Any, text: str, spans: Any) -> JudgeRequest:
    subject = Subject(prompt, text, spans=spans, aspects=("reward",))
    return prompts.scores_request(subject, needs_rubrics=False)


def reference(path: Path) -> Callable[[list[int]], float]:
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32
    )

    def score(ids: list[int]) -> float:
        with torch.no_grad():
            return float(model.eval()(torch.tensor([ids])).logits[0, 0])

    return score


def prefixes(path: Path, prompt: Any, text: str, spans: Any) -> list[list[int]]:
    """Return the tokens up to each segment's end, written without ours."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    plain = isinstance(prompt, str)
    if plain:
        whole = prompt + text
    else:
        turns = [*prompt, {"role": "assistant", "content": text}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
    made = tokenizer(whole, add_special_tokens=plain, return_offsets_mapping=True)
    ids, begin, end = made["input_ids"], whole.rindex(text), 0
    first = []
    for a, b in made["offset_mapping"]:
        # This tokenizer leaves the space before a word out of its token's offsets.
        places, end = range(min(a, end), b), b
        first.append(next((c for c in places if not whole[c].isspace()), min(a, b)))
    cut = []
    for _, stop in spans[:-1]:
        inside = [n for n, c in enumerate(first) if c < begin + stop]
        cut.append(ids[: inside[-1] + 1])
    return [*cut, [*ids, tokenizer.eos_token_id] if plain else ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers(make: Any, family: str) -> None:
    path = make(family)
    asked = [
        (TURNS, TEXT, SPANS),
        (TURNS, OTHER, ((0, 5), (6, 20))),
        (LONGER, TEXT, SPANS),
        ("the river is blue: ", TEXT, SPANS),
        (TURNS, TEXT, ((0, 60),)),
        ("the river is blue: ", OTHER, ((0, 3),)),
    ]
    judge = make_judge(JudgeConfig(name="reward", model=str(path)))
    found = graded(judge, [scores(*one) for one in asked])
    score = reference(path)
    everything = []
    for verdict, one in zip(found, asked, strict=True):
        want = [score(ids) for ids in prefixes(path, *one)]
        got = [segment["reward"] for segment in verdict.value["segments"]]
        np.testing.assert_allclose(got, want, atol=1e-4)
        everything += got
    assert np.std(everything) > 0.1  # or any score would do
    # The whole answer is scored, whatever it is cut into.
    whole, cut = found[4].value["segments"], found[0].value["segments"]
    assert whole[0]["reward"] == pytest.approx(cut[-1]["reward"], abs=1e-5)


def test_padding_is_not_scored(make: Any) -> None:
    """Of this tokenizer the end of turn is the padding, if config.json says so."""
    path = make("llama")
    plain = make("llama", pad_token_id=None)
    for one in (path, plain):
        (verdict,) = graded(
            make_judge(JudgeConfig(name="reward", model=str(one))),
            [scores("the river: ", OTHER, ((0, 20),))],
        )
        (ids,) = prefixes(one, "the river: ", OTHER, ((0, 20),))
        want = reference(one)(ids)
        assert verdict.value["segments"][0]["reward"] == pytest.approx(want, abs=1e-4)
    pad = json.loads((path / "config.json").read_text())["pad_token_id"]
    assert ids[-1] == pad  # so the first model scores the token before it
    assert reference(path)(ids) == pytest.approx(reference(path)(ids[:-1]), abs=1e-6)
    assert reference(plain)(ids) != pytest.approx(reference(plain)(ids[:-1]), abs=1e-3)


def test_prompts_are_read_once_and_texts_share_rows(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = make_judge(JudgeConfig(name="reward", model=str(make("llama"))))
    rows: list[tuple[int, int]] = []
    compute = reward._compute

    def counted(*arguments: Any, **named: Any) -> Any:
        rows.append(arguments[2].tokens.shape)
        tokens.append(int((np.asarray(arguments[2].sequence_ids) > 0).sum()))
        return compute(*arguments, **named)

    tokens: list[int] = []
    monkeypatch.setattr(reward, "_compute", counted)
    asked = [scores(LONGER, f"{TEXT} {'seven ' * n}", SPANS) for n in range(6)]
    together = graded(judge, asked)
    assert len(rows) == 1
    # Six answers, and six prompts of which five were not read again.
    apart = sum(verdict.prompt_tokens for verdict in together)
    assert tokens[0] < apart / 2
    for request, verdict in zip(asked, together, strict=True):
        (alone,) = graded(judge, [request])
        for one, other in zip(
            alone.value["segments"], verdict.value["segments"], strict=True
        ):
            assert one["reward"] == pytest.approx(other["reward"], abs=1e-5)


@pytest.fixture(scope="module")
def tiny(make: Any) -> Path:
    return make("llama")


def test_checkpoints_that_are_refused(make: Any, tiny_llama: Path, tmp_path) -> None:
    def judge(path: Path) -> Any:
        return make_judge(JudgeConfig(name="reward", model=str(path)))

    with pytest.raises(UserError, match=r"no tensor score\.weight.*judge.name local"):
        judge(tiny_llama)
    with pytest.raises(UserError, match=r"\[3, 40\].*gives 3 scores.*one label"):
        judge(make("llama", labels=3))
    other = shutil.copytree(make("llama"), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(UserError, match="model_type 'bert' is not supported"):
        judge(other)
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(UserError, match="missing tensor"):
        judge(other)


def test_a_head_for_words_that_was_left_in_is_left_alone(tiny: Path, tmp_path) -> None:
    from safetensors.numpy import load_file, save_file

    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] = np.ones_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    asked = [scores(TURNS, TEXT, SPANS)]
    one, two = (
        graded(make_judge(JudgeConfig(name="reward", model=str(path))), asked)[0].value
        for path in (tiny, other)
    )
    assert one == two


def test_what_it_cannot_do_is_a_failure_by_name(tiny: Path) -> None:
    judge = make_judge(JudgeConfig(name="reward", model=str(tiny)))
    compare = prompts.compare_request(Subject(TURNS, "a", other="b"))
    good = scores(TURNS, OTHER, ((0, 20),))
    picture = Subject(TURNS, "a", spans=((0, 1),), aspects=("r",), images=("x.png",))
    seen = JudgeRequest("scores", (), {}, picture)
    refused, blind, judged = graded(judge, [compare, seen, good])
    assert "answers no compare" in str(refused.failure) and refused.value is None
    assert "images" in str(blind.failure)
    assert judged.failure is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": None}, "judge.model is missing"),
        ({"aspects": ("a", "b")}, "gives one score"),
        ({"method": "choice"}, "judge.method does nothing"),
        ({"base_url": "http://h/v1"}, "base_url does nothing"),
    ],
)
def test_options_that_are_refused(options: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        JudgeConfig(**{"name": "reward", "model": "m", **options})


def test_the_command_with_a_reward_model(tiny: Path, tmp_path: Path, capsys) -> None:
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", [pair(n) for n in range(3)])
    out = tmp_path / "o.jsonl"
    flags = [f"--data={data}", f"--out={out}", "--judge.name=reward"]
    flags += [f"--judge.model={tiny}"]
    assert run("judge", *flags, "--dry_run") == 0
    assert "to judge: 6 requests, in this process" in capsys.readouterr().out
    assert run("judge", *flags) == 0
    score = reference(tiny)
    for row in lines(out):
        for side in ("chosen", "rejected"):
            spans = [(s["start"], s["end"]) for s in row[f"{side}_segments"]]
            got = [s["scores"]["reward"] for s in row[f"{side}_segments"]]
            cut = prefixes(tiny, row["prompt"], row[side], spans)
            np.testing.assert_allclose(got, [score(ids) for ids in cut], atol=1e-4)
    assert run("judge", *flags, '--judge.aspects=["taste"]') == 0
    assert set(lines(out)[0]["chosen_segments"][0]["scores"]) == {"taste"}
    capsys.readouterr()
    assert run("judge", *flags) == 0
    assert "0 asked, 6 known" in capsys.readouterr().out


TOOLS = [
    {
        "type": "function",
        "function": {"name": "river", "description": "is it blue", "parameters": {}},
    }
]
TEMPLATE = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t.function.name }} "
    "{% endfor %}<|end|>{% endif %}"
    "{% if shout is defined and shout %}<|system|>Über<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def with_tools(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model whose template reads tools, and an option of its own."""
    target = tmp_path_factory.mktemp("tools") / "reward"
    shutil.copytree(tiny, target)
    (target / "chat_template.jinja").unlink(missing_ok=True)
    path = target / "tokenizer_config.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "chat_template": TEMPLATE}))
    return target


COLUMNS: list[dict[str, Any]] = [
    {},
    {"tools": TOOLS},
    {"chat_template_kwargs": {"shout": True}},
    {"tools": TOOLS, "chat_template_kwargs": {"shout": True}},
]


def test_a_record_s_tools_and_options_are_in_the_text_that_is_scored(
    with_tools: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    prompt = [{"role": "user", "content": "the river is blue"}]
    rows = [
        {
            "prompt": prompt,
            **{name: [{"role": "assistant", "content": TEXT}] for name in SIDES},
            **{f"{name}_segments": [{"start": 0, "end": len(TEXT)}] for name in SIDES},
            **columns,
        }
        for columns in COLUMNS
    ]
    synthetic.write_jsonl(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    options = JudgeConfig(name="reward", model=str(with_tools))
    judge_file(
        JudgeFileConfig(data=str(tmp_path / "in.jsonl"), out=str(out), judge=options)
    )
    score, tokenizer = (
        reference(with_tools),
        AutoTokenizer.from_pretrained(with_tools),
    )
    turns = [*prompt, {"role": "assistant", "content": TEXT}]
    want = []
    for columns in COLUMNS:
        given = {
            "tools": columns.get("tools"),
            **columns.get("chat_template_kwargs", {}),
        }
        text = tokenizer.apply_chat_template(turns, tokenize=False, **given)
        want.append(score(tokenizer(text, add_special_tokens=False)["input_ids"]))
    found = [row["chosen_segments"][0]["scores"]["reward"] for row in lines(out)]
    np.testing.assert_allclose(found, want, atol=1e-4)
    assert len({round(value, 4) for value in want}) == len(COLUMNS)


SIDES = ("chosen", "rejected")


def test_in_rounds_a_prompt_s_tools_are_judged_too() -> None:
    completions = [{"text": "seven."}]
    prompt = [{"role": "user", "content": "the river"}]
    row = {"prompt": prompt, "completions": completions, "tools": TOOLS}
    ((sampled,),) = (
        one.candidates for one in candidates.parse_samples([row], SegmenterConfig())
    )
    asked = {
        name: segments.decomposer(
            config.scored_aspects, needs_rubrics=False, renders=config.renders
        )(sampled, [])
        for name, config in (
            ("reward", JudgeConfig(name="reward", model="m")),
            ("local", JudgeConfig(name="local", model="m")),
            ("python", JudgeConfig(name="python")),
        )
    }
    given = {name: one.subject.template_kwargs for name, (one,) in asked.items()}
    assert given == {
        "reward": {"tools": TOOLS},
        "local": {"tools": TOOLS},
        "python": None,
    }


def test_keys_of_requests_without_tools_are_those_of_older_stores() -> None:
    request = scores("the river", TEXT, SPANS)
    whole = hashlib.sha256(
        json.dumps(
            {
                "task": "scores",
                "messages": [
                    {**m, "content": digest(m["content"])} for m in request.messages
                ],
                "schema": digest(schema_text(request.schema)),
                "subject": {
                    "prompt": "the river",
                    "response": TEXT,
                    "spans": SPANS,
                    "aspects": ["reward"],
                    "other": None,
                    "statement": None,
                    "references": [],
                    "images": [],
                },
                "vote": 0,
                "judge": {"judge": "reward"},
            },
            sort_keys=True,
        ).encode()
    )
    assert request_key(request, {"judge": "reward"}) == whole.hexdigest()
    subject = dataclasses.replace(request.subject, template_kwargs={"tools": TOOLS})
    other = dataclasses.replace(request, subject=subject)
    assert request_key(other, {"judge": "reward"}) != whole.hexdigest()

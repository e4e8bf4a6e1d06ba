"""The judge in process that writes: every reply that ends is read, and none is bent."""

import asyncio
import dataclasses
import json
from typing import Any

import pytest

from jaxalign.cli.main import main
from jaxalign.data import records
from jaxalign.data.rendering import Renderer
from jaxalign.generation import text_model
from jaxalign.generation.engine import Request, Sampling, generate
from jaxalign.generation.steering import Steering
from jaxalign.generation.structure import json_schema
from jaxalign.judging import prompts
from jaxalign.judging.config import ASPECTS, JudgeConfig
from jaxalign.judging.graders import YES_OR_NO, closed, texts
from jaxalign.judging.judge import JudgeRequest, Subject, Verdict, request_key
from jaxalign.judging.make import make_judge
from jaxalign.judging.writing import WritingJudge


TEXT = "the answer is not seven. and the river is blue, 好 Über! seven"
SUBJECT = Subject(
    ({"role": "user", "content": "the river is blue"},),
    TEXT,
    spans=((0, 24), (25, 54)),
    aspects=("clarity", "safety"),
)


def ask(judge: Any, requests: list[JudgeRequest]) -> list[Verdict]:
    async def gather() -> list[Verdict]:
        found = {number: verdict async for number, verdict in judge.grade(requests)}
        return [found[number] for number in range(len(requests))]

    return asyncio.run(gather())


def asked(task: Any, schema: Any, content: str = "what?") -> JudgeRequest:
    return JudgeRequest(task, ({"role": "user", "content": content},), schema, SUBJECT)


# One of every shape that our requests have.
RISK = closed(
    malicious_content={"type": "string"},
    source={"type": "string", "enum": ["image", "text", "both"]},
    risk_category={"type": "string"},
)
REQUESTS = [
    asked("scores", prompts.scores_schema(SUBJECT.aspects, 2)),
    asked("scores", prompts.scores_schema(SUBJECT.aspects, 1)),
    asked("compare", prompts.COMPARE_SCHEMA),
    asked("verify", YES_OR_NO),
    asked("grade", closed(grade={"enum": ["correct", "incorrect", "not_attempted"]})),
]
WRITTEN = [
    asked("claims", closed(claims=texts(1, 2))),
    asked("questions", closed(questions=texts(2, 2))),
    asked("observations", closed(observations={"type": "array", "items": RISK})),
]


@pytest.fixture(scope="module")
def judge(tiny_llama) -> WritingJudge:
    return WritingJudge(str(tiny_llama), max_reply_tokens=160)


def test_every_reply_that_ends_is_read(tiny_llama) -> None:
    """Of random weights, at a temperature: shapes with closed ends never fail, and
    those with texts fail by being cut off alone, with what was written."""
    judge = WritingJudge(str(tiny_llama), temperature=1.3, max_reply_tokens=160)
    some = [dataclasses.replace(r, vote=n) for n in range(3) for r in REQUESTS]
    verdicts = ask(judge, some)
    for request, verdict in zip(some, verdicts, strict=True):
        assert verdict.failure is None and verdict.attempts == 1
        assert prompts.parse(str(verdict.raw), request.schema).value == verdict.value
        assert verdict.raw == json.dumps(json.loads(str(verdict.raw)))
        assert verdict.prompt_tokens > 0 and verdict.completion_tokens > 3
    assert len({verdict.raw for verdict in verdicts[::5]}) > 1  # votes differ
    again = ask(judge, some[3:5])
    assert [v.raw for v in again] == [v.raw for v in verdicts[3:5]]
    for verdict in ask(judge, [dataclasses.replace(r, vote=1) for r in WRITTEN]):
        if verdict.failure is None:
            assert verdict.value is not None
        else:
            assert verdict.value is None and "cut off: the reply has" in verdict.failure
            assert verdict.completion_tokens == 160 and str(verdict.raw).startswith("{")


def test_a_reply_is_the_engine_s_greedy_text(judge, tiny_llama) -> None:
    made = text_model.load(str(tiny_llama))
    for request in (REQUESTS[0], REQUESTS[3]):
        (verdict,) = ask(judge, [request])
        messages = [dict(m) for m in request.messages]
        tokens = Renderer(made.tokenizer).prompt_tokens(
            records.parse_prompt({"prompt": messages})
        )
        wanted = Request(
            tokens,
            Sampling(max_new_tokens=160, temperature=0.0),
            made.stop_tokens,
            steering=Steering(structure=json_schema(request.schema, one_line=True)),
        )
        ((want,),) = generate(
            made.model,
            made.variables,
            [wanted],
            text_of=text_model.text_with(made.tokenizer),
            tokenizer=made.tokenizer,
        )
        assert verdict.raw == want.text and verdict.failure is None
        assert verdict.completion_tokens == len(want.tokens)
        assert verdict.prompt_tokens == len(tokens)


def test_a_verdict_does_not_depend_on_the_others(judge) -> None:
    """Also where they need longer slots."""
    some = [asked("verify", YES_OR_NO, "the river " * 150), *REQUESTS]
    together = [verdict.raw for verdict in ask(judge, some)]
    assert [ask(judge, [request])[0].raw for request in some] == together
    assert [v.raw for v in ask(judge, some[::-1])][::-1] == together


def test_what_it_cannot_do_is_a_failure_by_name(judge) -> None:
    image = ({"role": "user", "content": [{"type": "image_url"}]},)
    saw, odd, good = ask(
        judge,
        [
            dataclasses.replace(REQUESTS[3], messages=image),
            asked("verify", {"type": "king"}),
            REQUESTS[3],
        ],
    )
    assert saw.value is None and "sees no images" in str(saw.failure)
    assert odd.value is None and "Invalid type: king" in str(odd.failure)
    assert good.value is not None


def test_settings_and_options(tiny_llama, judge) -> None:
    """What replies depend on is in the key; other methods' keys are as they were."""
    model = str(tiny_llama)
    config = JudgeConfig(name="local", model=model, method="json", max_reply_tokens=9)
    made = make_judge(config)
    assert isinstance(made, WritingJudge) and config.scored_aspects == ASPECTS
    assert made.settings["max_reply_tokens"] == 9 and made.settings["method"] == "json"
    warmer = make_judge(dataclasses.replace(config, temperature=0.5))
    keys = {request_key(REQUESTS[0], one.settings) for one in (made, warmer, judge)}
    assert len(keys) == 3
    choice = make_judge(JudgeConfig(name="local", model=model, method="choice"))
    assert dict(choice.settings) == {
        "judge": "local",
        "version": 1,
        "model": made.settings["model"],
        "method": "choice",
        "dtype": "float32",
    }


def test_the_command(tiny_llama, tmp_path) -> None:
    """Scores of 0 to 4 for every segment, and nothing asked twice."""
    spans = [{"start": 0, "end": 24}, {"start": 25, "end": 54}]
    data, out = tmp_path / "data.jsonl", tmp_path / "judged.jsonl"
    rows = [
        {
            "prompt": f"the river {n}",
            "chosen": TEXT,
            "rejected": TEXT[::-1],
            "chosen_segments": spans,
            "rejected_segments": spans[:1],
        }
        for n in range(1)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        **{"data": data, "out": out, "store": tmp_path / "store.db"},
        **{"judge.name": "local", "judge.model": tiny_llama, "judge.method": "json"},
        "judge.aspects": '["clarity", "safety"]',
    }
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    with pytest.raises(SystemExit) as stopped:
        main(["judge", *arguments])
    assert not stopped.value.code
    for line in out.read_text().splitlines():
        judged = json.loads(line)
        for side in ("chosen", "rejected"):
            for segment in judged[f"{side}_segments"]:
                assert set(segment["scores"]) == {"clarity", "safety"}
                assert set(segment["scores"].values()) <= set(range(5))

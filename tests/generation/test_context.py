"""generate --context: what is put before prompts, and that the lines do not show it."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxalign.cli.main import main
from jaxalign.data import records
from jaxalign.errors import UserError
from jaxalign.generation.context import observations_text, read_contexts, with_context
from tests import synthetic
from tests.judging.stub_server import schema_of, serving


SYSTEM = [{"role": "system", "content": "Be brief."}]
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
PROMPTS: list[Any] = [
    {"prompt": QUESTION},
    {"prompt": [*SYSTEM, *QUESTION]},
    {"prompt": "Tell me a story"},
]


def risk(**more: Any) -> dict[str, Any]:
    kind = {"source": "text content", "risk_category": "privacy"}
    return {"malicious_content": 'a "story"', **kind, "verified": True, **more}


def generate(model: Path, data: Path, out: Path, *more: str) -> int:
    files = {"model": model, "data": data, "out": out, "max_new_tokens": 6}
    flags = [f"--{name}={value}" for name, value in files.items()]
    with pytest.raises(SystemExit) as stopped:
        main(["generate", *flags, "--batch_slots=3", *more])
    return int(stopped.value.code or 0)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(folder: Path, seen: list[list[Any]]) -> Path:
    rows = [
        {"index": n, **row, "images": [], "observations": found, "failed": []}
        for n, (row, found) in enumerate(zip(PROMPTS, seen, strict=True))
    ]
    return synthetic.write_jsonl(folder / "observations.jsonl", rows)


def told(text: str) -> list[Any]:
    """Return the prompts with a text written into them by hand."""
    both = [{"role": "system", "content": f"Be brief.\n\n{text}"}, *QUESTION]
    return [
        {"prompt": [{"role": "system", "content": text}, *QUESTION]},
        {"prompt": both},
        {"prompt": f"{text}\n\nTell me a story"},
    ]


def test_it_is_what_is_written_by_hand(
    tiny_llama: Path, tmp_path: Path, capsys
) -> None:
    data = synthetic.write_jsonl(tmp_path / "p.jsonl", PROMPTS)
    hand = synthetic.write_jsonl(tmp_path / "hand.jsonl", told("Say yes."))
    rules = tmp_path / "rules.md"
    rules.write_text("Say yes.\n")
    flag = f"--context={rules}"
    assert generate(tiny_llama, data, tmp_path / "a.jsonl", flag) == 0
    assert "before 3 of 3 prompts" in capsys.readouterr().err
    assert generate(tiny_llama, hand, tmp_path / "b.jsonl") == 0
    assert generate(tiny_llama, data, tmp_path / "c.jsonl") == 0
    a, b, c = (lines(tmp_path / f"{name}.jsonl") for name in "abc")
    assert [x["completions"] for x in a] == [x["completions"] for x in b]
    assert all(x["completions"] != y["completions"] for x, y in zip(a, c, strict=True))
    assert [x["prompt"] for x in a] == [row["prompt"] for row in PROMPTS]
    rules.write_text("Say no.")
    assert generate(tiny_llama, data, tmp_path / "a.jsonl", flag) == 2
    assert "other settings: context" in capsys.readouterr().err
    assert generate(tiny_llama, data, tmp_path / "c.jsonl", flag) == 2
    assert "other settings: context" in capsys.readouterr().err


def test_observations_stand_before_their_prompts(tmp_path: Path) -> None:
    prompts = [records.parse_prompt(row) for row in PROMPTS]
    seen = [[risk(verified=False)], [risk(verified=None), risk()], []]
    found = read_contexts(written(tmp_path, seen), prompts)
    assert found[0] is None and found[2] is None
    assert str(found[1]).count('- text content: "a \\"story\\"" (privacy)') == 2
    assert with_context(prompts[0], None) is prompts[0]
    given = with_context(prompts[1], found[1])
    assert given.given == PROMPTS[1]["prompt"]
    (system, _) = given.text
    assert isinstance(system, records.Message) and system.role == "system"
    assert system.text == f"Be brief.\n\n{found[1]}"
    assert observations_text([]) is None


def test_a_system_message_in_parts() -> None:
    parts = [{"type": "text", "text": "Be brief."}]
    row = {"prompt": [{"role": "system", "content": parts}, *QUESTION]}
    made = with_context(records.parse_prompt(row), "Say yes.").text
    assert isinstance(made[0], records.Message)
    assert made[0].text == "Be brief.\n\nSay yes." and len(made) == 2


def test_of_other_prompts(tmp_path: Path) -> None:
    path = written(tmp_path, [[], [], []])
    prompts = [records.parse_prompt(row) for row in PROMPTS]
    with pytest.raises(UserError, match="has 3 lines for 2 prompts"):
        read_contexts(path, prompts[:2])
    with pytest.raises(UserError, match="jsonl:1 is of another prompt than"):
        read_contexts(path, prompts[::-1])
    pictured = prompts[0]._replace(image_columns={"images": ["a.png"]})
    with pytest.raises(UserError, match="jsonl:1 is of another prompt than"):
        read_contexts(path, [pictured, *prompts[1:]])
    path.write_text('{"prompt": "x"}\n' * 3)
    with pytest.raises(UserError, match="jsonl:1: not as jaxalign disentangle"):
        read_contexts(path, prompts)
    with pytest.raises(UserError, match="cannot be read"):
        read_contexts(tmp_path / "none.md", prompts)
    (tmp_path / "empty.md").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read_contexts(tmp_path / "empty.md", prompts)


def test_risks_are_observed_on_the_way(
    tiny_llama: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789abcd")
    data = synthetic.write_jsonl(tmp_path / "p.jsonl", PROMPTS)

    def say(body: dict[str, Any]) -> str:
        if "answer" in schema_of(body)["properties"]:
            return '{"answer": "yes"}'
        found = risk()
        del found["verified"]
        story = "story" in body["messages"][1]["content"]
        return json.dumps({"observations": [found] if story else []})

    out = tmp_path / "out.jsonl"
    with serving(say=say) as stub:
        judge = (f"--judge.base_url={stub.url}", "--judge.model=m")
        assert generate(tiny_llama, data, out, "--context=risks", *judge) == 0
        said = capsys.readouterr()
        assert "1 observations: 1 verified" in said.out
        assert "before 1 of 3 prompts" in said.err
        assert stub.total == 4
        assert generate(tiny_llama, data, out, "--context=risks", *judge) == 0
        assert stub.total == 4
    made = Path(f"{out}.observations.jsonl")
    assert [len(line["observations"]) for line in lines(made)] == [0, 0, 1]
    again = tmp_path / "again.jsonl"
    assert generate(tiny_llama, data, again, f"--context={made}") == 0
    assert again.read_text() == out.read_text()
    assert generate(tiny_llama, data, again, f"--context={made}", *judge) == 2
    assert "unknown option --judge.base_url" in capsys.readouterr().err

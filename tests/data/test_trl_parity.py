"""The same token ids and the same learnt tokens as TRL's own data preparation.

Where they differ it is on purpose, and all the ways are listed here:

1. Nothing that a template prints behind the end of turn is learnt, nor is it in the row
   (ChatML's line break, Phi's EOS).
2. Where the generation prompt is no beginning of the whole conversation, or the
   template leaves out what was thought, completions follow the generation prompt.
3. A template that prints no end of turn gets the tokenizer's EOS (GLM).
4. The prompt ends where its characters do. TRL's ends where its token ids, taken alone,
   differ, so that it learns tokens of the prompt where the tokenizer merges across it.
5. A template that prints only lists of parts is given lists of parts.
"""

import copy
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import datasets
import pytest

from jaxalign import progress
from jaxalign.data import chat, layouts, records
from jaxalign.data.rendering import Renderer
from tests import synthetic


trl = pytest.importorskip("trl")

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
NO_END = {"glm4moe"}
AS_GENERATED = {
    *("deepseek_r1_distill", "deepseek_r1_distill_training"),
    *("deepseekv3", "deepseekv3_training"),
    *("nemotron_3_5_lightning", "nemotron_3_5_lightning_training"),
    *("nemotron_3_nano", "nemotron_3_nano_training"),
    *("nemotron_3_super", "nemotron_3_super_training"),
    *("nemotron_3_ultra", "nemotron_3_ultra_training"),
}
"""Templates that open a thinking block for generation which no answer closes."""
PARTS = {
    f"{name}{kind}"
    for name in ("idefics3", "llava_next", "smolvlm")
    for kind in ("", "_training")
}


class Prepared(NamedTuple):
    """What comes before each completion, and what is learnt of it."""

    prompts: list[list[int]]
    completions: list[list[int]]

    @property
    def wholes(self) -> list[list[int]]:
        pairs = zip(self.prompts, self.completions, strict=True)
        return [[*prompt, *completion] for prompt, completion in pairs]


def theirs(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> list[Prepared]:
    """Prepare pairs as ``DPOTrainer`` does."""
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(
        dataset_num_proc=None, max_length=None, truncation_mode="keep_start"
    )
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(list(rows))
    made = trl.DPOTrainer._prepare_dataset(trainer, data, tokenizer, args, "train")
    return [
        Prepared([row["prompt_ids"]] * 2, [row["chosen_ids"], row["rejected_ids"]])
        for row in made
    ]


def ours(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> list[Prepared]:
    """Prepare records as ``jaxalign train`` does."""
    kept = [row for row, _ in layouts_of(rows)]
    found = [records.parse(row) for row in kept]
    made = []
    for pair in chat.tokenize(found, Renderer(tokenizer)):
        sides = [b for b in (pair.chosen, pair.rejected) if len(b.tokens)]
        made.append(
            Prepared(
                [[*pair.prompt.tolist(), *b.tokens[: b.lead].tolist()] for b in sides],
                [b.tokens[b.places].tolist() for b in sides],
            )
        )
    return made


def layouts_of(rows: Sequence[dict[str, Any]]) -> Any:
    numbered = [(row, f"row {i}") for i, row in enumerate(rows)]
    known = layouts.LAYOUTS[layouts.recognise(rows[0])]
    return [(made, where) for made, where in known.convert(numbered)]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


# What of a tool a template prints differs; that all get it does not.
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Looks a river up.",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    },
}

CASES: dict[str, dict[str, Any]] = {
    "plain": {"prompt": [user("Is it?")], "chosen": "It is.", "rejected": "No"},
    "system": {
        "prompt": [{"role": "system", "content": "Be brief."}, user("Is it?")],
        "chosen": "It is.",
        "rejected": "No",
    },
    "history": {
        "prompt": [user("Hi"), answer("Ho"), user("Is it?")],
        "chosen": "It is\n\nso.",
        "rejected": "No",
    },
    "thinking": {
        "prompt": [user("Is it?")],
        "chosen": "<think>\nThe river.\n</think>\n\nIt is.",
        "rejected": "<think>\nSeven.\n</think>\n\nNo",
    },
    "thinking without line breaks": {
        "prompt": [user("Is it?")],
        "chosen": "<think>The river.</think>It is.",
        "rejected": "No",
    },
    "outer spaces": {
        "prompt": [user(" Is it? ")],
        "chosen": "  It is. \n",
        "rejected": "No ",
    },
    "empty": {"prompt": [user("Is it?")], "chosen": "", "rejected": "No"},
    "tools": {
        "prompt": [user("Is it?")],
        "chosen": "It is.",
        "rejected": "No",
        "tools": [TOOL],
    },
}


def with_template(base: Any, path: Path) -> Any:
    """Return the tokenizer with a template and the special tokens that it prints."""
    text = path.read_text(encoding="utf-8")
    special = re.findall(
        r"<\|[^|>\s]+\|>|<｜[^>\s]+｜>|<(?:start|end)_of_[a-z]+>|<\|?turn\|?>|</s>",
        text,
    )
    tokenizer = copy.deepcopy(base)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(special))})
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = text
    return tokenizer


def conversational(case: dict[str, Any]) -> dict[str, Any]:
    return {**case, **{k: [answer(case[k])] for k in ("chosen", "rejected")}}


@pytest.fixture(scope="module")
def base(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer()


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_every_template_of_trl(path: Path, base: Any) -> None:
    tokenizer = with_template(base, path)
    compared = 0
    for name, case in CASES.items():
        row = conversational(case)
        try:
            (expected,) = theirs(tokenizer, [row])
        except Exception as error:  # the template refuses it; then we do too
            refused = str(error)
            if path.stem in PARTS:
                continue  # it fails over a text where it wants parts
            with pytest.raises(Exception, match=re.escape(refused[:40])):
                ours(tokenizer, [row])
            continue
        (found,) = ours(tokenizer, [row])
        compared += 1
        for side in (0, 1):
            check(path.stem, tokenizer, case, side, (expected, found), name)
    assert compared >= 4 or path.stem in PARTS


def check(
    stem: str,
    tokenizer: Any,
    case: dict[str, Any],
    side: int,
    both: tuple[Prepared, Prepared],
    name: str,
) -> None:
    expected, found = both
    whole, mine = expected.wholes[side], found.wholes[side]
    shown = f"{name}: {tokenizer.decode(whole)!r}, {tokenizer.decode(mine)!r}"
    if stem in PARTS:
        text = tokenizer.decode(mine)
        assert case["prompt"][-1]["content"] in text, shown
        return
    options = {"tools": case["tools"]} if "tools" in case else {}
    prompt = tokenizer.apply_chat_template(
        case["prompt"], add_generation_prompt=True, tokenize=False, **options
    )
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    text = case[("chosen", "rejected")[side]]
    whole_text = tokenizer.decode(whole)
    thought = text.partition("</think>")[0].removeprefix("<think>").strip()
    if not whole_text.startswith(prompt) or (
        "</think>" in text and thought not in whole_text
    ):
        # The second kind: as generation would see it.
        assert stem in AS_GENERATED or "think" in text, shown
        given = re.sub(r"\A\s*<think>\s*", "", text) if OPENED.search(prompt) else text
        assert tokenizer.decode(mine).startswith(prompt + given), shown
        return
    rest = whole[len(mine) :]
    if stem in NO_END:
        assert mine == [*whole, tokenizer.eos_token_id], shown
        return
    # The first kind: what is left out is behind the end of turn.
    assert whole[: len(mine)] == mine, shown
    assert mine[-1] in tokenizer.all_special_ids, shown
    assert not re.sub(r"<[^>]*>|\s", "", tokenizer.decode(rest)), shown
    # The fourth: the same beginning wherever TRL's prompt is a beginning of the ids.
    if whole[: len(alone)] == alone:
        assert len(found.prompts[side]) == len(alone), shown
    else:
        assert len(found.prompts[side]) >= len(expected.prompts[side]), shown


OPENED = re.compile(r"<think>\s*\Z")


# 500 records of each form.


def _texts(rng: random.Random) -> tuple[str, str]:
    """Return two answers that differ in their first word."""
    first, second = rng.sample(synthetic.WORDS, 2)
    tails = [synthetic.sentence(rng, rng.randint(1, 12)) for _ in range(2)]
    return f"{first} {tails[0]}", f"{second} {tails[1]}"


def _conversation(rng: random.Random) -> list[dict[str, Any]]:
    turns = []
    if rng.random() < 0.3:
        turns.append({"role": "system", "content": synthetic.sentence(rng)})
    for _ in range(rng.randint(0, 2)):
        turns += [user(synthetic.sentence(rng)), answer(synthetic.sentence(rng))]
    return [*turns, user(synthetic.sentence(rng, rng.randint(1, 9)))]


def _explicit(rng: random.Random) -> dict[str, Any]:
    chosen, rejected = _texts(rng)
    return {
        "prompt": _conversation(rng),
        "chosen": [answer(chosen)],
        "rejected": [answer(rejected)],
    }


def _implicit(rng: random.Random) -> dict[str, Any]:
    row = _explicit(rng)
    prompt = row.pop("prompt")
    return {name: [*prompt, *turns] for name, turns in row.items()}


def _explicit_text(rng: random.Random) -> dict[str, Any]:
    chosen, rejected = _texts(rng)
    question = f"Q: {synthetic.sentence(rng, rng.randint(1, 9))}\nA:"
    return {"prompt": question, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def _implicit_text(rng: random.Random) -> dict[str, Any]:
    row = _explicit_text(rng)
    prompt = row.pop("prompt")
    return {name: prompt + text for name, text in row.items()}


FORMS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "explicit conversations": _explicit,
    "implicit conversations": _implicit,
    "explicit texts": _explicit_text,
    "implicit texts": _implicit_text,
}


@pytest.mark.parametrize("form", FORMS)
def test_500_records_of_each_form(form: str, base: Any) -> None:
    rng = random.Random(form)
    rows = [FORMS[form](rng) for _ in range(500)]
    expected, found = theirs(base, rows), ours(base, rows)
    behind = [] if "text" in form else base("\n", add_special_tokens=False)["input_ids"]
    for row, his, mine in zip(rows, expected, found, strict=True):
        assert his.prompts == mine.prompts, row
        for a, b in zip(his.completions, mine.completions, strict=True):
            assert a == [*b, *behind], row  # ChatML's line break


@pytest.mark.parametrize("conversation", [True, False])
def test_500_completions_with_their_prompts(conversation: bool, base: Any) -> None:
    rng = random.Random(conversation)
    make = _explicit if conversation else _explicit_text
    rows = [make(rng) for _ in range(500)]
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows]
    trainer = SimpleNamespace(
        _tokenizer=base, completion_only_loss=True, chat_template=None
    )
    args = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=False,
        completion_only_loss=True,
        max_length=None,
        eos_token=None,
        truncation_mode="keep_start",
        pad_to_multiple_of=None,
        use_liger_kernel=False,
        padding_free=False,
        shuffle_dataset=False,
        packing=False,
        seed=0,
    )
    data = datasets.Dataset.from_list(rows)
    made = trl.SFTTrainer._prepare_dataset(
        trainer, data, base, args, False, None, "train"
    )
    behind = base("\n", add_special_tokens=False)["input_ids"] if conversation else []
    for his, mine in zip(made, ours(base, rows), strict=True):
        learnt = [label for label in his["labels"] if label != -100]
        assert learnt == [*mine.completions[0], *behind]
        assert his["input_ids"] == [*mine.wholes[0], *behind]


# The columns that TRL gives to the template.


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [TOOL]},
        {"tools": '[{"type": "function", "function": {"name": "f"}}]'},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": True}, "tools": [TOOL]},
    ],
    ids=["a list", "as JSON", "kwargs", "both"],
)
def test_columns_of_the_template(more: dict[str, Any], base: Any) -> None:
    (path,) = [path for path in TEMPLATES if path.stem == "qwen3"]
    tokenizer = with_template(base, path)
    row = conversational(CASES["plain"])
    (without,) = ours(tokenizer, [row])
    (expected,) = theirs(tokenizer, [row | more])
    (found,) = ours(tokenizer, [row | more])
    behind = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert [[*one, *behind] for one in found.wholes] == expected.wholes
    if more != {"chat_template_kwargs": {"enable_thinking": True}}:
        assert found != without


def test_as_generated_is_said_once(
    base: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = [path for path in TEMPLATES if path.stem == "deepseek_r1_distill"]
    progress.say_once.cache_clear()
    ours(with_template(base, path), [conversational(CASES["plain"])] * 3)
    assert capsys.readouterr().err.count("generation prompt is no beginning") == 1

"""One data path: pairs, single completions, weights, steps, prompts that are learnt."""

from typing import Any

import numpy as np
import pytest

from jaxalign.data import chat, forms, loader, pairs, records
from jaxalign.errors import UserError
from jaxalign.types import Form
from tests import synthetic


PAIR = {"prompt": "Q:", "chosen": " good", "rejected": " bad"}
GOOD = {"prompt": "Q:", "completion": " good", "label": True}
BAD = {"prompt": "R:", "completion": " bad", "label": False}


def parse(*rows: dict[str, Any]) -> list[records.Record]:
    return [records.parse(row, f"f:{i + 1}") for i, row in enumerate(rows)]


def shaped(form: Form, *rows: dict[str, Any]) -> list[tuple[Any, ...]]:
    found, origins = forms.shape(parse(*rows), form)
    return [
        (origin, record.prompt, record.chosen, record.rejected, record.label)
        for record, origin in zip(found, origins, strict=True)
    ]


def test_single_completions_are_read() -> None:
    first, second = parse({**GOOD, "weight": 2}, {"prompt": "Q:", "completion": " x"})
    assert (first.chosen, first.rejected, first.label, first.weight) == (
        " good", None, True, 2.0,
    )  # fmt: skip
    assert second.label is None and second.weight == 1.0
    turns = [{"role": "user", "content": "Hi"}]
    said = [{"role": "assistant", "content": "Yo"}]
    assert parse({"prompt": turns, "completion": said})[0].chosen == "Yo"


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({**GOOD, "chosen": "x"}, "f:1: field chosen does not go with a completion"),
        ({**GOOD, "chosen_segments": []}, "field chosen_segments does not go with"),
        ({**PAIR, "label": True}, "field label does not go with chosen and rejected"),
        ({**GOOD, "label": 2}, "f:1: field label: input should be a valid boolean"),
        ({**GOOD, "label": "1"}, "f:1: field label: input should be a valid boolean"),
        ({**GOOD, "completion": 3}, "field completion: expected a text or a list"),
        ({**PAIR, "weight": -1}, "field weight: input should be greater than or eq"),
        ({**PAIR, "weight": float("nan")}, "field weight: input should be a finite"),
        ({**PAIR, "chosen_token_weights": ["a"]}, r"chosen_token_weights\[0\]: input"),
        ({"prompt": "Q:"}, "field chosen is missing.*or prompt, completion and label"),
        ({**GOOD, "lable": True}, "unknown field 'lable'. Did you mean label"),
    ],
)
def test_what_is_wrong_is_named(row, match) -> None:
    if "lable" in row:
        row = {k: v for k, v in row.items() if k != "label"}
    with pytest.raises(UserError, match=match):
        parse(row)


def test_pairs_and_completions_take_each_other_s_form() -> None:
    assert shaped("pairs", PAIR) == [(0, "Q:", " good", " bad", None)]
    # Unpaired, as TRL does it: the chosen one is desirable, the rejected one is not.
    assert shaped("labelled", PAIR, BAD) == [
        (0, "Q:", " good", None, True),
        (0, "Q:", " bad", None, False),
        (1, "R:", " bad", None, False),
    ]
    assert shaped("completions", PAIR, GOOD, BAD) == [
        (0, "Q:", " good", None, True),
        (1, "Q:", " good", None, True),
    ]
    with pytest.raises(UserError, match="f:1: a single completion, but the objective"):
        shaped("pairs", GOOD)
    with pytest.raises(UserError, match="f:1: field label is missing"):
        shaped("labelled", {"prompt": "Q:", "completion": "x"})
    with pytest.raises(UserError, match="none of the 1 record.* has a desirable"):
        shaped("completions", BAD)


def test_a_mismatched_completion_is_of_another_prompt() -> None:
    """The next record with another prompt, round the end, whatever the batch is."""
    other = {"prompt": "S:", "completion": " so", "label": True}
    found = shaped("labelled_kl", PAIR, BAD, other)
    assert [(prompt, mine, mismatched) for _, prompt, mine, mismatched, _ in found] == [
        ("Q:", " good", " bad"),  # R's
        ("Q:", " bad", " bad"),  # R's
        ("R:", " bad", " so"),
        ("S:", " so", " good"),
    ]
    ends_as_it_begins = shaped("labelled_kl", GOOD, BAD, PAIR)
    assert [row[3] for row in ends_as_it_begins] == [" bad", " good", " bad", " bad"]
    with pytest.raises(UserError, match="have the same prompt"):
        shaped("labelled_kl", PAIR, GOOD)


def test_pictures_go_with_their_record_and_make_prompts_differ() -> None:
    # The same question on two pictures: each is another prompt, and the mismatched
    # completion goes with the record's own picture.
    rows = [
        {"prompt": "Q:", "completion": said, "label": True, "images": [picture]}
        for said, picture in ((" a", b"1"), (" b", b"2"), (" c", b"2"))
    ]
    found, _ = forms.shape(parse(*rows), "labelled_kl")
    assert [(r.chosen, r.rejected, r.images[0].source) for r in found] == [
        (" a", " b", b"1"),
        (" b", " a", b"2"),
        (" c", " a", b"2"),
    ]
    single, _ = forms.shape(parse({**PAIR, "images": [b"1", b"2"]}), "completions")
    assert [p.source for p in single[0].images] == [b"1", b"2"]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return chat.load_tokenizer(str(tiny_llama))


def test_a_single_completion_is_a_row_with_one_response(tokenizer) -> None:
    rows = [{**GOOD, "weight": 0.5}, BAD]
    data = pairs.prepare(parse(*rows), tokenizer, max_length=None, form="labelled")
    batch = loader.single_batch(data, row_length=64)
    assert batch.labels is not None and batch.weights is not None
    assert batch.labels[batch.pair_mask].tolist() == [True, False]
    assert batch.weights[batch.pair_mask].tolist() == [0.5, 1.0]
    # Only the first response of each pair has tokens, up to and with the EOS.
    response = batch.completions.response
    assert set(response[response >= 0].tolist()) == {0, 2}
    ends = [int(batch.completions.target[response == which][-1]) for which in (0, 2)]
    assert ends == [tokenizer.eos_token_id] * 2


def test_a_step_is_not_an_ending(tokenizer) -> None:
    """Step-DPO: no end of turn after a step, with or without a template."""
    plain = parse({"prompt": "Q:", "chosen": " a step", "rejected": " another"})
    turns = [{"role": "user", "content": "Q"}]
    talk = parse({"prompt": turns, "chosen": "a step", "rejected": "another"})
    for found in (plain, talk):
        whole, step = (
            pairs.prepare(found, tokenizer, max_length=None, end_of_turn=end).pairs[0]
            for end in (True, False)
        )
        for with_end, without in (
            (whole.chosen, step.chosen),
            (whole.rejected, step.rejected),
        ):
            np.testing.assert_array_equal(with_end.tokens[:-1], without.tokens)
            special = tokenizer.all_special_ids
            assert with_end.tokens[-1] in special
            assert without.tokens[-1] not in special


def test_token_weights_go_with_their_tokens(tokenizer) -> None:
    row = {"prompt": "Q:", "chosen": " good one", "rejected": " bad"}
    plain = pairs.prepare(parse(row), tokenizer, max_length=None).pairs[0]
    counts = [side.num_completion_tokens for side in (plain.chosen, plain.rejected)]
    weights = [list(np.arange(n, dtype=float) - 1) for n in counts]
    given = {
        **row,
        "chosen_token_weights": weights[0],
        "rejected_token_weights": weights[1],
    }
    data = pairs.prepare(parse(given), tokenizer, max_length=None)
    batch = loader.single_batch(data, row_length=64)
    assert batch.token_weights is not None
    for side in (0, 1):
        mine = batch.completions.response[0] == side
        assert batch.token_weights[0][mine].tolist() == weights[side]
    # Cut with their tokens.
    longest = max(counts)
    cut = pairs.truncate(data.pairs[0], 1 + longest - 1)
    assert cut is not None and cut.chosen.weights is not None
    assert len(cut.chosen.weights) == cut.chosen.num_completion_tokens
    wrong = {**given, "rejected_token_weights": [*weights[1], 1.0]}
    with pytest.raises(UserError, match=r"rejected_token_weights: got \d+ number"):
        pairs.prepare(parse(wrong), tokenizer, max_length=None)
    with pytest.raises(UserError, match="some completions have token weights"):
        pairs.prepare(parse(given, row), tokenizer, max_length=None)


def test_learning_the_prompt_counts_every_token_once(tokenizer) -> None:
    found = [records.parse(r) for r in synthetic.feedback_records(3)]
    options: dict[str, Any] = {"max_length": None, "form": "completions"}
    data = pairs.prepare(found, tokenizer, learn_prompt=True, **options)
    batch = loader.single_batch(data)
    for row in range(len(batch.pair_mask)):
        there = batch.completions.response[row] >= 0
        size = int((batch.inputs.sequence_ids[row] > 0).sum())
        tokens = batch.inputs.tokens[row][:size]
        # All but the first token are predicted, each by the one before it.
        np.testing.assert_array_equal(batch.completions.target[row][there], tokens[1:])
        np.testing.assert_array_equal(
            batch.completions.source[row][there], np.arange(size - 1)
        )

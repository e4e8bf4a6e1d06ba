"""Segments that nobody has judged: spans are kept and summed, scores are none."""

import numpy as np
import pytest

from jaxalign import load_hf
from jaxalign.data import chat, pairs, records
from jaxalign.errors import UserError
from jaxalign.objectives import logps, objective
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.objectives.options import ObjectiveConfig
from jaxalign.objectives.policy import TokenLogps
from jaxalign.objectives.stepwise import SDPOConfig
from jaxalign.training.checks import check_records
from tests import scenes


def row(chosen: list[dict], rejected: list[dict]) -> dict:
    return {
        "prompt": "Is the river blue?",
        "chosen": "It is. And red. Or so.",
        "rejected": "No. It is seven.",
        "chosen_segments": chosen,
        "rejected_segments": rejected,
    }


SPANS = (
    [{"start": 0, "end": 6}, {"start": 7, "end": 15}, {"start": 16, "end": 22}],
    [{"start": 0, "end": 3}, {"start": 4, "end": 16}],
)


def judged(spans: list[dict], *scores: float | None) -> list[dict]:
    return [
        {**span, **({} if score is None else {"scores": {"helpfulness": score}})}
        for span, score in zip(spans, scores, strict=True)
    ]


PLAIN = row(*SPANS)
PARTLY = row(judged(SPANS[0], 3.0, 1.0, None), judged(SPANS[1], None, 2.0))
LISTED = row(judged(SPANS[0][:2], 3.0, 1.0), judged(SPANS[1][1:], 2.0))


def test_spans_are_kept(make_tokenizer) -> None:
    (record,) = records.from_rows([PLAIN])
    assert record.chosen_segments is not None
    assert [(s.start, s.end, s.scores) for s in record.chosen_segments] == [
        (0, 6, {}),
        (7, 15, {}),
        (16, 22, {}),
    ]
    assert records.aspects_of([record]) == ()
    (pair,) = chat.tokenize([record], make_tokenizer())
    assert pair.chosen.scores.shape == (3, 0) and pair.chosen.scored.all()
    assert set(pair.chosen.segments) - {-1} == {0, 1, 2}


def test_the_end_of_turn_goes_to_the_last_judged_segment(make_tokenizer) -> None:
    tokenizer = make_tokenizer()
    plain, partly, listed = chat.tokenize([PLAIN, PARTLY, LISTED], tokenizer)
    assert plain.chosen.segments[-1] == 2 and plain.rejected.segments[-1] == 1
    assert partly.chosen.segments[-1] == 1 == listed.chosen.segments[-1]
    # Beside what is unjudged, every token has the owner that it had without it.
    mine = partly.chosen.segments.copy()
    assert (mine == 2).any()
    mine[mine == 2] = -1
    np.testing.assert_array_equal(mine, listed.chosen.segments)


@pytest.fixture(scope="module")
def scored(tiny_llama):
    """Return loss and sums of a batch of rows under a policy and its reference."""
    loaded = load_hf(tiny_llama)
    tokenizer = chat.load_tokenizer(str(tiny_llama))
    adapters = scenes.random_lora(loaded.variables["params"])

    def score(rows: list[dict], config: ObjectiveConfig):
        data = pairs.prepare(rows, tokenizer, max_length=None)
        batch = scenes.batch(data)
        variables = {**loaded.variables, "lora": adapters}
        policy = scenes.token_logps(variables, batch, model=loaded.model)
        reference = scenes.token_logps(loaded.variables, batch, model=loaded.model)
        found = TokenLogps(policy, reference)
        losses = objective.pair_losses(found, batch, config, data.aspects)
        return np.asarray(losses), found, batch, data

    return score


def test_their_tokens_are_summed(scored) -> None:
    losses, tokens, batch, data = scored([PLAIN], SDPOConfig(beta=0.3))
    shape = batch.segment_mask.shape[1], batch.segment_mask.shape[3]
    assert shape[1] == 3
    got = np.asarray(logps.segment_sums(tokens.logratios, batch.completions, shape))
    ratios = np.asarray(tokens.logratios, np.float64)[0]
    segment = np.asarray(batch.completions.segment)[0]
    response = np.asarray(batch.completions.response)[0]
    want = np.zeros((2, 3))
    for value, side, owner in zip(ratios, response, segment, strict=True):
        if side >= 0 and owner >= 0:
            want[side, owner] += value
    np.testing.assert_allclose(got[0, 0], want, atol=1e-5)
    assert np.abs(want[0]).min() > 1e-3
    # SDPO asks for no scores: two segments of either side, in order.
    margin = (want[0, :2] - want[1, :2]).sum()
    np.testing.assert_allclose(losses[0, 0], np.log1p(np.exp(-0.3 * margin)), rtol=1e-4)
    assert data.report["segments"] == 0


def test_two_dimensional_losses_are_as_without_them(scored) -> None:
    for options in ({}, {"form": "vanilla"}, {"normalize": "mean1"}):
        config = DPO2DConfig(**options)
        partly, *_, first = scored([PARTLY], config)
        listed, *_, second = scored([LISTED], config)
        np.testing.assert_allclose(partly, listed, rtol=1e-5)
        assert first.report == second.report


def test_what_needs_scores_says_so(capsys) -> None:
    found = records.from_rows([PLAIN])
    with pytest.raises(UserError, match="no scored segments, which dpo2d needs.*judge"):
        check_records(DPO2DConfig(), found, records.aspects_of(found))
    capsys.readouterr()
    check_records(SDPOConfig(), found, ())
    assert "learns nothing" not in capsys.readouterr().err
    found = records.from_rows([PARTLY, PLAIN])
    check_records(DPO2DConfig(), found, records.aspects_of(found))
    said = capsys.readouterr()
    assert "1 of 2 record(s) have a response without a scored" in said.err + said.out

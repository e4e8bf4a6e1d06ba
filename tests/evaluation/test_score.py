"""`jaxalign score` against transformers, peft, and the slow reference of the losses."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.checkpoints import load as load_lib
from jaxalign.cli.main import main
from jaxalign.data import pairs, records
from jaxalign.data.pairs import PairDataset
from jaxalign.errors import UserError
from jaxalign.evaluation import score as score_lib
from jaxalign.evaluation.score import PolicyAndReference, ScoreConfig, score_records
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.objectives.pairwise import PairwiseConfig
from jaxalign.types import Model
from tests import scenes, synthetic
from tests.checkpoints.test_export import peft_model, save_with_peft
from tests.objectives import reference_dpo2d


pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")

SIDES = ("chosen", "rejected")
ASPECTS = ("correctness", "helpfulness")


# --- what a record comes to, worked out without jaxalign ---------------------------


class Side(NamedTuple):
    """A response: all tokens up to its end, where it begins, whose each token is."""

    ids: list[int]
    first: int
    owners: list[int]


def tokenise(tokenizer: Any, record: dict[str, Any], name: str) -> Side:
    """Tokenise one response with its prompt; offsets must not be trimmed."""
    prompt, text = record["prompt"], record[name]
    if isinstance(prompt, str):
        begin = len(prompt)
        encoded = tokenizer(prompt + text, return_offsets_mapping=True)
        ids = [*encoded["input_ids"], tokenizer.eos_token_id]
        spans = [*encoded["offset_mapping"], (begin + len(text),) * 2]
    else:
        rendered = tokenizer.apply_chat_template([*prompt, *text], tokenize=False)
        before = tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )
        text, begin = text[0]["content"], len(before)
        encoded = tokenizer(
            rendered, add_special_tokens=False, return_offsets_mapping=True
        )
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        last = next(i for i, (a, _) in enumerate(spans) if a >= begin + len(text))
        assert ids[last] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        ids, spans = ids[: last + 1], spans[: last + 1]
    first = next(i for i, (_, end) in enumerate(spans) if end > begin)
    segments = record.get(f"{name}_segments") or []
    owners = []
    for start, end in spans[first:-1]:
        characters = range(max(start - begin, 0), end - begin)
        solid = [c for c in characters if not text[c].isspace()]
        place = (solid or characters)[0]
        owners.append(
            next(
                (i for i, s in enumerate(segments) if s["start"] <= place < s["end"]),
                -1,
            )
        )
    return Side(ids, first, [*owners, len(segments) - 1])


def reference_sides(
    record: dict[str, Any],
    sides: list[Side],
    policy: list[np.ndarray],
    reference: list[np.ndarray],
    aspect_weights: dict[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Return the sides of a pair as reference_dpo2d takes them."""
    made = []
    for name, side, pi, ref in zip(SIDES, sides, policy, reference, strict=True):
        segments = []
        for i, segment in enumerate(record.get(f"{name}_segments") or []):
            mine = np.array(side.owners) == i
            weights = {a: (aspect_weights or {}).get(a, 0.0) for a in segment["scores"]}
            if aspect_weights is None:
                weights = dict.fromkeys(segment["scores"], 1.0)
            total = sum(weights.values())
            segments.append(
                {
                    # Scored on no aspect that counts: as if it had no token.
                    "tokens": int(mine.sum()) if total else 0,
                    "logratio": (pi - ref)[mine].sum(),
                    "score": sum(weights[a] * s for a, s in segment["scores"].items())
                    / (total or 1),
                }
            )
        made.append(
            {
                "segments": segments,
                "logratio": (pi - ref).sum(),
                "logp": pi.sum(),
                "tokens": len(pi),
            }
        )
    return made


def check(
    result: dict[str, Any],
    record: dict[str, Any],
    sides: list[Side],
    policy: list[np.ndarray],
    reference: list[np.ndarray],
    *,
    objective: str = "dpo2d",
    atol: float,
    **options: Any,
) -> None:
    """Compare one line of the output with everything worked out by hand."""
    near = {"abs": atol * max(len(pi) for pi in policy)}
    beta = options.get("beta", 0.1)
    aspect_weights = options.get("aspect_weights")
    chosen, rejected = reference_sides(record, sides, policy, reference, aspect_weights)
    if objective == "dpo2d":
        loss = reference_dpo2d.reference_dpo2d(chosen, rejected, options)
        selected: Any = reference_dpo2d.reference_selection(chosen, rejected, options)
        if options.get("form") != "vanilla":
            selected = list(zip(*selected, strict=True)) or [(), ()]
    else:
        loss = reference_dpo2d.reference_dpo(chosen, rejected, options)
    assert result["loss"] == pytest.approx(loss, rel=1e-4, **near)
    rewards = [beta * side["logratio"] for side in (chosen, rejected)]
    assert result["rewards"] == {
        "chosen": pytest.approx(rewards[0], **near),
        "rejected": pytest.approx(rewards[1], **near),
        "margin": pytest.approx(rewards[0] - rewards[1], **near),
    }
    for which, (name, side, made) in enumerate(
        zip(SIDES, sides, (chosen, rejected), strict=True)
    ):
        got, pi, ref = result[name], policy[which], reference[which]
        assert got["tokens"] == len(pi) == len(side.owners)
        assert got["logp"] == pytest.approx(pi.sum(), **near)
        assert got["ref_logp"] == pytest.approx(ref.sum(), **near)
        if "token_ids" in got:
            assert got["token_ids"] == side.ids[side.first :]
            np.testing.assert_allclose(got["token_logps"], pi, atol=atol)
            np.testing.assert_allclose(got["ref_token_logps"], ref, atol=atol)
        wanted = record.get(f"{name}_segments") or []
        assert [(s["start"], s["end"]) for s in got["segments"]] == [
            (s["start"], s["end"]) for s in wanted
        ]
        weights: list[float] = [float(s["tokens"] > 0) for s in made["segments"]]
        chosen_ones = [i for i, weight in enumerate(weights) if weight]
        if objective == "dpo2d":
            weights = reference_dpo2d.reference_weights(
                made, options, rejected=bool(which)
            )
            chosen_ones = sorted(selected[which])
        for i, segment in enumerate(got["segments"]):
            mine = np.array(side.owners) == i
            assert segment["tokens"] == mine.sum()
            assert segment["logp"] == pytest.approx(pi[mine].sum(), **near)
            assert segment["ref_logp"] == pytest.approx(ref[mine].sum(), **near)
            assert segment["weight"] == pytest.approx(weights[i], rel=1e-4, abs=1e-6)
            assert segment["selected"] == (i in chosen_ones)


# --- a real model, through the command line ---------------------------------------


class Scene(NamedTuple):
    """A tiny Llama, a random PEFT adapter on it, and records of every form."""

    model: Path
    adapter: Path
    tokenizer: Any
    records: list[dict[str, Any]]


@pytest.fixture(scope="module")
def scene(make_llama: Callable[..., Path], tmp_path_factory: Any) -> Scene:
    from transformers import AutoTokenizer

    model = make_llama(tokenizer={"trim_offsets": False}, num_hidden_layers=2)
    adapter = tmp_path_factory.mktemp("adapter")
    targets = ["q_proj", "v_proj", "down_proj"]
    save_with_peft(model, adapter, target_modules=targets, layers_to_transform=[1])
    found = synthetic.feedback_records(4, seed=1)
    found += synthetic.feedback_records(3, seed=2, chat=False)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    return Scene(model, adapter, tokenizer, [*found[::2], *found[1::2]])


def torch_logps(model: Any, side: Side) -> np.ndarray:
    """Score one response on its own with transformers, in float64."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([side.ids])).logits[0].double()
    table = torch.log_softmax(logits, -1).numpy()
    places = np.arange(side.first, len(side.ids))
    return table[places - 1, np.array(side.ids)[places]]


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["score", *map(str, arguments)])
    return int(str(stop.value.code))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_policy_with_an_adapter_scores_as_peft_does(scene, tmp_path) -> None:
    data = synthetic.write_jsonl(tmp_path / "data.jsonl", scene.records)
    flags = ["--model", scene.model, "--adapter", scene.adapter, "--data", data]
    flags += ["--objective.rejected_weight", "inverted", "--objective.beta", "0.3"]
    flags += ["--token_logps", "true", "--row_length", "128", "--batch_rows", "2"]
    assert run(*flags, "--out", tmp_path / "new" / "out.jsonl") == 0
    results = read(tmp_path / "new" / "out.jsonl")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.jsonl"]
    assert [result["index"] for result in results] == list(range(len(scene.records)))
    base = scenes.torch_model(scene.model)
    references = [
        [torch_logps(base, tokenise(scene.tokenizer, record, name)) for name in SIDES]
        for record in scene.records
    ]
    policy = peft_model(scene.model, scene.adapter)
    moved = []
    for record, result, reference in zip(
        scene.records, results, references, strict=True
    ):
        sides = [tokenise(scene.tokenizer, record, name) for name in SIDES]
        logps = [torch_logps(policy, side) for side in sides]
        moved.append(np.abs(logps[0] - reference[0]).mean())
        check(
            result,
            record,
            sides,
            logps,
            reference,
            atol=1e-4,
            rejected_weight="inverted",
            beta=0.3,
        )
    assert min(moved) > 0.1
    assert any(s["tokens"] > 3 for r in results for s in r["chosen"]["segments"])


def test_another_checkpoint_as_the_reference(scene, make_llama, tmp_path) -> None:
    """Of another depth; the records have no segments."""
    other = make_llama(num_hidden_layers=1, seed=5)
    found = [
        {name: record[name] for name in ("prompt", *SIDES)} for record in scene.records
    ]
    data = synthetic.write_jsonl(tmp_path / "data.jsonl", found)
    flags = ["--model", scene.model, "--reference", other, "--data", data]
    flags += ["--objective.name", "dpo", "--objective.label_smoothing", "0.2"]
    (tmp_path / "out").write_text("an earlier result")
    assert run(*flags, "--out", tmp_path / "out") == 0
    results = read(tmp_path / "out")
    assert [result["index"] for result in results] == list(range(len(found)))
    models = [scenes.torch_model(path) for path in (scene.model, other)]
    for record, result in zip(found, results, strict=True):
        sides = [tokenise(scene.tokenizer, record, name) for name in SIDES]
        logps = [[torch_logps(model, side) for side in sides] for model in models]
        check(
            result,
            record,
            sides,
            *logps,
            objective="dpo",
            label_smoothing=0.2,
            atol=1e-4,
        )
        assert result["chosen"]["segments"] == []
        assert "token_ids" not in result["chosen"]


def test_tdpo_under_an_adapter_and_another_reference(
    scene, make_llama, tmp_path
) -> None:
    """Whole distributions of two models whose layers are cut differently.

    Zeng et al. 2024, eq. 16, https://arxiv.org/abs/2404.11999: with r the log-ratios
    and D the sums of KL(ref || policy) along each response,
    -log sigmoid(beta (r_w - r_l - alpha (D_l - D_w))).
    """
    import torch

    other = make_llama(num_hidden_layers=1, seed=5)
    data = synthetic.write_jsonl(tmp_path / "data.jsonl", scene.records)
    flags = ["--model", scene.model, "--adapter", scene.adapter, "--data", data]
    flags += ["--reference", other, "--objective.name", "tdpo2"]
    flags += ["--objective.beta", "0.3", "--objective.alpha", "0.7"]
    assert run(*flags, "--out", tmp_path / "out.jsonl") == 0
    models = peft_model(scene.model, scene.adapter), scenes.torch_model(other)

    def tables(side: Side) -> list[np.ndarray]:
        with torch.no_grad():
            logits = [m(torch.tensor([side.ids])).logits[0].double() for m in models]
        rows = slice(side.first - 1, len(side.ids) - 1)
        return [torch.log_softmax(x, -1).numpy()[rows] for x in logits]

    for record, result in zip(scene.records, read(tmp_path / "out.jsonl"), strict=True):
        ratios, kls = [], []
        for name in SIDES:
            side = tokenise(scene.tokenizer, record, name)
            policy, reference = tables(side)
            target = side.ids[side.first :]
            places = np.arange(len(target))
            ratios.append((policy - reference)[places, target].sum())
            kls.append((np.exp(reference) * (reference - policy)).sum())
        inner = 0.3 * (ratios[0] - ratios[1] - 0.7 * (kls[1] - kls[0]))
        assert result["loss"] == pytest.approx(np.log1p(np.exp(-inner)), abs=1e-3)
        margin = result["rewards"]["margin"]
        assert margin == pytest.approx(0.3 * (ratios[0] - ratios[1]), abs=1e-3)


# --- every option, on a model that is a table -------------------------------------

TABLE = Model(
    hidden_fn=lambda variables, inputs: variables["table"][inputs.tokens],
    logits_fn=lambda variables, logits: logits,
)
"""The next token's logits are a row of the table: bigrams."""


def table_logps(table: np.ndarray, side: Side) -> np.ndarray:
    logits = table.astype(np.float64)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    places = np.arange(side.first, len(side.ids))
    ids = np.array(side.ids)
    return logps[ids[places - 1], ids[places]]


class Tables(NamedTuple):
    """Two tables as policy and reference, and records that are hard to score."""

    policy: np.ndarray
    reference: np.ndarray
    records: list[dict[str, Any]]
    sides: list[list[Side]]
    data: PairDataset

    def results(self, objective: Any, **options: Any) -> list[dict[str, Any]]:
        scorer = PolicyAndReference(
            TABLE,
            {"table": jnp.asarray(self.policy)},
            TABLE,
            {"table": jnp.asarray(self.reference)},
        )
        found = score_records(
            self.data,
            scorer,
            objective=objective,
            put=lambda batch: jax.tree.map(jnp.asarray, batch),
            **options,
        )
        return list(found)

    def logps(self, index: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        sides = self.sides[index]
        return (
            [table_logps(self.policy, side) for side in sides],
            [table_logps(self.reference, side) for side in sides],
        )


def segment(start: int, end: int, correctness: int | None, helpfulness: int) -> Any:
    scores = {"correctness": correctness, "helpfulness": helpfulness}
    scores = {name: score for name, score in scores.items() if score is not None}
    return {"start": start, "end": end, "scores": scores}


@pytest.fixture(scope="module")
def tables(scene: Scene) -> Tables:
    found = list(scene.records)
    plain = {"prompt": "Q: seven?\nA:", "chosen": " the river", "rejected": " not blue"}
    found += [
        # Equal scores: ties keep text order; all 0 on the rejected side: mean 0.
        {
            **plain,
            "chosen_segments": [segment(0, 4, 2, 2), segment(4, 10, 2, 2)],
            "rejected_segments": [segment(0, 4, 0, 0), segment(4, 9, 0, 0)],
        },
        # A segment of one space owns no token, whatever its score; a gap; the chosen
        # side is the worse one.
        {
            **plain,
            "chosen_segments": [
                segment(0, 4, 0, 1),
                segment(4, 5, 4, 4),
                segment(5, 7, 1, 0),
            ],
            "rejected_segments": [segment(1, 3, 4, 4), segment(5, 9, 3, 4)],
        },
        # One segment has one aspect only; one side has three, the other one.
        {
            **plain,
            "chosen_segments": [
                segment(0, 2, None, 3),
                segment(2, 4, 1, 2),
                segment(4, 10, 4, 3),
            ],
            "rejected_segments": [segment(0, 9, 2, 1)],
        },
        # No segment on one side.
        {
            **plain,
            "chosen_segments": [],
            "rejected_segments": [segment(0, 9, 2, 1)],
        },
    ]
    data = pairs.prepare(
        [records.parse(record) for record in found], scene.tokenizer, max_length=None
    )
    assert data.aspects == ASPECTS
    rng = np.random.default_rng(3)
    size = (len(scene.tokenizer),) * 2
    policy, reference = (rng.normal(size=size).astype(np.float32) for _ in range(2))
    sides = [
        [tokenise(scene.tokenizer, record, name) for name in SIDES] for record in found
    ]
    return Tables(policy, reference, found, sides, data)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"beta": 0.7},
    {"top_k": 1},
    {"top_k": 2, "pairing": "order"},
    {"pairing": "order", "reduction": "mean"},
    {"normalize": "none"},
    {"normalize": "mean1"},
    {"max_score": 8.0},
    {"max_score": 5.0, "normalize": "none", "rejected_weight": "inverted"},
    {"rejected_weight": "inverted"},
    {"rejected_weight": "inverted", "normalize": "mean1"},
    {"rejected_weight": "uniform"},
    {"rejected_weight": "centred"},
    {"reduction": "mean"},
    {"label_smoothing": 0.3},
    {"skip_contradictory": True},
    {"skip_contradictory": True, "top_k": 2, "reduction": "mean"},
    {"dpo_weight": 0.5},
    {"sft_weight": 0.25},
    {"dpo_weight": 2.0, "sft_weight": 1.0, "label_smoothing": 0.1},
    {"aspect_weights": {"helpfulness": 3.0, "correctness": 1.0}},
    {"aspect_weights": {"correctness": 2.0}},
    {"form": "vanilla"},
    {"form": "vanilla", "top_k": 1, "rejected_weight": "inverted"},
    {"form": "vanilla", "label_smoothing": 0.2, "normalize": "mean1"},
    {"form": "vanilla", "dpo_weight": 1.0, "rejected_weight": "centred"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_of_2d_dpo(tables, options) -> None:
    one_row = int(tables.data.lengths.sum())
    with jax.disable_jit():  # what is compiled is kept from one option to the next
        results = tables.results(DPO2DConfig(**options), row_length=one_row)
    assert len(results) == len(tables.records)
    for i, (result, record) in enumerate(zip(results, tables.records, strict=True)):
        check(result, record, tables.sides[i], *tables.logps(i), atol=1e-5, **options)


def test_every_option_of_2d_dpo_matters(tables) -> None:
    """Each changes some loss or weight: the test above tells options apart."""
    import dataclasses

    fields = {f.name for f in dataclasses.fields(DPO2DConfig)} - {"name"}
    assert {name for options in OPTIONS for name in options} == fields

    def key(options: dict[str, Any]) -> str:
        found = []
        for i, record in enumerate(tables.records):
            weights = options.get("aspect_weights")
            sides = reference_sides(record, tables.sides[i], *tables.logps(i), weights)
            found.append(round(reference_dpo2d.reference_dpo2d(*sides, options), 6))
        return str(found)

    assert len({key(options) for options in OPTIONS}) == len(OPTIONS)


@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.5, "label_smoothing": 0.25}], ids=str
)
def test_dpo(tables, options) -> None:
    for name in ("dpo", "sigmoid"):
        results = tables.results(PairwiseConfig(name=name, **options))
        for i, (result, record) in enumerate(zip(results, tables.records, strict=True)):
            check(
                result,
                record,
                tables.sides[i],
                *tables.logps(i),
                objective="dpo",
                atol=1e-5,
                **options,
            )


def test_equal_models_give_the_logarithm_of_2(tables) -> None:
    same = tables._replace(reference=tables.policy)
    for result in same.results(PairwiseConfig()):
        assert result["loss"] == pytest.approx(math.log(2))
        assert result["rewards"] == {"chosen": 0.0, "rejected": 0.0, "margin": 0.0}
    # One term of ln 2 for every pair of segments: the shorter side's number of those
    # that own a token. The last four records: 2, 2 (of 3, one is a space), 1, 0.
    losses = [result["loss"] for result in same.results(DPO2DConfig())]
    counts = [len(r["chosen_segments"]) for r in tables.records]
    counts = [
        min(n, len(r["rejected_segments"]))
        for n, r in zip(counts, tables.records, strict=True)
    ]
    assert counts[-4:] == [2, 2, 1, 0]
    assert losses == pytest.approx([n * math.log(2) for n in counts])


def test_how_pairs_lie_in_rows_changes_nothing(tables) -> None:
    def flat(value: Any) -> Any:
        if isinstance(value, dict):
            return [x for v in value.values() for x in flat(v)]
        if isinstance(value, list):
            return [x for v in value for x in flat(v)]
        return [value]

    objective = DPO2DConfig(normalize="mean1", dpo_weight=1.0)
    want = tables.results(objective, token_logps=True)
    assert len(flat(want)) > 500
    for options in (
        {"row_length": 10_000},  # all in one
        {"batch_rows": 3},
        {"batch_rows": 16, "row_length": 150},  # more rows than there are
    ):
        got = tables.results(objective, token_logps=True, **options)
        assert [result["index"] for result in got] == list(range(len(want)))
        assert flat(got) == pytest.approx(flat(want), abs=1e-5)


# --- what is refused --------------------------------------------------------------


def config(scene: Scene, directory: Path, found: list[Any], **options: Any) -> Any:
    data = synthetic.write_jsonl(directory / "data.jsonl", found)
    values = {"model": str(scene.model), "data": str(data)}
    values["out"] = str(directory / "out.jsonl")
    return ScoreConfig(**{**values, **options})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"chosen_segments": None}, "data.jsonl:2: field chosen_segments is missing"),
        ({"chosen": 3}, "data.jsonl:2: field chosen: expected a text or a list"),
        (
            {"chosen_segments": [segment(0, 3, 5, 1)]},
            r"chosen_segments\[0\].scores.correctness: got 5.*expected 0 to",
        ),
    ],
)
def test_records_that_cannot_be_scored(
    scene, tmp_path, monkeypatch, change, match
) -> None:
    monkeypatch.setattr(load_lib, "load", None)  # refused before weights are read
    found = [scene.records[0], {**scene.records[1], **change}]
    with pytest.raises(UserError, match=match):
        score_lib.score(config(scene, tmp_path, found))
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_options_that_cannot_be_met(scene, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(load_lib, "load", None)

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            score_lib.score(config(scene, tmp_path, scene.records, **options))

    weights = {"helpfulnes": 1.0}
    refused(
        "names the aspect 'helpfulnes'.*Did you mean helpfulness",
        objective=DPO2DConfig(aspect_weights=weights),
    )
    refused("is not an ordinary file", out=str(tmp_path))
    refused("is no adapter", adapter=str(tmp_path))
    refused("is no directory", reference=str(tmp_path / "absent"))
    refused("batch_rows must be a positive multiple", batch_rows=0)
    refused("row_length must be at least 2: got 1", row_length=1)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_reference_of_a_smaller_vocabulary(scene, make_llama, tmp_path) -> None:
    small = make_llama(vocab_size=250)
    match = "the tokenizer gives the token 2[5-9][0-9], but the model .* has 250"
    with pytest.raises(UserError, match=match):
        score_lib.score(config(scene, tmp_path, scene.records, reference=str(small)))


def test_a_row_that_is_too_short(tables, scene, tmp_path) -> None:
    longest = int(tables.data.lengths.max())
    tables.results(PairwiseConfig(), row_length=longest)
    with pytest.raises(UserError, match=f"takes {longest} places.*has {longest - 1}"):
        tables.results(PairwiseConfig(), row_length=longest - 1)
    # Nothing half-written is left.
    (tmp_path / "out.jsonl").write_text("an earlier result")
    with pytest.raises(UserError, match="places"):
        score_lib.score(config(scene, tmp_path, scene.records, row_length=9))
    assert (tmp_path / "out.jsonl").read_text() == "an earlier result"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_out_that_cannot_be_written(scene, tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        score_lib.score(
            config(scene, tmp_path, scene.records, out=str(tmp_path / "file" / "out"))
        )

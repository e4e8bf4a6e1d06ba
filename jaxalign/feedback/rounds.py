"""RLAIF: rounds of sample, decompose, judge, pair, train and gate.

Each stage ends with a file that appears whole, and is not done again where that file is
there. What takes long inside a stage goes on from where it was: sampling line by line,
judging call by call (the store), training from its newest checkpoint. So a run that is
killed at any moment and begun again repeats no finished work and ends with the same
adapter.

Files::

    OUT/rlaif.yaml           the config
        store.db             every judgement
        gate/<policy>.jsonl  held-out prompts completed by a policy, and _judged.jsonl
        round-<n>/           from 1
            samples.jsonl    as ``jaxalign generate`` writes it
            judged.jsonl     candidates with scores, segments, units, failures
            pairs.jsonl      feedback records        pairing.json  what was dropped
            run/             the training run        adapter/      what it trained
            gate.json        accepted or not, and why
        export/              the adapter of the last accepted round
        report.html
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxalign import progress
from jaxalign.checkpoints import contents, fastest
from jaxalign.configs import read_yaml
from jaxalign.data import rows
from jaxalign.data.images import NamedPictures
from jaxalign.errors import UserError
from jaxalign.feedback import (
    candidates,
    gate,
    gate_metrics,
    pairing,
    round_adapters,
)
from jaxalign.feedback.candidates import JudgedPrompt
from jaxalign.feedback.config import RLAIFConfig
from jaxalign.feedback.decompose.decomposition import Decompose
from jaxalign.feedback.gate import Decision
from jaxalign.feedback.gate_config import GateConfig
from jaxalign.feedback.round_adapters import adapter_of, policy_name
from jaxalign.feedback.round_options import (
    decomposer_of,
    gate_decomposer_of,
    store_path,
)
from jaxalign.feedback.round_prompts import (
    benign_of,
    check_prompts,
    references_of,
    with_benign,
)
from jaxalign.functions import identity
from jaxalign.generation.files import GenerateConfig, generate_file
from jaxalign.judging.judge import Judge, hash_of
from jaxalign.judging.make import Function, given_judge, make_judge
from jaxalign.judging.openai import OpenAIJudge
from jaxalign.judging.store import Store, StoredPair
from jaxalign.objectives.options import ObjectiveConfig
from jaxalign.objectives.own import LossOfPairs, as_config
from jaxalign.objectives.record import Objective
from jaxalign.training import publish, run_directory
from jaxalign.training.preemption import Preemption
from jaxalign.training.run import train
from jaxalign.whole_file import write_lines, write_text


__all__ = [
    "CONFIG",
    "GATE_VOTE",
    "decomposer_of",
    "rlaif",
    "store_path",
]

CONFIG = "rlaif.yaml"

_FREE = (
    "out",
    "rounds",
    "store",
    *(f"judge.{name}" for name in ("concurrency", "timeout", "max_attempts")),
    *(f"judge.{name}" for name in ("max_wait", "max_requests", "max_total_tokens")),
    *(f"judge.{name}" for name in ("max_cost", "prompt_price", "completion_price")),
    *(f"judge.{name}" for name in ("base_url", "key_variable", "response_format")),
    "judge.max_reply_tokens",
)
"""Changing these changes no verdict, or only whether one can be had (what mends a judge
whose replies cannot be read); more rounds go on behind the last."""

_GATE_SEED = 2**31
GATE_VOTE = 1_000_000
"""Number of the judge's first vote on the gate: another seed than in the rounds."""


class _Run:
    """What all rounds share."""

    def __init__(
        self,
        config: RLAIFConfig,
        out: Path,
        store: Store,
        judge: Judge | None,
        decomposer: Decompose | None,
        pictures: NamedPictures,
    ):
        self.config, self.out, self.store = config, out, store
        self.pictures = pictures
        self.judge = judge or make_judge(config.judge, load_image=pictures.load)
        self.gate_judge = self.judge
        if config.gate.judge_model is not None:
            other = dataclasses.replace(config.judge, model=config.gate.judge_model)
            self.gate_judge = make_judge(other, load_image=pictures.load)
            if isinstance(self.judge, OpenAIJudge):
                assert isinstance(self.gate_judge, OpenAIJudge)
                self.gate_judge.budget = self.judge.budget  # one for the run
        self.decompose = decomposer or decomposer_of(config)
        self.gate_decompose = gate_decomposer_of(config, decomposer)
        self.benign = benign_of(config)
        self.references = {
            name: references_of(name, config.decomposer.name == "hops")
            for name in (config.prompts, config.gate.prompts)
        }


def rlaif(
    config: RLAIFConfig,
    *,
    judge: Judge | Function | None = None,
    decomposer: Decompose | None = None,
    objective: Objective | LossOfPairs | ObjectiveConfig | None = None,
    preemption: Preemption | None = None,
    pictures: NamedPictures | None = None,
) -> Path:
    """Run all rounds, or what is left of them; in a notebook too.

    An object in the place of an option is known, when the run goes on, by its name and
    code (a Judge by its settings); what a closure holds only the caller can know.

    Args:
      config: of the run. For a function as the judge it has ``judge=JudgeConfig(
        name="python", aspects=(...))``.
      judge: a Judge, or a function ``judge(requests) -> replies``, plain or ``async``
        (see ``jaxalign.judging.function``); default that of ``config.judge``.
      decomposer: what is asked of a candidate, see ``decompose.decomposition``;
        default that of ``config.decomposer``.
      objective: a loss of one's own that every round trains with, as ``setup`` takes
        it; default ``config.objective``.
      preemption: SIGTERM, if it is to be caught.
      pictures: names the prompts' pictures. The judge of the options and a function
        look at them; a Judge does that was made with ``load_image=pictures.load``.
    Returns:
      The directory of the run.
    Raises:
      UserError: something the user gave is wrong; before anything is computed.
      Preempted: SIGTERM came; all is saved.
    Example::

      options = JudgeConfig(name="python", aspects=("brevity",))
      gate = GateConfig(prompts="held_out.jsonl")
      files = {"model": "smollm2", "prompts": "prompts.jsonl", "out": "rounds"}
      rlaif(RLAIFConfig(judge=options, gate=gate, **files), judge=judge)
    """
    if objective is not None:
        config = dataclasses.replace(config, objective=as_config(objective))
    try:
        return _rlaif(
            config, judge, decomposer, preemption, pictures or NamedPictures()
        )
    except OSError as error:
        raise UserError(
            f"a file of the run {config.out} cannot be read or written: {error}. What "
            "is finished stays: make room, and the same command goes on from there"
        ) from None


def _rlaif(
    config: RLAIFConfig,
    given: Judge | Function | None,
    decomposer: Decompose | None,
    preemption: Preemption | None,
    pictures: NamedPictures,
) -> Path:
    shown = check_prompts(config, pictures)
    judge = given_judge(config.judge, given, load_image=pictures.load)
    if judge is not None and config.gate.judge_model is not None:
        raise UserError(
            "gate.judge_model does nothing where the judge is given as an object: "
            f"got {config.gate.judge_model}"
        )
    kept = fastest.kept_in(Path(config.out) / CONFIG)
    dtype = fastest.resolve(config.dtype, config.model, kept=kept)
    config = dataclasses.replace(config, dtype=dtype)
    sources = {
        "model": contents.fingerprint(config.model),
        "prompts": rows.fingerprint(config.prompts),
        "gate prompts": rows.fingerprint(config.gate.prompts),
    }
    if shown is not None:
        sources["prompts' pictures"] = shown
    if judge is not None:
        sources["judge"] = hash_of(judge.settings)
    if decomposer is not None:
        sources["decomposer"] = hash_of(identity(decomposer))
    with run_directory.claim(
        config,
        sources,
        name=CONFIG,
        free=_FREE,
        before=_kept,
    ) as out:
        with Store(store_path(config)) as store:
            run = _Run(config, out, store, judge, decomposer, pictures)
            policy: int | None = None
            for number in range(1, config.rounds + 1):
                if _round(run, number, policy, preemption).accepted:
                    policy = number
            round_adapters.export(adapter_of(out, policy), out)
    return out


def _kept(out: Path) -> dict[str, Any]:
    """Return a run's config; before risks were graded, they were counted."""
    values = read_yaml(out / CONFIG)
    decomposer = values.get("decomposer", {})
    if decomposer.get("name") == "risks":
        decomposer.setdefault("score", "count")
    return values


def _round(
    run: _Run, number: int, policy: int | None, preemption: Preemption | None
) -> Decision:
    """Do a round, or what is left of it."""
    config, here = run.config, run.out / f"round-{number}"
    decided = here / "gate.json"
    if decided.is_file():
        return gate.decision_of(json.loads(decided.read_text(encoding="utf-8")))
    progress.say(f"round {number} of {config.rounds}, from {policy_name(policy)}")
    here.mkdir(exist_ok=True)
    adapter = adapter_of(run.out, policy)
    samples = _sample(config, config.prompts, adapter, here / "samples.jsonl", number)
    judged = _judge(run, config.prompts, samples, here / "judged.jsonl")
    if not _pair(run, judged, here):
        decision = gate.decide([], [], min_improvement=config.gate.min_improvement)
        decision = decision._replace(reason="no pair of candidates to train on")
    else:
        _train(config, here, number, adapter, preemption)
        before = _gate(run, policy, adapter)
        after = _gate(run, number, here / "adapter")
        decision = _decide(config.gate, before, after)
    found = {"round": number, "from": policy_name(policy), **gate.to_dict(decision)}
    write_text(decided, json.dumps(found, indent=2) + "\n")
    verb = "accepted" if decision.accepted else "REJECTED"
    gained = decision.improvement
    figures = "" if gained is None else f", {gained:+.4f} on {decision.prompts} prompts"
    progress.say(f"round {number} is {verb}: {decision.reason}{figures}")
    return decision


def _decide(
    config: GateConfig, before: list[JudgedPrompt], after: list[JudgedPrompt]
) -> Decision:
    if config.metrics is None:
        least = config.min_improvement
        return gate.decide(before, after, min_improvement=least)
    options = {"tolerance": config.tolerance}
    return gate_metrics.decide(before, after, config.metrics, **options)


def _sample(
    config: RLAIFConfig,
    prompts: str,
    adapter: Path | None,
    out: Path,
    number: int,
    **options: Any,
) -> Path:
    """Complete prompts; the file appears when it is complete."""
    part = out.with_name(f".{out.name}.part")
    if not out.exists():
        progress.say(f"sampling: {out}")
        generate_file(
            GenerateConfig(
                model=config.model,
                adapter=None if adapter is None else str(adapter),
                data=prompts,
                image_dir=config.image_dir,
                max_pixels=config.max_pixels,
                out=str(part),
                chat_template_kwargs=config.chat_template_kwargs,
                dtype=config.dtype,
                quantize=config.quantize,
                mesh=config.mesh,
                **config.generation.sampling(seed=config.seed + number, **options),
            )
        )
        part.rename(out)
    part.with_name(f"{part.name}.settings.json").unlink(missing_ok=True)
    return out


def _judge(
    run: _Run, prompts: str, samples: Path, out: Path, *, gate: bool = False
) -> list[JudgedPrompt]:
    """Judge what was sampled, in a round or for the gate."""
    if not out.exists():
        found = candidates.read_samples(
            samples,
            run.config.segmenter,
            run.references[prompts],
            image_dir=rows.image_base(prompts, run.config.image_dir),
            pictures=run.pictures,
        )
        judged = candidates.judge_candidates(
            with_benign(found, run.benign) if gate else found,
            run.gate_decompose if gate else run.decompose,
            run.gate_judge if gate else run.judge,
            run.store,
            votes=run.config.judge.votes,
            first_vote=GATE_VOTE if gate else 0,
            what=f"judging {out.parent.name}",
        )
        write_text(out, candidates.to_lines(judged))
    return candidates.from_lines(out)


def _pair(run: _Run, judged: list[JudgedPrompt], here: Path) -> int:
    """Write the records of a round and return how many."""
    out = here / "pairs.jsonl"
    if not out.exists():
        asked = run.config.pairing
        options = dataclasses.replace(asked, seed=asked.seed + run.config.seed)
        found, statistics = pairing.pair(candidates.scored(judged), options)
        run.store.add_pairs(_pair_of(record) for record in found)
        text = json.dumps(statistics.to_dict(), indent=2)
        write_text(here / "pairing.json", text + "\n")
        write_lines(out, found)
        progress.say(f"{len(found)} pairs of {statistics.responses} candidates: {out}")
    return out.read_text(encoding="utf-8").count("\n")


def _pair_of(record: Mapping[str, Any]) -> StoredPair:
    return StoredPair(
        candidates.as_judged(record),
        record["chosen"],
        record["rejected"],
        record["chosen_score"] - record["rejected_score"],
    )


def _train(
    config: RLAIFConfig,
    here: Path,
    number: int,
    adapter: Path | None,
    preemption: Preemption | None,
) -> None:
    """Train on the records of a round; the adapter's directory appears whole."""
    if (here / "adapter").exists():
        return
    progress.say(f"training: {here / 'run'}")
    data, out, policy = here / "pairs.jsonl", here / "run", adapter and str(adapter)
    options = config.train_config(str(data), str(out), number, policy)
    # The pictures' paths are those of the prompts that the pairs are made of.
    base = rows.image_base(config.prompts, config.image_dir)
    options = dataclasses.replace(options, image_dir=base and str(base))
    run = train(options, preemption=preemption)
    round_adapters.whole(
        here / "adapter", lambda part: publish.publish_run(run, part, form="peft")
    )


def _gate(run: _Run, policy: int | None, adapter: Path | None) -> list[JudgedPrompt]:
    """Have a policy complete the held-out prompts, and judge that."""
    config, name = run.config, policy_name(policy)
    folder = run.out / "gate"
    folder.mkdir(exist_ok=True)
    samples = _sample(
        config,
        config.gate.prompts,
        adapter,
        folder / f"{name}.jsonl",
        _GATE_SEED,
        num_samples=config.gate.num_samples,
    )
    judged = folder / f"{name}_judged.jsonl"
    return _judge(run, config.gate.prompts, samples, judged, gate=True)

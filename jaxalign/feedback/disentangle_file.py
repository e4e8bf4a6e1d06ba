"""From a file of prompts to a file of the risks in them."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxalign import event_loops, shards
from jaxalign.configs import check_fields
from jaxalign.data import layouts, records
from jaxalign.data.images import NamedPictures
from jaxalign.data.record_images import as_json
from jaxalign.data.records import Prompt
from jaxalign.errors import UserError
from jaxalign.feedback.decompose import risks
from jaxalign.feedback.disentangle import (
    Observed,
    PromptRisks,
    RiskQuestions,
    candidate_of,
    disentangle_async,
    joined,
)
from jaxalign.feedback.judge_file import begin_part, check_apart
from jaxalign.judging.asking import Usage
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.estimate import Estimate, KnownVerdicts, estimate
from jaxalign.judging.judge import Judge, JudgeRequest
from jaxalign.judging.make import Function, given_judge, make_judge
from jaxalign.judging.store import Store
from jaxalign.whole_file import whole


__all__ = [
    "DisentangleConfig",
    "DisentangleReport",
    "disentangle_file",
    "estimate_disentangling",
    "expected_risks",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DisentangleConfig:
    """Looking for the risks in a file of prompts.

    Attributes:
      data: prompts, one object a line, ``{"prompt": text or messages}``, with
        ``images`` where it shows pictures.
      out: JSON Lines file to write, one object a prompt, in order.
      layout: of the rows, see ``jaxalign.data.layouts``; default what their columns
        say.
      image_dir: where relative paths of pictures start; default beside the data file.
        Paths are written as they are: OUT is read with the same directory.
      verify: have each observation checked, whether the content can do this harm.
      max_observations: a pass with a longer list is a failed reply.
      judge: who observes and verifies: an endpoint, a checkpoint in this process that
        writes (``judge.name local``, ``judge.method json``) or a function.
        ``judge.votes`` is how often the verifier is asked.
      store: SQLite file that keeps every reply; default ``OUT.store.db``.
      shard: ``i/n``: look at part i (from 0) of n of the prompts alone, every n-th;
        ``jaxalign join`` makes one file of the parts.
    Raises:
      UserError: the judge does not write, or an option is out of range.

    >>> judge = JudgeConfig(name="openai", model="m")
    >>> files = {"data": "prompts.jsonl", "out": "observations.jsonl"}
    >>> DisentangleConfig(judge=judge, **files).store_path.name
    'observations.jsonl.store.db'
    """

    data: str
    out: str
    judge: JudgeConfig
    store: str | None = None
    layout: str | None = None
    image_dir: str | None = None
    verify: bool = True
    max_observations: int = risks.MAX_OBSERVATIONS
    shard: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        layouts.check_name(self.layout)
        shards.parse(self.shard)
        judge = self.judge
        judge.check_writes("disentangling has the judge write what it observes")
        if judge.aspects is not None:
            raise UserError(
                "judge.aspects does nothing here, where no segment is scored: leave it "
                "out"
            )
        if judge.votes > 1 and not self.verify:
            raise UserError(
                f"judge.votes {judge.votes} does nothing with verify false: votes are "
                "taken on the verifier's answers alone. Leave one of the two out"
            )
        if self.max_observations < 1:
            raise UserError(
                f"max_observations must be at least 1: got {self.max_observations}"
            )

    @property
    def store_path(self) -> Path:
        """Where the store is."""
        return Path(self.store or f"{self.out}.store.db")


class DisentangleReport(NamedTuple):
    """What disentangling a file came to."""

    prompts: int
    requests: int
    asked: int
    """Requests that the store did not know."""
    observations: int
    verified: int
    rejected: int
    unanswered: int
    """Observations that the verifier gave no answer on."""
    failed_passes: int
    failed_prompts: int
    """Prompts with such a pass."""
    prompt_tokens: int
    completion_tokens: int
    cost: float


def disentangle_file(
    config: DisentangleConfig, judge: Judge | Function | None = None
) -> DisentangleReport:
    """Look for the risks in every prompt of a file, and write them whole or not at all.

    What the store knows is not asked again; what failed before is.

    Args:
      config: files and options.
      judge: default that of ``config.judge``; see
        :func:`jaxalign.feedback.disentangle.disentangle`.
    Raises:
      UserError: something that was given is wrong, or the judge or the store stops the
        run; what was answered stays in the store and the same call goes on from there.
    Example::

      files = {"data": "prompts.jsonl", "out": "observations.jsonl"}
      options = JudgeConfig(name="openai", model="gpt-4o-mini")
      disentangle_file(DisentangleConfig(judge=options, **files)).rejected
    """
    out = Path(config.out)
    check_apart(out, config.data, config.store_path)
    pictures = NamedPictures()
    load = pictures.load
    given = given_judge(config.judge, judge, load_image=load)
    prompts = _prompts(config)
    candidates = [candidate_of(prompt, pictures) for prompt in prompts.values()]
    asked = given or make_judge(config.judge, load_image=load)
    looks = {"verify": config.verify, "max_observations": config.max_observations}
    begin_part("disentangle", config, asked, lines=len(prompts), **looks)
    usage = Usage()
    with Store(config.store_path) as store:
        work = disentangle_async(candidates, asked, store, _questions(config), usage)
        found = event_loops.run(work)
    kept = "all replies are in the store and the same command writes them"
    with whole(out, kept) as file:
        for (index, prompt), one in zip(prompts.items(), found, strict=True):
            file.write(_line(index, prompt, one) + "\n")
    return _report(found, usage)


def estimate_disentangling(config: DisentangleConfig) -> Estimate:
    """Return what disentangling a file would take; nothing is sent and nothing written.

    What a pass will see is not known before it is asked: one risk is taken to be in
    the words of each prompt, and one more in its pictures where it has some.

    Raises:
      UserError: the prompts, the judge's options or the store cannot be read.
    Example::

      judge = JudgeConfig(model="gpt-4o-mini", prompt_price=0.15)
      files = {"data": "prompts.jsonl", "out": "observations.jsonl"}
      estimate_disentangling(DisentangleConfig(judge=judge, **files)).calls
    """
    prompts = [*_prompts(config).values()]
    expected = expected_risks(config, prompts, NamedPictures())
    requests = (request for asked, _ in expected for request in asked)
    return estimate(config.judge, requests, config.store_path)


def _questions(config: DisentangleConfig) -> RiskQuestions:
    judge = config.judge
    bound = config.max_observations
    return RiskQuestions(config.verify, judge.votes, bound, judge.own_wording)


def _prompts(config: DisentangleConfig) -> dict[int, Prompt]:
    """Return the prompts that are looked at, by their place in the file."""
    folder = config.image_dir
    found = records.read_prompts(config.data, config.layout, image_dir=folder)
    rows = (shards.parse(config.shard) or shards.WHOLE).rows(len(found))
    return {row: found[row] for row in rows}


def expected_risks(
    config: DisentangleConfig, prompts: Sequence[Prompt], pictures: NamedPictures
) -> Iterator[tuple[list[JudgeRequest], PromptRisks]]:
    """Yield what would be asked of each prompt, and what would be seen in it.

    What the store does not know is taken to be, see :func:`estimate_disentangling`.

    Args:
      config: files and options.
      prompts: those of the data.
      pictures: names these.
    Raises:
      UserError: a picture or the store cannot be read.
    Example::

      prompts = records.read_prompts(config.data)
      for requests, found in expected_risks(config, prompts, NamedPictures()):
          print(len(requests), found.observations)
    """
    questions = _questions(config)
    known = KnownVerdicts(config.judge, config.store_path)
    with contextlib.closing(known):
        for prompt in prompts:
            candidate = candidate_of(prompt, pictures)
            looks = questions.observe(candidate)
            look = {name: known.verdict([r], items=1) for name, r in looks.items()}
            asked, observed = [*looks.values()], []
            for one, names in joined(look).items():
                verified = None
                if questions.verify:
                    votes = questions.confirm(candidate, one)
                    asked += votes
                    verified = known.verdict(votes, items=1).value["answer"] == "yes"
                observed.append(Observed(one, names, verified))
            yield asked, PromptRisks(tuple(observed), ())


def _line(index: int, prompt: Prompt, found: PromptRisks) -> str:
    row = {"index": index, "prompt": prompt.given, "images": []}
    return json.dumps(
        {**row, **prompt.image_columns, **found.columns()}, default=as_json
    )


def _report(found: Sequence[PromptRisks], usage: Usage) -> DisentangleReport:
    said = [one.verified for each in found for one in each.observations]
    return DisentangleReport(
        prompts=len(found),
        observations=len(said),
        verified=said.count(True),
        rejected=said.count(False),
        unanswered=said.count(None),
        failed_passes=sum(len(one.failed) for one in found),
        failed_prompts=sum(bool(one.failed) for one in found),
        **dataclasses.asdict(usage),
    )

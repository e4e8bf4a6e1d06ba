"""What the judge of a file, or of all rounds of RLAIF, would have to be asked.

Of rounds that are still to be sampled nothing is there yet: their candidates are taken
to be as long as they may be (``generation.max_new_tokens``), in sentences of a dozen
words, and the judge to find as many things in one as it has segments. Every round is
taken to be accepted, so that each has a policy of its own for the gate.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.data import records, rows
from jaxalign.data.images import NamedPictures
from jaxalign.feedback import candidates, rounds
from jaxalign.feedback.config import RLAIFConfig
from jaxalign.feedback.decompose.decomposition import Candidate, Judged
from jaxalign.feedback.round_prompts import check_prompts, references_of
from jaxalign.judging import estimate
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.estimate import Estimate, KnownVerdicts, TokenCounter
from jaxalign.judging.judge import JudgeRequest, Verdict


__all__ = ["estimate_rounds"]

_SENTENCE = "This is one of the sentences that an answer is made of. "


class _Set(NamedTuple):
    """Candidates that are judged together."""

    prompts: str
    samples: Path
    """Where they are, or will be."""
    judged: Path
    each: int
    """Candidates of a prompt."""
    gate: bool


def estimate_rounds(config: RLAIFConfig) -> tuple[Estimate, TokenCounter]:
    """Return what the judge would have to be asked for what is left of a run.

    What has been sampled is counted as it is; what is judged is done. The rest see in
    the module. Tokens are counted by the tokenizer of the policy.

    Raises:
      UserError: prompts, tokenizer or store cannot be read, or are no good.
    """
    pictures = NamedPictures()
    check_prompts(config, pictures)
    counter = estimate.token_counter(config.model)
    found = Estimate(0, 0, 0, 0, 0)
    for one in _sets(config):
        if one.judged.is_file():
            continue
        judge = config.judge
        if one.gate and config.gate.judge_model is not None:
            judge = dataclasses.replace(judge, model=config.gate.judge_model)
        store = rounds.store_path(config) if one.samples.is_file() else None
        requests = _requests(config, judge, one, counter, pictures)
        found = found.plus(estimate.estimate(judge, requests, store, counter))
    return found, counter


def _sets(config: RLAIFConfig) -> Iterator[_Set]:
    out = Path(config.out)
    for number in range(1, config.rounds + 1):
        here = out / f"round-{number}"
        samples, judged = here / "samples.jsonl", here / "judged.jsonl"
        count = config.generation.num_samples
        yield _Set(config.prompts, samples, judged, count, gate=False)
    for name in ("base", *(f"round-{n}" for n in range(1, config.rounds + 1))):
        samples, judged = (out / "gate" / f"{name}{e}.jsonl" for e in ("", "_judged"))
        count = config.gate.num_samples
        yield _Set(config.gate.prompts, samples, judged, count, gate=True)


def _requests(
    config: RLAIFConfig,
    judge: JudgeConfig,
    one: _Set,
    counter: TokenCounter,
    pictures: NamedPictures,
) -> Iterator[JudgeRequest]:
    """Yield all that would be asked about a set's candidates."""
    decompose = rounds.decomposer_of(config)
    references = references_of(one.prompts, config.decomposer.name == "hops")
    path = rounds.store_path(config)
    known = KnownVerdicts(judge, path if one.samples.is_file() else None)
    first = rounds.GATE_VOTE if one.gate else 0
    try:
        for candidate in _candidates(config, one, references, counter, pictures):
            so_far: list[list[Verdict]] = []
            while not isinstance(now := decompose(candidate, so_far), Judged):
                asked = [candidates.votes_on(r, judge.votes, first) for r in now]
                yield from itertools.chain.from_iterable(asked)
                so_far.append([known.verdict(v, len(candidate.spans)) for v in asked])
    finally:
        known.close()


def _candidates(
    config: RLAIFConfig,
    one: _Set,
    references: Sequence[tuple[str, ...]],
    counter: TokenCounter,
    pictures: NamedPictures,
) -> Iterator[Candidate]:
    """Yield what was sampled, or else what could be."""
    base = rows.image_base(one.prompts, config.image_dir)
    seen: Any = {"image_dir": base, "pictures": pictures}
    if one.samples.is_file():
        for sampled in candidates.read_samples(
            one.samples, config.segmenter, references, **seen
        ):
            yield from sampled.candidates
        return
    sentences = config.generation.max_new_tokens // counter.tokens(_SENTENCE) or 1
    text = (_SENTENCE * sentences).strip()
    prompts = records.read_prompts(one.prompts, image_dir=config.image_dir)
    for prompt, known in zip(prompts, references, strict=True):
        line = {"index": 0, "prompt": prompt.given, "completions": [{"text": text}]}
        line |= prompt.image_columns
        (sampled,) = candidates.parse_samples([line], config.segmenter, [known], **seen)
        (candidate,) = sampled.candidates
        for _ in range(one.each):
            yield candidate

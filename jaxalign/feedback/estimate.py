"""What the judge of a file, or of all rounds of RLAIF, would have to be asked.

Of rounds that are still to be sampled nothing is there yet: their candidates are taken
to be as long as they may be (``generation.max_new_tokens``), in sentences of a dozen
words, and the judge to find as many things in one as it has segments; one risk in the
words of a prompt, and one in its pictures, each of them real. Every round is taken to
be accepted, so that each has a policy of its own for the gate.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from jaxalign.data import records, rows
from jaxalign.data.images import NamedPictures
from jaxalign.feedback import candidates
from jaxalign.feedback.config import RLAIFConfig
from jaxalign.feedback.decompose.decomposition import Candidate, Judged
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
from jaxalign.feedback.rounds import GATE_VOTE
from jaxalign.judging import estimate
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.estimate import Estimate, KnownVerdicts, TokenCounter
from jaxalign.judging.judge import JudgeRequest, Verdict, request_key


__all__ = ["estimate_rounds"]

_Requests: TypeAlias = dict[str, JudgeRequest]

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
    of_prompts: dict[bool, _Requests] = {False: {}, True: {}}
    for one in _sets(config):
        if one.judged.is_file():
            continue
        store = store_path(config) if one.samples.is_file() else None
        requests = _requests(config, one, counter, pictures, of_prompts[one.gate])
        judge = _judge_of(config, one.gate)
        found = found.plus(estimate.estimate(judge, requests, store, counter))
    for gate, asked in of_prompts.items():
        judge, store = _judge_of(config, gate), store_path(config)
        more = estimate.estimate(judge, asked.values(), store, counter)
        found = found.plus(more)
    return found, counter


def _judge_of(config: RLAIFConfig, gate: bool) -> JudgeConfig:
    if not gate or config.gate.judge_model is None:
        return config.judge
    return dataclasses.replace(config.judge, model=config.gate.judge_model)


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
    one: _Set,
    counter: TokenCounter,
    pictures: NamedPictures,
    of_prompts: _Requests,
) -> Iterator[JudgeRequest]:
    """Yield all that would be asked about a set's candidates.

    What is asked of a prompt's risks, once for all rounds, goes to ``of_prompts``.
    """
    decompose = gate_decomposer_of(config) if one.gate else decomposer_of(config)
    judge = _judge_of(config, one.gate)
    known = KnownVerdicts(judge, store_path(config))
    first = GATE_VOTE if one.gate else 0
    risks = config.decomposer.name == "risks"
    try:
        for candidate in _candidates(config, one, counter, pictures):
            so_far: list[list[Verdict]] = []
            while not isinstance(now := decompose(candidate, so_far), Judged):
                asked = [candidates.votes_on(r, judge.votes, first) for r in now]
                for vote in itertools.chain.from_iterable(asked):
                    if risks and not vote.subject.response:
                        of_prompts[request_key(vote, {})] = vote
                    else:
                        yield vote
                many = [_items(votes[0], candidate) for votes in asked]
                replies = map(known.verdict, asked, many)
                so_far.append([*replies])
    finally:
        known.close()


def _items(request: JudgeRequest, candidate: Candidate) -> int:
    """Return how many things a reply is taken to list, where their number is open."""
    return 1 if request.task == "observations" else len(candidate.spans)


def _candidates(
    config: RLAIFConfig,
    one: _Set,
    counter: TokenCounter,
    pictures: NamedPictures,
) -> Iterator[Candidate]:
    """Yield what was sampled, or else what could be."""
    references = references_of(one.prompts, config.decomposer.name == "hops")
    benign = benign_of(config) if one.gate else [None] * len(references)
    base = rows.image_base(one.prompts, config.image_dir)
    seen: Any = {"image_dir": base, "pictures": pictures}
    if one.samples.is_file():
        found = candidates.read_samples(
            one.samples, config.segmenter, references, **seen
        )
        for sampled in with_benign(found, benign):
            yield from sampled.candidates
        return
    sentences = config.generation.max_new_tokens // counter.tokens(_SENTENCE) or 1
    text = (_SENTENCE * sentences).strip()
    prompts = records.read_prompts(one.prompts, image_dir=config.image_dir)
    for prompt, known, mark in zip(prompts, references, benign, strict=True):
        line = {"index": 0, "prompt": prompt.given, "completions": [{"text": text}]}
        line |= prompt.image_columns
        made = candidates.parse_samples([line], config.segmenter, [known], **seen)
        (sampled,) = with_benign(made, [mark])
        (candidate,) = sampled.candidates
        for _ in range(one.each):
            yield candidate

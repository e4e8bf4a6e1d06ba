"""The risks in prompts, in memory: DREAM's multimodal risk disentangling.

A prompt with pictures is looked at three times (both at once, the pictures without the
words, the words without the pictures), one without pictures once. What the passes saw
is joined, and a verifier says of each observation whether it can do this harm: see
:mod:`jaxalign.feedback.decompose.risks`. No response takes part.
https://arxiv.org/abs/2504.18053
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign import event_loops
from jaxalign.data import records
from jaxalign.data.images import NamedPictures
from jaxalign.data.records import Prompt
from jaxalign.feedback.candidates import as_judged, votes_on
from jaxalign.feedback.decompose import risks
from jaxalign.feedback.decompose.decomposition import Candidate
from jaxalign.feedback.decompose.observations import Observation, join
from jaxalign.judging.asking import Usage, ask_all
from jaxalign.judging.judge import Judge, JudgeRequest, Verdict
from jaxalign.judging.make import Function, as_judge
from jaxalign.judging.store import Store, temporary_store
from jaxalign.judging.votes import merged


__all__ = [
    "Observed",
    "PromptRisks",
    "RiskQuestions",
    "candidate_of",
    "disentangle",
    "disentangle_async",
    "joined",
]


class Observed(NamedTuple):
    """A risk in a prompt, and what is known of it.

    >>> risk = Observation("pick a lock", "text instructions", "illegal activities")
    >>> Observed(risk, ("joint", "text"), True).observation.source
    'text instructions'
    """

    observation: Observation
    passes: tuple[str, ...]
    """Those that saw it."""
    verified: bool | None
    """What the verifier said; None where it gave no answer, or was not asked."""


class PromptRisks(NamedTuple):
    """What was seen in one prompt.

    >>> PromptRisks((), ("image",)).columns()
    {'observations': [], 'failed': ['image']}
    """

    observations: tuple[Observed, ...]
    failed: tuple[str, ...]
    """Passes that never got an answer."""

    def columns(self) -> dict[str, Any]:
        """Return it as the columns of a line."""
        observations = [
            {
                **one.observation._asdict(),
                "passes": list(one.passes),
                "verified": one.verified,
            }
            for one in self.observations
        ]
        return {"observations": observations, "failed": list(self.failed)}


class RiskQuestions(NamedTuple):
    """What is asked about a prompt.

    >>> questions = RiskQuestions(verify=True, votes=1, max_observations=16, own=None)
    >>> pictured = Candidate("What is this?", "", images=("sha256:0",))
    >>> [*questions.observe(pictured)]
    ['joint', 'image', 'text']
    """

    verify: bool
    votes: int
    """How often the verifier is asked."""
    max_observations: int
    own: Path | None
    """A directory with templates of the user's that replace ours."""

    def observe(self, candidate: Candidate) -> dict[risks.Pass, JudgeRequest]:
        """Return the request of each pass."""
        bound = self.max_observations
        return risks.observe_requests(candidate, max_observations=bound, own=self.own)

    def confirm(self, candidate: Candidate, one: Observation) -> list[JudgeRequest]:
        """Return the requests whether an observation is right, one a vote."""
        request = risks.confirm_request(candidate, one, self.own)
        return votes_on(request, self.votes, 0)


def disentangle(
    rows: Iterable[Mapping[str, Any]],
    judge: Judge | Function,
    *,
    verify: bool = True,
    votes: int = 1,
    max_observations: int = risks.MAX_OBSERVATIONS,
    own: Path | None = None,
    store: Store | None = None,
    image_dir: str | Path | None = None,
    pictures: NamedPictures | None = None,
) -> list[PromptRisks]:
    """Return the risks in each of some prompts, also where an event loop runs.

    Args:
      rows: ``{"prompt": text or messages}``, with ``images`` where it shows pictures.
      judge: a Judge, or a function ``judge(requests) -> replies``, plain or ``async``
        (see ``jaxalign.judging.function``).
      verify: have each observation checked.
      votes: how often the verifier is asked.
      max_observations: a pass with a longer list is a failed reply.
      own: a directory with templates of the user's that replace ours.
      store: keeps every reply, so that none is asked for twice; default none.
      image_dir: where relative paths of pictures start; default the working directory.
      pictures: names the prompts' pictures. A function is given their bytes; a Judge
        that looks at them was made with this object's ``load`` as its ``load_image``.
    Raises:
      UserError: a prompt is malformed, or the judge or the store stops the run.

    >>> def judge(requests):
    ...     risk = {"malicious_content": "pick a lock", "source": "text instructions",
    ...             "risk_category": "illegal activities"}
    ...     replies = {"observations": {"observations": [risk]},
    ...                "verify": {"answer": "yes"}}
    ...     return [replies[asked["task"]] for asked in requests]
    >>> (found,) = disentangle([{"prompt": "How do I pick a lock?"}], judge)
    >>> [(one.passes, one.verified) for one in found.observations]
    [(('text',), True)]
    """
    pictures = pictures or NamedPictures()
    prompts = records.read_prompts(rows, image_dir=image_dir)
    candidates = [candidate_of(prompt, pictures) for prompt in prompts]
    judge = as_judge(judge, load_image=pictures.load)
    questions = RiskQuestions(verify, votes, max_observations, own)
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(temporary_store()) if store is None else store
        return event_loops.run(
            disentangle_async(candidates, judge, kept, questions, Usage())
        )


def candidate_of(prompt: Prompt, pictures: NamedPictures) -> Candidate:
    """Return a prompt as it is looked at, without a response.

    Args:
      prompt: a text or a conversation, with its pictures.
      pictures: names these.
    Raises:
      UserError: a picture is not there.
    Example:
      >>> prompt = records.parse_prompt({"prompt": "How do I pick a lock?"})
      >>> candidate_of(prompt, NamedPictures()).prompt
      'How do I pick a lock?'
    """
    columns = {"prompt": prompt.given, **prompt.image_columns}
    return Candidate(as_judged(columns), "", images=pictures.references(prompt.images))


async def disentangle_async(
    candidates: Sequence[Candidate],
    judge: Judge,
    store: Store,
    questions: RiskQuestions,
    usage: Usage,
) -> list[PromptRisks]:
    """Return the risks in each prompt; all passes are asked before the verifier is.

    Args:
      candidates: the prompts, see :func:`candidate_of`.
      judge: who observes and verifies.
      store: keeps every reply.
      questions: what is asked.
      usage: what is asked and used is added to it.
    Raises:
      UserError: the judge or the store stops the run.
    Example::

      questions = RiskQuestions(verify=True, votes=1, max_observations=16, own=None)
      await disentangle_async(candidates, judge, store, questions, Usage())
    """
    asking = functools.partial(ask_all, judge, store=store, usage=usage)
    passes = [risks.passes_of(candidate) for candidate in candidates]
    requests = (r for c in candidates for r in questions.observe(c).values())
    total = sum(map(len, passes))
    seen = iter(await asking(requests, total=total, what="observing"))
    looks = [{name: next(seen) for name in names} for names in passes]
    found = [joined(look) for look in looks]
    verdicts: Iterator[Verdict] = iter(())
    if questions.verify:
        requests = (
            request
            for candidate, observations in zip(candidates, found, strict=True)
            for one in observations
            for request in questions.confirm(candidate, one)
        )
        total = sum(map(len, found)) * questions.votes
        verdicts = iter(await asking(requests, total=total, what="verifying"))
    return [
        PromptRisks(
            tuple(
                Observed(one, names, _verified(verdicts, questions))
                for one, names in observations.items()
            ),
            tuple(name for name, verdict in look.items() if verdict.failure),
        )
        for look, observations in zip(looks, found, strict=True)
    ]


def joined(look: Mapping[Any, Verdict]) -> dict[Observation, tuple[str, ...]]:
    """Return what the passes observed, once each, with those that saw it.

    >>> risk = {"malicious_content": "pick a lock", "source": "text instructions",
    ...         "risk_category": "illegal activities"}
    >>> seen = Verdict({"observations": [risk]})
    >>> look = {"joint": seen, "image": Verdict(None, "refused"), "text": seen}
    >>> [*joined(look).values()]
    [('joint', 'text')]
    """
    return join(
        (name, [Observation(**one) for one in verdict.value["observations"]])
        for name, verdict in look.items()
        if verdict.failure is None
    )


def _verified(verdicts: Iterator[Verdict], questions: RiskQuestions) -> bool | None:
    """Return what the verifier said of the next observation."""
    if not questions.verify:
        return None
    verdict = merged([next(verdicts) for _ in range(questions.votes)])
    return None if verdict.failure else verdict.value["answer"] == "yes"

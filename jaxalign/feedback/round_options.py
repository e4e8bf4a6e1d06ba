"""What a run's options stand for: its store, and what of a candidate is judged."""

from pathlib import Path

from jaxalign.feedback import gate_metrics
from jaxalign.feedback.config import RLAIFConfig
from jaxalign.feedback.decompose import claims, hops, risks, segments
from jaxalign.feedback.decompose.decomposition import Decompose
from jaxalign.objectives.objective import needs


__all__ = ["decomposer_of", "gate_decomposer_of", "store_path"]


def store_path(config: RLAIFConfig) -> Path:
    """Return where a run keeps its judgements.

    >>> from jaxalign.feedback.config import GateConfig
    >>> from jaxalign.judging.config import JudgeConfig
    >>> judge = JudgeConfig(name="python", aspects=("brevity",))
    >>> files = {"model": "smollm2", "prompts": "prompts.jsonl", "out": "rounds"}
    >>> gate = GateConfig(prompts="held_out.jsonl")
    >>> store_path(RLAIFConfig(judge=judge, gate=gate, **files)).as_posix()
    'rounds/store.db'
    """
    return Path(config.store or Path(config.out) / "store.db")


def decomposer_of(config: RLAIFConfig) -> Decompose:
    """Return what the options ask of a candidate.

    Raises:
      UserError: an aspect without a rubric, for a judge that needs one.
    Example:
      >>> from jaxalign.feedback.config import GateConfig
      >>> from jaxalign.feedback.decompose.decomposition import Candidate
      >>> from jaxalign.judging.config import JudgeConfig
      >>> judge = JudgeConfig(name="python", aspects=("brevity",))
      >>> files = {"model": "smollm2", "prompts": "prompts.jsonl", "out": "rounds"}
      >>> gate = GateConfig(prompts="held_out.jsonl")
      >>> decompose = decomposer_of(RLAIFConfig(judge=judge, gate=gate, **files))
      >>> candidate = Candidate("2 + 2?", "4", spans=((0, 1),))
      >>> [asked.task for asked in decompose(candidate, [])]
      ['scores']
    """
    own = config.judge.own_wording
    match config.decomposer.name:
        case "segments":
            judge = config.judge
            return segments.decomposer(
                judge.scored_aspects,
                own=own,
                needs_rubrics=judge.needs_rubrics,
                renders=judge.renders,
            )
        case "claims":
            return claims.decomposer(own=own)
        case "risks":
            weight = config.decomposer.global_weight
            return risks.decomposer(
                score=config.decomposer.score or "graded",
                global_weight=0.5 if weight is None else weight,
                segments=needs(config.objective).segments,
                own=own,
            )
        case "hops":
            return hops.decomposer(own=own)


def gate_decomposer_of(
    config: RLAIFConfig, decompose: Decompose | None = None
) -> Decompose:
    """Return what is asked of a completion of the gate's prompts.

    Args:
      config: of the run.
      decompose: what is asked of a candidate, where the caller gave it; asked of the
        gate's completions too, unless metrics take its place.
    Example:
      >>> from jaxalign.feedback.config import GateConfig
      >>> from jaxalign.feedback.decompose.decomposition import Candidate
      >>> from jaxalign.judging.config import JudgeConfig
      >>> files = {"model": "smollm2", "prompts": "prompts.jsonl", "out": "rounds"}
      >>> gate = GateConfig(prompts="held_out.jsonl", metrics={"effective": "higher"})
      >>> config = RLAIFConfig(judge=JudgeConfig(model="m"), gate=gate, **files)
      >>> [asked.task for asked in gate_decomposer_of(config)(Candidate("?", "!"), [])]
      ['label']
    """
    if config.gate.metrics is None:
        return decompose or decomposer_of(config)
    return gate_metrics.decomposer(config.gate.metrics, own=config.judge.own_wording)

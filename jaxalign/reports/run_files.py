"""What the report of an RLAIF run is made from: the finished files of its rounds."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.errors import UserError
from jaxalign.feedback import candidates
from jaxalign.feedback.candidates import JudgedPrompt
from jaxalign.feedback.config import RLAIFConfig
from jaxalign.feedback.decompose.decomposition import Judged
from jaxalign.feedback.gate import Decision, decision_of
from jaxalign.training import metrics


__all__ = ["BASE", "Round", "Run", "judged_of", "read"]

BASE = "base"
"""The policy before all rounds."""


class Round(NamedTuple):
    """One round, decided."""

    number: int
    origin: str
    """The policy that it began with."""
    judged: list[JudgedPrompt]
    """The candidates that it sampled."""
    pairing: Mapping[str, Any]
    """As of ``Statistics.to_dict``."""
    pairs: frozenset[tuple[str, str]]
    """Texts of its records, the chosen one first."""
    steps: Mapping[int, Mapping[str, Any]]
    """Metrics of its training; empty if there was none."""
    decision: Decision

    @property
    def name(self) -> str:
        """What the policy that it made is called."""
        return f"round-{self.number}"

    @property
    def compared(self) -> bool:
        """Whether it trained a policy that the gate then looked at."""
        return self.decision.prompts + self.decision.failed > 0


class Run(NamedTuple):
    """A run whose rounds are all decided."""

    config: RLAIFConfig
    rounds: list[Round]
    held_out: dict[str, list[JudgedPrompt]]
    """By policy, its judged completions of the gate's prompts."""

    @property
    def accepted(self) -> list[Round]:
        """Those that the gate let pass."""
        return [one for one in self.rounds if one.decision.accepted]

    @property
    def policy(self) -> str:
        """The policy that the run ends with."""
        return self.accepted[-1].name if self.accepted else BASE


def read(out: Path, config: RLAIFConfig) -> Run:
    """Read the files of a finished run.

    Raises:
      UserError: one that its rounds have written is gone, or was changed.
    """
    rounds = [_round(out, number) for number in range(1, config.rounds + 1)]
    names = {name for one in rounds if one.compared for name in (one.origin, one.name)}
    held_out = {
        name: candidates.from_lines(_needed(out / "gate" / f"{name}_judged.jsonl"))
        for name in sorted(names)
    }
    return Run(config, rounds, held_out)


def judged_of(prompts: list[JudgedPrompt]) -> Iterator[Judged]:
    """Yield what the judge made of each candidate."""
    for one in prompts:
        yield from one.judged


def _round(out: Path, number: int) -> Round:
    here = out / f"round-{number}"
    gate = json.loads(_needed(here / "gate.json").read_text(encoding="utf-8"))
    lines = _needed(here / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return Round(
        number,
        gate["from"],
        candidates.from_lines(_needed(here / "judged.jsonl")),
        json.loads(_needed(here / "pairing.json").read_text(encoding="utf-8")),
        frozenset((record["chosen"], record["rejected"]) for record in records),
        metrics.read(here / "run" / "metrics.jsonl"),
        decision_of(gate),
    )


def _needed(path: Path) -> Path:
    if not path.is_file():
        raise UserError(
            f"{path} is gone, and the report is made from it. Put it back, or remove "
            "the round's directory to run that round again"
        )
    return path

"""What the comparisons with other libraries share: fresh processes in turn, one table.

A *side* is one library in one setting. It is a script that takes ``--out FILE`` and
writes a JSON object there: ``rate`` (what it does a second), ``peak_gb``, ``error``
(mean |difference| of a token's log-probability from float32, only where
``--error_pairs`` asked for it), ``logp`` (the mean log-probability of a token: all
sides must agree, else they do not compute the same thing) and ``versions``.

Standard library alone: sides run in environments that have little in common.
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""Flags of a CPU that decide which dtype it multiplies fastest."""

MULTIPLY_BF16 = ("amx_bf16", "avx512_bf16")
NO_UNITS = (
    f"the CPU has none of {', '.join(MULTIPLY_BF16)}: torch's bfloat16 is many times "
    "slower than its float32 there (--without_units runs it all the same)"
)

CONTENDS = 0.8
"""A peer's setting this close to its best in the first round runs again."""

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Side:
    """One library in one setting.

    Attributes:
      name: in the table.
      kind: whose it is, ``ours`` or the peer's name.
      command: without ``--out``.
      skip: why it cannot run here, if it cannot.
      once: whether the first round is enough, as for a side that is far behind.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    skip: str = ""
    once: bool = False


def script(name: str, *arguments: object, python: str = sys.executable) -> tuple:
    """Return the command that runs a script of this folder."""
    return (python, str(HERE / name), *map(str, arguments))


def cpu_flags() -> frozenset[str]:
    """Return what the first core can do, by /proc/cpuinfo."""
    return frozenset(_cpu("flags").split())


def _cpu(field: str) -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = (line.partition(":") for line in lines)
    return next((text.strip() for name, _, text in found if name.strip() == field), "")


def multiplies_bf16() -> bool:
    """Tell whether the CPU has units for products of bfloat16 that torch uses."""
    return not cpu_flags().isdisjoint(MULTIPLY_BF16)


def peak_gb() -> float:
    """Return this process's peak of resident memory, in 10^9 bytes.

    ``VmHWM`` starts afresh with the program; ``ru_maxrss`` survives exec, and would
    count what the caller held.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise OSError("/proc/self/status has no VmHWM")


def head_line(results: Iterable[Result]) -> str:
    """Say on which machine and with which versions the results came about."""
    flags = cpu_flags()
    units = ", ".join(unit for unit in UNITS if unit in flags) or "none of these"
    found: dict[str, str] = {"python": platform.python_version()}
    for result in results:
        for package, its in result.get("versions", {}).items():
            if its not in found.setdefault(package, its).split(" and "):
                found[package] += f" and {its}"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    versions = ", ".join(f"{name} {its}" for name, its in found.items())
    return (
        f"{_cpu('model name')} ({units}), {len(os.sched_getaffinity(0))} cores; "
        f"commit {commit or 'unknown'}; {versions}."
    )


def run_side(command: Sequence[str]) -> Result | str:
    """Run a side in a fresh process; return what it measured, or why it could not."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        done = subprocess.run(
            [*command, "--out", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode == 0 and out.is_file():
            return json.loads(out.read_text(encoding="utf-8"))
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"exit {done.returncode}: {said[-1] if said else 'no word'}"


def alternate(
    sides: Sequence[Side], rounds: int, *, first: Sequence[str] = ()
) -> tuple[dict[str, list[Result]], dict[str, str]]:
    """Run the sides in turn, so that a slow minute of the machine falls on all.

    Every side runs in the first round. In the others all of ours do, and of a peer
    those that came within ``CONTENDS`` of its best: the rest cannot be its best.

    Args:
      sides: in the order of a round.
      rounds: how often.
      first: more arguments in the first round, for what need not be done twice.
    Returns:
      The results of each side, and for those without why.
    """
    results: dict[str, list[Result]] = {}
    skipped = {side.name: side.skip for side in sides if side.skip}
    for number in range(rounds):
        best = best_rates(sides, results)
        for side in sides:
            if side.name in skipped:
                continue
            if number and not _contends(side, results, best):
                continue
            found = run_side([*side.command, *(first if number == 0 else ())])
            if isinstance(found, str):
                skipped[side.name] = found
                print(f"{side.name}: {found}", file=sys.stderr, flush=True)
                continue
            results.setdefault(side.name, []).append(found)
            print(
                f"round {number + 1}, {side.name}: {found['rate']:.3f} a second, "
                f"{found['peak_gb']:.2f} GB",
                file=sys.stderr,
                flush=True,
            )
    return results, {n: why for n, why in skipped.items() if n not in results}


def _contends(
    side: Side, results: Mapping[str, list[Result]], best: Mapping[str, float]
) -> bool:
    if side.kind == "ours":
        return True
    return not side.once and rate(results[side.name]) >= CONTENDS * best[side.kind]


def rate(runs: Sequence[Result]) -> float:
    """Return the median rate of a side's runs."""
    return statistics.median(run["rate"] for run in runs)


def best_rates(
    sides: Sequence[Side], results: Mapping[str, list[Result]]
) -> dict[str, float]:
    """Return the best median rate of every kind that ran."""
    best: dict[str, float] = {}
    for side in sides:
        if side.name in results:
            best[side.kind] = max(best.get(side.kind, 0.0), rate(results[side.name]))
    return best


def fastest(
    sides: Sequence[Side], results: Mapping[str, list[Result]], kind: str
) -> Side | None:
    """Return the fastest side of a kind by the median of its runs, None without any."""
    ran = [side for side in sides if side.kind == kind and side.name in results]
    return max(ran, key=lambda side: rate(results[side.name]), default=None)


def table(
    sides: Sequence[Side],
    results: Mapping[str, list[Result]],
    skipped: Mapping[str, str],
    *,
    unit: str,
    peer: str,
) -> str:
    """Lay the results out, the best of every kind in bold.

    Args:
      sides: in the order of the rows.
      results: of :func:`alternate`.
      skipped: of :func:`alternate`.
      unit: of the rate.
      peer: the kind whose best is 1 ×, in rate and in memory.
    """
    ours, theirs = (fastest(sides, results, kind) for kind in ("ours", peer))
    bold = {
        side.name
        for kind in {side.kind for side in sides}
        if (side := fastest(sides, results, kind)) is not None
    }
    lines = [
        f"| | runs | {unit} | from – to | × best {peer} | peak GB | × its memory | "
        "error, nats a token | log-prob. a token |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for side in sides:
        if side.name in skipped:
            lines.append(f"| {side.name} | – | | | | | | | |")
            continue
        lines.append(
            _row(
                f"**{side.name}**" if side.name in bold else side.name,
                results[side.name],
                None if theirs is None else results[theirs.name],
            )
        )
    if ours is not None and theirs is not None:
        mine, other = results[ours.name], results[theirs.name]
        lines += [
            "",
            f"Best against best: {ours.name} does {rate(mine) / rate(other):.2f} × the "
            f"{unit} of {theirs.name} in {_peak(mine) / _peak(other):.2f} × its "
            "memory.",
        ]
    if skipped:
        lines += ["", *(f"Left out: {name}: {why}." for name, why in skipped.items())]
    return "\n".join(lines)


def _peak(runs: Sequence[Result]) -> float:
    return max(run["peak_gb"] for run in runs)


def _row(name: str, runs: Sequence[Result], best: Sequence[Result] | None) -> str:
    rates = sorted(run["rate"] for run in runs)
    chosen = {run["chosen"] for run in runs if run.get("chosen")}
    ratios = ("", "")
    if best is not None:
        ratios = (
            f"{rate(runs) / rate(best):.2f}",
            f"{_peak(runs) / _peak(best):.2f}",
        )
    cells = (
        f"{name} ({', '.join(sorted(chosen))})" if chosen else name,
        str(len(runs)),
        f"{rate(runs):.3g}",
        f"{rates[0]:.3g} – {rates[-1]:.3g}",
        ratios[0],
        f"{_peak(runs):.2f}",
        ratios[1],
        _first(runs, "error", ".2g"),
        _first(runs, "logp", ".4f"),
    )
    return f"| {' | '.join(cells)} |"


def _first(runs: Sequence[Result], key: str, form: str) -> str:
    """Show what only the first run had to find out."""
    found = [run[key] for run in runs if run.get(key) is not None]
    return format(found[0], form) if found else ""

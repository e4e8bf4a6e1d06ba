"""Small pictures as inline SVG, each with its figures in words beside it."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxalign.reports.page import escape


__all__ = ["Bins", "Step", "bar", "count", "gate_picture", "histogram", "signed"]

_BARS = 12
_NEAR = 1e-9


class Bins(NamedTuple):
    """Where the bars of a histogram stand."""

    low: float
    """Lower end of the first bar."""
    width: float
    bars: int
    exact: bool
    """Whether a bar stands for one value, its centre."""

    @classmethod
    def of(cls, values: Sequence[float], *, ends: Sequence[float] = ()) -> "Bins":
        """Return one bar for each value where they lie on a grid, else equal widths.

        Args:
          values: finite.
          ends: values that have their place even if they do not occur.
        """
        every = [*values, *ends]
        low, high = (min(every), max(every)) if every else (0.0, 1.0)
        for width in (1.0, 0.5):
            bars = round((high - low) / width) + 1
            even = all(abs(v / width - round(v / width)) < _NEAR for v in every)
            if even and bars <= _BARS:
                return cls(low - width / 2, width, bars, True)
        if high - low < _NEAR:
            return cls(low - 0.5, 1.0, 1, True)
        return cls(low, (high - low) / _BARS, _BARS, False)

    def shares(self, values: Sequence[float]) -> list[float]:
        """Return the share of the values in each bar; of none 0."""
        counts = [0] * self.bars
        for value in values:
            place = math.floor((value - self.low) / self.width + _NEAR)
            counts[min(max(place, 0), self.bars - 1)] += 1
        return [n / max(1, len(values)) for n in counts]

    def name(self, bar: int) -> str:
        """Return what a bar stands for."""
        start = self.low + bar * self.width
        if self.exact:
            return f"{_plain(start + self.width / 2):g}"
        return f"{_plain(start):.3g} to {_plain(start + self.width):.3g}"

    @property
    def ends(self) -> tuple[str, str]:
        """What is written below the first and the last bar."""
        shift = self.width / 2 if self.exact else 0.0
        high = self.low + self.bars * self.width
        return f"{_plain(self.low + shift):.3g}", f"{_plain(high - shift):.3g}"


def histogram(values: Sequence[float], bins: Bins, top: float) -> str:
    """Draw shares as bars, and the mean as a line.

    Args:
      values: at least one.
      bins: of all histograms that are to be compared.
      top: the share that is as high as the picture.
    """
    shares = bins.shares(values)
    width, height, floor = 168, 74, 58
    each = (width - 8) / bins.bars
    mean = math.fsum(values) / len(values)
    bars = "".join(
        f"<rect x='{4 + i * each + each * 0.08:.1f}' y='{floor - h:.1f}' "
        f"width='{each * 0.84:.1f}' height='{h:.1f}' class='bar'>"
        f"<title>{bins.name(i)}: {share:.1%}</title></rect>"
        for i, share in enumerate(shares)
        for h in [(floor - 6) * share / top]
    )
    at = 4 + each * (mean - bins.low) / bins.width
    low, high = bins.ends
    ends = f"<text x='4' y='{height - 3}'>{_minus(low)}</text>"
    if bins.bars > 1:
        ends += (
            f"<text x='{width - 4}' y='{height - 3}' text-anchor='end'>"
            f"{_minus(high)}</text>"
        )
    said = ", ".join(
        f"{bins.name(i)}: {share:.0%}" for i, share in enumerate(shares) if share
    )
    return (
        f"<svg class='histogram' viewBox='0 0 {width} {height}' font-size='11' "
        f"role='img' aria-label='{escape(said)}'>{bars}"
        f"<line x1='4' x2='{width - 4}' y1='{floor}' y2='{floor}' class='axis'/>"
        f"<line x1='{at:.1f}' x2='{at:.1f}' y1='2' y2='{floor}' class='mean'/>"
        f"{ends}</svg>"
    )


class Step(NamedTuple):
    """What the gate found of one round, as a step from one policy to another."""

    origin: int
    """Place of the policy that it began with; 0 is the base model."""
    before: float
    after: float
    error: float | None
    """Standard error of the difference."""
    accepted: bool


def gate_picture(
    names: Sequence[str],
    steps: Sequence[Step | None],
    what: str = "mean held-out score",
) -> str:
    """Draw what the gate looks at of each policy, and the way to it.

    Args:
      names: of the policies, the base model's first.
      steps: of each policy but the first; None where nothing could be compared.
      what: is looked at.
    """
    made = [step for step in steps if step is not None]
    if not made:
        return ""
    ends = [
        value
        for step in made
        for e in [step.error or 0.0]
        for value in (step.before, step.after - e, step.after + e)
    ]
    low, high = min(ends), max(ends)
    pad = (high - low) * 0.12 or 0.5
    low, high = low - pad, high + pad
    wide, height, left, floor = 96, 245, 54, 190
    width = left + wide * len(names)

    def x(place: int) -> float:
        return left + wide * (place + 0.5)

    def y(value: float) -> float:
        return 12 + (floor - 12) * (1 - (value - low) / (high - low))

    parts = [
        f"<line x1='{left}' x2='{width - 8}' y1='{y(v):.1f}' y2='{y(v):.1f}' "
        f"stroke='var(--line)'/><text x='{left - 8}' y='{y(v) + 4:.1f}' "
        f"text-anchor='end'>{signed(v, 3, plus='')}</text>"
        for v in (low + pad, (low + high) / 2, high - pad)
    ]
    parts.append(_dot(x(0), y(made[0].before), True))
    for place, step in enumerate(steps, 1):
        if step is not None:
            parts.append(_step(step, x(step.origin), x(place), y))
    verdicts = ["", *("no comparison" if s is None else _word(s) for s in steps)]
    gains = ["", *("" if s is None else signed(s.after - s.before) for s in steps)]
    parts += [
        f"<text x='{x(i):.1f}' y='{floor + 18}' text-anchor='middle' class='name'>"
        f"{escape(name)}</text><text x='{x(i):.1f}' y='{floor + 33}' "
        f"text-anchor='middle'>{verdict}</text><text x='{x(i):.1f}' "
        f"y='{floor + 48}' text-anchor='middle'>{gain}</text>"
        for i, (name, verdict, gain) in enumerate(
            zip(names, verdicts, gains, strict=True)
        )
    ]
    said = "; ".join(
        f"{name}: {step.before:.3f} to {step.after:.3f}, {_word(step)}"
        for name, step in zip(names[1:], steps, strict=True)
        if step is not None
    )
    return (
        f"<svg viewBox='0 0 {width} {height}' style='max-width: {width * 1.2:.0f}px; "
        f"min-width: {width * 0.8:.0f}px' "
        f"font-size='12' fill='var(--mute)' role='img' aria-label='{what} by policy: "
        f"{escape(said)}'>{''.join(parts)}</svg>"
    )


def _step(step: Step, start: float, at: float, y: Callable[[float], float]) -> str:
    top, middle = y(step.after + (step.error or 0.0)), y(step.after)
    bottom = y(step.after - (step.error or 0.0))
    dashes = "" if step.accepted else " stroke-dasharray='5 4'"
    whiskers = "".join(
        f"<line x1='{at - 6:.1f}' x2='{at + 6:.1f}' y1='{end:.1f}' y2='{end:.1f}' "
        "class='error'/>"
        for end in (top, bottom)
    )
    return (
        f"<line x1='{start:.1f}' x2='{at:.1f}' y1='{y(step.before):.1f}' "
        f"y2='{middle:.1f}' class='way'{dashes}/>"
        f"<line x1='{at:.1f}' x2='{at:.1f}' y1='{top:.1f}' y2='{bottom:.1f}' "
        f"class='error'/>{whiskers}{_dot(at, middle, step.accepted)}"
    )


def _dot(x: float, y: float, filled: bool) -> str:
    kind = "taken" if filled else "refused"
    return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5.5' class='{kind}'/>"


def _word(step: Step) -> str:
    return "accepted" if step.accepted else "rejected"


def bar(share: float) -> str:
    """Draw a share of 1 as the length of a bar."""
    return f"<span class='share'><span style='width: {share:.1%}'></span></span>"


def signed(value: float, digits: int = 3, *, plus: str = "+") -> str:
    """Return a number with its sign, a real minus.

    >>> signed(-0.25, 2), signed(0.5, 1, plus="")
    ('−0.25', '0.5')
    """
    return f"{_plain(value):{plus}.{digits}f}".replace("-", "−")


def count(number: int, what: str) -> str:
    """Return a number with what it counts.

    >>> count(1, "prompt"), count(1200, "prompt")
    ('1 prompt', '1,200 prompts')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _plain(value: float) -> float:
    """Return a number without noise, and zero without a sign."""
    return round(value, 9) + 0.0


def _minus(text: str) -> str:
    return text.replace("-", "−")

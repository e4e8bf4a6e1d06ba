"""What the user sees while work goes on: bars in a terminal, plain lines in a file."""

import contextlib
import datetime
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import rich.console
import rich.progress


__all__ = ["TrainingDisplay", "counting", "reading", "say", "say_once", "track"]

T = TypeVar("T")

console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)

_PLAIN_SECONDS = 10.0
_BIG = 10**8  # bytes that are worth a bar


def say(text: str) -> None:
    """Print a line about the work (to standard error)."""
    console.print(text, markup=False)


@functools.cache
def say_once(text: str) -> None:
    """Print a line that one reading of is enough for, however often it is called."""
    say(text)


def _bar(*extra: rich.progress.ProgressColumn) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        *extra,
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
    )


def track(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield the items and show how far it is, at what rate and until when."""
    if console.is_terminal:
        with _bar() as bar:
            yield from bar.track(items, total=total, description=what)
        return
    begin = shown = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - shown > _PLAIN_SECONDS:
            shown = now
            rate = done / (now - begin)
            left = _duration((total - done) / rate)
            say(f"{what}: {done}/{total}, {rate:.1f}/s, {left} left")
    say(f"{what}: {done} in {time.monotonic() - begin:.1f} s")


@contextlib.contextmanager
def reading(what: str) -> Iterator[Callable[[int, int], None]]:
    """Give what shows (bytes read, bytes in all): a bar, or a line now and then.

    Nothing for less than 100 MB; in a file nothing for what takes less than 10 s.
    """
    with contextlib.ExitStack() as stack:
        bar: rich.progress.Progress | None = None
        begin = shown = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal bar, shown
            if total < _BIG:
                return
            if console.is_terminal:
                if bar is None:
                    bar = stack.enter_context(_bytes_bar())
                    bar.add_task(what, total=total)
                bar.update(bar.task_ids[0], completed=done)
                return
            now = time.monotonic()
            if now - shown > _PLAIN_SECONDS and done:
                shown = now
                rate = done / (now - begin)
                left = _duration((total - done) / rate)
                say(
                    f"{what}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, "
                    f"{rate / 1e6:.0f} MB/s, {left} left"
                )

        yield show


@contextlib.contextmanager
def counting(
    what: str, total: int, unit: str, start: int = 0
) -> Iterator[Callable[[int, int], None]]:
    """Give what shows (items done, units so far): a bar, or a line every ten seconds.

    Args:
      what: is done.
      total: items.
      unit: of what an item consists of; its rate is shown.
      start: items that were done before.
    """
    begin = shown = time.monotonic()
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_bar()) if console.is_terminal else None
        task = None if bar is None else bar.add_task(what, total=total, completed=start)

        def show(done: int, units: int) -> None:
            nonlocal shown
            now = time.monotonic()
            rate = units / max(now - begin, 1e-9)
            if bar is not None and task is not None:
                text = f"{what} ({rate:.0f} {unit}/s)"
                bar.update(task, completed=done, description=text)
            elif now - shown > _PLAIN_SECONDS:
                shown = now
                left = ""
                if done > start:
                    seconds = (now - begin) / (done - start) * (total - done)
                    left = f", {_duration(seconds)} left"
                say(f"{what}: {done}/{total}, {units} {unit}, {rate:.1f}/s{left}")

        yield show


def _bytes_bar() -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
    )


class TrainingDisplay:
    """Shows the steps of a run. Use as a context."""

    def __init__(self, total: int, start: int = 0):
        self.total = total
        self.first = start
        self.begin = time.monotonic()
        self.bar = _bar() if console.is_terminal else None

    def __enter__(self) -> "TrainingDisplay":
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("training", total=self.total)
            self.bar.update(self.task, completed=self.first)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show a logged step."""
        parts = [f"step {step}/{self.total}"]
        for name, label, form in (
            ("loss", "loss", ".4f"),
            ("rewards/accuracies", "accuracy", ".2f"),
            ("rewards/margins", "margin", ".4f"),
            ("segments/accuracy", "segment accuracy", ".3f"),
            ("grad_norm", "grad norm", ".2f"),
            ("perf/pairs_per_second", "pairs/s", ".2f"),
            ("memory/peak_gb", "peak GB", ".2f"),
        ):
            for prefix, note in (("", ""), ("eval_", "eval ")):
                if prefix + name in values:
                    parts.append(f"{note}{label} {values[prefix + name]:{form}}")
        done = step - self.first
        if done > 0 and step < self.total:
            left = (time.monotonic() - self.begin) / done * (self.total - step)
            parts.append(f"{_duration(left)} left")
        if self.bar is not None:
            self.bar.update(self.task, completed=step)
        say("  ".join(parts))


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))

"""The one error that is the user's to mend."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator


__all__ = ["UserError", "did_you_mean", "naming_flags"]

_FLAG = re.compile(r"(?<![\w=-])--(?=[a-z])")
_SPEAKERS: list[None] = []
"""As many as commands are running in this process."""


class UserError(ValueError):
    """Something the user gave is wrong: a file, a record, an option.

    The text says what is wrong, what was got, what was expected and how to mend it.
    The command line prints it without a traceback and exits with 2.

    Texts are written with the flags of the command line, which a command shows; who
    called from Python reads the same names as arguments. Commands that are told whole,
    in backquotes, stay as they are.

    >>> print(UserError("--out o is there. See `jaxalign export --help`"))
    out o is there. See `jaxalign export --help`
    """

    def __str__(self) -> str:
        """Return the text in the words of who reads it."""
        text = super().__str__()
        if _SPEAKERS:
            return text
        parts = text.split("`")
        parts[::2] = [_FLAG.sub("", part) for part in parts[::2]]
        return "`".join(parts)


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """Have errors name flags, as long as a command runs."""
    _SPEAKERS.append(None)
    try:
        yield
    finally:
        _SPEAKERS.pop()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence naming the known names nearest to ``name``.

    >>> did_you_mean("chosen_segment", ["prompt", "chosen", "chosen_segments"])
    'Did you mean chosen_segments, chosen?'
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"Did you mean {', '.join(near)}?"
    return f"Known: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."

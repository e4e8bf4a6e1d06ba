"""The one error that is the user's to mend."""

import difflib
from collections.abc import Iterable


__all__ = ["UserError", "did_you_mean"]


class UserError(ValueError):
    """Something the user gave is wrong: a file, a record, an option.

    The text says what is wrong, what was got, what was expected and how to mend it.
    The command line prints it without a traceback and exits with 2.
    """


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

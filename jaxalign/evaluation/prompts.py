"""What tasks ask, in words: files that people may edit.

A prompt is a Markdown file with places ``{{name}}``. Ours lie in
``evaluation/templates``; a directory of one's own (``--prompts DIR``) may hold
replacements of the same names. What is asked is part of a request's key, so another
wording is another question.
"""

from collections.abc import Mapping
from pathlib import Path

from jaxalign.errors import UserError, did_you_mean
from jaxalign.judging import wording


__all__ = ["prompt"]

_HERE = Path(__file__).parent / "templates"


def prompt(name: str, values: Mapping[str, str], own: Path | None = None) -> str:
    """Return a prompt with its places filled.

    Values are put in once and never searched for places themselves.

    Args:
      name: of the file, without ``.md``.
      values: of its places.
      own: directory with replacements of ours.
    Raises:
      UserError: there is no such file, or it has a place without a value.
    Example:
      >>> prompt("chinese_simpleqa", {"question": "2 + 2?"})
      '2 + 2?'
    """
    for folder in (own, _HERE):
        if folder is not None and (path := folder / f"{name}.md").is_file():
            break
    else:
        known = {path.stem for path in _HERE.glob("*.md")}
        raise UserError(f"there is no prompt {name!r}. {did_you_mean(name, known)}")

    text = path.read_text(encoding="utf-8").strip()
    return wording.filled(text, values, f"the prompt {path}")

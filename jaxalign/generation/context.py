"""What a model is told before a prompt: a system text, or the risks in each prompt.

A file of observations is what ``jaxalign disentangle`` writes, a line a prompt; they
are DREAM's use of it without training (https://arxiv.org/abs/2504.18053), in words of
ours. Any other file is one system text for all prompts.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.data.record_images import COLUMNS, as_json
from jaxalign.data.records import Message, Prompt
from jaxalign.errors import UserError


__all__ = [
    "fingerprint",
    "observations_text",
    "read_contexts",
    "read_observed",
    "with_context",
]

_BEFORE = """\
Somebody looked at what the user sends and found what may do harm in it:
"""
_AFTER = """
Answer with this in mind. Help with what can be helped with safely, give no help that \
does one of these harms, and say what the risk is where it matters. These remarks are \
not the user's: do not quote them."""


def read_contexts(path: str | Path, prompts: Sequence[Prompt]) -> list[str | None]:
    """Return what stands before each prompt, None where nothing does.

    Args:
      path: of a ``.jsonl`` file of observations, whose lines are these prompts', or of
        a system text.
      prompts: that are to be completed.
    Raises:
      UserError: the file cannot be read, is empty, or belongs to other prompts.
    Example:
      >>> import tempfile
      >>> from jaxalign.data.records import parse_prompt
      >>> path = Path(tempfile.mkdtemp()) / "short.md"
      >>> _ = path.write_text("Answer in one word.")
      >>> read_contexts(path, [parse_prompt({"prompt": "2 + 2?"})])
      ['Answer in one word.']
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return [text for _, text in _observed(path, prompts)]
    return [_text_of(path)] * len(prompts)


def read_observed(
    path: str | Path, prompts: Sequence[Prompt]
) -> list[Mapping[str, Any]]:
    """Read a file of observations, whose lines are these prompts'.

    Args:
      path: of what ``jaxalign disentangle`` wrote.
      prompts: of the data, in its order.
    Raises:
      UserError: it cannot be read, or belongs to other prompts.
    Example::

      read_observed("observations.jsonl", prompts)[0]["observations"]
    """
    return [row for row, _ in _observed(Path(path), prompts)]


def _observed(
    path: Path, prompts: Sequence[Prompt]
) -> list[tuple[Mapping[str, Any], str | None]]:
    """Return the lines of a file of observations, each with its text."""
    lines = _text_of(path).split("\n")
    if len(lines) != len(prompts):
        raise UserError(
            f"--context {path} has {len(lines)} lines for {len(prompts)} prompts: give "
            "the observations that jaxalign disentangle made of this very --data"
        )
    return [
        _of_line(line, prompt, f"--context {path}:{number}")
        for number, (line, prompt) in enumerate(zip(lines, prompts, strict=True), 1)
    ]


def _text_of(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--context {path} cannot be read: {error}. Give a text file, or the "
            "observations that jaxalign disentangle wrote (.jsonl)"
        ) from None
    if not text:
        raise UserError(f"--context {path} is empty: leave it out, or write into it")
    return text


def observations_text(observations: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the system text about a prompt's risks, None where there are none.

    What the verifier rejected is left out; what it gave no answer on is not.

    >>> risk = {"malicious_content": "pick a lock", "source": "text instructions",
    ...         "risk_category": "illegal activities", "verified": True}
    >>> str(observations_text([risk])).splitlines()[1]
    '- text instructions: "pick a lock" (illegal activities)'
    >>> observations_text([{**risk, "verified": False}]) is None
    True
    """
    listed = [
        f"- {one['source']}: {json.dumps(one['malicious_content'], ensure_ascii=False)}"
        f" ({one['risk_category']})"
        for one in observations
        if one.get("verified") is not False
    ]
    return _BEFORE + "\n".join(listed) + _AFTER if listed else None


def with_context(prompt: Prompt, text: str | None) -> Prompt:
    """Return a prompt with a system text before it; what was given stays as it was.

    A conversation's own system message stays, and the text stands behind it in the
    same message, since templates take one. Before a plain text it is a paragraph.

    >>> from jaxalign.data.records import parse_prompt
    >>> turns = [{"role": "user", "content": "2 + 2?"}]
    >>> [t.role for t in with_context(parse_prompt({"prompt": turns}), "Brief.").text]
    ['system', 'user']
    """
    if text is None:
        return prompt
    if isinstance(prompt.text, str):
        return prompt._replace(text=f"{text}\n\n{prompt.text}")
    turns = prompt.text
    if turns and turns[0].role == "system":
        own = turns[0]
        if isinstance(own.content, list):
            first = own.turn()
            parts = [*first["content"], {"type": "text", "text": f"\n\n{text}"}]
            joined = Message(**{**first, "content": parts})
        else:
            joined = Message(**{**own.turn(), "content": f"{own.text}\n\n{text}"})
        return prompt._replace(text=(joined, *turns[1:]))
    return prompt._replace(text=(Message(role="system", content=text), *turns))


def fingerprint(contexts: Sequence[str | None]) -> str:
    """Return what tells what stands before some prompts: a SHA-256 in hexadecimal.

    >>> fingerprint(["Brief."]) == fingerprint(["Long."])
    False
    """
    return hashlib.sha256(json.dumps(list(contexts)).encode()).hexdigest()


def _of_line(
    line: str, prompt: Prompt, where: str
) -> tuple[Mapping[str, Any], str | None]:
    """Return a line of observations, and its text.

    Raises:
      UserError: it is none, or of another prompt.
    """
    try:
        row = json.loads(line)
        given, observations = row["prompt"], row["observations"]
        made = observations_text(observations)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: not as jaxalign disentangle writes it ({error!r}): expected "
            "prompt and observations, each with malicious_content, source and "
            "risk_category"
        ) from None
    asked = {"prompt": prompt.given, **prompt.image_columns}
    asked = json.loads(json.dumps(asked, default=as_json))
    same = all((row.get(k) or None) == (asked.get(k) or None) for k in COLUMNS)
    if given != asked["prompt"] or not same:
        raise UserError(
            f"{where} is of another prompt than {prompt.where}: give the observations "
            "that jaxalign disentangle made of this very --data"
        )
    return row, made

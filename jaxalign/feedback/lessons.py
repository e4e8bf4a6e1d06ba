"""What a teacher is told and asked, a lesson a prompt, before any of it is asked.

A prompt is risky, benign, or neither is known. Its column ``benign`` says so; where it
has none, what :mod:`.disentangle` observed does: nothing, and it is benign. A benign
prompt is answered without the context, and if its row has a ``completion``, that is its
answer and the teacher is not asked.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.data import layouts, records
from jaxalign.data.columns import shown
from jaxalign.data.images import NamedPictures
from jaxalign.data.records import Message, Prompt
from jaxalign.data.rows import image_base
from jaxalign.errors import UserError
from jaxalign.feedback.decompose.observations import Observation
from jaxalign.feedback.disentangle import Observed, PromptRisks
from jaxalign.generation.completions import Sampling
from jaxalign.generation.context import (
    observations_text,
    read_observed,
    with_context,
)
from jaxalign.judging.graders import prose_request
from jaxalign.judging.judge import JudgeRequest, Subject


__all__ = [
    "Lesson",
    "answer_request",
    "check_conversation",
    "read_lessons",
    "read_observations",
    "with_risks",
    "with_system",
]

_NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class Lesson(NamedTuple):
    """A prompt, and what the teacher is to do with it."""

    row: int
    """Of its row, from 0."""
    prompt: Prompt
    """As the student will see it."""
    benign: bool | None
    """Whether there is nothing to be careful about; None where nobody says."""
    own: Any = None
    """The row's own completion, as it stands there."""
    context: str | None = None
    """What the teacher alone is told; None: nothing."""
    observations: tuple[Observation, ...] = ()
    """Risks that its answer has to handle."""
    reason: str | None = None
    """Why nobody is to learn from this prompt; None where nothing speaks against it."""

    @property
    def told(self) -> Prompt:
        """Return the prompt as the teacher sees it."""
        return with_context(self.prompt, self.context)

    @property
    def taken(self) -> bool:
        """Whether the row's own completion is the answer."""
        return bool(self.benign) and self.own is not None

    @property
    def words(self) -> tuple[str, ...]:
        """Return the texts that an answer may repeat: the prompt's, and of its risks.

        What was observed is content of the prompt, be it words in a picture.
        """
        text = self.prompt.text
        turns = (text,) if isinstance(text, str) else tuple(turn.text for turn in text)
        return (*turns, *(one.malicious_content for one in self.observations))

    @property
    def risky(self) -> bool:
        """Whether the prompt is known to be none that is benign."""
        return self.benign is False


def read_lessons(
    source: Any, layout: str | None = None, *, image_dir: str | Path | None = None
) -> list[Lesson]:
    """Return the lessons of a file or of rows, which tell the teacher nothing yet.

    Args:
      source: see :func:`jaxalign.data.records.read`; columns beside ``prompt`` that
        matter are ``images``, ``tools``, ``chat_template_kwargs``, ``benign`` (true or
        false) and ``completion``.
      layout: see :func:`jaxalign.data.records.read`.
      image_dir: where relative paths of pictures start.
    Raises:
      UserError: there is no row, or one is malformed.
    Example:
      >>> rows = [{"prompt": "2 + 2?", "benign": True, "completion": "4"}]
      >>> [lesson.taken for lesson in read_lessons(rows)]
      [True]
    """
    base = image_base(source, image_dir)
    lessons = []
    for index, (columns, where) in enumerate(layouts.read(source, layout)):
        prompt = records.parse_prompt(columns, where, base)
        lessons.append(
            Lesson(index, prompt, _benign(columns, where), _own(columns, where, base))
        )
    if not lessons:
        raise UserError("there is no prompt: expected one JSON object per line")
    return lessons


def _benign(columns: Mapping[str, Any], where: str) -> bool | None:
    given = columns.get("benign")
    if given is not None and given not in (True, False):
        raise UserError(
            f"{where}: field benign: expected true, false or no such field: got "
            f"{shown(given)}"
        )
    return None if given is None else bool(given)


def _own(columns: Mapping[str, Any], where: str, base: Path | None) -> Any:
    """Return a row's own completion, None where it has none.

    Raises:
      UserError: it is no completion.
    """
    if columns.get("completion") is None:
        return None
    kept = {name: columns.get(name) for name in records.PROMPT_COLUMNS}
    row = {"prompt": columns["prompt"], "completion": columns["completion"], **kept}
    records.parse(row, where, base)
    return columns["completion"]


def with_risks(lesson: Lesson, found: PromptRisks) -> Lesson:
    """Return a lesson that tells the teacher what was observed in its prompt.

    What the verifier rejected is left out. Nobody learns from a prompt that a pass
    failed on (what it would have seen is not known), nor from one that is marked as not
    benign and that nothing was observed in.

    Args:
      lesson: of the prompt.
      found: in it.
    Example:
      >>> (lesson,) = read_lessons([{"prompt": "2 + 2?"}])
      >>> with_risks(lesson, PromptRisks((), ())).benign
      True
      >>> with_risks(lesson, PromptRisks((), ("text",))).reason
      'not observed'
    """
    if lesson.benign:
        return lesson
    if found.failed:
        return lesson._replace(reason="not observed")
    listed = [one for one in found.observations if one.verified is not False]
    if not listed:
        if lesson.benign is False:
            return lesson._replace(reason="nothing observed")
        return lesson._replace(benign=True)
    return lesson._replace(
        benign=False,
        context=observations_text(found.columns()["observations"]),
        observations=tuple(one.observation for one in listed),
    )


def with_system(lesson: Lesson, text: str) -> Lesson:
    """Return a lesson that tells the teacher a system text, unless it is benign.

    >>> rows = [{"prompt": "2 + 2?"}, {"prompt": "3 + 3?", "benign": True}]
    >>> [with_system(lesson, "Be brief.").context for lesson in read_lessons(rows)]
    ['Be brief.', None]
    """
    return lesson if lesson.benign else lesson._replace(context=text)


def read_observations(path: str | Path, prompts: Sequence[Prompt]) -> list[PromptRisks]:
    """Read what ``jaxalign disentangle`` wrote of these prompts.

    Args:
      path: of the file.
      prompts: of the data, in its order.
    Raises:
      UserError: it cannot be read, or belongs to other prompts.
    Example::

      read_observations("observations.jsonl", records.read_prompts("prompts.jsonl"))
    """
    found = []
    for number, row in enumerate(read_observed(path, prompts), 1):
        try:
            seen = tuple(
                Observed(
                    Observation(*(str(one[name]) for name in Observation._fields)),
                    tuple(one["passes"]),
                    one["verified"],
                )
                for one in row["observations"]
            )
            found.append(PromptRisks(seen, tuple(row["failed"])))
        except (KeyError, TypeError) as error:
            raise UserError(
                f"--context {path}:{number}: not as jaxalign disentangle writes it "
                f"({error!r}): expected observations with passes and verified, and "
                "failed"
            ) from None
    return found


def check_conversation(lessons: Iterable[Lesson]) -> None:
    """Refuse prompts that cannot be asked of a teacher over chat completions.

    Raises:
      UserError: a plain text shows pictures, or a conversation ends with the
        assistant's turn.
    Example:
      >>> check_conversation(read_lessons([{"prompt": "2 + 2?"}]))
    """
    for lesson in lessons:
        prompt = lesson.prompt
        if lesson.taken:
            continue
        if isinstance(prompt.text, str) and prompt.images:
            raise UserError(
                f"{prompt.where}: a plain text with pictures holds a checkpoint's own "
                "placeholders, which this teacher does not know: give the prompt as "
                "messages, or a checkpoint with --teacher"
            )
        if not isinstance(prompt.text, str) and prompt.text[-1].role == "assistant":
            raise UserError(
                f"{prompt.where}: the prompt ends with the assistant's turn, which "
                "this teacher does not go on with: end it with the user's, or give a "
                "checkpoint with --teacher"
            )


def answer_request(
    lesson: Lesson,
    sampling: Sampling,
    sample: int,
    pictures: NamedPictures,
    *,
    goes_on: bool = False,
) -> JudgeRequest:
    """Return what the teacher is asked.

    Args:
      lesson: the prompt, with what is told before it.
      sampling: how the answer is drawn.
      sample: which of several answers; it is added to the seed.
      pictures: names those of the prompt.
      goes_on: whether the teacher goes on with a plain text (see
        :class:`jaxalign.judging.judge.Expecting`); else that is a user's turn.
    Raises:
      UserError: a picture is not there.
    Example:
      >>> (lesson,) = read_lessons([{"prompt": "2 + 2?"}])
      >>> options = Sampling(max_new_tokens=8)
      >>> answer_request(lesson, options, 0, NamedPictures()).messages
      ({'role': 'user', 'content': '2 + 2?'},)
    """
    told = lesson.told
    names = pictures.references(told.images)
    options: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed + sample,
    }
    options |= {
        name: getattr(sampling, name)
        for name, neutral in _NEUTRAL.items()
        if getattr(sampling, name) != neutral
    }
    if sampling.stop:
        options["stop"] = sampling.stop
    subject = Subject(
        told.text
        if isinstance(told.text, str)
        else tuple(turn.turn() for turn in told.text),
        "",
        images=names,
        template_kwargs=dict(told.template_kwargs) or None,
    )
    if not isinstance(told.text, str):
        left = list(names)
        messages = [_message(turn, left) for turn in told.text]
    else:
        messages = [] if goes_on else [{"role": "user", "content": told.text}]
    return prose_request(messages, subject, options=options)


def _message(turn: Message, left: list[str]) -> dict[str, Any]:
    """Return a turn with the names of its pictures, which are taken from those left."""
    made = turn.turn()
    content = made.get("content")
    if isinstance(content, list):
        made["content"] = [
            {"type": "image_url", "image_url": {"url": left.pop(0)}}
            if part["type"] == "image"
            else part
            for part in content
        ]
    return {**made, "content": made.get("content") or ""}

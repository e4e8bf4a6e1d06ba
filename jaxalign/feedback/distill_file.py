"""From a file of prompts to a file of a teacher's answers that a student learns from.

Beside OUT: ``OUT.store.db`` has every answer and verdict before it counts, so that the
same command goes on after a kill and asks for nothing twice; ``OUT.dropped.jsonl`` has
each other prompt with its reason and its answers; ``OUT.settings.json`` says what OUT
was made with; ``OUT.observations.jsonl`` what ``--context risks`` saw.
"""

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign import event_loops
from jaxalign.checkpoints.renderer import open_renderer
from jaxalign.configs import to_dict
from jaxalign.data import rows, shard_files
from jaxalign.data.images import NamedPictures
from jaxalign.data.record_images import as_json
from jaxalign.errors import UserError
from jaxalign.feedback.disentangle import candidate_of
from jaxalign.feedback.disentangle_file import DisentangleReport, disentangle_file
from jaxalign.feedback.distill import Learnt, distill_async
from jaxalign.feedback.distill_config import RISKS, DistillConfig
from jaxalign.feedback.examining import Examiner
from jaxalign.feedback.judge_file import check_apart
from jaxalign.feedback.lessons import (
    Lesson,
    check_conversation,
    read_lessons,
    read_observations,
    with_risks,
    with_system,
)
from jaxalign.generation.context import read_contexts
from jaxalign.judging import make
from jaxalign.judging.asking import Usage
from jaxalign.judging.endpoint_model import answering_model, endpoint_settings
from jaxalign.judging.judge import Judge
from jaxalign.judging.make import Function
from jaxalign.judging.store import Store
from jaxalign.whole_file import whole, write_text, writing


__all__ = [
    "DistillConfig",
    "DistillReport",
    "distill_file",
    "lessons_of",
    "read_data",
    "teacher_of",
    "teacher_settings",
]

_FREE = (
    *("out", "store", "endpoint", "judge", "batch_slots", "mesh"),
    *("teacher", "adapter", "dtype"),
)
"""Changing these changes no answer, or is seen by what is asked."""


class DistillReport(NamedTuple):
    """What distilling a file came to."""

    prompts: int
    risky: int
    """Records of prompts that are known to be risky."""
    benign: int
    """Records of prompts that are known to be benign."""
    refusals: int
    """Answers to risky prompts that refuse and nothing else."""
    mean_lengths: tuple[float, float]
    """Of answers to risky and to benign prompts, in characters; 0 without any."""
    unbalanced: bool
    """Whether these differ by more than they may."""
    dropped: Mapping[str, int]
    """How many prompts have no record, by the reason."""
    teacher: Usage
    judge: Usage
    """Without what observing took."""
    observed: DisentangleReport | None
    """What observing came to, where it was done on the way."""


def distill_file(
    config: DistillConfig, judge: Judge | Function | None = None
) -> DistillReport:
    """Have a teacher answer every prompt of a file; write what is fit to be learnt.

    Both files are written whole or not at all. What the store knows is not asked again;
    what failed before is.

    Args:
      config: files and options.
      judge: default that of ``config.judge``; see
        :func:`jaxalign.feedback.distill.distill`.
    Raises:
      UserError: something that was given is wrong, before anything is asked; or nothing
        was kept; or teacher, judge or store stop the run, which the same call then goes
        on with.
    Example::

      files = {"data": "prompts.jsonl", "out": "sft.jsonl", "context": "rules.md"}
      distill_file(DistillConfig(teacher="smollm2", **files)).dropped
    """
    for written in (Path(config.out), config.dropped_path):
        for read in (config.data, config.context):
            check_apart(written, read, config.store_path)
    pictures = NamedPictures()
    judge = make.given_judge(config.judge, judge, load_image=pictures.load)
    teacher = teacher_of(config, pictures)
    lessons = read_data(config, pictures)
    if config.context != RISKS:
        lessons = lessons_of(config, lessons)
    asked = judge or make.make_judge(config.judge, load_image=pictures.load)
    _begin(config, teacher.settings, asked.settings)
    observed = None
    if config.context == RISKS:
        # The very judge that verifies: loaded once, and with one budget.
        observed = disentangle_file(config.disentangling, asked)
        lessons = lessons_of(config, lessons)
    examiner = Examiner(asked, config.judge.votes, config.judge.own_wording)
    used = Usage(), Usage()
    with Store(config.store_path) as store:
        work = distill_async(
            lessons, teacher, examiner, store, config, pictures, used=used
        )
        learnt = event_loops.run(work)
    _write(config, learnt)
    return _report(config, learnt, used, observed)


def read_data(config: DistillConfig, pictures: NamedPictures) -> list[Lesson]:
    """Return the lessons of the data, whose pictures are there.

    Raises:
      UserError: a row is malformed, a picture is missing, or the teacher cannot be
        shown what a row shows.
    Example::

      lessons = read_data(config, NamedPictures())
    """
    lessons = read_lessons(config.data, config.layout, image_dir=config.image_dir)
    for lesson in lessons:
        candidate_of(lesson.prompt, pictures)
    if config.teacher is None:
        check_conversation(lessons)
        return lessons
    shown = [one for one in lessons if one.prompt.images and not one.taken]
    if shown and open_renderer(config.teacher).patcher is None:
        raise UserError(
            f"{shown[0].prompt.where}: the prompt shows a picture, and the teacher "
            f"{config.teacher} does not see ({len(shown)} such prompts): give a "
            "vision-language checkpoint, or take these prompts out"
        )
    return lessons


def lessons_of(config: DistillConfig, lessons: Sequence[Lesson]) -> list[Lesson]:
    """Return lessons with what the context's file tells the teacher.

    Args:
      config: with the context; ``risks`` have been observed.
      lessons: of the data.
    Raises:
      UserError: the file cannot be read, or belongs to other prompts.
    Example::

      lessons = lessons_of(config, read_data(config, NamedPictures()))
    """
    prompts = [lesson.prompt for lesson in lessons]
    if not config.observed:
        (text, *_) = read_contexts(config.context, prompts)
        return [with_system(lesson, str(text)) for lesson in lessons]
    path = config.disentangling.out if config.context == RISKS else config.context
    pairs = zip(lessons, read_observations(path, prompts), strict=True)
    return [with_risks(lesson, found) for lesson, found in pairs]


def teacher_of(config: DistillConfig, pictures: NamedPictures) -> Any:
    """Return the teacher; nothing is loaded and nothing sent yet.

    Args:
      config: of the command.
      pictures: of the prompts.
    Raises:
      UserError: there is no such checkpoint, or the endpoint cannot be.
    Example::

      teacher_of(config, NamedPictures()).settings
    """
    kept = shard_files.said_of(Path(config.out)) or {}
    dtype = kept.get("teacher", {}).get("dtype")
    return answering_model(config, config.teacher, pictures, kept_dtype=dtype)


def teacher_settings(
    config: DistillConfig, pictures: NamedPictures
) -> Mapping[str, Any]:
    """Return what the teacher's answers depend on; that needs no key.

    Raises:
      UserError: there is no such checkpoint.
    Example:
      >>> files = {"data": "p.jsonl", "out": "sft.jsonl", "context": "rules.md"}
      >>> from jaxalign.judging.endpoint_model import EndpointConfig
      >>> config = DistillConfig(endpoint=EndpointConfig(model="m"), **files)
      >>> teacher_settings(config, NamedPictures())
      {'endpoint': 'm'}
    """
    if config.teacher is None:
        return endpoint_settings(config.endpoint)
    return teacher_of(config, pictures).settings


def _begin(
    config: DistillConfig, teacher: Mapping[str, Any], judge: Mapping[str, Any]
) -> None:
    """Write what OUT is made with.

    Raises:
      UserError: it is there and was made otherwise.
    """
    settings = {k: v for k, v in to_dict(config).items() if k not in _FREE}
    settings["data"] = rows.fingerprint(config.data)
    if config.context != RISKS:
        settings["context"] = rows.fingerprint(config.context)
    settings |= {"teacher": dict(teacher), "judge": dict(judge)}
    settings["votes"] = config.judge.votes
    settings = json.loads(json.dumps(settings, default=dict))
    out = Path(config.out)
    before, path = shard_files.said_of(out), shard_files.settings_of(out)
    if out.exists() and before != settings:
        names = "it was not made by jaxalign distill"
        if before is not None:
            changed = shard_files.differing(before, settings)
            names = f"it was made with other settings: {', '.join(changed)}"
        raise UserError(
            f"--out {out} is there already: {names}. Give another --out (with --store "
            f"{config.store_path} nothing is asked for twice), or remove {out.name}"
        )
    with writing(path, "nothing was asked for"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=2))


def _write(config: DistillConfig, learnt: Sequence[Learnt]) -> None:
    """Write what is learnt from and what is not.

    Raises:
      UserError: nothing is learnt from, or the disk is full.
    """
    kept = "all answers are in the store and the same command writes them"
    dropped = [one for one in learnt if one.kept is None]
    with whole(config.dropped_path, kept) as file:
        for one in dropped:
            file.write(json.dumps(one.row(), default=as_json) + "\n")
    if len(dropped) == len(learnt):
        counts = collections.Counter(one.reason for one in dropped)
        reasons = ", ".join(f"{n} {why}" for why, n in sorted(counts.items(), key=str))
        raise UserError(
            f"no answer is fit to be learnt from, and {config.out} is not written: "
            f"{reasons}. {config.dropped_path} has them all"
        )
    with whole(Path(config.out), kept) as file:
        for one in learnt:
            if one.kept is not None:
                file.write(json.dumps(one.record(), default=as_json) + "\n")


def _report(
    config: DistillConfig,
    learnt: Sequence[Learnt],
    used: tuple[Usage, Usage],
    observed: DisentangleReport | None,
) -> DistillReport:
    kept = [one for one in learnt if one.kept is not None]
    sides = [
        [one for one in kept if one.lesson.benign is side] for side in (False, True)
    ]
    lengths = [[len(one.answer.text) for one in side] for side in sides]
    means = [sum(some) / len(some) if some else 0.0 for some in lengths]
    ratio = max(means) / min(means) if all(means) else 1.0
    reasons = collections.Counter(str(one.reason) for one in learnt if one.kept is None)
    return DistillReport(
        prompts=len(learnt),
        risky=len(sides[0]),
        benign=len(sides[1]),
        refusals=sum(one.answer.refused for one in sides[0]),
        mean_lengths=(means[0], means[1]),
        unbalanced=ratio > (config.max_length_ratio or ratio) + 1e-9,
        dropped=dict(sorted(reasons.items())),
        teacher=used[0],
        judge=used[1],
        observed=observed,
    )

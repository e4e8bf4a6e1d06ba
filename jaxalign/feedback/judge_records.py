"""Records with segments to the same records with scores, in memory."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxalign import event_loops
from jaxalign.data.images import NamedPictures
from jaxalign.data.rows import image_base
from jaxalign.feedback import annotate
from jaxalign.judging.asking import ask
from jaxalign.judging.judge import Judge, Verdict
from jaxalign.judging.make import Function, as_judge
from jaxalign.judging.store import Store, temporary_store


__all__ = ["judge_records", "judge_records_async"]


def judge_records(
    rows: Iterable[Mapping[str, Any]],
    judge: Judge | Function,
    *,
    aspects: tuple[str, ...],
    votes: int = 1,
    store: Store | None = None,
    image_dir: str | Path | None = None,
    pictures: NamedPictures | None = None,
) -> list[dict[str, Any]]:
    """Have every response of some records judged; return them with scores.

    A response that got no verdict has no scores and stands in its record's
    ``judge_failures``: ``{"response", "reason", "raw"}``.

    Args:
      rows: feedback records with segments (DESIGN 4.1), scored or not.
      judge: a Judge, or a function ``judge(requests) -> replies``, plain or ``async``
        (see ``jaxalign.judging.function``): no endpoint, and no rubric is asked for.
      aspects: what each segment is scored on, from 0 to 4.
      votes: how often each response is judged; scores are means over the votes.
      store: keeps every verdict, so that none is asked for twice; default none.
      image_dir: where relative paths of pictures start; default the working directory.
      pictures: names the prompts' pictures. A function is given their bytes; a Judge
        that looks at them was made with this object's ``load`` as its ``load_image``.
    Raises:
      UserError: a record is malformed, or none of the judge's first replies fit.

    >>> row = {"prompt": "Sky?", "completion": "Blue. Up.",
    ...        "completion_segments": [{"start": 0, "end": 5}, {"start": 5, "end": 9}]}
    >>> def reply(request):
    ...     texts = [segment["text"] for segment in request["segments"]]
    ...     return {"segments": [{"short": 4 - len(text) / 5} for text in texts]}
    >>> def judge(requests):
    ...     return [reply(request) for request in requests]
    >>> (made,) = judge_records([row], judge, aspects=("short",))
    >>> [segment["scores"] for segment in made["completion_segments"]]
    [{'short': 3.0}, {'short': 3.2}]
    """
    return event_loops.run(
        judge_records_async(
            *(rows, judge),
            aspects=aspects,
            votes=votes,
            store=store,
            image_dir=image_dir,
            pictures=pictures,
        )
    )


async def judge_records_async(
    rows: Iterable[Mapping[str, Any]],
    judge: Judge | Function,
    *,
    aspects: tuple[str, ...],
    votes: int = 1,
    store: Store | None = None,
    image_dir: str | Path | None = None,
    pictures: NamedPictures | None = None,
) -> list[dict[str, Any]]:
    """Do as :func:`judge_records` does, awaited in a running event loop."""
    if store is None:
        with temporary_store() as kept:
            return await judge_records_async(
                *(rows, judge),
                aspects=aspects,
                votes=votes,
                store=kept,
                image_dir=image_dir,
                pictures=pictures,
            )
    pictures, base = pictures or NamedPictures(), image_base([], image_dir)
    items = [
        annotate.read_item(row, f"record {number}", aspects, base, pictures)
        for number, row in enumerate(rows)
    ]
    requests = [
        list(annotate.requests_of(item, votes=votes, needs_rubrics=False))
        for item in items
    ]
    asked = [request for own in requests for request in own]
    verdicts: dict[int, Verdict] = {}
    judge = as_judge(judge, load_image=pictures.load)
    async for answer in ask(judge, asked, store):
        verdicts[answer.number] = answer.verdict
    ordered = iter([verdicts[number] for number in range(len(asked))])
    return [
        annotate.annotated(item, [next(ordered) for _ in own])
        for item, own in zip(items, requests, strict=True)
    ]

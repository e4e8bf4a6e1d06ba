"""The columns of a tensorflow-datasets set, found by looking at all of its records.

Such a set has no nulls. What a record lacks is written as an empty value and named in
the column ``missing_columns``; an aspect that a segment has no score on is NaN.
:mod:`jaxalign.data.tfds_rows` undoes both.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxalign.data.tfds_builders.sources import RECORD_COLUMNS
from jaxalign.data.tfds_rows import MISSING
from jaxalign.errors import UserError


__all__ = ["FeatureSchema", "encode", "features", "scan"]


_SEGMENTS = ("chosen_segments", "rejected_segments")
_WEIGHTS = ("chosen_token_weights", "rejected_token_weights")


@dataclasses.dataclass(frozen=True)
class FeatureSchema:
    """What the records of a set have.

    Attributes:
      columns: names, in order.
      messages: whether prompts are conversations; else they are texts.
      encoded_images: whether images are bytes; else they are paths.
      aspects: by column of segments, the aspects in it, sorted.
      gaps: whether some record lacks a column that another has.
    """

    columns: tuple[str, ...]
    messages: bool
    encoded_images: bool
    aspects: Mapping[str, tuple[str, ...]]
    gaps: bool


def scan(found: Iterable[Mapping[str, Any]]) -> FeatureSchema:
    """Look at every record once.

    Raises:
      UserError: prompts are texts in some records and conversations in others, images
        are bytes in some and paths in others, or an aspect's name cannot be a column.
    """
    seen: dict[str, int] = {}
    prompts: dict[bool, str] = {}
    images: dict[bool, str] = {}
    aspects: dict[str, set[str]] = {name: set() for name in _SEGMENTS}
    count = 0
    for record in found:
        count += 1
        where = record["where"]
        for name in record:
            seen[name] = seen.get(name, 0) + 1
        prompts.setdefault(not isinstance(record["prompt"], str), where)
        _refuse_rich_turns(record, where)
        for image in record.get("images") or ():
            images.setdefault(isinstance(image, bytes), where)
        for name in _SEGMENTS:
            for segment in record.get(name) or ():
                aspects[name].update(segment["scores"])
    for name, kinds, both in (
        ("prompt", prompts, "a conversation and a text"),
        ("images", images, "encoded bytes and a path"),
    ):
        if len(kinds) > 1:
            raise UserError(
                f"field {name}: {both} in one set, at {kinds[True]} and {kinds[False]}."
                " A data set of tensorflow-datasets has one kind: split the file in two"
            )
    for name in sorted(aspects[_SEGMENTS[0]] | aspects[_SEGMENTS[1]]):
        if "/" in name:
            raise UserError(
                f"aspect {name!r}: a column's name may hold no slash. Rename the aspect"
            )
    order = [*RECORD_COLUMNS, *seen]
    return FeatureSchema(
        columns=tuple(sorted(seen, key=order.index)),
        messages=True in prompts,
        encoded_images=True in images,
        aspects={name: tuple(sorted(names)) for name, names in aspects.items()},
        gaps=any(times < count for times in seen.values()),
    )


def _refuse_rich_turns(record: Mapping[str, Any], where: str) -> None:
    """Refuse turns that such a set cannot hold: it has columns for plain ones."""
    for name in ("prompt", "chosen", "rejected", "completion"):
        turns = record.get(name)
        if turns is None or isinstance(turns, str):
            continue
        plain = all(
            set(turn) == {"role", "content"} and isinstance(turn["content"], str)
            for turn in turns
        )
        if not plain or (name != "prompt" and len(turns) != 1):
            raise UserError(
                f"{where}: field {name}: a data set of tensorflow-datasets holds turns "
                "of {role, content} and completions of one turn. Give an --out that "
                "ends in .jsonl"
            )


def encode(record: Mapping[str, Any], schema: FeatureSchema) -> dict[str, Any]:
    """Return a record as an example of :func:`features`."""
    example = {name: _value(name, record.get(name), schema) for name in schema.columns}
    if schema.gaps:
        example[MISSING] = [name for name in schema.columns if name not in record]
    return example


def features(schema: FeatureSchema) -> Any:
    """Return the ``tfds.features.FeaturesDict`` of a schema."""
    import numpy as np
    from tensorflow_datasets import features as tfds

    def feature(name: str) -> Any:
        if name == "prompt" and schema.messages:
            return tfds.Sequence({"role": tfds.Text(), "content": tfds.Text()})
        if name == "images":
            # No format is given, so that the bytes are kept as they are.
            return tfds.Sequence(tfds.Image() if schema.encoded_images else tfds.Text())
        if name in _SEGMENTS:
            span: dict[str, Any] = {
                end: tfds.Scalar(np.int64) for end in ("start", "end")
            }
            scores = {a: tfds.Scalar(np.float32) for a in schema.aspects[name]}
            return tfds.Sequence(span | ({"scores": scores} if scores else {}))
        if name in _WEIGHTS:
            return tfds.Sequence(tfds.Scalar(np.float32))
        if name == "weight":
            return tfds.Scalar(np.float32)
        return tfds.Scalar(np.bool_) if name == "label" else tfds.Text()

    made = {name: feature(name) for name in schema.columns}
    if schema.gaps:
        made[MISSING] = tfds.Sequence(tfds.Text())
    return tfds.FeaturesDict(made)


def _value(name: str, value: Any, schema: FeatureSchema) -> Any:
    if name == "images":
        return [_file(image) for image in value or ()]
    if name in _SEGMENTS:
        return [_segment(s, schema.aspects[name]) for s in value or ()]
    if name in _WEIGHTS or (name == "prompt" and schema.messages):
        return value or []
    if name in ("tools", "chat_template_kwargs"):
        return value if isinstance(value, str) else json.dumps(value or None)
    if name == "weight":
        return 1.0 if value is None else value
    if name == "label":
        return bool(value)
    if name in ("chosen", "rejected", "completion") and not isinstance(value, str):
        return value[0]["content"] if value else ""
    return value or ""


def _file(image: bytes | str) -> Any:
    import io

    return io.BytesIO(image) if isinstance(image, bytes) else image


def _segment(segment: Mapping[str, Any], aspects: Sequence[str]) -> dict[str, Any]:
    scores = segment["scores"]
    return {
        "start": segment["start"],
        "end": segment["end"],
        "scores": {name: scores.get(name, float("nan")) for name in aspects},
    }

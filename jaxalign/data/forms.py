"""What a record becomes for an objective: a pair, or completions on their own."""

from collections.abc import Sequence

from jaxalign.data.records import Completion, Record
from jaxalign.errors import UserError
from jaxalign.types import Form


__all__ = ["shape"]


def shape(
    records: Sequence[Record], form: Form
) -> tuple[Sequence[Record], Sequence[int]]:
    """Give records the form that an objective reads.

    Returns:
      The records, and for each the index of the one it was made from. With
      ``labelled_kl`` the mismatched completion stands in ``rejected``.
    Raises:
      UserError: a record cannot have that form.
    """
    if form == "pairs":
        return [_paired(record) for record in records], range(len(records))
    split: list[Record] = []
    origins: list[int] = []
    for index, record in enumerate(records):
        for single in _singles(record, form):
            split.append(single)
            origins.append(index)
    if not split:
        raise UserError(
            f"none of the {len(records)} record(s) has a desirable completion to learn"
        )
    if form == "labelled_kl":
        split = _with_mismatch(split)
    return split, origins


def _paired(record: Record) -> Record:
    if record.rejected is None:
        raise UserError(
            f"{record.where}: a single completion, but the objective compares two. "
            "Give chosen and rejected, or use objective.name kto, bco or sft"
        )
    return record


def _singles(record: Record, form: Form) -> list[Record]:
    if record.rejected is None:
        if form == "completions":
            return [] if record.label is False else [record]
        if record.label is None:
            raise UserError(
                f"{record.where}: field label is missing: expected true for a "
                "desirable completion or false for an undesirable one"
            )
        return [record]

    def single(said: Completion, label: bool) -> Record:
        return Record(
            *(record.prompt, said, None, None, None, record.where),
            label=label,
            weight=record.weight,
            template_kwargs=record.template_kwargs,
            images=record.images,
        )

    if form == "completions":
        return [single(record.chosen, True)]
    return [single(record.chosen, True), single(record.rejected, False)]


def _with_mismatch(records: Sequence[Record]) -> list[Record]:
    """Give each record the completion of the next one that has another prompt.

    That depends on the data alone, so neither packing nor the size of a batch changes
    what the KL estimate of KTO is made of. It goes with the record's own pictures.
    """
    count = len(records)
    others: list[int] = [0] * count
    asked = [(r.prompt, tuple(p.source for p in r.images)) for r in records]
    # From the end, the next record with another prompt is the next one, or its own.
    start = next((i for i in range(1, count) if asked[i] != asked[0]), None)
    if start is None:
        raise UserError(
            f"all {count} record(s) have the same prompt, but the KL estimate of kto "
            "needs completions of other prompts. Use objective.name bco, or add prompts"
        )
    others[count - 1] = start if asked[count - 1] == asked[0] else 0
    for i in reversed(range(count - 1)):
        others[i] = others[i + 1] if asked[i] == asked[i + 1] else i + 1
    return [
        record._replace(rejected=records[other].chosen)
        for record, other in zip(records, others, strict=True)
    ]

"""What a file of records becomes for training, shown before any model is loaded."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxalign import progress
from jaxalign.checkpoints.renderer import open_renderer
from jaxalign.configs import check_fields
from jaxalign.data import layouts, loader, packing, pairs, records
from jaxalign.data.chat import Branch, TokenizedPair
from jaxalign.data.columns import check_template_kwargs
from jaxalign.data.pairs import Overflow, PairDataset
from jaxalign.data.records import Record
from jaxalign.data.rendering import Renderer
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.objectives import objective
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.objectives.objective import ObjectiveConfig
from jaxalign.training.checks import check_records


__all__ = ["DataCheckConfig", "check_data"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataCheckConfig:
    """Looking at records as training would read them.

    Attributes:
      model: Hugging Face checkpoint whose tokenizer and chat template are used.
      layout: of the rows, see ``jaxalign.data.layouts``; default what their columns
        say.
      image_dir: where relative paths of pictures start; default beside the data file.
      max_pixels: of a picture; larger ones are made smaller. Default what the
        checkpoint's own files say; each family has its own limit.
      chat_template_kwargs: what the chat template is given beside the conversations.
      objective: the loss that is to read them.
      row_length: places of a row; a pair takes prompt + chosen + rejected.
      max_length: most tokens of a prompt with either response.
      overflow: what to do with a pair above max_length.
      packing: whether a row holds as many pairs as fit, or one.
      examples: records that are shown with their tokens.

    >>> DataCheckConfig(model="smollm2").objective.name
    'dpo2d'
    """

    model: str
    layout: str | None = None
    image_dir: str | None = None
    max_pixels: int | None = None
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    objective: ObjectiveConfig = dataclasses.field(default_factory=DPO2DConfig)
    row_length: int = 2048
    max_length: int = 1024
    overflow: Overflow = "drop"
    packing: bool = True
    examples: int = 3

    def __post_init__(self) -> None:
        check_fields(self)
        layouts.check_name(self.layout)
        check_template_kwargs(self.chat_template_kwargs, "chat_template_kwargs")
        for name, low in (("examples", 0), ("row_length", 2), ("max_length", 2)):
            if getattr(self, name) < low:
                raise UserError(
                    f"{name} must be at least {low}: got {getattr(self, name)}"
                )


def check_data(source: str, config: DataCheckConfig) -> Iterator[str]:
    """Yield lines on what training would make of a source.

    How many records there are, how long they are in tokens, which would be left out or
    cut and why, how full rows get, and the first records with what is learnt of them.

    Args:
      source: see :func:`jaxalign.data.records.read`.
      config: the options.
    Raises:
      UserError: training would refuse the data; what can be shown is shown first.
    Example::

      for line in check_data("pairs.jsonl", DataCheckConfig(model="smollm2")):
          print(line)
    """
    found = records.read(source, config.layout, image_dir=config.image_dir)
    aspects = records.aspects_of(found)
    yield from _contents(found, aspects)
    refusal = None
    try:
        check_records(config.objective, found, aspects)
    except UserError as error:
        refusal = error
    renderer = open_renderer(
        config.model, config.chat_template_kwargs, max_pixels=config.max_pixels
    )
    form = objective.needs(config.objective).form if refusal is None else _form(found)
    whole = _prepared(found, renderer, config, form, None, "drop")
    yield from _lengths(whole)
    yield from _pictures(whole)
    overflow: Overflow = "drop" if config.overflow == "error" else config.overflow
    try:
        fitting = _prepared(found, renderer, config, form, config.max_length, overflow)
        yield from _left_out(found, whole, fitting, config)
        yield from _rows(fitting, config)
    except UserError as error:
        refusal = refusal or error
    for index in range(min(config.examples, len(whole.pairs))):
        yield from _example(
            found[whole.indices[index]], whole.pairs[index], renderer.tokenizer
        )
    if refusal is not None:
        raise refusal


def _form(found: Sequence[Record]) -> Literal["pairs", "completions"]:
    single = any(record.rejected is None for record in found)
    return "completions" if single else "pairs"


def _prepared(
    found: Sequence[Record],
    renderer: Renderer,
    config: DataCheckConfig,
    form: Any,
    max_length: int | None,
    overflow: Overflow,
) -> PairDataset:
    needs = objective.needs(config.objective)
    return pairs.prepare(
        found,
        renderer,
        max_length=max_length,
        overflow=overflow,
        form=form,
        end_of_turn=needs.end_of_turn,
        learn_prompt=needs.prompt,
        progress=lambda items, n: progress.track(items, n, "tokenising"),
    )


def _contents(found: Sequence[Record], aspects: Sequence[str]) -> Iterator[str]:
    sides = [record.completions for record in found]
    yield (
        f"{len(found)} records: {sum(len(s) == 2 for s in sides)} pairs, "
        f"{sum(len(s) == 1 for s in sides)} single completions; "
        f"{sum(not isinstance(r.prompt, str) for r in found)} of conversations, "
        f"{sum(len(records.texts_of(c)) > 1 for s in sides for c in s)} completions of "
        "several turns"
    )
    counts = [
        sum(bool(segment.scores) for segment in segments)
        for record in found
        for segments in (record.chosen_segments, record.rejected_segments)
        if segments is not None
    ]
    if counts:
        yield (
            f"{sum(counts)} scored segments, {np.mean(counts):.1f} a response, on "
            f"{', '.join(aspects) or 'no aspect'}"
        )


def _lengths(data: PairDataset) -> Iterator[str]:
    measured: Mapping[str, Sequence[int]] = {
        "prompt": [len(p.prompt) + p.chosen.lead for p in data.pairs],
        "chosen": [p.chosen.num_completion_tokens for p in data.pairs],
        "rejected": [p.rejected.num_completion_tokens for p in data.pairs],
        "prompt + longer response": [p.longest for p in data.pairs],
    }
    yield f"{'tokens':26}{'least':>8}{'median':>8}{'95 %':>8}{'most':>8}"
    for name, values in measured.items():
        if max(values, default=0):
            shown = np.percentile(values, [0, 50, 95, 100])
            yield f"{name:26}" + "".join(f"{value:8.0f}" for value in shown)


def _pictures(data: PairDataset) -> Iterator[str]:
    """Yield what pictures take, of a place for a picture in the data each."""
    layouts = [layout for pair in data.pairs for layout in pair.layouts]
    if data.patcher is None or not layouts:
        return
    unit = data.patcher.merge**2
    tokens = [end - begin for pair in data.pairs for begin, end in pair.stretches]
    patches = [data.patcher.units(layout) * unit for layout in layouts]
    yield (
        f"{len(layouts)} pictures: {np.mean(tokens):.0f} tokens a picture, most "
        f"{max(tokens)}; {np.mean(patches):.0f} patches, most {max(patches)}"
    )


def _left_out(
    found: Sequence[Record],
    whole: PairDataset,
    fitting: PairDataset,
    config: DataCheckConfig,
) -> Iterator[str]:
    long = [
        (pair.longest, found[index].where)
        for index, pair in zip(whole.indices, whole.pairs, strict=True)
        if pair.longest > config.max_length
    ]
    done = {"drop": "dropped", "truncate": "cut", "error": "refused"}[config.overflow]
    yield f"{len(long)} {done}: longer than max_length {config.max_length}"
    for length, where in sorted(long, reverse=True)[:5]:
        yield f"  {where}: {length} tokens"
    lost = fitting.report.get("segments_without_tokens_or_cut", 0)
    if lost:
        yield f"{lost} segments own no token or are cut: they count as not scored"
    empty = collections.Counter(
        side
        for record in found
        for side, said in zip(("chosen", "rejected"), record.completions, strict=False)
        if not any(text.strip() for text in records.texts_of(said))
    )
    for side, count in empty.items():
        yield f"{count} {side} completions have no text"


def _rows(data: PairDataset, config: DataCheckConfig) -> Iterator[str]:
    shape = loader.batch_shape(
        [data], row_length=config.row_length, pack=config.packing
    )
    source = loader.StepSource(data, shape, loader.BatchPlan(1, 1, 0), num_epochs=1)
    rows = source.rows_of_epoch(0)
    fill = packing.fill(rows, data.lengths, shape.row_length)
    said = (
        f"{len(data.pairs)} kept, in {len(rows)} rows of {shape.row_length} places, "
        f"{fill:.0%} full"
    )
    if shape.patches:
        fill = packing.fill(rows, data.units, loader.row_units(data, shape))
        said += f"; {shape.patches} patches a row, {fill:.0%} full"
    yield said


def _example(
    record: Record, pair: TokenizedPair, tokenizer: Tokenizer
) -> Iterator[str]:
    """Yield a record as its tokens read: ⟦learnt⟧, with the number of the segment."""
    yield f"\n--- {record.where}: what is learnt stands in ⟦⟧, with its segment"
    sides = (
        ("chosen", pair.chosen, record.chosen_segments),
        ("rejected", pair.rejected, record.rejected_segments),
    )
    yield _prompt(tokenizer, pair)
    for name, branch, segments in sides:
        if not len(branch.tokens):
            continue
        yield f"{name if record.rejected is not None else 'completion'}:"
        yield _marked(tokenizer, branch)
        for number, segment in enumerate(segments or (), 1):
            scores = ", ".join(f"{k} {v:g}" for k, v in segment.scores.items())
            yield f"  {number}: {scores}"


def _prompt(tokenizer: Tokenizer, pair: TokenizedPair) -> str:
    """Return a prompt's text with the size of each picture in its place."""
    shown, done = [], 0
    for (begin, end), layout in zip(pair.stretches, pair.layouts, strict=True):
        grids = ", ".join(f"{rows} x {columns}" for rows, columns in layout.grids)
        shown.append(_decoded(tokenizer, pair.prompt[done:begin]))
        shown.append(f"⟨picture of {end - begin} tokens: {grids} patches⟩")
        done = end
    return "".join([*shown, _decoded(tokenizer, pair.prompt[done:])])


def _marked(tokenizer: Tokenizer, branch: Branch) -> str:
    """Return a response's text with marks where what is learnt begins and ends."""
    owners = np.full(len(branch.tokens), -2)
    owners[branch.places] = branch.segments
    borders = np.flatnonzero(np.diff(owners)) + 1
    shown = []
    for tokens, owner in zip(
        np.split(branch.tokens, borders),
        owners[np.concatenate([[0], borders]).astype(int)],
        strict=True,
    ):
        text = _decoded(tokenizer, tokens)
        label = "" if owner == -1 else f"{owner + 1}: "
        shown.append(text if owner == -2 else f"⟦{label}{text}⟧")
    return "".join(shown)


def _decoded(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    return tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)

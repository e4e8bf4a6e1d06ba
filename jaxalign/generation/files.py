"""From a file of prompts to a file of completions; goes on where it was stopped."""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxalign import progress, shards
from jaxalign.checkpoints import fastest
from jaxalign.checkpoints.load import DType
from jaxalign.checkpoints.renderer import max_pixels_of, template_kwargs_of
from jaxalign.configs import as_command
from jaxalign.data import layouts, picture_sizes, records, shard_files
from jaxalign.data.columns import check_template_kwargs
from jaxalign.data.record_images import as_json
from jaxalign.data.records import Prompt
from jaxalign.errors import UserError
from jaxalign.generation import context as contexts_of
from jaxalign.generation import file_settings, text_model
from jaxalign.generation.completions import check_drawn
from jaxalign.generation.engine import Completion, Engine, Request, Sampling, completed
from jaxalign.models.quantised import Quantize
from jaxalign.parallel.mesh import MeshConfig
from jaxalign.whole_file import check_target, write_text, writing


__all__ = ["GenerateConfig", "GenerationReport", "generate_file", "seed_of"]

_KEPT = "the lines that are there stay, and the same command goes on behind them"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(Sampling):
    """Completing a file of prompts.

    Attributes:
      model: Hugging Face checkpoint: a directory, or an id on the hub,
        ``owner/name`` or ``owner/name@revision``.
      data: prompts, one object a line, ``{"prompt": text or messages}``.
      out: JSON Lines file to write, one object a prompt, in order. If it has lines
        already, made with the same settings, the rest is written.
      adapter: PEFT directory, exported hybrid or run directory on top of the model.
      layout: of the data's rows, see ``jaxalign.data.layouts``; default what their
        columns say.
      image_dir: where relative paths of pictures start; default beside the data file.
      max_pixels: of a picture; larger ones are made smaller. Default as the run that
        ``adapter`` is was trained, elsewhere what the checkpoint's own files say.
      chat_template_kwargs: what the chat template is given beside the conversations,
        such as ``{"enable_thinking": false}``; a prompt's own column comes first.
        Default as the run that ``adapter`` is was trained.
      context: file that is put before the prompts as a system message and is not
        written with them: what ``jaxalign disentangle`` made of this data (.jsonl),
        or a system text for all of them (any other file).
      shard: ``i/n``: complete part i (from 0) of n of the prompts alone, every n-th;
        ``jaxalign join`` makes one file of the parts, the same as without.
      batch_slots: completions that are made at the same time.
      dtype: of weights and computation; ``auto`` keeps weights as they are stored,
        ``fastest`` is what this device multiplies faster.
      cache_dtype: of the keys and values of earlier tokens; default that of the
        computation, on a CPU float32.
      quantize: how frozen linear weights are held, see ``jaxalign train``; default as
        the run that ``adapter`` is was trained, elsewhere ``none``.
      mesh: how the devices are arranged.

    >>> GenerateConfig(model="smollm2", data="prompts.jsonl", out="o.jsonl").batch_slots
    64
    """

    model: str
    data: str
    out: str
    adapter: str | None = None
    layout: str | None = None
    image_dir: str | None = None
    max_pixels: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    context: str | None = None
    shard: str | None = None
    batch_slots: int = 64
    dtype: DType = "float32"
    cache_dtype: DType | None = None
    quantize: Quantize | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        layouts.check_name(self.layout)
        shards.parse(self.shard)
        check_template_kwargs(self.chat_template_kwargs or {}, "chat_template_kwargs")
        text_model.check_slots(self.batch_slots, self.cache_dtype, self.mesh)
        check_drawn(self)


class GenerationReport(NamedTuple):
    """What a run of the engine took."""

    tokens: int
    seconds: float
    """Without compiling."""
    compile_seconds: float


def seed_of(seed: int, line: int) -> int:
    """Return the seed of a line, so that equal prompts get different samples.

    >>> seed_of(0, 1) != seed_of(0, 2)
    True
    """
    return int(np.random.SeedSequence([seed, line]).generate_state(1)[0])


def generate_file(config: GenerateConfig) -> GenerationReport:
    """Complete every prompt of a file that has no line in the output yet.

    Raises:
      UserError: something the user gave is wrong, or the output was made with other
        settings; nothing is written then.
    Example::

      files = {"data": "prompts.jsonl", "out": "samples.jsonl"}
      generate_file(GenerateConfig(model="smollm2", **files))
    """
    out = Path(config.out)
    check_target(out)
    prompts = _prompts(config)
    mine = (shards.parse(config.shard) or shards.WHOLE).rows(len(prompts))
    kept, again = file_settings.kept_dtype(out), as_command("generate", config)
    options = dict(template_kwargs_of(config.chat_template_kwargs, config.adapter))
    config = dataclasses.replace(
        config,
        dtype=fastest.resolve(config.dtype, config.model, kept=kept),
        chat_template_kwargs=options,
        max_pixels=max_pixels_of(config.max_pixels, config.adapter),
    )
    told, before = _told(config, prompts)
    shown = any(prompt.images for prompt in prompts)
    settings = before | file_settings.settings(config, shown=shown, lines=len(mine))
    with writing(f"--out {out}", _KEPT):
        done = file_settings.resume(out, settings, len(mine))
    if done == len(mine):
        if not mine:
            _begin(out, settings, again)
        progress.say(f"{out} is complete: {done} line(s), made with these options")
        return GenerationReport(0, 0.0, 0.0)
    made = text_model.load(
        config.model,
        config.adapter,
        template_kwargs=options,
        dtype=config.dtype,
        quantize=config.quantize,
        mesh=config.mesh,
        max_pixels=config.max_pixels,
    )
    made.renderer.check_used(prompt.text for prompt in told)
    requests = _requests(config, told, made)
    if before:
        _say_costs(config, requests, _requests(config, prompts, made))
    engine, left = _engine(config, made, requests), mine[done:]
    asked = [requests[row] for row in left]
    _check(engine, asked, [prompts[row] for row in left])
    _begin(out, settings, again)
    tokens, began = 0, time.monotonic()
    with (
        writing(f"--out {out}", _KEPT),
        out.open("a", encoding="utf-8") as file,
        progress.counting("generating", len(mine), "tokens", done) as show,
    ):
        for index, completions in _in_order(completed(engine, asked)):
            tokens += sum(len(c.tokens) for c in completions)
            row = left[index]
            file.write(_line(row, prompts[row], completions) + "\n")
            file.flush()
            show(done + index + 1, tokens)
    seconds = time.monotonic() - began - engine.compile_seconds
    return GenerationReport(tokens, seconds, engine.compile_seconds)


def _engine(
    config: GenerateConfig, made: text_model.TextModel, requests: Sequence[Request]
) -> Engine:
    """Return an engine for all prompts, not for what is left or one part of them.

    The same programs give the same bits.
    """
    slots = min(config.batch_slots, len(requests) * config.num_samples)
    return Engine(
        made.model,
        made.variables,
        slots=-(-slots // config.mesh.rows) * config.mesh.rows,
        length=max(len(r.tokens) for r in requests) + config.max_new_tokens,
        cache_dtype=config.cache_dtype,
        text_of=text_model.text_with(made.tokenizer),
    )


def _prompts(config: GenerateConfig) -> list[Prompt]:
    folder = config.image_dir
    return records.read_prompts(config.data, config.layout, image_dir=folder)


def _told(
    config: GenerateConfig, prompts: Sequence[Prompt]
) -> tuple[Sequence[Prompt], dict[str, str]]:
    """Return the prompts as the model gets them, and what settings say of that."""
    if config.context is None:
        return prompts, {}
    before = contexts_of.read_contexts(config.context, prompts)
    told = [*map(contexts_of.with_context, prompts, before)]
    return told, {"context": contexts_of.fingerprint(before)}


def _begin(out: Path, settings: dict[str, Any], again: str) -> None:
    """Write what the lines that follow are made with, and make room for them."""
    if shard_files.SHARD in settings:
        settings = {**settings, shard_files.AGAIN: again}
    with writing(f"--out {out}", _KEPT):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(shard_files.settings_of(out), json.dumps(settings, indent=2))
        out.touch()


def _say_costs(
    config: GenerateConfig, requests: Sequence[Request], plain: Sequence[Request]
) -> None:
    """Say what stands before how many prompts, and the tokens that it takes."""
    more = [
        len(one.tokens) - len(other.tokens)
        for one, other in zip(requests, plain, strict=True)
    ]
    progress.say(
        f"context {config.context}: before {sum(map(bool, more))} of {len(more)} "
        f"prompts, {sum(more)} tokens in all, at most {max(more)}"
    )


def _check(
    engine: Engine, requests: Sequence[Request], prompts: Sequence[Prompt]
) -> None:
    """Refuse what cannot be completed, with its prompt's place."""
    for request, prompt in zip(requests, prompts, strict=True):
        try:
            engine.check(request)
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from None


def _requests(
    config: GenerateConfig, prompts: Sequence[Prompt], made: text_model.TextModel
) -> list[Request]:
    sees = made.renderer.patcher is not None  # else the renderer says that it does not
    pictures = [picture for prompt in prompts for picture in prompt.images if sees]
    sizes = iter(picture_sizes.sizes(pictures))
    return [
        _request(
            config, prompt, line, made, [*itertools.islice(sizes, len(prompt.images))]
        )
        for line, prompt in enumerate(prompts)
    ]


def _request(
    config: GenerateConfig,
    prompt: Prompt,
    line: int,
    made: text_model.TextModel,
    sizes: Sequence[tuple[int, int]],
) -> Request:
    options = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(Sampling)
        if field.name != "seed"
    }
    sampling = Sampling(**options, seed=seed_of(config.seed, line))
    ends = made.ends(sampling.stop)
    return text_model.as_request(made.renderer, prompt, sampling, ends, sizes=sizes)


def _in_order(
    found: Iterator[tuple[int, list[Completion]]],
) -> Iterator[tuple[int, list[Completion]]]:
    waiting: dict[int, list[Completion]] = {}
    following = 0
    for index, completions in found:
        waiting[index] = completions
        while following in waiting:
            yield following, waiting.pop(following)
            following += 1


def _line(index: int, prompt: Prompt, completions: list[Completion]) -> str:
    line = {
        "index": index,
        "prompt": prompt.given,
        **_template_columns(prompt),
        **prompt.image_columns,
        "completions": [
            {
                "text": completion.text,
                "tokens": completion.tokens,
                "logp": float(np.sum(completion.logps)),
                "finish_reason": completion.finish_reason,
            }
            for completion in completions
        ],
    }
    return json.dumps(line, default=as_json)


def _template_columns(prompt: Prompt) -> dict[str, Any]:
    """Return the columns of a prompt that a record made of it needs."""
    given = dict(prompt.template_kwargs)
    tools = given.pop("tools", None)
    columns = {"tools": tools, "chat_template_kwargs": given}
    return {name: value for name, value in columns.items() if value}

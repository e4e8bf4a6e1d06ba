"""Scoring records: what a policy and its reference give to every segment."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign import progress
from jaxalign.adapters import adapter
from jaxalign.checkpoints import fastest
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.load import DType
from jaxalign.checkpoints.policy import open_policy, quantize_of
from jaxalign.checkpoints.renderer import (
    max_pixels_of,
    open_renderer,
    template_kwargs_of,
)
from jaxalign.configs import check_fields
from jaxalign.data import layouts, loader, pairs, records
from jaxalign.data.columns import check_template_kwargs
from jaxalign.data.kept_features import ImageFeatures
from jaxalign.errors import UserError
from jaxalign.evaluation import scored_pair
from jaxalign.models.quantised import Quantize
from jaxalign.objectives import logps
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.objectives.objective import (
    beta_of,
    make,
    needs,
    score_under,
    weight_models,
)
from jaxalign.objectives.options import ObjectiveConfig
from jaxalign.objectives.policy import pair_logps
from jaxalign.objectives.record import per_pair
from jaxalign.parallel import multihost, sharding
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from jaxalign.training import encoding, kept_parts
from jaxalign.training.checks import check_records, check_tokens
from jaxalign.types import Model, PreferenceBatch, RowShare, Variables
from jaxalign.whole_file import check_target, whole


__all__ = ["ScoreConfig", "PolicyAndReference", "score", "score_records"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Scoring a file of records.

    Attributes:
      model: Hugging Face checkpoint: a directory, or an id on the hub,
        ``owner/name`` or ``owner/name@revision``.
      data: feedback records.
      out: JSON Lines file to write, one object a record, in order; nothing is dropped.
      adapter: PEFT directory, exported hybrid or run directory on top of the model.
      reference: another checkpoint; default the model without the adapter.
      objective: the loss that is reported.
      layout: of the data's rows, see ``jaxalign.data.layouts``; default what their
        columns say.
      image_dir: where relative paths of pictures start; default beside the data file.
      max_pixels: of a picture; larger ones are made smaller. Default what the
        checkpoint's own files say; each family has its own limit.
      image_features: ``recompute`` runs the tower for every row; ``cached`` once a
        picture, keeps what it makes of them in ``features`` beside ``out``, and does
        not load it. The tower is then the model's own, without an adapter.
      chat_template_kwargs: what the chat template is given beside the conversations,
        such as ``{"enable_thinking": false}``; a record's own column comes first.
        Default as the run that ``adapter`` is was trained.
      token_logps: whether to write every completion token.
      batch_rows: rows that are computed at once.
      row_length: places of a row; default the longest pair.
      row_patches: places of a row for patches of pictures; default a number that
        seldom binds, found from the data.
      dtype: of weights and computation; ``auto`` keeps weights as they are stored,
        ``fastest`` is what this device multiplies faster.
      quantize: how both models' frozen linear weights are held, see ``jaxalign train``;
        default as the run that ``adapter`` is was trained, elsewhere ``none``.
      mesh: how the devices are arranged.

    >>> ScoreConfig(model="smollm2", data="pairs.jsonl", out="scores.jsonl").dtype
    'float32'
    """

    model: str
    data: str
    out: str
    adapter: str | None = None
    reference: str | None = None
    objective: ObjectiveConfig = dataclasses.field(default_factory=DPO2DConfig)
    layout: str | None = None
    image_dir: str | None = None
    max_pixels: int | None = None
    image_features: ImageFeatures = "recompute"
    chat_template_kwargs: dict[str, Any] | None = None
    token_logps: bool = False
    batch_rows: int = 1
    row_length: int | None = None
    row_patches: int | None = None
    dtype: DType = "float32"
    quantize: Quantize | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        layouts.check_name(self.layout)
        check_template_kwargs(self.chat_template_kwargs or {}, "chat_template_kwargs")
        rows = self.mesh.rows
        if self.batch_rows < 1 or self.batch_rows % rows:
            raise UserError(
                f"batch_rows must be a positive multiple of mesh.data × mesh.fsdp = "
                f"{rows}: got {self.batch_rows}"
            )
        asked = needs(self.objective)
        if asked.ranked or asked.form.startswith("labelled"):
            raise UserError(
                f"objective.name {self.objective.name} gives a record no loss of its "
                "own, as it depends on the batch. Score with another objective, such "
                "as sigmoid; the log-probabilities are the same"
            )
        if weight_models(self.objective):
            raise UserError(
                "objective.positive_model has no effect here: score reads token "
                "weights from the records, chosen_token_weights and "
                "rejected_token_weights"
            )
        if self.row_length is not None and self.row_length < 2:
            raise UserError(f"row_length must be at least 2: got {self.row_length}")
        if self.row_patches is not None and self.row_patches < 1:
            raise UserError(f"row_patches must be at least 1: got {self.row_patches}")


class PolicyAndReference(NamedTuple):
    """A policy and a reference, ready to score."""

    model: Model
    variables: Variables
    ref_model: Model
    ref_variables: Variables


def score(config: ScoreConfig) -> Path:
    """Score every record of a file and write one JSON object each, in order.

    Raises:
      UserError: something the user gave is wrong; nothing is written then.
    Example::

      files = {"data": "pairs.jsonl", "out": "scores.jsonl"}
      score(ScoreConfig(model="smollm2", adapter="run", **files))
    """
    out = Path(config.out)
    check_target(out)
    dtype = fastest.resolve(config.dtype, config.model)
    config = dataclasses.replace(config, dtype=dtype)
    data, mesh = _read(config), make_mesh(config.mesh)
    kept = None
    if config.image_features == "cached":
        kept = kept_parts.kept_of_policy(config.model, config.adapter, config.reference)
        encoder = encoding.Encoder(
            *(config.model, kept, config.dtype),
            quantize_of(config.quantize, config.adapter),
            mesh,
            config.batch_rows,
        )
        [data] = encoding.encoded([data], encoder, out.parent / "features")
    scorer = _load(config, mesh, kept_parts.scopes_to_load(kept))
    kept_whole = "the checkpoint and the data are as they were"
    with (
        whole(out, kept_whole) if multihost.is_first() else contextlib.nullcontext()
    ) as file:
        for result in score_records(
            data,
            scorer,
            objective=config.objective,
            token_logps=config.token_logps,
            batch_rows=config.batch_rows,
            row_length=config.row_length,
            row_patches=config.row_patches,
            put=functools.partial(sharding.put_batch, mesh=mesh),
            share=sharding.share_of_rows(mesh),
        ):
            if file is not None:
                file.write(json.dumps(result) + "\n")
    return out


def _read(config: ScoreConfig) -> pairs.PairDataset:
    """Read and tokenise the records, for a model that can score them."""
    found = records.read(config.data, config.layout, image_dir=config.image_dir)
    check_records(config.objective, found, records.aspects_of(found))
    options = template_kwargs_of(config.chat_template_kwargs, config.adapter)
    pixels = max_pixels_of(config.max_pixels, config.adapter)
    data = pairs.prepare(
        found,
        open_renderer(config.model, options, max_pixels=pixels),
        max_length=None,
        end_of_turn=needs(config.objective).end_of_turn,
        progress=lambda items, n: progress.track(items, n, "tokenising"),
    )
    for path in (config.model, config.reference):
        if path is not None:
            check_tokens(data, load_lib.open_config(path)[0].text, path)
    return data


def _load(config: ScoreConfig, mesh: Mesh, scopes: Any) -> PolicyAndReference:
    """Load the policy and what it is compared with, of both the scopes asked for."""
    policy = open_policy(
        config.model,
        config.adapter,
        dtype=config.dtype,
        quantize=config.quantize,
        mesh=mesh,
        scopes=scopes,
    )
    if adapter.reads_ahead(policy.variables):
        raise UserError(
            f"--adapter {config.adapter} has a mean_gate, which averages over the "
            "whole sequence, answer included: a prompt has no one value for the two "
            "responses that score compares. Train with gate token or sequence instead"
        )
    model = policy.checkpoint.model
    scorer = PolicyAndReference(model, policy.variables, model, policy.base)
    if config.reference is None:
        return scorer
    with progress.reading(f"loading {config.reference}") as show:
        other = load_lib.load(
            config.reference,
            dtype=config.dtype,
            quantize=policy.quantize,
            mesh=mesh,
            scopes=scopes,
            progress=show,
        )
    return scorer._replace(ref_model=other.model, ref_variables=other.variables)


def score_records(
    data: pairs.PairDataset,
    scorer: PolicyAndReference,
    *,
    objective: ObjectiveConfig,
    token_logps: bool = False,
    batch_rows: int = 1,
    row_length: int | None = None,
    row_patches: int | None = None,
    put: Any = lambda batch: batch,
    share: RowShare | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the result of every pair, in the order of the data.

    Returns:
      Objects with ``index``, ``loss``, ``rewards`` (beta × log-ratio of whole
      completions), and for each side its tokens, log-probabilities and segments;
      ``reward`` is a segment's, ``weight`` its coefficient without beta.
    Example::

      base, policy = load_hf("smollm2"), open_policy("smollm2", "run")
      tuned = policy.checkpoint.model, policy.variables
      scorer = PolicyAndReference(*tuned, base.model, base.variables)
      data = pairs.prepare(rows, chat.load_tokenizer("smollm2"), max_length=512)
      for result in score_records(data, scorer, objective=DPO2DConfig()):
          print(result["loss"], result["rewards"]["margin"])
    """
    shape = loader.batch_shape(
        [data],
        row_length=row_length or int(data.lengths.max()),
        row_patches=row_patches,
    )
    source = loader.StepSource(
        data,
        shape,
        loader.BatchPlan(batch_rows, 1, 0, shuffle=False),
        num_epochs=1,
        share=share,
    )
    run = functools.partial(
        _evaluate_jit,
        models=(scorer.model, scorer.ref_model),
        objective=objective,
        aspects=tuple(data.aspects),
    )
    waiting: dict[int, dict[str, Any]] = {}
    ready = 0
    for step in progress.track(range(len(source)), len(source), "scoring rows"):
        batch = put(jax.tree.map(lambda leaf: leaf[0], source[step]))
        found = run(scorer.variables, scorer.ref_variables, batch)
        values, response = multihost.gather((found, batch.completions.response))
        for r, row in enumerate(source.rows_of_step(step)):
            for slot, index in enumerate(row):
                waiting[index] = scored_pair.result(
                    data.pairs[index],
                    index=data.indices[index],
                    values={k: v[r] for k, v in values.items()},
                    response=response[r],
                    slot=slot,
                    beta=beta_of(objective),
                    token_logps=token_logps,
                )
        while ready in waiting:
            yield waiting.pop(ready)
            ready += 1


def _evaluate(
    variables: Variables,
    ref_variables: Variables,
    batch: PreferenceBatch,
    *,
    models: tuple[Model, Model],
    objective: ObjectiveConfig,
    aspects: tuple[str, ...],
) -> dict[str, Any]:
    tokens = score_under(
        variables, ref_variables, batch, models=models, config=objective
    )
    pair = pair_logps(tokens, batch)
    shape = batch.segment_mask.shape[1], batch.segment_mask.shape[3]
    losses = per_pair(make(objective, aspects), tokens, batch)
    weights = batch.segment_mask.astype(jnp.float32)
    selected = batch.segment_mask
    if losses.segments is not None:
        weights, selected = losses.segments.weights, losses.segments.selected
    return {
        "token_logps": tokens.policy,
        "ref_token_logps": tokens.reference,
        "loss": losses.values,
        "logps": pair.logps,
        "ref_logps": pair.ref_logps,
        "segment_logps": logps.segment_sums(tokens.policy, batch.completions, shape),
        "ref_segment_logps": logps.segment_sums(
            tokens.reference, batch.completions, shape
        ),
        "segment_tokens": logps.segment_token_counts(batch.completions, shape),
        "weights": weights,
        "selected": selected,
    }


# By the models' values: a second score in one process compiles nothing.
_evaluate_jit = jax.jit(_evaluate, static_argnames=("models", "objective", "aspects"))

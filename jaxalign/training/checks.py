"""What must hold between an objective, its data and a model, before compute starts."""

from collections.abc import Sequence
from typing import Any

from jaxalign import progress, trees
from jaxalign.adapters import saved
from jaxalign.data import records
from jaxalign.data.pairs import PairDataset
from jaxalign.errors import UserError
from jaxalign.models import quantised
from jaxalign.models.config import DecoderConfig
from jaxalign.models.quantised import Quantize
from jaxalign.objectives import objective
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.types import Variables


__all__ = ["check_records", "check_tokens", "check_trained"]


def check_records(
    config: objective.ObjectiveConfig,
    found: Sequence[records.Record],
    aspects: tuple[str, ...],
) -> None:
    """Refuse data that the objective cannot use.

    Raises:
      UserError: segments or token weights that are missing, an unknown aspect, a score
        outside of 0 to ``max_score`` where the scale matters, a ``max_score`` where it
        does not, pair weights for an
        objective that sorts the batch.
    """
    asked = objective.needs(config)
    unjudged = 0
    for record in found:
        if asked.segments and record.rejected is not None:
            _check_segments(record, config.name)
            unjudged += not all(
                any(segment.scores or not asked.scores for segment in segments or ())
                for segments in (record.chosen_segments, record.rejected_segments)
            )
    if unjudged:
        what = "a scored segment" if asked.scores else "a segment"
        progress.say(
            f"{unjudged} of {len(found)} record(s) have a response without {what}, "
            f"from which {config.name} learns nothing"
        )
    for _, options in objective.members(config):
        part = objective.make(options, aspects)
        if part.needs.max_score is not None:
            _check_scale(part.needs.max_score, found)
        elif isinstance(options, DPO2DConfig):
            _refuse_scale(options)
        if part.needs.token_weights:
            _check_token_weights(options.name, part.weight_models is not None, found)
        if part.needs.ranked:
            _check_equal_weights(options.name, found)


def _check_segments(record: records.Record, name: str) -> None:
    for field in ("chosen_segments", "rejected_segments"):
        if getattr(record, field) is None:
            raise UserError(
                f"{record.where}: field {field} is missing, which {name} needs: add "
                "the scored segments, or use objective.name=dpo"
            )


def _check_equal_weights(name: str, found: Sequence[records.Record]) -> None:
    for record in found:
        if record.weight != 1:
            raise UserError(
                f"{record.where}: field weight has no meaning for {name}, which "
                "compares sorted values of the whole batch: leave the column out or "
                "choose another objective"
            )


def _check_token_weights(
    name: str, given: bool, found: Sequence[records.Record]
) -> None:
    """Want token weights of the records, unless two models are given that make them."""
    for record in found:
        for field in ("chosen_token_weights", "rejected_token_weights"):
            there = getattr(record, field) is not None
            if there and given:
                raise UserError(
                    f"{record.where}: field {field} would be ignored, as "
                    "objective.positive_model and negative_model give the weights: "
                    "leave out one of the two"
                )
            if not there and not given:
                raise UserError(
                    f"{record.where}: field {field} is missing, which {name} "
                    "needs: add one number for each completion token, or give "
                    "objective.positive_model and objective.negative_model"
                )


def _refuse_scale(config: DPO2DConfig) -> None:
    if config.max_score != DPO2DConfig.max_score:
        raise UserError(
            f"objective.max_score {config.max_score} has no effect with "
            f"objective.normalize {config.normalize} and rejected_weight "
            f"{config.rejected_weight}, which do not read the top of the scale: leave "
            "it out"
        )


def _check_scale(top: float, found: Sequence[records.Record]) -> None:
    for record in found:
        for field in ("chosen_segments", "rejected_segments"):
            segments: Any = getattr(record, field) or ()
            for i, segment in enumerate(segments):
                for aspect, score in segment.scores.items():
                    if not 0 <= score <= top:
                        raise UserError(
                            f"{record.where}: field {field}[{i}].scores.{aspect}: "
                            f"got {score}, expected 0 to objective.max_score="
                            f"{top}. Set objective.max_score to the "
                            "top of your scale, or objective.normalize=none"
                        )


def check_tokens(data: PairDataset, model_config: DecoderConfig, model: str) -> None:
    """Refuse tokens that a model has no embedding for.

    Raises:
      UserError: the tokenizer gives such a token.
    """
    largest = max(
        int(tokens.max())
        for pair in data.pairs
        for tokens in (pair.prompt, pair.chosen.tokens, pair.rejected.tokens)
        if tokens.size
    )
    if largest >= model_config.vocab_size:
        raise UserError(
            f"the tokenizer gives the token {largest}, but the model {model} has "
            f"{model_config.vocab_size}: their files are of different checkpoints"
        )


def check_trained(
    params: Any, collections: Variables, trainable: Sequence[str], quantize: Quantize
) -> None:
    """Refuse to train base weights that are codes, or that an adapter stands on.

    Args:
      params: shapes of the base weights, cut for the adapter.
      collections: the adapter's, or their shapes.
      trainable: patterns of the base weights to train.
      quantize: how frozen ones are held.
    Raises:
      UserError: naming the pattern and the first weight, or an adapter that no export
        could hold beside them.
    """
    adapted = {path.rpartition("/")[0] for path in trees.paths(collections.get("lora"))}
    own = set(trees.paths(collections.get(saved.COLLECTION)))
    for pattern in trainable:
        mask = trees.by_path(trees.mask_from_patterns(params, [pattern]))
        chosen = [path for path, is_chosen in mask.items() if is_chosen]
        for path in chosen:
            if quantize != "none" and quantised.holds_codes(path):
                raise UserError(
                    f"quantize {quantize} holds {path} as codes, which cannot be "
                    f"trained: got {pattern!r} in trainable. Choose weights that are "
                    "no codes (norm/scale, connector/.*), train an adapter there, or "
                    "leave --quantize out"
                )
            module, _, leaf = path.rpartition("/")
            twice = "targets" if module in adapted and leaf != "bias" else ""
            if {path, f"{module}/{saved.ROWS[0]}"} & own:
                twice = "modules_to_save"
            if twice:
                raise UserError(
                    f"trainable trains {path}, by {pattern!r}, and adapter.{twice} has "
                    "it too: leave it out of one of the two"
                )
    if trainable and "prefix" in collections and "lora" not in collections:
        raise UserError(
            f"trainable {list(trainable)} beside a prefix alone could not be written: "
            "PEFT's prefix has no place for base weights, and no merged weight can "
            "stand for a prefix. Use an adapter with LoRA (lora, hlpt, h2lpt), or "
            "adapter.name none"
        )

"""Fields of config.json about what a model sees with."""

from collections.abc import Mapping
from typing import Any

from jaxalign.errors import UserError
from jaxalign.models.config import DecoderConfig, TowerNames, VisionConfig
from jaxalign.models.families import (
    fields,
    gemma2,
    llama,
    mistral,
    qwen2,
    qwen3,
)
from jaxalign.models.families.vision_rules import CLIP, DINOV2


__all__ = ["filled", "layers_run", "part", "read_text", "read_tower"]

_TEXTS = {
    module.FAMILY.model_type: module.FAMILY
    for module in (gemma2, llama, mistral, qwen2, qwen3)
}
"""Families that a decoder inside of a model may be of."""


def part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a part of config.json.

    Raises:
      UserError: it is not there, or no object.
    """
    value = config.get(name)
    if not isinstance(value, Mapping):
        raise UserError(f"config.json: {name} must be an object: got {value!r}")
    return value


def filled(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Return a part of config.json with what it leaves out, as transformers fills it.

    Published files leave out what is transformers' default for the part.

    Args:
      config: the part.
      model_type: of the part, where it does not say.
    Raises:
      UserError: a type that transformers does not know.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = config.get("model_type", model_type)
    try:
        defaults = CONFIG_MAPPING[name]().to_dict()
    except KeyError:
        raise UserError(f"config.json: model_type {name!r} is not known") from None
    # What these are follows from others, which the file may have.
    for derived in ("rope_parameters", "num_key_value_heads", "head_dim", "dtype"):
        defaults.pop(derived, None)
    return {**defaults, **config, "model_type": name}


def read_text(
    config: Mapping[str, Any], model_type: str, *, tied: bool | None = None
) -> DecoderConfig:
    """Read the decoder of a vision-language model.

    Args:
      config: config.json.
      model_type: of the decoder, where it does not say.
      tied: whether the head is the embeddings; default what config.json says, not what
        the part for the text does.
    Raises:
      UserError: a type that is not implemented here, or see its own family.
    """
    text = filled(part(config, "text_config"), model_type)
    if text["model_type"] not in _TEXTS:
        raise UserError(
            f"config.json: text_config.model_type {text['model_type']!r} is not "
            f"implemented for {config.get('model_type')}: expected "
            f"{', '.join(sorted(_TEXTS))}"
        )
    if tied is None:
        tied = fields.flag(config, "tie_word_embeddings")
    text["tie_word_embeddings"] = tied
    return _TEXTS[text["model_type"]].read_text(text)


def layers_run(config: Mapping[str, Any], layers: int) -> int:
    """Return how many layers lead to the states that are looked at.

    ``vision_feature_layer`` counts the states before and behind all layers.

    Raises:
      UserError: it is a list, or there is no such layer.
    """
    chosen = config.get("vision_feature_layer", -2)
    if isinstance(chosen, bool) or not isinstance(chosen, int):
        raise UserError(
            f"config.json: vision_feature_layer {chosen!r} is not implemented: "
            "expected one number"
        )
    run = chosen if chosen >= 0 else layers + 1 + chosen
    if not 1 <= run <= layers:
        raise UserError(
            f"config.json: vision_feature_layer {chosen} of {layers} layers: expected "
            f"-{layers} to -1, or 1 to {layers}"
        )
    return run


_KINDS: dict[str, tuple[TowerNames, dict[str, Any]]] = {
    "clip_vision_model": (
        CLIP,
        {"class_token": True, "first_norm": True, "patch_bias": False},
    ),
    "siglip_vision_model": (CLIP, {}),
    "dinov2": (DINOV2, {"class_token": True, "layer_scale": True}),
}

_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def read_tower(config: Mapping[str, Any]) -> VisionConfig:
    """Read a tower of CLIP's kin: fixed square images, learned positions.

    All its layers are run, and the last one's states are not normed.

    Args:
      config: the part of config.json, see :func:`filled`.
    Raises:
      UserError: a field is missing or wrong, or asks for what is not implemented.
    """
    kind = config["model_type"]
    if kind not in _KINDS:
        raise UserError(
            f"config.json: vision_config.model_type {kind!r} is not implemented: "
            f"expected {', '.join(sorted(_KINDS))}"
        )
    names, options = _KINDS[kind]
    act = config.get("hidden_act", "gelu")
    if act not in _ACTIVATIONS or config.get("use_swiglu_ffn"):
        raise UserError(
            f"config.json: the tower's MLP ({act!r}, use_swiglu_ffn "
            f"{config.get('use_swiglu_ffn')}) is not implemented: expected one of "
            f"{', '.join(_ACTIVATIONS)} without SwiGLU"
        )
    fields.expect(config, "the tower", num_channels=3)
    width, side = (
        fields.integer(config, "hidden_size"),
        fields.integer(config, "patch_size"),
    )
    size = fields.integer(config, "image_size")
    heads = fields.integer(config, "num_attention_heads")
    if size % side or width % heads:
        raise UserError(
            f"config.json: image_size {size} must be a multiple of patch_size {side}, "
            f"and hidden_size {width} of num_attention_heads {heads}"
        )
    if kind == "dinov2":
        mlp = int(width * fields.number(config, "mlp_ratio", 4.0))
    else:
        mlp = fields.integer(config, "intermediate_size")
    return VisionConfig(
        width=width,
        mlp_width=mlp,
        num_layers=fields.integer(config, "num_hidden_layers", most=2**16),
        num_heads=heads,
        patch_values=3 * side * side,
        positions=(size // side) ** 2 + bool(options.get("class_token")),
        side=size // side,
        norm_eps=fields.number(config, "layer_norm_eps", 1e-6),
        qkv_bias=fields.flag(config, "qkv_bias", True),
        activation=_ACTIVATIONS[act],  # pyright: ignore[reportArgumentType]
        names=names,
        **options,
    )

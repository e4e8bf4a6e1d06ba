"""Tiny models that see: random weights with tokenizer, image processor and template."""

import json
import shutil
from pathlib import Path
from typing import Any

from tests import synthetic
from tests.data.patchers import published


__all__ = ["KINDS", "TEMPLATE", "write"]

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}PLACE"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, whose contents may be parts; ``PLACE`` is what stands for a picture."""

_FIXED = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3}
_FIXED |= {"num_attention_heads": 4, "patch_size": 7, "image_size": 28}

_TOWERS: dict[str, dict[str, Any]] = {
    "llava": {"model_type": "clip_vision_model", "projection_dim": 16, **_FIXED},
    "llava-siglip": {
        "model_type": "siglip_vision_model",
        "vision_use_head": False,
        **_FIXED,
    },
    "llava-dinov2": {
        "model_type": "dinov2",
        "mlp_ratio": 2,
        **{k: v for k, v in _FIXED.items() if k != "intermediate_size"},
    },
    "idefics3": {**_FIXED, "patch_size": 8, "image_size": 32},
    "smolvlm": {**_FIXED, "patch_size": 8, "image_size": 32},
    "qwen2_5_vl": {
        "hidden_size": 32,
        "intermediate_size": 44,
        "depth": 3,
        "num_heads": 4,
        "patch_size": 14,
        "out_hidden_size": 48,
        "fullatt_block_indexes": [1],
        "window_size": 112,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
    },
}

KINDS = tuple(_TOWERS)
"""What :func:`write` can write: families, of LLaVA one with each tower."""

_PROCESSORS: dict[str, dict[str, Any]] = {
    "llava": {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True},
    "llava-siglip": {"image_processor_type": "SiglipImageProcessor"},
    "llava-dinov2": {
        "image_processor_type": "BitImageProcessor",
        "do_center_crop": True,
    },
    "idefics3": {"image_processor_type": "Idefics3ImageProcessor"},
    "smolvlm": {"image_processor_type": "SmolVLMImageProcessor"},
    "qwen2_5_vl": {"image_processor_type": "Qwen2VLImageProcessor"},
}


def write(
    kind: str,
    directory: Path,
    *,
    seed: int = 0,
    save: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a random model that sees; return its directory.

    The decoder has two layers and odd sizes, the tower three layers; norms' weights are
    not 1 and biases not 0. It is made once a run of the tests, and every caller has a
    copy to change.

    Args:
      kind: of :data:`KINDS`.
      directory: where to.
      seed: of the weights.
      save: options of ``save_pretrained``.
      tokenizer: options of ``synthetic.make_tokenizer``.
      **changes: fields of the config; those of a part are put into it.
    """
    options = {"seed": seed, "save": save, "tokenizer": tokenizer, **changes}
    key = json.dumps(["sees", kind, options], sort_keys=True, default=repr)
    kept = synthetic.made_once(key, lambda empty: _write(kind, empty, **options))
    shutil.copytree(kept, directory, dirs_exist_ok=True)
    return directory


def _write(
    kind: str,
    directory: Path,
    *,
    seed: int,
    save: dict[str, Any] | None,
    tokenizer: dict[str, Any] | None,
    **changes: Any,
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    qwen, tiles = kind == "qwen2_5_vl", kind in ("idefics3", "smolvlm")
    token = "<|image_pad|>" if qwen else "<image>"
    place = "<|vision_start|><|image_pad|><|vision_end|>" if qwen else "<image>"
    names = (
        published.QWEN if qwen else published.TILES if tiles else ("<image>",)
    )  # fmt: skip
    made = synthetic.make_tokenizer(
        directory, template=TEMPLATE.replace("PLACE", place), **(tokenizer or {})
    )
    made.add_special_tokens({"additional_special_tokens": list(names)})
    made.save_pretrained(directory)

    settings = _settings(kind, made, token)
    for name, value in changes.items():
        part = settings.get(name)
        if isinstance(part, dict) and isinstance(value, dict):
            value = {**part, **value}
        settings[name] = value
    config = AutoConfig.for_model(kind.partition("-")[0], **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        for name, weight in model.named_parameters():
            around = 1.0 if _is_scale(name) else 0.0
            torch.nn.init.normal_(weight, mean=around, std=0.2)
    model.save_pretrained(directory, **(save or {}))
    (directory / "preprocessor_config.json").write_text(json.dumps(_processor(kind)))
    (directory / "processor_config.json").write_text('{"image_seq_len": 4}')


def _is_scale(name: str) -> bool:
    """Tell whether a weight is a factor: of a norm, or of a layer's whole output."""
    *_, module, leaf = name.split(".")
    norm = "norm" in module or module == "ln_q" or module == "pre_layrnorm"
    return leaf == "lambda1" or (leaf == "weight" and norm)


def _settings(kind: str, tokenizer: Any, token: str) -> dict[str, Any]:
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    common = {"vision_config": dict(_TOWERS[kind]), "tie_word_embeddings": False}
    token_id = tokenizer.convert_tokens_to_ids(token)
    if kind.startswith("llava"):
        full = "full" if kind == "llava-siglip" else "default"
        return common | {
            "text_config": {"model_type": "llama", "head_dim": 16, **text},
            "image_token_index": token_id,
            "vision_feature_select_strategy": full,
        }
    if kind == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
        others = ("<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        video, start, end = map(tokenizer.convert_tokens_to_ids, others)
        return common | {
            "text_config": {**text, "rope_parameters": rope},
            "image_token_id": token_id,
            "video_token_id": video,
            "vision_start_token_id": start,
            "vision_end_token_id": end,
        }
    return common | {
        "text_config": {"model_type": "llama", "head_dim": 16, **text},
        "image_token_id": token_id,
        "scale_factor": 2,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _processor(kind: str) -> dict[str, Any]:
    """Return the image processor's options: of a picture 4 x 4 patches, or few more."""
    options = dict(_PROCESSORS[kind])
    options |= {"image_mean": published.HALF, "image_std": published.HALF}
    if kind.startswith("llava"):
        side = _FIXED["image_size"]
        square = {"height": side, "width": side}
        if "do_center_crop" in options:
            return options | {"crop_size": square, "size": {"shortest_edge": side}}
        return options | {"size": square}
    if kind == "qwen2_5_vl":
        sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
        return options | sizes | {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 30}
    return options | {
        "do_image_splitting": True,
        "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 32},
        "resample": 1,
    }

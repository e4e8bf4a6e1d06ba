"""The image processor of a checkpoint, and what config.json says of its pictures."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError


__all__ = [
    "Changes",
    "changes",
    "describe",
    "image_token",
    "load_processor",
    "needed",
]

_NEW = "processor_config.json"
_OLD = "preprocessor_config.json"
_LIBRARIES = ("pillow", "transformers")


def load_processor(directory: str | Path, known: Sequence[str]) -> Any:
    """Load a checkpoint's image processor: transformers' that works by Pillow.

    Its options are in preprocessor_config.json, or since transformers 5 under
    ``image_processor`` in processor_config.json. AutoImageProcessor is not asked: it
    takes torchvision's where that is there, whose pixels are others.

    Args:
      directory: the checkpoint.
      known: names of the classes that will do, as the files have them; the first where
        a file names none.
    Raises:
      UserError: there is none, another, or one with options that do not fit.
    """
    path, options = _saved_options(Path(directory))
    name = options.get("image_processor_type") or options.get("feature_extractor_type")
    name = (name or known[0]).replace("FeatureExtractor", "ImageProcessor")
    name = name.removesuffix("Fast")
    if name not in known:
        raise UserError(
            f"{path}: the image processor is {name}. Models of this type are fed by "
            f"{' or '.join(known)}: name one as image_processor_type"
        )
    import transformers
    from PIL import Image

    try:
        processor = getattr(transformers, f"{name}Pil")(**options)
        # A long one: of a square Idefics3 makes 17 tiles.
        processor(images=Image.new("RGB", (16, 1)), return_tensors="np")
    except Exception as error:  # transformers raises many kinds here
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{path}: with these options {name} fails on any picture: "
            f"{reason[0] if reason else type(error).__name__}. Expected those that it "
            "was saved with"
        ) from None
    if not processor.do_resize:
        raise UserError(
            f"{path}: do_resize is {processor.do_resize}, which leaves pictures as "
            "large as they are. Expected true"
        )
    return processor


def _saved_options(directory: Path) -> tuple[Path, Mapping[str, Any]]:
    """Return the options of an image processor as saved, of either era, and where."""
    for path in (directory / _NEW, directory / _OLD):
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path}: it is no JSON: {error}") from None
        if not isinstance(found, dict):
            raise UserError(f"{path}: expected an object, got {type(found).__name__}")
        if path.name == _NEW:
            # Before transformers 5 this held the options of the text's part alone.
            found = found.get("image_processor")
        if found:
            return path, found
    raise UserError(
        f"{directory}: it has no image processor. Expected {_OLD} or, since "
        f"transformers 5, image_processor in {_NEW}. Copy the file from the checkpoint "
        "that this one was made of"
    )


def needed(config: Mapping[str, Any], name: str) -> Any:
    """Return a value of config.json, the parts of whose name are joined by dots.

    Raises:
      UserError: it is not there. Defaults of transformers' classes are not the
        published checkpoints' values.
    """
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            raise UserError(
                f"config.json has no {name}, which says how pictures are cut into "
                "patches. Take it from the checkpoint that this one was made of"
            )
    return value


def image_token(config: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[str, int]:
    """Return what stands for one feature of a picture in a text, and its token.

    Raises:
      UserError: config.json does not say, or it is none of those that a tokenizer
        reads as one whatever stands beside them.
    """
    index = config.get("image_token_id")
    if index is None:
        index = config.get("image_token_index")
    if index is None:
        raise UserError(
            "config.json has neither image_token_id nor image_token_index, which says "
            "which token stands for a picture. Take it from the checkpoint that this "
            "one was made of"
        )
    token = tokenizer.added_tokens_decoder.get(index)
    if token is None:
        raise UserError(
            f"config.json says that token {index} stands for a picture; the tokenizer "
            f"has {tokenizer.convert_ids_to_tokens(index)!r} there, which is no special"
            " token. Take tokenizer and config.json from the same checkpoint"
        )
    return token.content, index


def describe(patcher: Any) -> str:
    """Return all that decides the numbers of a patcher's patches, as JSON.

    Pillow is named with its version because 13 resizes in another order than 12.
    """
    own = {
        field.name: getattr(patcher, field.name)
        for field in dataclasses.fields(patcher)
        if field.name not in ("processor", "settings")
    }
    processor = patcher.processor
    options = {
        name: value
        for name in processor.valid_kwargs.__annotations__
        if (value := getattr(processor, name, None)) is not None
    }
    versions = {
        name: ".".join(metadata.version(name).split(".")[:2]) for name in _LIBRARIES
    }
    told = {
        "patcher": type(patcher).__name__,
        **own,
        "processor": type(processor).__name__,
        "options": options,
        **versions,
    }
    return json.dumps(told, sort_keys=True, default=dict)  # sizes are no dicts


class Changes(NamedTuple):
    """What differs between two texts of :func:`describe`, for messages."""

    options: list[str]
    versions: list[str]
    """Of libraries: the same options, computed in another way."""


def changes(before: str, now: str) -> Changes:
    """Compare how pictures were made into patches with how they are now.

    >>> changes('{"merge": 2, "pillow": "12.2"}', '{"merge": 2, "pillow": "13.0"}')
    Changes(options=[], versions=['pillow: 12.2 there, 13.0 now'])
    """
    old, new = json.loads(before), json.loads(now)
    found = Changes([], [])
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            told = f"{name}: {old.get(name)} there, {new.get(name)} now"
            (found.versions if name in _LIBRARIES else found.options).append(told)
    return found

"""Records with pictures, and what transformers makes of them by its own processors."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from tests.data.patchers import published


__all__ = [
    "Answer",
    "Reference",
    "place_of",
    "png",
    "pair",
    "records",
    "reference",
    "segmented",
    "text_records",
    "user",
]

SIZES = ((61, 97), (30, 30), (200, 33), (48, 48), (7, 90), (112, 100), (1, 1), (32, 64))


def place_of(kind: str) -> str:
    """Return what a plain text holds in a picture's place."""
    if kind == "qwen2_5_vl":
        return "<|vision_start|><|image_pad|><|vision_end|>"
    return "<image>"


def png(image: Image.Image) -> bytes:
    """Return a picture as the bytes of a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def user(*content: str | None) -> dict[str, Any]:
    """Return a user's turn: a picture for every None, and the texts."""
    parts = [
        {"type": "image"} if part is None else {"type": "text", "text": part}
        for part in content
    ]
    return {"role": "user", "content": parts}


def pair(prompt: Sequence[Any], chosen: str, rejected: str, **columns: Any) -> Any:
    """Return a record of turns."""
    return {
        "prompt": list(prompt),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **segmented(chosen, rejected),
        **columns,
    }


def segmented(chosen: str, rejected: str) -> dict[str, Any]:
    """Return the columns of scored segments: two halves of each completion."""
    columns = {}
    for side, text, best in (("chosen", chosen, 4), ("rejected", rejected, 2)):
        half = len(text) // 2
        columns[f"{side}_segments"] = [
            {"start": 0, "end": half, "scores": {"correctness": best}},
            {"start": half, "end": len(text), "scores": {"correctness": best - 1}},
        ]
    return columns


def records(
    kind: str, place: Path, count: int = 8, files: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Make pictures; return records with one of them, with none and with several.

    Of each four the first has one picture in the column ``images``, the second text
    alone, the third two or three in parts of its turns, the fourth is a plain text.

    Args:
      kind: of ``vision_models.KINDS``, for the placeholder of plain texts.
      place: an existing directory, where relative paths start.
      count: of records.
      files: pictures in the place of those that are made.
    """
    paths = list(files)
    if not paths:
        for i, size in enumerate(SIZES):
            paths.append(f"picture {i}.png")
            published.drawn(*size, seed=i).save(place / paths[-1])
    found = []
    for i in range(count):
        said, other = f"the answer is {i * 7}", f"not  blue and river {i}" * (1 + i % 2)
        mine = [paths[(i + k) % len(paths)] for k in range(3)]
        match i % 4:
            case 0:
                turn = {"role": "user", "content": f"is the river {i}?"}
                found.append(pair([turn], said, other, images=mine[:1]))
            case 1:
                found += text_records(1, first=i)
            case 2:
                three = i % 8 == 2
                turns = [
                    user(None, "and", None, f"which is blue {i}?"),
                    {"role": "assistant", "content": "好 seven"},
                    user("and that? ", None) if three else user("and now?"),
                ]
                shown = mine if three else mine[:2]
                found.append(pair(turns, said, other, images=shown))
            case _:
                text = f"{place_of(kind)} is the answer {i}:"
                texts = {"prompt": text, "chosen": said, "rejected": other}
                texts |= segmented(said, other)
                found.append({**texts, "images": mine[:1]})
    return found


def text_records(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Return records of a conversation without pictures."""
    return [
        pair(
            [{"role": "user", "content": f"the Über river {i}?"}],
            f"is not {i}",
            f"blue  and {i} seven",
        )
        for i in range(first, first + count)
    ]


class Answer(NamedTuple):
    """What transformers says of a prompt with one of its completions."""

    inputs: dict[str, Any]
    """What its model is called with."""
    begin: int
    """Index of the completion's first token."""

    @property
    def tokens(self) -> list[int]:
        """Return the tokens of prompt and completion."""
        return self.inputs["input_ids"][0].tolist()

    def log_probs(self, model: Any) -> Any:
        """Return the log-probability of every completion token, with its gradient."""
        import torch

        ids = self.inputs["input_ids"]
        logits = model(**self.inputs).logits.float()
        each = torch.log_softmax(logits[0, :-1], -1)
        return each.gather(1, ids[0, 1:, None])[self.begin - 1 :, 0]


class Reference:
    """A checkpoint as transformers loads it, with its own processor.

    The composite processors want a part for videos, and with it torchvision: here they
    do without, by a subclass that does not look (see ``data/patchers/test_parity``).
    """

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        from tests.data.patchers import test_parity

        self.directory = directory
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.config = json.loads((directory / "config.json").read_text())
        checkpoint = published.Checkpoint(directory, self.config, self.tokenizer)
        patcher = test_parity.PATCHERS[self.config["model_type"]].from_files(
            *checkpoint.arguments
        )
        options = test_parity.options_of(patcher, self.config)
        self.processor = test_parity.reference(checkpoint, **options)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(directory)
        self.model.eval()

    def answer(self, record: dict[str, Any], side: str, place: Path) -> Answer:
        """Return what it is asked of a record's prompt with one of its completions."""
        pictures = [Image.open(place / path) for path in record.get("images", ())]
        prompt, completion = record["prompt"], record[side]
        if isinstance(prompt, str):
            texts = prompt, prompt + completion
        else:
            turns = _with_parts(prompt, len(pictures))
            texts = (
                self._rendered(turns, add_generation_prompt=True),
                self._rendered([*turns, *completion]),
            )
        before, whole = (self._inputs(text, pictures) for text in texts)
        begin = before["input_ids"].shape[1]
        return Answer(self._until_end(whole, isinstance(prompt, str)), begin)

    def _rendered(self, turns: Sequence[Any], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(turns, tokenize=False, **options)

    def _inputs(self, text: str, pictures: Sequence[Any]) -> dict[str, Any]:
        if not pictures:
            return dict(self.tokenizer(text, return_tensors="pt"))
        images = [*pictures]
        if self.config["model_type"] in ("idefics3", "smolvlm"):
            images = [images]
        return dict(self.processor(text=[text], images=images, return_tensors="pt"))

    def _until_end(self, inputs: dict[str, Any], plain: bool) -> dict[str, Any]:
        """Cut the line break that the template prints behind, or add the EOS."""
        import torch

        eos = self.tokenizer.eos_token_id
        ids = inputs["input_ids"]
        if plain:
            ids = torch.cat([ids, torch.tensor([[eos]])], 1)
        else:
            ids = ids[:, : int((ids[0] == eos).nonzero().max()) + 1]
        kept = {
            k: v for k, v in inputs.items() if v.shape[:2] != inputs["input_ids"].shape
        }
        out = {**kept, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.config["model_type"] == "qwen2_5_vl":
            out["mm_token_type_ids"] = (ids == self.config["image_token_id"]).long()
        return out


def _with_parts(prompt: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Put a picture's parts before the first user turn's text, if it has none."""
    first, *rest = prompt
    if not count or isinstance(first["content"], list):
        return list(prompt)
    text = {"type": "text", "text": first["content"]}
    return [{**first, "content": [*[{"type": "image"}] * count, text]}, *rest]


def reference(directory: Path) -> Reference:
    """Return :class:`Reference` without transformers' bars and advice."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return Reference(directory)

"""A tensorflow-datasets builder of feedback records, importable by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


RECORDS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": f"Größe {i}?"}],
        "chosen": "好 yes.",
        "rejected": "no",
        "chosen_segments": [
            {"start": 0, "end": 1, "scores": {"clarity": 1.5, "safety": float(i)}},
            {"start": 2, "end": 6, "scores": {"clarity": 2.5, "safety": 4.0}},
        ],
        "rejected_segments": [],
    }
    for i in range(4)
]


def _segments() -> Any:
    scores = {"clarity": tfds.features.Scalar(np.float32)}
    scores["safety"] = tfds.features.Scalar(np.float32)
    span = {"start": tfds.features.Scalar(np.int32)}
    span["end"] = tfds.features.Scalar(np.int32)
    return tfds.features.Sequence({**span, "scores": scores})


class TinyFeedback(tfds.core.GeneratorBasedBuilder):
    """Four records with the columns of DESIGN 4.1."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded; tfds' own look-up needs the package importlib_resources.
    url_infos: dict[str, Any] = {}
    FEATURES: dict[str, Any] = {
        "prompt": tfds.features.Sequence(
            {"role": tfds.features.Text(), "content": tfds.features.Text()}
        ),
        "chosen": tfds.features.Text(),
        "rejected": tfds.features.Text(),
        "chosen_segments": _segments(),
        "rejected_segments": _segments(),
    }
    EXAMPLES = RECORDS

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self.FEATURES)
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(self.EXAMPLES)


class LooseFeedback(TinyFeedback):
    """Segments that are one object instead of a sequence of them."""

    FEATURES = {
        "prompt": tfds.features.Text(),
        "chosen": tfds.features.Text(),
        "rejected": tfds.features.Text(),
        "chosen_segments": {"start": tfds.features.Scalar(np.int32)},
    }
    EXAMPLES = [
        {"prompt": "p", "chosen": "c", "rejected": "r", "chosen_segments": {"start": 0}}
    ]


class BrokenFeedback(TinyFeedback):
    """A text that is not UTF-8."""

    FEATURES = {name: tfds.features.Text() for name in ("prompt", "chosen", "rejected")}
    EXAMPLES = [{"prompt": "p", "chosen": b"\xff\xfe", "rejected": "r"}]


def write(builder: type[TinyFeedback], directory: Path) -> str:
    """Prepare a builder as array_record; return the source to read it by."""
    made = builder(data_dir=str(directory), file_format="array_record")
    made.download_and_prepare()
    return f"tfds:{made.data_path}:train"

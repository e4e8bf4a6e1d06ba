"""Builders of tensorflow-datasets, one a layout; TensorFlow itself is not imported.

Data sets keep the order of their source, so that ``train[:100]`` is its beginning.
Grain reads a built one as a random-access source::

    source = tfds.builder_from_directory(directory).as_data_source("train")
    grain.MapDataset.source(source).shuffle(seed=0)

Importing this module makes the builders known by name to tensorflow-datasets.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from jaxalign.data.tfds_builders import schema, sources
from jaxalign.errors import UserError


__all__ = [
    "BUILDERS",
    "FeedbackRecords",
    "HelpSteer2",
    "HelpSteer2D",
    "HelpSteer3",
    "Hh",
    "Implicit",
    "LlamaFactory",
    "QaFeedback",
    "RlaifV",
    "ShareGpt",
    "UltraFeedback",
    "UltraFeedbackBinarized",
]


class _Layout(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder of feedback records from local files of one layout.

    ``files`` gives the source of each split. It is needed to build, not to read.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded; tfds' own look-up needs the package importlib_resources.
    url_infos: dict[str, Any] | None = {}
    LAYOUT: ClassVar[str]
    HOMEPAGE: ClassVar[str | None] = None

    def __init__(
        self,
        *,
        files: Mapping[str, str | os.PathLike[str]] | None = None,
        file_format: str = "array_record",
        **kwargs: Any,
    ):
        self._files = {split: os.fspath(path) for split, path in (files or {}).items()}
        self.schema: schema.FeatureSchema | None = None
        self.counts: dict[str, sources.Counts] = {}
        super().__init__(file_format=file_format, **kwargs)

    def _look(self) -> None:
        self.counts = {split: sources.Counts() for split in self._files}
        self.schema = schema.scan(
            record
            for split, counts in self.counts.items()
            for record in sources.records_of(self.LAYOUT, self._files[split], counts)
        )

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()["_original_state"]
        return {"_original_state": {**state, "files": self._files}}

    def _info(self) -> tfds.core.DatasetInfo:
        prepared = Path(self.data_path) / "features.json"
        if prepared.exists():
            found = tfds.features.FeaturesDict.from_config(str(prepared.parent))
        elif not self._files:
            raise UserError(
                f"{type(self).__name__} is not built in {self.data_path}: give the "
                'files to build it from, files={"train": path}'
            )
        else:
            if self.schema is None:
                self._look()
            assert self.schema is not None
            found = schema.features(self.schema)
        return tfds.core.DatasetInfo(
            builder=self,
            description=(type(self).__doc__ or "").strip(),
            features=found,
            homepage=self.HOMEPAGE,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # everything is a local file
        return {split: self._generate_examples(split) for split in self._files}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        assert self.schema is not None
        for number, record in enumerate(
            sources.records_of(self.LAYOUT, self._files[split])
        ):
            yield number, schema.encode(record, self.schema)


class FeedbackRecords(_Layout):
    """Feedback records from any source that jaxalign reads."""

    LAYOUT = "feedback"


class HelpSteer2(_Layout):
    """Pairs of HelpSteer2 by helpfulness, with five ratings of each response."""

    LAYOUT = "helpsteer2"
    HOMEPAGE = "https://huggingface.co/datasets/nvidia/HelpSteer2"


class HelpSteer2D(_Layout):
    """Pairs with a score for each segment, in the columns of Robust 2D-DPO."""

    LAYOUT = "helpsteer2d"
    HOMEPAGE = "https://github.com/nachiketapatil/Robust-2D-DPO"


class QaFeedback(_Layout):
    """Answers with human error spans against their corrections."""

    LAYOUT = "qa_feedback"
    HOMEPAGE = "https://github.com/allenai/FineGrainedRLHF"


class HelpSteer3(_Layout):
    """Pairs of HelpSteer3 by people's overall preference."""

    LAYOUT = "helpsteer3"
    HOMEPAGE = "https://huggingface.co/datasets/nvidia/HelpSteer3"


class Hh(_Layout):
    """Pairs of dialogues of HH-RLHF."""

    LAYOUT = "hh"
    HOMEPAGE = "https://github.com/anthropics/hh-rlhf"


class Implicit(_Layout):
    """Pairs of conversations or texts that begin with their prompt."""

    LAYOUT = "implicit"


class LlamaFactory(_Layout):
    """Rows in Alpaca's columns, as LLaMA-Factory reads them."""

    LAYOUT = "llamafactory"


class ShareGpt(_Layout):
    """Conversations in ShareGPT's turns, as LLaMA-Factory reads them."""

    LAYOUT = "sharegpt"


class UltraFeedback(_Layout):
    """Best against worst completion of UltraFeedback, with four ratings of each."""

    LAYOUT = "ultrafeedback"
    HOMEPAGE = "https://huggingface.co/datasets/openbmb/UltraFeedback"


class UltraFeedbackBinarized(_Layout):
    """Pairs of UltraFeedback, binarised."""

    LAYOUT = "ultrafeedback_binarized"
    HOMEPAGE = "https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized"


class RlaifV(_Layout):
    """Questions about images, each with two answers."""

    LAYOUT = "rlaif_v"
    HOMEPAGE = "https://huggingface.co/datasets/openbmb/RLAIF-V-Dataset"


BUILDERS = {
    builder.LAYOUT: builder
    for builder in (
        *(FeedbackRecords, HelpSteer2, HelpSteer2D, HelpSteer3, Hh, Implicit),
        *(LlamaFactory, QaFeedback, RlaifV, ShareGpt, UltraFeedback),
        UltraFeedbackBinarized,
    )
}
"""Builders by layout."""

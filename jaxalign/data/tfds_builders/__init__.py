"""Data sets of other layouts as feedback records, for Grain and for people.

Four published layouts, and jaxalign's own, become data sets of tensorflow-datasets in
the array_record format (no TensorFlow is imported), or JSON Lines::

    from jaxalign.data import tfds_builders

    built = tfds_builders.build("helpsteer2", {"train": "train.jsonl.gz"}, "sets/hs2")
    built.source("train")  # "tfds:sets/hs2/help_steer2/1.0.0:train", for --data

or, from a shell::

    python -m jaxalign.data.tfds_builders --layout helpsteer2 \
        --data train.jsonl.gz --out sets/hs2

The conversions themselves are pure functions of rows and need none of this: see
``helpsteer2.pair``, ``helpsteer2d.record``, ``qa_feedback.record`` and
``rlaif_v.record``.
"""

from jaxalign.data.tfds_builders.foreign import Converted, Dropped
from jaxalign.data.tfds_builders.sources import LAYOUTS, Counts, convert
from jaxalign.data.tfds_builders.writing import Built, build, write_jsonl


__all__ = [
    "LAYOUTS",
    "Built",
    "Converted",
    "Counts",
    "Dropped",
    "build",
    "convert",
    "write_jsonl",
]

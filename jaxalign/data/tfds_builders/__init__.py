"""Data sets of other layouts as feedback records, for Grain and for people.

Every layout of :mod:`jaxalign.data.layouts` becomes data sets of tensorflow-datasets in
the array_record format (no TensorFlow is imported), or JSON Lines::

    from jaxalign.data import tfds_builders

    built = tfds_builders.build("helpsteer2", {"train": "train.jsonl.gz"}, "sets/hs2")
    built.source("train")  # "tfds:sets/hs2/help_steer2/1.0.0:train", for --data

or, from a shell::

    python -m jaxalign.data.tfds_builders --layout helpsteer2 \
        --data train.jsonl.gz --out sets/hs2

The conversions themselves are pure functions of rows and need none of this: see
``jaxalign.data.layouts``, such as ``layouts.helpsteer2.pair``.
"""

from jaxalign.data.layouts import LAYOUTS, Converted, Dropped
from jaxalign.data.tfds_builders.sources import Counts, convert
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

"""``jaxalign convert``: a checkpoint once and for all as runs read it fastest.

Every process of a run then reads only what its devices hold, in parallel, so that a
restart on many hosts does not wait for each to read the whole checkpoint. --model of
every command takes the directory, on any mesh, with any adapter.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxalign.checkpoints.load import DType
from jaxalign.cli import devices, parsing


__all__ = ["ConvertConfig", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to convert.

    Attributes:
      model: Hugging Face checkpoint: a directory, or an id on the hub.
      out: new directory; it appears only when complete.
      dtype: of the weights; ``auto`` keeps them as they are.
    """

    model: str
    out: str
    dtype: DType = "auto"


def run(arguments: Sequence[str]) -> int:
    """Parse and convert."""
    from jaxalign import progress
    from jaxalign.checkpoints import convert

    parser = parsing.make_parser("convert", ConvertConfig, description=__doc__ or "")
    config = parsing.parse(parser, arguments, ConvertConfig)
    devices.set_up_jax()
    with progress.reading(f"loading {config.model}") as show:
        convert.convert(
            config.model, Path(config.out), dtype=config.dtype, progress=show
        )
    print(f"converted: {config.out}")
    return 0

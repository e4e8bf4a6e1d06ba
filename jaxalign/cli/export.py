"""``jaxalign export``: write a run, or a checkpoint, for others to load."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jaxalign.cli import devices, parsing
from jaxalign.errors import UserError


__all__ = ["ExportConfig", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to write, and how.

    Attributes:
      out: new directory; it appears only when complete.
      run: run directory to export from.
      model: checkpoint to write as it is, instead of a run: a directory, an id on the
        hub, or a GGUF file to make a checkpoint of.
      adapter: adapter directory on top of the model.
      step: of the run's checkpoint; default the newest.
      format: ``merged`` is a whole Hugging Face checkpoint, ``peft`` the adapter.
      max_shard_size: of a weight file, such as 5GB; default the files of the source.
    """

    out: str
    run: str | None = None
    model: str | None = None
    adapter: str | None = None
    step: int | None = None
    format: Literal["merged", "peft"] = "merged"
    max_shard_size: str | None = None

    def __post_init__(self) -> None:
        if (self.run is None) == (self.model is None):
            raise UserError("give either --run RUN or --model DIR, one of them")
        if self.run is not None and self.adapter is not None:
            raise UserError("--run has its own adapter: leave out --adapter")
        if self.model is not None and self.step is not None:
            raise UserError("--step chooses a checkpoint of --run: leave it out")
        if self.run is None and self.adapter is None and self.format == "peft":
            raise UserError(
                "--format peft writes an adapter: give --run, or --model and --adapter"
            )
        if self.format == "peft" and self.max_shard_size is not None:
            raise UserError("--max_shard_size has no effect with --format peft")


def run(arguments: Sequence[str]) -> int:
    """Parse and export."""
    from jaxalign.training import publish

    parser = parsing.make_parser("export", ExportConfig, description=__doc__ or "")
    config = parsing.parse(parser, arguments, ExportConfig)
    devices.set_up_jax()
    out = Path(config.out)
    if config.run is not None:
        publish.publish_run(
            Path(config.run),
            out,
            form=config.format,
            step=config.step,
            max_shard_size=config.max_shard_size,
        )
    elif config.adapter is not None:
        publish.publish_adapted(
            config.model,
            config.adapter,
            out,
            form=config.format,
            max_shard_size=config.max_shard_size,
        )
    else:
        publish.publish_model(config.model, out, max_shard_size=config.max_shard_size)
    print(f"exported: {out}")
    return 0

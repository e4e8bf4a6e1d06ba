"""The attention kernel of a run: chosen, and tried out, before anything is loaded."""

from jax.sharding import Mesh

from jaxalign.checkpoints import load as load_lib
from jaxalign.models.attention import trial
from jaxalign.models.attention.choice import KernelChoice, Work
from jaxalign.models.config import DecoderConfig
from jaxalign.training.config import TrainConfig


__all__ = ["choose"]


def choose(
    config: TrainConfig, model: DecoderConfig, mesh: Mesh, *, prefix: bool
) -> KernelChoice:
    """Return the kernel that a run uses. A fused one is tried out first.

    Args:
      config: of the run.
      model: what is trained.
      mesh: devices.
      prefix: whether the adapter has prefixes.
    Raises:
      UserError: see ``trial.choose_tried``.
    """
    work = Work(
        dtype=load_lib.compute_dtype(config.model, config.dtype),
        heads=model.num_heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        rows=config.batch_rows // config.mesh.rows,
        row_length=config.row_length,
        windows=any(window is not None for window in model.windows),
        softcap=model.attention_softcap is not None,
        prefix=prefix,
        tensor=config.mesh.tensor,
    )
    return trial.choose_tried(
        config.attention, work, mesh, softcap=model.attention_softcap
    )

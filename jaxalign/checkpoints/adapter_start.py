"""From an adapter's config to its weights beside a loaded checkpoint."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from jaxalign.adapters import adapter
from jaxalign.adapters.adapter import Adapter
from jaxalign.adapters.hybrid import HLPTConfig
from jaxalign.adapters.prefix import PrefixConfig
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.models import decoder
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.models.families import Family
from jaxalign.parallel import sharding
from jaxalign.types import ModelInputs


__all__ = ["make", "place", "shapes"]


def _sizes(config: DecoderConfig) -> dict[str, int]:
    """Return what of a model decides the shape of a prefix."""
    return {
        "width": config.width,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
    }


def make(
    key: Key[Array, ""], config: Adapter, checkpoint: Checkpoint
) -> dict[str, Any]:
    """Make an adapter's collections for a checkpoint that was cut for it.

    Args:
      key: consumed.
      config: options.
      checkpoint: with the groups of ``adapter.groups``.
    Returns:
      As ``adapter.init`` does; a prefix starts from its text where the options say so.
    Raises:
      UserError: the adapter chooses what is not there, or something twice.
    Example::

      base = load("smollm2", adapter=LoRAConfig(rank=8))
      collections = make(jax.random.key(0), LoRAConfig(rank=8), base)
    """
    model = checkpoint.config.text
    made = adapter.parts(config, model.num_layers).prefix
    start = None
    if made is not None and made.prefix_init == "text":
        start = _text_start(checkpoint, made)
    return adapter.init(
        key,
        checkpoint.variables["params"],
        config,
        num_layers=model.num_layers,
        sizes=_sizes(model),
        text=start,
    )


def _text_start(checkpoint: Checkpoint, config: PrefixConfig) -> Any:
    """Return the keys and values of the text that a prefix starts from."""
    tokenizer = load_tokenizer(str(checkpoint.path))
    tokens = np.asarray(tokenizer(config.prefix_text)["input_ids"], np.int32)
    length = config.prefix_length
    ones = jnp.ones((1, length), jnp.int32)
    inputs = ModelInputs(
        tokens=jnp.asarray(np.resize(tokens, (1, length))),
        positions=jnp.arange(length, dtype=jnp.int32)[None],
        sequence_ids=ones,
        branch_ids=0 * ones,
    )
    run = functools.partial(
        decoder.keys_and_values,
        checkpoint.config.text,
        groups=checkpoint.groups,
        dtype=checkpoint.dtype,
    )
    return jax.jit(run)(checkpoint.variables, inputs)


def shapes(config: Adapter, model: DecoderConfig | ModelConfig) -> tuple[Any, Any]:
    """Return the shapes of base weights and adapter without making either.

    Raises:
      UserError: the adapter chooses what is not there, or something twice.
    Example:
      >>> from jaxalign.adapters.lora import LoRAConfig
      >>> from jaxalign.models.rotary import Rotary
      >>> sizes = {"vocab_size": 8, "width": 8, "mlp_width": 16, "num_layers": 2}
      >>> heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
      >>> turned = Rotary(theta=10000.0, dims=4)
      >>> model = DecoderConfig(**sizes, **heads, norm_eps=1e-6, rotaries=(turned,))
      >>> _, adapters = shapes(LoRAConfig(rank=2, targets=("up_proj",)), model)
      >>> adapters["lora"]["layers_0_2"]["mlp"]["up_proj"]["a"].shape
      (2, 8, 2)
    """
    if isinstance(model, DecoderConfig):
        model = ModelConfig(text=model)
    whole = decoder.param_shapes(model)
    groups = adapter.groups(config, whole, model.text.num_layers)
    params = decoder.param_shapes(model, groups, adapter.vision_groups(config, whole))

    def init(params: Any) -> Any:
        return adapter.init(
            jax.random.key(0),
            params,
            _without_text(config),
            num_layers=model.text.num_layers,
            sizes=_sizes(model.text),
        )

    return params, jax.eval_shape(init, params)


def _without_text(config: Adapter) -> Adapter:
    """Return options that make the same tree without a pass of the model."""
    if isinstance(config, PrefixConfig | HLPTConfig):
        made = dataclasses.replace(config, prefix_text=PrefixConfig().prefix_text)
        return dataclasses.replace(made, prefix_init="normal")
    return config


def place(collections: Any, mesh: Mesh, family: Family) -> Any:
    """Put an adapter's leaves on a mesh, by the family's rules.

    Args:
      collections: of the adapter.
      mesh: devices.
      family: of the base model.
    Example::

      collections = place(collections, make_mesh(MeshConfig(data=8)), base.family)
    """
    return {
        name: jax.tree.map(
            sharding.put,
            tree,
            sharding.param_shardings(tree, mesh, family.sharding),
        )
        for name, tree in collections.items()
    }

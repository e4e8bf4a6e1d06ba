"""What generation needs of a decoder: an empty cache, and weights cut by layer."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import trees
from jaxalign.adapters.adapter import COLLECTIONS
from jaxalign.errors import UserError
from jaxalign.models.attention import cached
from jaxalign.models.config import DecoderConfig
from jaxalign.stacks import Group, group_name, group_of_name
from jaxalign.types import Variables


__all__ = ["by_layer", "make_cache"]


def make_cache(
    config: DecoderConfig,
    groups: Sequence[Group],
    variables: Variables,
    slots: int,
    length: int,
    dtype: Any = jnp.float32,
    block: int | None = None,
) -> Any:
    """Return an empty cache: keys and values of every layer, and the gates' sums.

    Keys are tuples of arrays [layers, slots, kv heads, head size, block], for one
    stretch of places each, values likewise but for the last two axes, which are the
    other way round; the slots are the second axis of every leaf.

    Args:
      config: of the model.
      groups: how its layers are cut.
      variables: with the adapters; a ``sequence_gate`` keeps a running sum.
      slots: rows.
      length: most tokens of a row.
      dtype: of keys and values.
      block: places of an array, see ``attention.cached``; default all in one.
    Raises:
      UserError: a gate that reads later tokens, which are not there yet.
    Example:
      >>> from jaxalign.models.rotary import Rotary
      >>> sizes = {"vocab_size": 8, "width": 8, "mlp_width": 16, "num_layers": 2}
      >>> heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
      >>> turned = Rotary(theta=10000.0, dims=4)
      >>> config = DecoderConfig(**sizes, **heads, norm_eps=1e-6, rotaries=(turned,))
      >>> cache = make_cache(config, [(0, 2)], {}, slots=3, length=16, block=8)
      >>> [block.shape for block in cache["layers_0_2"]["self_attn"]["key"]]
      [(2, 3, 2, 4, 8), (2, 3, 2, 4, 8)]
    """
    cache: dict[str, Any] = {}
    block = block or length
    for low, high in groups:
        stack = cache[group_name((low, high))] = {"self_attn": {}}
        for name, axis in cached.PLACES_AXIS.items():
            shape = [high - low, slots, config.num_kv_heads, *[config.head_dim] * 2]
            shape[axis] = block
            blocks = range(-(-length // block))
            stack["self_attn"][name] = tuple(jnp.zeros(shape, dtype) for _ in blocks)
    for collection in COLLECTIONS:
        for path in trees.paths(variables.get(collection, {})):
            *module, leaf = path.split("/")
            if leaf == "mean_gate":
                raise UserError(
                    "the adapter has a mean_gate, which averages over the whole "
                    "sequence: it cannot decode token by token. Train with gate token "
                    "or sequence instead"
                )
            if leaf == "sequence_gate":
                layers_here = group_of_name(module[0])
                assert layers_here is not None  # the head has no such gate
                count = layers_here[1] - layers_here[0]
                node = trees.node_at(cache, module)
                node["gate_sum"] = jnp.zeros((count, slots), jnp.float32)
    return cache


def by_layer(variables: Variables, *, donate: bool = False) -> Variables:
    """Cut base weights and adapters into stacks of one layer each, for generation.

    A step of a single token reads every weight once. Out of a stack the compiler copies
    each layer's weights first, and the cache in and out of its own: on CPUs that takes
    more than twice as long.

    Args:
      variables: cut in any way.
      donate: free every stack once its layers have been copied.
    Returns:
      Variables for a model with the groups (0, 1), (1, 2), ...
    Example:
      >>> stack = {"layers_0_2": {"mlp": {"up_proj": {"kernel": jnp.ones((2, 3, 4))}}}}
      >>> list(by_layer({"params": stack})["params"])
      ['layers_0_1', 'layers_1_2']
    """

    def cut_group(name: str, stack: Any) -> dict[str, Any]:
        group = group_of_name(name)
        if group is None or group[1] - group[0] == 1:
            return {name: stack}
        count = group[1] - group[0]
        leaves, structure = jax.tree.flatten(stack)
        pieces: list[list[Any]] = [[] for _ in range(count)]
        for leaf in leaves:
            for layer, piece in enumerate(pieces):
                # The place as an argument: one program for all layers.
                at = np.int32(layer)
                piece.append(jax.lax.dynamic_slice_in_dim(leaf, at, 1))
            if donate:
                jax.block_until_ready([piece[-1] for piece in pieces])
                leaf.delete()
        names = (group_name((group[0] + i, group[0] + i + 1)) for i in range(count))
        made = (jax.tree.unflatten(structure, piece) for piece in pieces)
        return dict(zip(names, made, strict=True))

    return {
        collection: {
            name: subtree
            for group, stack in groups.items()
            for name, subtree in cut_group(group, stack).items()
        }
        for collection, groups in variables.items()
    }

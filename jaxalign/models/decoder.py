"""The decoder: embeddings, groups of scanned layers, final norm, head."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxalign import trees
from jaxalign.adapters import saved
from jaxalign.errors import UserError
from jaxalign.models import attention, layers, rotary
from jaxalign.models.attention import cached
from jaxalign.models.config import DecoderConfig
from jaxalign.models.layers import Runtime
from jaxalign.stacks import Group, group_name, group_of_name
from jaxalign.types import Bound, Model, ModelInputs, RouterSums, Variables
from jaxalign.variables import check_variables


__all__ = [
    "Decoder",
    "Remat",
    "by_layer",
    "keys_and_values",
    "make_model",
    "param_shapes",
]

Remat = Literal["none", "dots", "full"]

_ADAPTERS = ("lora", "prefix", saved.COLLECTION)


def remat_policy(remat: Remat) -> Callable[..., bool] | None:
    """Return what the backward pass keeps of a layer; the rest is computed again.

    ``none`` keeps everything; ``dots`` keeps the results of linear layers and of
    attention, so that only cheap elementwise work is repeated; ``full`` keeps the input
    of each layer alone.
    """
    if remat == "full":
        return jax.checkpoint_policies.nothing_saveable
    # By name: a policy that keeps every product would keep a LoRA layer's two halves
    # beside their sum.
    return jax.checkpoint_policies.save_only_these_names(
        *layers.SAVED_NAMES, *attention.SAVED_NAMES
    )


class Decoder(nn.Module):
    """A decoder-only transformer whose layers are stacked and scanned by group.

    Parameters: ``embed_tokens/embedding`` [v, d]; for every group [lo, hi) a subtree
    ``layers_<lo>_<hi>`` whose leaves have hi - lo as their first axis; ``norm/scale``;
    and, unless the embeddings are tied, ``lm_head/kernel`` [d, v].
    """

    config: DecoderConfig
    groups: tuple[Group, ...]
    runtime: Runtime
    remat: Remat = "none"

    def setup(self) -> None:
        config = self.config
        self.embed_tokens = layers.Embedding(
            config.vocab_size, config.width, self.runtime, config.embedding_scale
        )
        block = layers.Block
        if self.remat != "none":
            block = nn.remat(block, policy=remat_policy(self.remat), prevent_cse=False)
        # Python runs once for all layers that are stacks of their own, and alike: it
        # would take longer than the compiler.
        alone = nn.jit(block)
        for group in self.groups:
            scanned = nn.scan(
                alone if group[1] - group[0] == 1 else block,
                variable_axes=dict.fromkeys(
                    (
                        "params",
                        *_ADAPTERS,
                        layers.KEYS_AND_VALUES,
                        layers.ROUTED,
                        layers.CACHE,
                    ),
                    0,
                ),
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
                length=group[1] - group[0],
            )
            module = scanned(config, self.runtime, name=group_name(group))
            setattr(self, group_name(group), module)
        self.norm = layers.RMSNorm(config)
        if not config.tie_embeddings:
            self.lm_head = layers.Dense(config.vocab_size, self.runtime, rounded=False)

    def hidden(self, inputs: ModelInputs) -> Float[Array, "b t d"]:
        """Return the last hidden state of every token, after the final norm."""
        layout = attention.row_layout(inputs)
        return self._run(inputs.tokens, inputs.positions, layout)

    def decode(
        self, tokens: Int[Array, "b t"], layout: attention.CacheLayout
    ) -> Float[Array, "b t d"]:
        """Return the hidden states of new tokens, which go into the cache."""
        return self._run(tokens, layout.positions, layout)

    def _run(self, tokens: Array, positions: Array, layout: layers.Layout) -> Array:
        config = self.config
        x = self.embed_tokens(tokens)
        lengths = attention.lengths(layout)
        tables = rotary.make_tables(config.rotaries, positions, lengths)
        for group in self.groups:
            own = layers.traits(config, *group)
            x, _ = getattr(self, group_name(group))(x, tables, layout, own)
        return self.norm(x)

    def logits(self, hidden: Float[Array, "*n d"]) -> Float[Array, "*n v"]:
        """Return the logits of hidden states, in float32."""
        config = self.config
        if config.tie_embeddings:
            own = self.get_variable(saved.COLLECTION, "lm_head")
            logits = self.embed_tokens.attend(hidden, own)
        else:
            logits = self.lm_head(hidden).astype(jnp.float32)
        if config.logits_divisor != 1.0:
            logits = logits / config.logits_divisor
        return attention.capped(logits, config.logits_softcap)

    def __call__(self, inputs: ModelInputs) -> Float[Array, "b t v"]:
        """Return the logits of every token; only for making parameters and tests."""
        return self.logits(self.hidden(inputs))


def make_model(
    config: DecoderConfig,
    *,
    groups: Sequence[Group] | None = None,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    lora_dropout: float = 0.0,
    attention_implementation: attention.Implementation = "xla",
    attention_block: int = 64,
    attention_sequences: int | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Return the decoder as pure functions.

    Equal arguments give equal models with equal hashes: passed as a static argument, a
    model loaded twice finds the programs of the first.

    Args:
      config: sizes and options.
      groups: how the layers are cut into stacks; default one stack of all.
      dtype: of the computation; weights are cast when used.
      remat: what the backward pass keeps of each layer.
      lora_dropout: of adapters' inputs, in calls with a key.
      attention_implementation: see ``models.attention``.
      attention_block: queries and keys of a block of ``xla`` attention.
      attention_sequences: most sequences of a row, which ``cudnn`` needs.
      mesh: devices, over which some kernels must be split by hand.
    """
    runtime = Runtime(
        # By one of its many names: types of scalars and dtypes do not hash alike.
        dtype=jnp.dtype(dtype),
        attention=attention_implementation,
        attention_block=attention_block,
        attention_sequences=attention_sequences,
        mesh=mesh,
        lora_dropout=lora_dropout,
        deterministic=True,
    )
    cut = tuple((low, high) for low, high in groups or ((0, config.num_layers),))
    decoder = Decoder(config, cut, runtime, remat)
    return Model(
        hidden_fn=Bound(_hidden, decoder),
        logits_fn=Bound(_logits, decoder),
        decode_fn=Bound(_decode, decoder),
        cache_fn=Bound(_cache, decoder),
        routed_fn=None if config.mixture is None else Bound(_routed, decoder),
    )


def _with_dropout(decoder: Decoder, key: Any) -> tuple[Decoder, dict[str, Any] | None]:
    """Return the decoder and the keys that a call with or without a key needs."""
    if key is None:
        return decoder, None
    noisy = dataclasses.replace(decoder.runtime, deterministic=False)
    return decoder.clone(runtime=noisy), {"dropout": key}


def _hidden(
    decoder: Decoder, variables: Variables, inputs: ModelInputs, *, key: Any = None
) -> Float[Array, "b t d"]:
    check_variables(variables, "hidden_fn")
    decoder, rngs = _with_dropout(decoder, key)
    out: Any = decoder.apply(variables, inputs, method=Decoder.hidden, rngs=rngs)
    return out


def _routed(
    decoder: Decoder, variables: Variables, inputs: ModelInputs, *, key: Any = None
) -> tuple[Float[Array, "b t d"], RouterSums]:
    check_variables(variables, "routed_fn")
    decoder, rngs = _with_dropout(decoder, key)
    out, found = decoder.apply(
        variables, inputs, method=Decoder.hidden, rngs=rngs, mutable=[layers.ROUTED]
    )
    is_sums = lambda node: isinstance(node, RouterSums)  # noqa: E731
    stacks = jax.tree.leaves(found[layers.ROUTED], is_leaf=is_sums)
    of_stacks = [jax.tree.map(lambda x: x.sum(0), stack) for stack in stacks]
    return out, jax.tree.map(lambda *xs: sum(xs), *of_stacks)


def _logits(
    decoder: Decoder, variables: Variables, hidden: Float[Array, "*n d"]
) -> Float[Array, "*n v"]:
    check_variables(variables, "logits_fn")
    out: Any = decoder.apply(variables, hidden, method=Decoder.logits)
    return out


def _decode(
    decoder: Decoder,
    variables: Variables,
    cache: Any,
    tokens: Any,
    positions: Any,
    valid: Any,
    lengths: Any = None,
) -> tuple[Float[Array, "b t d"], Any]:
    out, changed = decoder.apply(
        {**variables, layers.CACHE: cache},
        tokens,
        attention.CacheLayout(positions, valid, lengths=lengths),
        method=Decoder.decode,
        mutable=[layers.CACHE],
    )
    return out, changed[layers.CACHE]


def _cache(
    decoder: Decoder,
    variables: Variables,
    slots: int,
    length: int,
    dtype: Any = None,
    block: int | None = None,
) -> Any:
    check_variables(variables, "cache_fn")
    kind = decoder.runtime.dtype if dtype is None else dtype
    return make_cache(
        decoder.config, decoder.groups, variables, slots, length, kind, block
    )


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
    for collection in _ADAPTERS:
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


def keys_and_values(
    config: DecoderConfig,
    variables: Variables,
    inputs: ModelInputs,
    *,
    groups: Sequence[Group],
    dtype: Any = jnp.float32,
) -> Any:
    """Return every layer's keys, before rotation, and values of all tokens.

    Returns:
      ``{group: {"self_attn": {"key": (x,), "value": (x,)}}}`` with x of shape
      [l, b, t, kv heads, head size].
    """
    decoder = Decoder(config, tuple(groups), layers.Runtime(dtype=dtype))
    name = layers.KEYS_AND_VALUES
    _, found = decoder.apply(variables, inputs, method=Decoder.hidden, mutable=[name])
    return found[name]


def param_shapes(config: DecoderConfig, groups: Sequence[Group] | None = None) -> Any:
    """Return the shapes of the parameters without making any."""
    shapes = _param_shapes(config, tuple(groups or ((0, config.num_layers),)))
    return jax.tree.map(lambda leaf: leaf, shapes)  # dicts of the caller's own


@functools.lru_cache(maxsize=64)  # a command asks several times, and tracing takes long
def _param_shapes(config: DecoderConfig, groups: tuple[Group, ...]) -> Any:
    decoder = Decoder(config, groups, Runtime())
    return jax.eval_shape(lambda: init_params(decoder, jax.random.key(0)))


def init_params(decoder: Decoder, key: Any) -> Any:
    """Make random parameters, for tests and for training from nothing."""
    zeros = jnp.zeros((1, 2), jnp.int32)
    return decoder.init(key, ModelInputs(zeros, zeros, zeros + 1, zeros))["params"]

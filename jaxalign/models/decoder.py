"""The decoder: embeddings, groups of scanned layers, final norm, head."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxalign.adapters import saved
from jaxalign.adapters.adapter import COLLECTIONS
from jaxalign.errors import UserError
from jaxalign.models import attention, decoding, layers, rotary
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.models.layers import Runtime
from jaxalign.models.vision import sight
from jaxalign.models.vision.merge import put_features
from jaxalign.stacks import Group, group_name
from jaxalign.types import Bound, Model, ModelInputs, RouterSums, Variables
from jaxalign.variables import check_variables


__all__ = [
    "Decoder",
    "Remat",
    "keys_and_values",
    "make_model",
    "param_shapes",
]

Remat = Literal["none", "dots", "full"]


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
                        *COLLECTIONS,
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

    def hidden(
        self, inputs: ModelInputs, features: Float[Array, "b u d"] | None = None
    ) -> Float[Array, "b t d"]:
        """Return the last hidden state of every token, after the final norm.

        Args:
          inputs: packed rows.
          features: of their pictures.
        """
        x = self.embed_tokens(inputs.tokens)
        if features is not None:
            assert inputs.images is not None
            x = put_features(x, features, inputs.images.features_to)
        return self._run(x, inputs.positions, attention.row_layout(inputs))

    def decode(
        self,
        tokens: Int[Array, "b t"],
        layout: attention.CacheLayout,
        turned: Int[Array, "b t *axes"] | None = None,
        pictures: tuple[Float[Array, "u d"], Int[Array, "b t"]] | None = None,
    ) -> Float[Array, "b t d"]:
        """Return the hidden states of new tokens, which go into the cache.

        Args:
          tokens: new ones.
          layout: where they stand.
          turned: their rotary positions; default their places in the cache.
          pictures: features, and which of them each token stands for; -1: none.
        """
        x = self.embed_tokens(tokens)
        if pictures is not None:
            features, which = pictures
            seen = features[jnp.maximum(which, 0)].astype(x.dtype)
            x = jnp.where((which >= 0)[..., None], seen, x)
        return self._run(x, layout.positions if turned is None else turned, layout)

    def _run(self, x: Array, positions: Array, layout: layers.Layout) -> Array:
        config = self.config
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
    config: DecoderConfig | ModelConfig,
    *,
    groups: Sequence[Group] | None = None,
    vision_groups: Sequence[Group] | None = None,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    lora_dropout: float = 0.0,
    attention_implementation: attention.Implementation = "xla",
    attention_block: int = 64,
    attention_sequences: int | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Return a model as pure functions: a decoder, maybe with a tower that sees.

    Equal arguments give equal models with equal hashes: passed as a static argument, a
    model loaded twice finds the programs of the first.

    Args:
      config: sizes and options.
      groups: how the layers are cut into stacks; default one stack of all.
      vision_groups: how a tower's are.
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
    whole = config if isinstance(config, ModelConfig) else ModelConfig(text=config)
    text = whole.text
    cut = tuple((low, high) for low, high in groups or ((0, text.num_layers),))
    decoder = Decoder(text, cut, runtime, remat)
    policy = None if remat == "none" else remat_policy(remat)
    eyes = sight.of_config(whole, vision_groups, runtime, policy)
    return Model(
        hidden_fn=Bound(_hidden, (decoder, eyes)),
        logits_fn=Bound(_logits, decoder),
        decode_fn=Bound(_decode, decoder),
        cache_fn=Bound(_cache, decoder),
        routed_fn=None if text.mixture is None else Bound(_routed, (decoder, eyes)),
        image_fn=None if eyes is None else Bound(sight.features, eyes),
    )


def _with_dropout(decoder: Decoder, key: Any) -> tuple[Decoder, dict[str, Any] | None]:
    """Return the decoder and the keys that a call with or without a key needs."""
    if key is None:
        return decoder, None
    noisy = dataclasses.replace(decoder.runtime, deterministic=False)
    return decoder.clone(runtime=noisy), {"dropout": key}


def _hidden(
    parts: tuple[Decoder, sight.Sight | None],
    variables: Variables,
    inputs: ModelInputs,
    *,
    key: Any = None,
    features: Any = None,
) -> Float[Array, "b t d"]:
    check_variables(variables, "hidden_fn")
    features = _features(parts[1], variables, inputs, key, features)
    decoder, rngs = _with_dropout(parts[0], key)
    out: Any = decoder.apply(
        variables, inputs, features, method=Decoder.hidden, rngs=rngs
    )
    return out


def _features(
    eyes: sight.Sight | None,
    variables: Variables,
    inputs: ModelInputs,
    key: Any,
    given: Any,
) -> Any:
    if inputs.images is None or given is not None:
        return given
    if eyes is None:
        raise UserError(
            "the rows have pictures, but the model has no vision tower: load a "
            "vision-language checkpoint, or leave the pictures out"
        )
    return sight.features(eyes, variables, inputs.images, key=key)


def _routed(
    parts: tuple[Decoder, sight.Sight | None],
    variables: Variables,
    inputs: ModelInputs,
    *,
    key: Any = None,
    features: Any = None,
) -> tuple[Float[Array, "b t d"], RouterSums]:
    check_variables(variables, "routed_fn")
    features = _features(parts[1], variables, inputs, key, features)
    decoder, rngs = _with_dropout(parts[0], key)
    out, found = decoder.apply(
        variables,
        inputs,
        features,
        method=Decoder.hidden,
        rngs=rngs,
        mutable=[layers.ROUTED],
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
    *,
    turned: Any = None,
    pictures: Any = None,
) -> tuple[Float[Array, "b t d"], Any]:
    out, changed = decoder.apply(
        {**variables, layers.CACHE: cache},
        tokens,
        attention.CacheLayout(positions, valid, lengths=lengths),
        turned,
        pictures,
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
    return decoding.make_cache(
        decoder.config, decoder.groups, variables, slots, length, kind, block
    )


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


def param_shapes(
    config: DecoderConfig | ModelConfig,
    groups: Sequence[Group] | None = None,
    vision_groups: Sequence[Group] | None = None,
) -> Any:
    """Return the shapes of the parameters without making any."""
    whole = config if isinstance(config, ModelConfig) else ModelConfig(text=config)
    cut = tuple(groups or ((0, whole.text.num_layers),))
    shapes = _param_shapes(whole, cut, vision_groups and tuple(vision_groups))
    return jax.tree.map(lambda leaf: leaf, shapes)  # dicts of the caller's own


@functools.lru_cache(maxsize=64)  # a command asks several times, and tracing takes long
def _param_shapes(
    config: ModelConfig, groups: tuple[Group, ...], vision_groups: Any
) -> Any:
    decoder = Decoder(config.text, groups, Runtime())
    shapes: Any = jax.eval_shape(lambda: init_params(decoder, jax.random.key(0)))
    eyes = sight.of_config(config, vision_groups, Runtime())
    return shapes if eyes is None else {**shapes, **sight.param_shapes(eyes)}


def init_params(decoder: Decoder, key: Any) -> Any:
    """Make random parameters, for tests and for training from nothing."""
    zeros = jnp.zeros((1, 2), jnp.int32)
    return decoder.init(key, ModelInputs(zeros, zeros, zeros + 1, zeros))["params"]

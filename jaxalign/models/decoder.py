"""A decoder as pure functions over its variables, and the shapes of its parameters."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxalign.errors import UserError
from jaxalign.models import attention, decoding, layers
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.models.layers import Runtime
from jaxalign.models.transformer import Decoder, Remat, remat_policy
from jaxalign.models.vision import sight
from jaxalign.stacks import Group
from jaxalign.types import Bound, Model, ModelInputs, RouterSums, Variables
from jaxalign.variables import check_variables


__all__ = [
    "Decoder",
    "Remat",
    "keys_and_values",
    "make_model",
    "param_shapes",
]


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
    Example:
      >>> from jaxalign.models.rotary import Rotary
      >>> sizes = {"vocab_size": 8, "width": 8, "mlp_width": 16, "num_layers": 2}
      >>> heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
      >>> turned = Rotary(theta=10000.0, dims=4)
      >>> config = DecoderConfig(**sizes, **heads, norm_eps=1e-6, rotaries=(turned,))
      >>> hash(make_model(config)) == hash(make_model(config, groups=[(0, 2)]))
      True
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

    Args:
      config: of the decoder.
      variables: base and adapters.
      inputs: packed rows, [b, t].
      groups: how the layers are cut.
      dtype: of the computation.
    Returns:
      ``{group: {"self_attn": {"key": (x,), "value": (x,)}}}`` with x of shape
      [l, b, t, kv heads, head size].
    Example:
      >>> from jaxalign.models.rotary import Rotary
      >>> sizes = {"vocab_size": 8, "width": 8, "mlp_width": 16, "num_layers": 2}
      >>> heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
      >>> turned = Rotary(theta=10000.0, dims=4)
      >>> config = DecoderConfig(**sizes, **heads, norm_eps=1e-6, rotaries=(turned,))
      >>> row = ModelInputs(*[jnp.ones((1, 3), jnp.int32)] * 4)
      >>> run = functools.partial(keys_and_values, config, groups=[(0, 2)])
      >>> found = jax.eval_shape(run, {"params": param_shapes(config)}, row)
      >>> found["layers_0_2"]["self_attn"]["key"][0].shape
      (2, 1, 3, 1, 4)
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
    """Return the shapes of the parameters without making any.

    Args:
      config: sizes and options.
      groups: how the layers are cut into stacks; default one stack of all.
      vision_groups: how a tower's are.
    Example:
      >>> from jaxalign.models.rotary import Rotary
      >>> sizes = {"vocab_size": 8, "width": 8, "mlp_width": 16, "num_layers": 2}
      >>> heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
      >>> turned = Rotary(theta=10000.0, dims=4)
      >>> config = DecoderConfig(**sizes, **heads, norm_eps=1e-6, rotaries=(turned,))
      >>> param_shapes(config)["layers_0_2"]["mlp"]["up_proj"]["kernel"].shape
      (2, 8, 16)
    """
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

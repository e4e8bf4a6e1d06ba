"""The decoder as a Linen module: embeddings, groups of scanned layers, norm, head."""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign.adapters import saved
from jaxalign.adapters.adapter import COLLECTIONS
from jaxalign.models import attention, layers, rotary
from jaxalign.models.config import DecoderConfig
from jaxalign.models.layers import Runtime
from jaxalign.models.vision.merge import put_features
from jaxalign.stacks import Group, group_name
from jaxalign.types import ModelInputs


__all__ = ["Decoder", "Remat", "remat_policy"]

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

    >>> sizes = {"vocab_size": 8, "width": 8, "mlp_width": 16, "num_layers": 2}
    >>> heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
    >>> turned = rotary.Rotary(theta=10000.0, dims=4)
    >>> config = DecoderConfig(**sizes, **heads, norm_eps=1e-6, rotaries=(turned,))
    >>> decoder = Decoder(config, ((0, 2),), Runtime())
    >>> row = ModelInputs(*[jnp.ones((1, 3), jnp.int32)] * 4)
    >>> jax.eval_shape(decoder.init_with_output, jax.random.key(0), row)[0].shape
    (1, 3, 8)
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

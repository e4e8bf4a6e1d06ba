"""Log-probabilities of a batch under the policy and under its reference."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxalign import trees
from jaxalign.errors import UserError
from jaxalign.objectives import logps
from jaxalign.stacks import SCOPES
from jaxalign.types import Model, PreferenceBatch, RouterSums
from jaxalign.variables import check_variables


__all__ = [
    "PairLogps",
    "Pictures",
    "TokenLogps",
    "WithReference",
    "pair_logps",
    "policy_and_kl",
    "policy_token_logps",
    "reference_variables",
    "score_tokens",
    "shared_pictures",
    "tail_weights",
]

REFERENCE = "reference"
"""Collection of ``frozen`` that holds reference weights where they differ."""


class WithReference(NamedTuple):
    """What stands for ``frozen`` where a model's variables are no dict: an NNX state.

    A dict has its reference under ``frozen["reference"]``; a state has no place for it.
    """

    frozen: Any
    """The leaves that are not trained; a tree of None where all are."""
    reference: Any
    """The reference's whole variables, such as the state before training."""


class TokenLogps(NamedTuple):
    """What every objective starts from: one number a completion token, 0 for padding.

    The reference's are constants: they never get a gradient.
    """

    policy: Float[Array, "b c"]
    reference: Float[Array, "b c"]
    """0 throughout for an objective without a reference."""
    kl: Float[Array, "b c"] | None = None
    """KL(reference || policy) where the token is predicted, if it is needed."""
    router: RouterSums | None = None
    """What the policy's routers did, if it is a mixture of experts."""

    @property
    def logratios(self) -> Float[Array, "b c"]:
        """log pi - log pi_ref of every token."""
        return self.policy - self.reference


class PairLogps(NamedTuple):
    """Sums over whole responses. Padding is 0 everywhere."""

    logps: Float[Array, "b p 2"]
    ref_logps: Float[Array, "b p 2"]
    tokens: Float[Array, "b p 2"]

    @property
    def logratios(self) -> Float[Array, "b p 2"]:
        """log pi(y|x) - log pi_ref(y|x) of whole completions."""
        return self.logps - self.ref_logps


def policy_token_logps(
    variables: Any,
    batch: PreferenceBatch,
    *,
    model: Model,
    key: Key[Array, ""] | None = None,
    features: Float[Array, "b u d"] | None = None,
) -> Float[Array, "b c"]:
    """Run the model once over the rows and score the completion tokens.

    ``variables`` are what the model's functions take: collections, or an NNX state.
    ``features`` are those of the rows' pictures where they are known already.

    >>> from jaxalign.types import Completions, ModelInputs
    >>> bigrams = Model(lambda table, x: table[x.tokens], lambda table, row: row)
    >>> one, branches = jnp.ones((1, 3), jnp.int32), jnp.array([[0, 1, 2]])
    >>> places = jnp.minimum(branches, 1)  # both responses follow a prompt of one token
    >>> row = ModelInputs(jnp.array([[1, 2, 3]]), places, one, branches)
    >>> first = jnp.zeros((1, 2), jnp.int32)  # whose hidden state predicts either
    >>> answers = Completions(first, jnp.array([[2, 3]]), jnp.array([[0, 1]]), first)
    >>> scores, yes = jnp.ones((1, 1, 2, 1, 1)), jnp.ones((1, 1, 2, 1), bool)
    >>> batch = PreferenceBatch(row, answers, scores, yes, yes[..., 0, 0])
    >>> found = policy_token_logps(jnp.zeros((4, 4)), batch, model=bigrams)
    >>> print([f"{logp:.4f}" for logp in found[0]])  # log 1/4: all words are equal
    ['-1.3863', '-1.3863']
    """
    hidden, _ = _hidden(variables, batch, model=model, key=key, features=features)
    return logps.token_logps(model.logits_fn, variables, hidden, batch.completions)


def _hidden(
    variables: Any,
    batch: PreferenceBatch,
    *,
    model: Model,
    key: Any,
    features: Any = None,
) -> tuple[Float[Array, "b t d"], RouterSums | None]:
    keys = {} if key is None else {"key": key}
    if features is not None:
        keys["features"] = features
    if model.routed_fn is not None:
        return model.routed_fn(variables, batch.inputs, **keys)
    return model.hidden_fn(variables, batch.inputs, **keys), None


class Pictures(NamedTuple):
    """What policy and reference see together."""

    batch: PreferenceBatch
    """With the tower's states in the place of patches, where the connector differs."""
    features: Float[Array, "b u d"] | None
    """Of the rows' pictures; None where there are none, or each model has its own."""


def shared_pictures(
    trainable: Any, frozen: Any, batch: PreferenceBatch, *, model: Model
) -> Pictures:
    """Encode a batch's pictures as far as policy and reference do it alike.

    That is once, and without derivatives: up to features where nothing of tower and
    connector is trained and the reference has no others, up to the tower's states where
    only the connectors differ.

    Args:
      trainable: see :func:`score_tokens`.
      frozen: likewise.
      batch: packed rows.
      model: the policy; without ``image_fn`` nothing is done.
    Example:
      >>> yes = jnp.ones((1, 1, 2, 1), bool)
      >>> from jaxalign.types import ModelInputs
      >>> row = ModelInputs(*[jnp.ones((1, 3), jnp.int32)] * 4)  # a text, no pictures
      >>> scores, pairs = 4.0 * yes[..., None], yes[..., 0, 0]
      >>> batch = PreferenceBatch(row, None, scores, yes, pairs)
      >>> reads = Model(lambda table, x: table[x.tokens], lambda table, hidden: hidden)
      >>> found = shared_pictures({}, {"params": {}}, batch, model=reads)
      >>> found.batch is batch, found.features is None
      (True, True)
    """
    images = batch.inputs.images
    if model.image_fn is None or images is None:
        return Pictures(batch, None)
    others = (frozen.get(REFERENCE) or {}) if isinstance(frozen, dict) else {}
    trees_of_both = (*trainable.values(), *others.values())
    differ = {
        scope
        for scope in SCOPES
        if any(jax.tree.leaves(tree.get(scope)) for tree in trees_of_both)
    }
    variables = _combined(trainable, frozen)
    if not differ:
        found = model.image_fn(variables, images)
        return Pictures(batch, jax.lax.stop_gradient(found))
    if differ == {"connector"} and images.patches is not None:
        states = jax.lax.stop_gradient(model.image_fn(variables, images, states=True))
        seen = images._replace(states=states, patches=None)
        batch = batch._replace(inputs=batch.inputs._replace(images=seen))
    return Pictures(batch, None)


def reference_variables(trainable: Any, frozen: Any) -> Any:
    """Return the reference's weights: the base weights with every adapter off.

    Weights under ``frozen["reference"]`` come first (another model, or the starting
    values of base weights that are being trained). Without them no base weight may be
    trainable, because then nothing holds its starting value.

    Raises:
      UserError: parameters were given for variables, or nothing tells the reference of
        variables that are no dict.
      ValueError: base weights are trained and no reference was given.
    Example:
      >>> none = {"params": None, "lora": None}
      >>> trainable = {"params": {"up": None}, "lora": {"a": 1.0}}
      >>> frozen = {"params": {"up": 2.0}, "lora": {"a": None}}
      >>> reference_variables(trainable, frozen)  # the adapter is off
      {'params': {'up': 2.0}}
    """
    if isinstance(frozen, WithReference):
        return frozen.reference
    if not isinstance(frozen, dict):
        raise UserError(
            f"no reference: frozen is {type(frozen).__name__}, without collections "
            "to switch off. Give policy.WithReference(frozen, reference) in its place, "
            "or batches with ref_logps"
        )
    given = frozen.get(REFERENCE)
    if given is not None:
        if "params" in trainable or "params" in frozen:
            check_variables(given, "the reference")
        if frozen.get("params") is None:
            return given
        return {"params": trees.combine(given["params"], frozen["params"])}
    if jax.tree.leaves(trainable.get("params")):
        raise ValueError(
            "base weights are trained, so switching the adapter off does not give the "
            "reference: put the starting values of the trained weights in "
            "frozen['reference'], or give the batch cached ref_logps"
        )
    check_variables(frozen, "frozen")
    return {"params": frozen["params"]}


def _combined(trainable: Any, frozen: Any) -> Any:
    """Return the policy's variables; a collection may be in one of the two alone."""
    if isinstance(frozen, WithReference):
        return trees.combine(trainable, frozen.frozen)
    if not (isinstance(frozen, dict) and isinstance(trainable, dict)):
        return trees.combine(trainable, frozen)
    rest = {k: v for k, v in frozen.items() if k != REFERENCE}
    return {
        name: trees.combine(*(part[name] for part in (trainable, rest) if name in part))
        for name in {**trainable, **rest}
    }


def score_tokens(
    trainable: Any,
    frozen: Any,
    batch: PreferenceBatch,
    key: Key[Array, ""] | None,
    *,
    model: Model,
    reference: bool = True,
    kl: bool = False,
) -> TokenLogps:
    """Score the completion tokens of a batch under policy and reference.

    The reference is ``batch.ref_logps`` where given, otherwise
    :func:`reference_variables`; it never gets a gradient and never sees dropout.
    A model whose variables are not a dict (an NNX module, say) has its reference in
    :class:`WithReference` or in ``ref_logps``.

    Args:
      trainable: the leaves to differentiate, None elsewhere (``trees.partition``).
      frozen: all the others; may hold a ``reference`` collection, or be
        :class:`WithReference`.
      batch: packed rows.
      key: for dropout; None runs without.
      model: the policy.
      reference: False for an objective that has none.
      kl: whether to compare the whole distributions, which needs the reference live.
    Returns:
      One number a completion token, [b, c], 0 for padding.
    Raises:
      UserError: nothing tells the reference, see :func:`reference_variables`.
      ValueError: base weights are trained and no reference was given.
    Example:
      >>> bigrams = Model(lambda v, x: v["params"][x.tokens], lambda v, hidden: hidden)
      >>> from jaxalign.types import Completions, ModelInputs
      >>> row = ModelInputs(*[jnp.array([[1, 2, 3]])] * 4)
      >>> answers = Completions(*[jnp.array([[0, 1]])] * 4)  # tokens 0 and 1
      >>> yes = jnp.ones((1, 1, 2, 1), bool)
      >>> scores, pairs = 4.0 * yes[..., None], yes[..., 0, 0]
      >>> batch = PreferenceBatch(row, answers, scores, yes, pairs)
      >>> cached = batch._replace(ref_logps=jnp.array([[-1.0, -2.0]]))
      >>> trained, frozen = {"params": jnp.zeros((4, 4))}, {"params": None}
      >>> found = score_tokens(trained, frozen, cached, None, model=bigrams)
      >>> print([f"{ratio:.4f}" for ratio in found.logratios[0]])  # log 1/4 + 1, + 2
      ['-0.3863', '0.6137']
    """
    variables = _combined(trainable, frozen)
    batch, features = shared_pictures(trainable, frozen, batch, model=model)
    if kl:
        ref_variables = reference_variables(trainable, frozen)
        models = (model, model)
        return policy_and_kl(
            variables, ref_variables, batch, key, models=models, features=features
        )
    hidden, router = _hidden(variables, batch, model=model, key=key, features=features)
    policy = logps.token_logps(model.logits_fn, variables, hidden, batch.completions)
    if not reference:
        return TokenLogps(policy, jnp.zeros_like(policy), router=router)
    if batch.ref_logps is not None:
        found = batch.ref_logps.astype(jnp.float32)
    else:
        found = policy_token_logps(
            reference_variables(trainable, frozen),
            batch,
            model=model,
            features=features,
        )
    return TokenLogps(policy, jax.lax.stop_gradient(found), router=router)


def policy_and_kl(
    variables: Any,
    ref_variables: Any,
    batch: PreferenceBatch,
    key: Key[Array, ""] | None,
    *,
    models: tuple[Model, Model],
    features: Float[Array, "b u d"] | None = None,
) -> TokenLogps:
    """Score under policy and reference and compare their whole distributions.

    The two models may have cut their layers differently; their heads are the same.
    ``features`` are those of the rows' pictures where both see the same.

    Args:
      variables: the policy's.
      ref_variables: the reference's.
      batch: packed rows.
      key: for the policy's dropout; None runs without.
      models: policy and reference.
      features: see above, [b, u, d].
    Returns:
      With ``kl``, KL(reference || policy) a token in nats.
    Example:
      >>> bigrams = Model(lambda table, x: table[x.tokens], lambda table, row: row)
      >>> from jaxalign.types import Completions, ModelInputs
      >>> row = ModelInputs(*[jnp.array([[1, 2, 3]])] * 4)
      >>> answers = Completions(*[jnp.array([[0, 1]])] * 4)  # tokens 0 and 1
      >>> yes = jnp.ones((1, 1, 2, 1), bool)
      >>> scores, pairs = 4.0 * yes[..., None], yes[..., 0, 0]
      >>> batch = PreferenceBatch(row, answers, scores, yes, pairs)
      >>> tables = jnp.zeros((4, 4)), jnp.tile(jnp.array([9.0, 0.0, 0.0, 0.0]), (4, 1))
      >>> found = policy_and_kl(*tables, batch, None, models=(bigrams, bigrams))
      >>> print([f"{kl:.2f}" for kl in found.kl[0]])  # nearly log 4
      ['1.38', '1.38']
    """
    model, ref_model = models
    hidden, router = _hidden(variables, batch, model=model, key=key, features=features)
    known = {} if features is None else {"features": features}
    ref_hidden = jax.lax.stop_gradient(
        ref_model.hidden_fn(ref_variables, batch.inputs, **known)
    )
    policy, reference, kl = logps.token_logps_and_kl(
        model.logits_fn, variables, hidden, ref_variables, ref_hidden, batch.completions
    )
    return TokenLogps(policy, jax.lax.stop_gradient(reference), kl, router)


def pair_logps(
    tokens: TokenLogps,
    batch: PreferenceBatch,
    weights: Float[Array, "b c"] | None = None,
) -> PairLogps:
    """Sum over each response, every token weighed if there are weights.

    >>> from jaxalign.types import Completions
    >>> answers = Completions(*[jnp.array([[0, 0, 1, -1]])] * 4)  # 2 + 1 tokens
    >>> yes = jnp.ones((1, 1, 2, 1), bool)
    >>> scores, pairs = 4.0 * yes[..., None], yes[..., 0, 0]
    >>> batch = PreferenceBatch(None, answers, scores, yes, pairs)
    >>> found = jnp.array([[-1.0, -2.0, -4.0, 0.0]])
    >>> pair = pair_logps(TokenLogps(found, 0 * found), batch)
    >>> pair.logps.tolist(), pair.tokens.tolist()
    ([[[-3.0, -4.0]]], [[[2.0, 1.0]]])
    """
    response = batch.completions.response
    pairs = batch.pair_mask.shape[1]

    def sums(values: Array) -> Array:
        weighted = values if weights is None else values * weights
        return logps.response_sums(weighted, batch.completions, pairs)

    ones = (response >= 0).astype(jnp.float32)
    count = logps.response_sums(ones, batch.completions, pairs)
    return PairLogps(sums(tokens.policy), sums(tokens.reference), count)


def tail_weights(batch: PreferenceBatch, alpha: float) -> Float[Array, "b c"]:
    """Weigh the tokens of each response by 1, those beyond the shorter one by alpha.

    >>> from jaxalign.types import Completions
    >>> answers = Completions(*[jnp.array([[0, 0, 1, -1]])] * 4)  # 2 + 1 tokens
    >>> yes = jnp.ones((1, 1, 2, 1), bool)
    >>> scores, pairs = 4.0 * yes[..., None], yes[..., 0, 0]
    >>> batch = PreferenceBatch(None, answers, scores, yes, pairs)
    >>> tail_weights(batch, alpha=0.5)[0, :3].tolist()
    [1.0, 0.5, 1.0]
    """
    response = batch.completions.response
    pairs = batch.pair_mask.shape[1]
    ones = (response >= 0).astype(jnp.float32)
    counts = logps.response_sums(ones, batch.completions, pairs)
    shorter = counts.min(-1)
    mine = jnp.take_along_axis(shorter, jnp.maximum(response, 0) // 2, axis=1)
    return jnp.where(logps.token_positions(response) < mine, 1.0, alpha)

"""A model of one's own, in Flax NNX and in Linen: scored, trained and sampled.

A model is two functions over a tree of arrays. Packing, the shared prompt, the
reference and every objective come with that; the one thing that the model must do is to
take the mask of packed rows.

    python experiments/notebooks/04_any_model.py    # half a minute on a laptop
"""

# %%
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxalign
from jaxalign import trees
from jaxalign.generation.engine import Request, Sampling, generate
from jaxalign.models.attention import attention_mask
from jaxalign.objectives import objective, policy
from jaxalign.objectives.pairwise import PairwiseConfig


MODEL = os.environ.get("JAXALIGN_NOTEBOOK_MODEL", "smollm2")  # for its tokenizer
WIDTH, LONGEST = 32, 512

# %% Rows from Python, tokenised and packed
tokenizer = jaxalign.data.tokenizer.load_tokenizer(MODEL)
rows = [
    {"prompt": f"What is {a} and {b}?", "chosen": f"{a + b}.", "rejected": "No idea."}
    for a in range(2)
    for b in range(2)
]
data = jaxalign.data.pairs.prepare(rows, tokenizer, max_length=None)
batch = jax.tree.map(jnp.asarray, jaxalign.data.loader.single_batch(data))
vocabulary = 1 + max(int(batch.inputs.tokens.max()), len(tokenizer))


# %% Flax NNX: the state is what stands for variables
class Decoder(nnx.Module):
    """One block of attention with learnt positions."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Embed(vocabulary, WIDTH, rngs=rngs)
        self.places = nnx.Embed(LONGEST, WIDTH, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.head = nnx.Linear(WIDTH, vocabulary, rngs=rngs)

    def hidden(self, inputs: jaxalign.types.ModelInputs) -> jax.Array:
        """Return [b, t, d] of packed rows."""
        x = self.tokens(inputs.tokens) + self.places(inputs.positions)
        return x + self.attend(x, mask=attention_mask(inputs))


graph, state = nnx.split(Decoder(nnx.Rngs(0)))
nnx_model = jaxalign.Model(
    hidden_fn=lambda state, inputs: nnx.merge(graph, state).hidden(inputs),
    logits_fn=lambda state, hidden: nnx.merge(graph, state).head(hidden),
)


# %% Flax Linen: variables are {"params": ...}
class LinenDecoder(nn.Module):
    """The same block."""

    def setup(self) -> None:
        self.tokens = nn.Embed(vocabulary, WIDTH)
        self.places = nn.Embed(LONGEST, WIDTH)
        self.attend = nn.MultiHeadDotProductAttention(num_heads=2)
        self.head = nn.Dense(vocabulary)

    def hidden(self, inputs: jaxalign.types.ModelInputs) -> jax.Array:
        """Return [b, t, d] of packed rows."""
        x = self.tokens(inputs.tokens) + self.places(inputs.positions)
        return x + self.attend(x, mask=attention_mask(inputs))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return the head's."""
        return self.head(hidden)

    def __call__(self, inputs: jaxalign.types.ModelInputs) -> jax.Array:
        """Make all parameters."""
        return self.logits(self.hidden(inputs))


linen = LinenDecoder()
variables = linen.init(jax.random.key(0), batch.inputs)
linen_model = jaxalign.Model(
    hidden_fn=lambda v, inputs: linen.apply(v, inputs, method=LinenDecoder.hidden),
    logits_fn=lambda v, hidden: linen.apply(v, hidden, method=LinenDecoder.logits),
)


# %% Train each with DPO: the reference is where it began
def train(model: jaxalign.Model, trainable: object, frozen: object) -> tuple:
    """Take twenty steps of plain optax."""
    tx = optax.adam(1e-2)

    @jax.jit
    def step(trainable: object, opt_state: object) -> tuple:
        (loss, _), grads = jax.value_and_grad(
            lambda t: objective.loss_fn(
                t, frozen, batch, None, model=model, config=PairwiseConfig()
            ),
            has_aux=True,
        )(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    opt_state, losses = tx.init(trainable), []
    for _ in range(20):
        trainable, opt_state, loss = step(trainable, opt_state)
        losses.append(float(loss))
    return trainable, losses


everything = jax.tree.map(lambda _: True, state)
nothing = trees.partition(state, everything)[1]
trained, nnx_losses = train(nnx_model, state, policy.WithReference(nothing, state))
linen_trained, linen_losses = train(linen_model, variables, {"reference": variables})
for name, losses in (("NNX", nnx_losses), ("Linen", linen_losses)):
    print(f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    # Policy and reference are one at first: ln 2.
    assert abs(losses[0] - 0.6931) < 1e-3 and losses[-1] < 0.3

# %% Score: the library's log-probabilities are the module's own log-softmax
got = policy.policy_token_logps(trained, batch, model=nnx_model)
module = nnx.merge(graph, trained)
logps = jax.nn.log_softmax(module.head(module.hidden(batch.inputs)))
rows_of, (source, target) = jnp.arange(len(got))[:, None], batch.completions[:2]
want = jnp.where(batch.completions.response >= 0, logps[rows_of, source, target], 0)
print(f"largest difference of a token: {float(jnp.abs(got - want).max()):.1e}")
assert jnp.allclose(got, want, atol=1e-4)

# %% Sample: without cache functions the text is run again for every token (said once)
prompt = tokenizer(rows[0]["prompt"])["input_ids"]
request = Request(prompt, Sampling(max_new_tokens=8, temperature=0.0))
for model, weights in ((nnx_model, trained), (linen_model, linen_trained)):
    ((completion,),) = generate(model, weights, [request], text_of=tokenizer.decode)
    print(repr(completion.text))
    assert len(completion.tokens) == 8

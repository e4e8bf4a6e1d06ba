"""A judge that is a reward model: a checkpoint with one score in the place of a head.

The checkpoints are those of transformers' ``...ForSequenceClassification`` with one
label: a decoder of a supported family, and ``score.weight`` [1, d] beside it. The score
of a text is that row times the hidden state of the text's last token that is not the
padding token of config.json, as transformers pools it (``modeling_layers.py`` there,
``GenericForSequenceClassification``); it is on no scale.

A segment's score is that of the conversation up to its end: up to the last token whose
first character that is no blank stands before it. The last segment's is the score of
the whole answer, with all that the chat template prints behind it (plain texts get
EOS), which is what the model gives the conversation itself. All segments of an answer
come from one pass over it, answers to a prompt read it once, and rows are packed.
"""

import itertools
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxalign import progress
from jaxalign.checkpoints import contents, load, reward_head
from jaxalign.checkpoints.load import DType
from jaxalign.checkpoints.renderer import open_renderer
from jaxalign.data import packing
from jaxalign.data.records import Message, Record
from jaxalign.data.rendering import Renderer
from jaxalign.errors import UserError
from jaxalign.judging.in_process import graded
from jaxalign.judging.judge import JudgeRequest, Verdict, hash_of
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from jaxalign.types import Model, ModelInputs, Variables


__all__ = ["RewardJudge"]


class _Text(NamedTuple):
    """An answer behind its prompt, as tokens."""

    tokens: list[int]
    places: list[int]
    """For each segment, the token whose hidden state is scored."""
    shared: str
    """Tells texts with the same prompt."""


class _Loaded(NamedTuple):
    model: Model
    variables: Variables
    weight: Float[Array, " d"]
    renderer: Renderer
    pad: int | None


class RewardJudge:
    """See the module.

    Args:
      model: Hugging Face directory or id; loaded when the first request comes.
      aspect: what its score is called.
      dtype: of the weights and of the computation.
      mesh: how the devices are arranged.
      batch_rows: rows that are computed at the same time.
    Raises:
      UserError: the checkpoint has no such head, or is of no supported family.
    """

    def __init__(
        self,
        model: str,
        *,
        aspect: str,
        template_kwargs: Mapping[str, Any] | None = None,
        dtype: DType = "float32",
        mesh: MeshConfig | None = None,
        batch_rows: int = 4,
    ):
        reward_head.check(model)
        self._model, self._aspect = model, aspect
        self._dtype: DType = dtype
        self._mesh = mesh or MeshConfig()
        self._batch_rows = -(-batch_rows // self._mesh.rows) * self._mesh.rows
        self._settings = {
            "judge": "reward",
            "version": 1,
            "model": contents.fingerprint(model),
            "dtype": dtype,
        }
        self._template_kwargs = template_kwargs
        if template_kwargs:
            self._settings["chat_template_kwargs"] = dict(template_kwargs)
        self._loaded: _Loaded | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """What verdicts depend on."""
        return self._settings

    def grade(
        self, requests: Iterable[JudgeRequest]
    ) -> AsyncIterator[tuple[int, Verdict]]:
        """Yield (number of the request, verdict), in order."""
        return graded(requests, self._verdicts)

    def _verdicts(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        found = self._loaded = self._loaded or _opened(
            self._model, self._dtype, self._mesh, self._template_kwargs
        )
        texts: list[_Text | str] = []
        for request in requests:
            try:
                texts.append(_text(request, found.renderer, found.pad))
            except UserError as error:
                texts.append(str(error))
        readable = [text for text in texts if isinstance(text, _Text)]
        scores = iter(_scores(found, readable, self._batch_rows))
        verdicts = []
        for text in texts:
            if isinstance(text, str):
                verdicts.append(Verdict(None, failure=f"reward: {text}"))
                continue
            mine = next(scores)
            if not np.isfinite(mine).all():
                verdicts.append(Verdict(None, failure=f"reward: not finite: {mine}"))
                continue
            value = [{self._aspect: round(float(score), 6)} for score in mine]
            read = len(text.tokens)
            verdicts.append(Verdict({"segments": value}, prompt_tokens=read))
        return verdicts


def _opened(
    model: str,
    dtype: DType,
    mesh_config: MeshConfig,
    template_kwargs: Mapping[str, Any] | None,
) -> _Loaded:
    mesh = make_mesh(mesh_config)
    renderer = open_renderer(model, template_kwargs)
    with progress.reading(f"loading {model}") as show:
        checkpoint = load.load(
            model, dtype=dtype, mesh=mesh, headless=True, progress=show
        )
    head = reward_head.read(model)
    weight = jnp.asarray(head.weight, jnp.float32)
    return _Loaded(
        checkpoint.model, checkpoint.variables, weight, renderer, head.padding
    )


def _text(request: JudgeRequest, renderer: Renderer, pad: int | None) -> _Text:
    """Return a request as the text that is scored.

    Raises:
      UserError: it asks for something else, or cannot be told in tokens.
    """
    subject = request.subject
    if request.task != "scores":
        raise UserError(
            f"it scores responses and answers no {request.task}, as judge.name openai "
            "does"
        )
    if subject.images:
        raise UserError("it sees no images")
    given = subject.prompt
    turns = given if isinstance(given, str) else tuple(Message(**t) for t in given)
    record = Record(
        *(turns, subject.response, None, None, None, "the response"),
        template_kwargs=subject.template_kwargs or {},
    )
    renderings = renderer.completions(record)
    (rendering,), (encoding,) = renderings, renderer.encode(renderings)
    tokens, text = encoding.tokens.tolist(), rendering.text
    first = []
    for start, end in encoding.spans.tolist():
        inked = (c for c in range(start, end) if not text[c].isspace())
        first.append(next(inked, start))
    if rendering.plain and (eos := renderer.tokenizer.eos_token_id) is not None:
        tokens.append(eos)
        first.append(len(text))
    scored = [place for place, token in enumerate(tokens) if token != pad]
    places, (turn,) = [], rendering.turns
    for _, end in subject.spans[:-1]:
        stop = turn.place.begin + int(np.searchsorted(turn.place.origins, end))
        inside = [p for p in scored if first[p] < stop]
        places.append(inside[-1] if inside else 0)
    places.append(scored[-1] if scored else 0)
    return _Text(tokens, places, hash_of([subject.prompt, subject.template_kwargs]))


def _scores(
    loaded: _Loaded, texts: Sequence[_Text], batch_rows: int
) -> list[Float[np.ndarray, " s"]]:
    """Return the scores of each text's segments."""
    found: list[np.ndarray] = [np.zeros(0)] * len(texts)
    if not texts:
        return found
    groups = _groups(texts)
    sizes = np.array([_size([texts[i] for i in group]) for group in groups])
    length = _rounded(int(sizes.max()))
    rows = packing.plan_rows(
        sizes,
        row_length=length,
        pairs=len(groups),
        seed=0,
        epoch=0,
        shuffle=False,
    )
    laid = [_row([[texts[i] for i in groups[g]] for g in row], length) for row in rows]
    wanted = _rounded(max(len(row.source) for row in laid))
    laid += [_row([], length)] * (-len(laid) % batch_rows)
    numbers = [[i for g in row for i in groups[g]] for row in rows]
    for begin in range(0, len(rows), batch_rows):
        part = laid[begin : begin + batch_rows]
        arrays: Any = np.stack([row.inputs for row in part], axis=1)
        source: Any = np.stack([_padded(row.source, wanted) for row in part])
        scored = _compute(
            loaded.variables,
            loaded.weight,
            ModelInputs(*arrays),
            source,
            model=loaded.model,
        )
        values = jax.device_get(scored)
        for row, mine in zip(numbers[begin : begin + batch_rows], values, strict=False):
            at = 0
            for i in row:
                found[i] = mine[at : at + len(texts[i].places)]
                at += len(texts[i].places)
    return found


class _Row(NamedTuple):
    inputs: Int[np.ndarray, "4 t"]
    """Tokens, positions, sequences and branches, as of ``ModelInputs``."""
    source: list[int]
    """Where the hidden states are that are scored, text by text."""


def _groups(texts: Sequence[_Text]) -> list[list[int]]:
    """Return which texts have the same prompt."""
    groups: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        groups.setdefault(text.shared, []).append(number)
    return list(groups.values())


def _prefix(texts: Sequence[_Text]) -> int:
    """Return how many tokens all texts begin with."""
    columns = zip(*(text.tokens for text in texts), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda c: len(set(c)) == 1, columns))


def _size(texts: Sequence[_Text]) -> int:
    shared = _prefix(texts)
    return shared + sum(len(text.tokens) - shared for text in texts)


def _row(groups: Sequence[Sequence[_Text]], length: int) -> _Row:
    """Lay groups out one after the other, what is shared once."""
    inputs = np.zeros((4, length), np.int32)
    source: list[int] = []
    end = 0

    def put(tokens: Sequence[int], position: int, sequence: int, branch: int) -> None:
        nonlocal end
        place = slice(end, end + len(tokens))
        positions = np.arange(position, position + len(tokens))
        for name, value in enumerate((tokens, positions, sequence, branch)):
            inputs[name, place] = value
        end += len(tokens)

    for sequence, texts in enumerate(groups, 1):
        shared, begin = _prefix(texts), end
        put(texts[0].tokens[:shared], 0, sequence, 0)
        for branch, text in enumerate(texts, 1):
            own = end - shared
            put(text.tokens[shared:], shared, sequence, branch)
            source += [(begin if p < shared else own) + p for p in text.places]
    return _Row(inputs, source)


def _padded(values: Sequence[int], size: int) -> Int[np.ndarray, " c"]:
    return np.pad(np.asarray(values, np.int32), (0, size - len(values)))


def _rounded(size: int) -> int:
    """Return the next of 64, 128, 256, ...: few programs."""
    return max(64, 1 << (size - 1).bit_length())


def _reward(
    variables: Variables,
    weight: Float[Array, " d"],
    inputs: ModelInputs,
    source: Int[Array, "b c"],
    *,
    model: Model,
) -> Float[Array, "b c"]:
    hidden = model.hidden_fn(variables, inputs)
    taken = jnp.take_along_axis(hidden, source[..., None], axis=1)
    return taken.astype(jnp.float32) @ weight


_compute = jax.jit(_reward, static_argnames="model")

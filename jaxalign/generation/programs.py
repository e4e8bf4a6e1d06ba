"""The engine's compiled steps, and how they get compiled at the same time."""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxalign.generation import drawing, steps
from jaxalign.generation.completions import Request
from jaxalign.generation.drawing import Edits
from jaxalign.generation.prefill import PIECE, WaitingPrompt, extent_of
from jaxalign.generation.steering import Steering
from jaxalign.generation.steps import Sights, Slots


__all__ = [
    "admit",
    "advance",
    "begin_edits",
    "cache_form",
    "compile_together",
    "draw",
    "empty",
    "encode",
    "lowered",
    "names_of",
    "no_edits",
    "pick",
    "prefill",
    "step",
]

_MOST_BLOCKS = 8
"""Of a cache on CPUs, see ``models.attention.cached``: each takes time to compile."""

empty = jax.jit(
    steps.empty,
    static_argnames=("model", "slots", "length", "vocab", "dtype", "block", "mesh"),
)
encode = jax.jit(steps.encode, static_argnames=("model", "mesh"))
pick = jax.jit(steps.pick, static_argnames=("dtype", "mesh"))
prefill = jax.jit(
    steps.prefill, static_argnames=("model", "mesh"), donate_argnames="cache"
)
admit = jax.jit(
    steps.admit, static_argnames=("extent", "mesh"), donate_argnames="slots"
)
step = jax.jit(steps.step, static_argnames=("model", "mesh"), donate_argnames="slots")
# The same in two, where a slot is steered.
draw = jax.jit(drawing.draw, static_argnames="mesh", donate_argnames="edits")
advance = jax.jit(
    steps.advance, static_argnames=("model", "mesh"), donate_argnames="slots"
)
no_edits = jax.jit(drawing.no_edits, static_argnames=("slots", "vocab", "mesh"))
begin_edits = jax.jit(drawing.begin, static_argnames="mesh", donate_argnames="edits")


def cache_form(
    devices: Collection[Any], length: int, dtype: Any
) -> tuple[int | None, Any]:
    """Return places of one array of a cache, None for all, and the kind of its numbers.

    Args:
      devices: that the cache lies on.
      length: most tokens of a slot.
      dtype: as asked for; None for the model's.
    Example:
      >>> cache_form(jax.devices("cpu")[:1], length=4096, dtype="bfloat16")
      (512, 'bfloat16')
    """
    if [device.platform for device in devices] != ["cpu"]:
        return None, dtype
    least = -(-length // _MOST_BLOCKS)
    # To put a narrow number in place, CPUs copy the whole block.
    return -(-least // PIECE) * PIECE, np.float32 if dtype is None else dtype


def names_of(request: Request, length: int) -> Iterator[Hashable]:
    """Yield a name for each program that a request needs in slots of a length."""
    yield "prefill", request.judged, _axes(request)
    yield "admit", extent_of(len(request.tokens), length)
    if request.steering is None:
        yield ("step",)
    else:
        yield from (("draw",), ("advance",), ("begin_edits",))


def _axes(request: Request) -> int | None:
    """Return how rotary positions are told: None for a prompt without pictures."""
    if request.images is None:
        return None
    return 0 if request.positions is None else request.positions.ndim


def lowered(
    name: Any,
    variables: Any,
    slots: Slots,
    row: Slots,
    edits: Edits | None,
    hidden: jax.ShapeDtypeStruct,
    static: Mapping[str, Any],
) -> jax.stages.Lowered:
    """Return a program, from arguments like those that it will be called with.

    Args:
      name: see :func:`names_of`.
      variables: of the model.
      slots: of the engine.
      row: a single slot.
      edits: of the slots, for steered requests.
      hidden: a token's hidden state.
      static: model and mesh.
    """
    kind, *options = name
    one, mesh = np.int32(1), static["mesh"]
    count, vocab = slots.logits.shape
    flags, no = np.zeros(count, bool), np.array(False)
    if kind == "step":
        return step.lower(variables, slots, flags, no, **static)
    if kind == "advance":
        tokens = jax.ShapeDtypeStruct(
            (count,), np.int32, sharding=slots.positions.sharding
        )
        return advance.lower(variables, slots, tokens, flags, **static)
    if kind == "draw":
        masks = np.zeros((count, -(-vocab // 32)), np.uint32)
        return draw.lower(slots, edits, flags, no, flags, masks, mesh=mesh)
    if kind == "begin_edits":
        return begin_edits.lower(edits, one, Steering().edits(vocab), mesh=mesh)
    if kind == "prefill":
        following = np.zeros(PIECE, np.int32) if options[0] else None
        piece = np.zeros((1, PIECE), np.int32)
        sights = _sights(options[1], hidden, row)
        values = variables, row.cache, piece, one, one, one, following, sights
        return prefill.lower(*values, **static)
    sees = slots.offsets is not None
    start = WaitingPrompt(0, Request([0])).start(0, vocab, sees=sees)
    values = slots, row.cache, row.logits, start
    return admit.lower(*values, extent=options[0], mesh=mesh)


def _sights(axes: int | None, hidden: Any, row: Slots) -> Sights | None:
    """Return what a piece of a prompt with pictures looks like."""
    if axes is None:
        return None
    place = row.logits.sharding
    features = jax.ShapeDtypeStruct(
        (PIECE, *hidden.shape), hidden.dtype, sharding=place
    )
    which = np.zeros((1, PIECE), np.int32)
    turned = (None, which, np.zeros((1, PIECE, 3), np.int32))[axes]
    return Sights(features, which, turned)  # pyright: ignore[reportArgumentType]


def compile_together(lowerings: Iterable[Callable[[], jax.stages.Lowered]]) -> None:
    """Compile programs at the same time, each in a thread of its own.

    Most of a compilation is one core's work, and needs no lock of Python's. What is
    compiled here is in JAX's cache: a call of the function with such arguments finds
    it there.

    Args:
      lowerings: each gives one program, before it is compiled. They are called one
        after the other, in this thread, as JAX's settings may be this thread's own.
    """
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(lowering().compile) for lowering in lowerings]:
            done.result()

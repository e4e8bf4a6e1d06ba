"""``--dtype fastest``: the dtype in which a device multiplies a model's layers faster.

GPUs and TPUs are made for bfloat16. CPUs differ: some have units for it, and others
take longer than in float32; there both are tried, on products of the layers' own
shapes.
"""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import products, progress
from jaxalign.checkpoints.load import DType, open_config
from jaxalign.configs import read_yaml


__all__ = ["kept_in", "resolve", "speed_of_bfloat16"]

_CLEARLY = 1.1
"""Times float32's speed from which bfloat16 is worth its rounding."""

_LARGEST = 2e9
"""Multiplications of a trial, which then takes a moment on one slow core."""


def resolve(option: DType, model: str | Path, *, kept: Any = None) -> DType:
    """Return a dtype for what was asked for, and say in a line why.

    Where ``bfloat16`` is asked for by name and slower than float32, a line says so.

    Args:
      option: what was asked for; all but ``fastest`` is returned as it is.
      model: checkpoint.
      kept: the dtype that the files of a run or output were begun with, which then is
        what ``fastest`` means, on whatever machine; None where nothing is begun.
    Raises:
      UserError: the checkpoint has no config, or one that is not understood.
    """
    if option == "fastest" and kept is not None:
        progress.say(f"dtype: {kept} (what it was begun with)")
        return kept
    if option not in ("fastest", "bfloat16"):
        return option
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        if option == "fastest":
            _say(f"dtype: bfloat16 (what a {device.device_kind} multiplies fastest)")
        return "bfloat16"
    if jax.process_count() > 1:  # which might not agree
        return "float32" if option == "fastest" else option
    config = open_config(model)[0].text
    ratio = speed_of_bfloat16(config.width, config.mlp_width)
    speed = f"{ratio:.1f} × float32's products on this CPU"
    if option == "fastest":
        if ratio >= _CLEARLY:
            _say(f"dtype: bfloat16 ({speed})")
            return "bfloat16"
        _say(f"dtype: float32 (bfloat16 makes {speed})")
        return "float32"
    if ratio < 1:
        _say(f"dtype: bfloat16 makes {speed}: --dtype float32 is faster here")
    return option


def kept_in(config: Path) -> Any:
    """Return the dtype that a run's file of options has; None where there is none."""
    return read_yaml(config).get("dtype") if config.is_file() else None


@functools.lru_cache(maxsize=64)
def _say(line: str) -> None:
    """Say a line once, however many stages of a run begin with it."""
    progress.say(line)


@functools.lru_cache(maxsize=8)
def speed_of_bfloat16(width: int, mlp_width: int) -> float:
    """Return how many times as fast as float32 the default device multiplies it.

    The shapes are those of an MLP's way up and down for a few hundred tokens; the
    quickest of several turns counts, taken alternately.
    """
    rows = int(min(512, max(16, _LARGEST // (2 * width * mlp_width))))

    @jax.jit
    def up_and_down(x: Any, up: Any, down: Any) -> Any:
        return products.matmul(products.matmul(x, up).astype(x.dtype), down)

    shapes = (rows, width), (width, mlp_width), (mlp_width, width)
    factors = {
        dtype: [jnp.full(shape, 1 / 64, dtype) for shape in shapes]
        for dtype in ("float32", "bfloat16")
    }
    best = dict.fromkeys(factors, float("inf"))
    for turn in range(7):
        for dtype, arrays in factors.items():
            began = time.perf_counter()
            jax.block_until_ready(up_and_down(*arrays))
            if turn:  # the first one compiles
                best[dtype] = min(best[dtype], time.perf_counter() - began)
    return best["float32"] / best["bfloat16"]

"""Several processes, one run: which one this is, and what they do together.

The same command starts once on every host (on GPUs once a device); each process builds
its own rows, and the first one writes what is written once. With one process everything
here returns at once. https://docs.jax.dev/en/latest/multi_process.html
"""

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign import progress
from jaxalign.errors import UserError
from jaxalign.parallel import lifeline


__all__ = [
    "agreed",
    "barrier",
    "gather",
    "initialise",
    "is_first",
    "is_loss",
    "leave",
    "on_first",
    "several",
]

T = TypeVar("T")

_HEARTBEAT = 60
"""Seconds without a sign of life after which a process is taken for dead. What it was
to answer fails at once where its connection breaks; this is for where it does not."""

_SHUTDOWN = 120
"""Seconds that a process waits at its end for the others, such as for a report."""

_STARTED_BY = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""How many processes a launcher started, in its words."""


def initialise(distributed: str = "auto") -> None:
    """Join the other processes of a run; to be called before JAX is used.

    Processes other than the first print nothing but errors from then on.

    Args:
      distributed: ``auto`` finds the others as ``jax.distributed.initialize`` does (TPU
        VMs, GKE, Slurm, Open MPI), and is one process where there is no cluster;
        ``off`` is one process anywhere; ``COORDINATOR:PORT,N,ID`` says it all: where
        process 0 listens, how many there are, and which this is, from 0.
    Raises:
      UserError: the text is none of these; the others cannot be reached; or JAX was
        used before.
    Example:
      >>> initialise("off")
      >>> several()
      False
    """
    if distributed == "off" or jax.distributed.is_initialized():
        return
    options: dict[str, Any] = {
        "heartbeat_timeout_seconds": _HEARTBEAT,
        "shutdown_timeout_seconds": _SHUTDOWN,
    }
    if distributed != "auto":
        options |= _parsed(distributed)
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        if distributed == "auto" and _is_no_cluster(error):
            return
        raise UserError(
            f"distributed {distributed}: the processes of this run cannot be joined: "
            f"{error}. Start the same command on every host, with COORDINATOR:PORT,"
            "N,ID where no cluster is found, or with off for one process"
        ) from None
    progress.console.quiet = not is_first()
    # On CPUs the first exchange has half a minute for all to arrive, and now they do.
    barrier("joined")
    _hold(options.get("coordinator_address", "").rpartition(":")[0])


def _hold(host: str) -> None:
    """Have this process end when another dies, whatever either does at that time.

    Args:
      host: where the first process is reached; default it finds that out.
    """
    if not several():
        return
    if is_first():
        listener = lifeline.Listener(host or lifeline.own_address())
        agreed(listener.place)
        lines = listener.accept(jax.process_count() - 1)
    else:
        lines = lifeline.connect(agreed(""))
    lifeline.watch(lines, _leave)


def _leave() -> None:
    leave("another process of this run has gone", 42)


def leave(why: str, status: int) -> None:
    """End this process at once, as Python's own end would wait for the others.

    Args:
      why: said on standard error.
      status: 42 where all are to be started again.
    Example::

      multihost.leave("another process of this run has gone", 42)
    """
    print(f"jaxalign: {why}", file=sys.stderr)
    if status == 42:
        print("jaxalign: give the same command again, everywhere", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _parsed(text: str) -> dict[str, Any]:
    """Read ``COORDINATOR:PORT,N,ID``.

    >>> _parsed("10.0.0.2:1234,4,3")["process_id"]
    3
    """
    parts = text.split(",")
    host, colon, port = parts[0].rpartition(":")
    numbers = [part.strip() for part in (port, *parts[1:])]
    if len(parts) == 3 and host and colon and all(part.isdecimal() for part in numbers):
        count, number = map(int, numbers[1:])
        if number < count:
            return {
                "coordinator_address": f"{host}:{numbers[0]}",
                "num_processes": count,
                "process_id": number,
            }
    raise UserError(
        f"distributed {text!r} is not known: expected auto, off, or COORDINATOR:PORT,N,"
        "ID, where process 0 listens, how many processes there are and which of them "
        "this is, from 0, such as 10.0.0.2:1234,4,0"
    )


def _is_no_cluster(error: Exception) -> bool:
    """Tell that there is nobody to join from a cluster that cannot be joined."""
    if isinstance(error, ValueError):
        return "coordinator_address" in str(error)
    # JAX was used before. In a process that no launcher started that is no error: the
    # second command of a notebook, say.
    started = [int(os.environ.get(name, "1") or 1) for name in _STARTED_BY]
    return "before" in str(error) and max(started) == 1


def several() -> bool:
    """Return whether there are other processes.

    >>> several()
    False
    """
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Return whether this process writes what is written once.

    >>> is_first()
    True
    """
    return not several() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here.

    Args:
      name: of the place, the same everywhere.
    Example:
      >>> barrier("saved")
    """
    if several():
        multihost_utils.sync_global_devices(name)


def on_first(work: Callable[[], T]) -> T | None:
    """Have the first process do something while the others wait for it.

    Args:
      work: what it does, without the others: it may use its own devices alone.
    Returns:
      What ``work`` returned in the first process, None in the others.
    Raises:
      UserError: what ``work`` raised, in every process.
    Example:
      >>> on_first(lambda: 3)
      3
    """
    if not several():
        return work()
    made, failure = None, ""
    if is_first():
        try:
            made = work()
        except UserError as error:
            failure = str(error)
    if said := agreed(failure):
        raise UserError(said)
    return made


def is_loss(error: Exception) -> bool:
    """Return whether an error says that another process has gone.

    JAX has no class for it: whatever the runtime raises counts, but for memory that
    does not suffice, and errors of the exchange between CPUs, which may come as others.

    >>> is_loss(ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"))
    True
    >>> is_loss(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    False
    """
    if "RESOURCE_EXHAUSTED" in str(error):
        return False
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def agreed(text: str) -> str:
    """Return the first process's text in every process.

    >>> agreed("4 rows")
    '4 rows'
    """
    if not several():
        return text
    own = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(own.size)))
    padded = np.zeros(size, np.uint8)
    if is_first():
        padded[:] = own
    said = np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)
    return said.tobytes().decode()


def gather(tree: Any) -> Any:
    """Return arrays that lie on devices of many processes, whole, as numpy arrays.

    >>> gather({"losses": jax.numpy.ones(2)})
    {'losses': array([1., 1.], dtype=float32)}
    """
    if not several():
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))

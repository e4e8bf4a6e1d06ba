"""Which parts of a model are the same at every step, so that their output is kept.

Where nothing of tower and connector is trained, the connector's output is kept; where
the connector alone is, the tower's states. What is kept need not be loaded.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxalign import trees
from jaxalign.checkpoints import adapter_files, contents, runs
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.adapter_files import AdapterFiles
from jaxalign.data.kept_features import Kept
from jaxalign.errors import UserError
from jaxalign.models import decoder
from jaxalign.stacks import SCOPES, scope_of
from jaxalign.types import Variables


__all__ = [
    "changed_scopes",
    "check_same_eyes",
    "encoded_scopes",
    "kept_of",
    "kept_of_policy",
    "scopes_to_load",
]


def changed_scopes(collections: Variables, trained: Any = None) -> set[str]:
    """Return the parts of a model that are not as its checkpoint has them.

    Args:
      collections: of an adapter; ``params`` among them do not count.
      trained: a mask of the base weights.
    Example:
      >>> lora = {"layers_0_2": {"q_proj": 1}, "connector": {"linear_1": 2}}
      >>> sorted(changed_scopes({"lora": lora}))
      ['', 'connector']
    """
    adapters = [tree for name, tree in collections.items() if name != "params"]
    found = {scope_of(path) for tree in adapters for path in trees.paths(tree)}
    mask = {} if trained is None else trees.by_path(trained)
    return found | {scope_of(path) for path, is_trained in mask.items() if is_trained}


def kept_of(model: str, changed: Collection[str], *, sees: bool) -> Kept:
    """Return what of the pictures' way through a model is the same at every step.

    Args:
      model: for messages.
      changed: see :func:`changed_scopes`.
      sees: whether it has a tower.
    Raises:
      UserError: it has none, or the tower is trained.
    """
    if not sees:
        raise UserError(
            f"image_features cached has no effect: {model} is no vision-language "
            "model. Leave it out"
        )
    if "vision" in changed:
        raise UserError(
            "image_features cached keeps what a frozen tower makes of the pictures, "
            "and this one's tower is trained or has an adapter. Use --image_features "
            "recompute, or leave vision: out of what is trained"
        )
    return "states" if "connector" in changed else "features"


def scopes_to_load(kept: Kept | None) -> tuple[str, ...]:
    """Return the parts of a model that are still needed beside what is kept.

    >>> scopes_to_load("features"), scopes_to_load("states")
    (('',), ('', 'connector'))
    """
    if kept is None:
        return load_lib.WHOLE
    return tuple(s for s in load_lib.WHOLE if s not in encoded_scopes(kept))


def encoded_scopes(kept: Kept) -> tuple[str, ...]:
    """Return the parts of a model whose output is kept."""
    return SCOPES if kept == "features" else ("vision",)


def check_same_eyes(model: str, others: Mapping[str, str], kept: Kept) -> None:
    """Refuse other models that would make other features of the pictures.

    Args:
      model: whose features are kept.
      others: paths of what is run on them too, by what messages call it.
      kept: what is.
    Raises:
      UserError: naming the model.
    """
    scopes = encoded_scopes(kept)
    if not others:
        return
    own = contents.fingerprint_of(model, scopes)
    for what, path in others.items():
        if contents.fingerprint_of(path, scopes) != own:
            raise UserError(
                f"image_features cached keeps what {model} makes of the pictures, and "
                f"{what} {path} has another {' or '.join(scopes)}. Use "
                "--image_features recompute"
            )


def kept_of_policy(model: str, adapter: str | None, reference: str | None) -> Kept:
    """Return what is kept where a model with an adapter or run on it is scored.

    Args:
      model: checkpoint.
      adapter: see ``policy.open_policy``.
      reference: another checkpoint that is run on the same pictures.
    Raises:
      UserError: see :func:`kept_of` and :func:`check_same_eyes`.
    """
    config = load_lib.open_config(model)[0]
    collections: Variables = {}
    trained = None
    if adapter is not None and runs.is_run(run := Path(adapter)):
        patterns = tuple(runs.read_settings(run).get("trainable", ()))
        trained = trees.mask_from_patterns(decoder.param_shapes(config), patterns)
        start = run / runs.ADAPTER_START
        collections = adapter_files.read_start(start) if start.is_file() else {}
    elif adapter is not None:
        collections = AdapterFiles(Path(adapter), model).collections()
    kept = kept_of(model, changed_scopes(collections, trained), sees=config.sees)
    others = {} if reference is None else {"the reference": reference}
    check_same_eyes(model, others, kept)
    return kept

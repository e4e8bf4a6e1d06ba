"""LoRA adapters as PEFT's config and tensors, and back.

Tensors ``base_model.model.<module>.lora_A.weight`` [rank, in] and ``.lora_B.weight``
[out, rank], with a bias ``.lora_B.bias`` [out], for DoRA ``.lora_magnitude_vector``
[out], of the embeddings
``.lora_embedding_A`` [rank, vocabulary] and ``_B`` [width, rank]; ours are their
transposes, stacked over the layers of a group. An expert's module carries its number,
``experts.3.down_proj``.
"""

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign import stacks, trees
from jaxalign.adapters import gates, peft_config, sites
from jaxalign.errors import UserError


__all__ = ["PeftLoRA", "adapted_layers", "from_peft", "to_peft"]

_NAMES = {
    "a": "lora_A.weight",
    "b": "lora_B.weight",
    "bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}
_EMBEDDING_NAMES = {"a": "lora_embedding_A", "b": "lora_embedding_B"}
_LEAVES = {name: leaf for leaf, name in (*_NAMES.items(), *_EMBEDDING_NAMES.items())}
_TENSOR = re.compile(rf"base_model\.model\.(.+)\.({'|'.join(map(re.escape, _LEAVES))})")
_GATE = re.compile(rf"(.+)\.({'|'.join(gates.FEATURE_GATES)})")

Module = tuple[str, tuple[int, ...]]
"""A path without its group, such as ``self_attn/q_proj`` or ``vision/attn/qkv``, and
the layer (and expert), or ``lm_head`` and nothing."""


class PeftLoRA(NamedTuple):
    """What a PEFT directory of LoRA holds, and beside it gates that PEFT lacks."""

    config: dict[str, Any]
    """``adapter_config.json``."""
    tensors: dict[str, np.ndarray]
    """Of ``adapter_model.safetensors``."""
    gates: dict[str, np.ndarray]
    """``<module>.token_gate`` and the like, [in]; empty where PEFT alone is exact."""


def _modules(adapters: Any) -> dict[Module, dict[str, np.ndarray]]:
    """Take the stacks apart: one entry for each adapted module of each layer.

    What only folds into the factors is folded: static gates, the part of the weight
    that PiSSA takes away.
    """
    modules: dict[Module, dict[str, np.ndarray]] = {}

    def walk(tree: Any, path: tuple[str, ...]) -> None:
        if "a" not in tree:
            for name, child in tree.items():
                walk(child, (*path, name))
            return
        leaf = {name: np.asarray(tree[name], np.float32) for name in tree}
        whole = "/".join(path)
        group = stacks.split(whole).group
        if group is None:
            modules[whole, ()] = _folded(leaf)
            return
        for i in np.ndindex(*leaf["a"].shape[:-2]):
            # All experts of a layer share its scale.
            single = {name: value[i[: value.ndim]] for name, value in leaf.items()}
            index = group[0] + i[0], *i[1:]
            modules[stacks.unstacked(whole), index] = _folded(single)

    walk(adapters, ())
    return modules


def _folded(leaf: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    leaf = dict(leaf)
    if "a0" in leaf:
        leaf["a"] = np.concatenate([leaf["a"], leaf.pop("a0")], axis=1)
        leaf["b"] = np.concatenate([leaf["b"], -leaf.pop("b0")], axis=0)
    if "gate" in leaf:
        gate = leaf.pop("gate")
        leaf |= {name: leaf[name] * gate for name in ("b", "bias") if name in leaf}
    return leaf


def to_peft(
    adapters: Any,
    *,
    module_name: Callable[[Module], str],
    num_layers: int,
    dropout: float = 0.0,
    base_model: str | None = None,
    whole_names: bool = False,
) -> PeftLoRA:
    """Return the files' contents for a LoRA adapter.

    PiSSA becomes plain LoRA of twice the rank, ``[A; A0]`` and ``[B, -B0]``.

    Args:
      adapters: the ``lora`` collection.
      module_name: Hugging Face name of a module.
      num_layers: of the model.
      dropout: recorded for whoever trains on.
      base_model: recorded as where the adapter belongs.
      whole_names: name every module in full. PEFT takes a short name for all modules
        whose names end with it: of a tower too, where only the decoder is adapted.
    """
    modules = _modules(adapters)
    tensors: dict[str, np.ndarray] = {}
    gated: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for module, leaf in modules.items():
        name = module_name(module)
        kinds = _EMBEDDING_NAMES if module[0] == "embed_tokens" else _NAMES
        for kind, suffix in kinds.items():
            if kind in leaf:
                tensor = np.ascontiguousarray(leaf[kind].T)
                tensors[f"base_model.model.{name}.{suffix}"] = tensor
        for kind in gates.FEATURE_GATES:
            if kind in leaf:
                gated[f"{name}.{kind}"] = leaf[kind]
        ranks[name] = leaf["a"].shape[-1]
        scales[name] = float(leaf["scale"])
    config = peft_config.to_config(
        ranks,
        scales,
        targets={"target_modules": sorted(map(module_name, modules))}
        if whole_names
        else _targets(modules, module_name, num_layers),
        use_dora=any("magnitude" in leaf for leaf in modules.values()),
        lora_bias=any("bias" in leaf for leaf in modules.values()),
        dropout=dropout,
        base_model=base_model,
    )
    return PeftLoRA(config, tensors, gated)


def _targets(
    modules: Mapping[Module, Any],
    module_name: Callable[[Module], str],
    num_layers: int,
) -> dict[str, Any]:
    layers = sorted({index[0] for _, index in modules if index})
    names = {module: module_name(module).split(".")[-1] for module in modules}
    kinds = {(path, *index[1:]) for path, index in modules if index}
    product = len(modules) == len(kinds) * len(layers)
    whole = all(index for _, index in modules)
    if not (product and whole):
        return {"target_modules": sorted(map(module_name, modules))}
    targets: dict[str, Any] = {"target_modules": sorted(set(names.values()))}
    if len(layers) < num_layers:
        targets["layers_to_transform"] = layers
    return targets


def adapted_layers(
    tensors: Mapping[str, np.ndarray],
    locate: Callable[[str], Module | None],
    scope: str = "",
) -> list[tuple[int, ...]]:
    """Return for each kind and rank of module the layers that have an adapter on it.

    Cutting the layers into groups by these choices makes every group uniform.

    Raises:
      UserError: a tensor that is no LoRA factor of a layer of the model.
    """
    layers: dict[Any, set[int]] = collections.defaultdict(set)
    for name, tensor in tensors.items():
        (path, index), kind = _parse(name, locate)
        if index and stacks.scope_of(path) == scope:
            rank = tensor.shape[0] if kind == "a" and tensor.ndim else kind
            layers[path, rank].add(index[0])
    return [tuple(sorted(chosen)) for chosen in layers.values()]


def _parse(name: str, locate: Callable[[str], Module | None]) -> tuple[Module, str]:
    match = _TENSOR.fullmatch(name)
    module = locate(match.group(1)) if match else None
    if match is None or module is None:
        raise UserError(
            f"the adapter's tensor {name!r} is no LoRA factor of a linear layer of "
            "this model: expected base_model.model.<module>.lora_A.weight or B"
        )
    return module, _LEAVES[match.group(2)]


def from_peft(
    stored: PeftLoRA,
    *,
    params: Any,
    locate: Callable[[str], Module | None],
) -> dict[str, Any]:
    """Return the ``lora`` collection of a PEFT LoRA adapter.

    Args:
      stored: contents of its files.
      params: base weights or shapes, with groups cut by :func:`adapted_layers`.
      locate: path and layer of a Hugging Face module name; None if there is none.
    Raises:
      UserError: another kind of adapter, an option that is not implemented, a factor
        that is missing or of the wrong shape.
    """
    peft_config.check_config(stored.config)
    factors, names = _factors(stored, locate)
    adapters: dict[str, Any] = {}
    for path, kind, weight in sites.weights(params):
        group, rest = stacks.split(path).group, stacks.unstacked(path)
        stack = weight.shape[:-2] if group else ()
        modules = [(rest, _absolute(group, i)) for i in np.ndindex(stack)]
        present = [module for module in modules if module in factors]
        if not present:
            continue
        if len(present) != len(modules):
            raise ValueError(
                f"the stack of {path} is cut through: load it with other groups"
            )
        leaves = [
            _leaf(
                factors.pop(module),
                names[module],
                weight.shape[-2:],
                stored.config,
                embedding=kind == "embedding",
            )
            for module in modules
        ]
        if len(stack) > 1 and any("bias" in leaf for leaf in leaves):
            raise UserError(
                f"the adapter of {rest} has biases (lora_bias) for experts, which is "
                f"not supported. {peft_config.MERGE}"
            )
        stacked = _stacked(leaves, stack, rest or path)
        trees.node_at(adapters, path.split("/")).update(stacked)
    if factors:
        raise UserError(
            f"the adapter has factors for {names[next(iter(factors))]}, of which this "
            "model has no weights of its own (a head that is tied to the embeddings "
            "cannot be adapted)"
        )
    return adapters


def _factors(
    stored: PeftLoRA, locate: Callable[[str], Module | None]
) -> tuple[dict[Module, dict[str, np.ndarray]], dict[Module, str]]:
    """Return what the files hold of each module, and its Hugging Face name."""
    factors: dict[Module, dict[str, np.ndarray]] = collections.defaultdict(dict)
    names: dict[Module, str] = {}
    for name, value in stored.tensors.items():
        module, factor = _parse(name, locate)
        factors[module][factor] = np.asarray(value, np.float32).T
        names[module] = _TENSOR.fullmatch(name).group(1)  # pyright: ignore[reportOptionalMemberAccess]
    for name, value in stored.gates.items():
        match = _GATE.fullmatch(name)
        module = locate(match.group(1)) if match else None
        if match is None or module not in factors:
            raise UserError(f"the gate {name!r} is of no layer that the adapter adapts")
        factors[module][match.group(2)] = np.asarray(value, np.float32)
    return factors, names


def _stacked(
    leaves: Sequence[Mapping[str, np.ndarray]], stack: Sequence[int], path: str
) -> dict[str, np.ndarray]:
    """Stack the layers of a group, and the experts of each."""
    if len({frozenset(leaf) for leaf in leaves}) > 1:
        raise UserError(
            f"the adapter of {path} has gates or magnitudes in some of its layers only"
        )
    if len({leaf["a"].shape for leaf in leaves}) > 1:
        raise UserError(
            f"the adapter of {path} has other ranks for other experts, "
            "which is not supported"
        )
    stacked = {
        name: np.stack([leaf[name] for leaf in leaves]).reshape(
            (*stack, *leaves[0][name].shape)
        )
        for name in leaves[0]
    }
    if len(stack) > 1:
        stacked["scale"] = _shared(stacked["scale"], path)
    return stacked


def _absolute(group: stacks.Group | None, index: tuple[int, ...]) -> tuple[int, ...]:
    return index if group is None else (group[0] + index[0], *index[1:])


def _shared(scales: np.ndarray, path: str) -> np.ndarray:
    """Return the scale of each layer, which is that of all its experts."""
    if (scales != scales[:, :1]).any():
        raise UserError(
            f"the adapter of {path} has other alphas for other experts of a layer, "
            "which is not supported"
        )
    return scales[:, 0]


def _leaf(
    factors: Mapping[str, np.ndarray],
    name: str,
    shape: Sequence[int],
    config: Mapping[str, Any],
    *,
    embedding: bool = False,
) -> dict[str, np.ndarray]:
    if not {"a", "b"} <= set(factors):
        raise UserError(f"the adapter of {name} has one factor only: expected A and B")
    if not embedding and bool(config.get("use_dora")) != ("magnitude" in factors):
        raise UserError(
            f"the adapter of {name} "
            f"{'has a' if 'magnitude' in factors else 'lacks its'} magnitude vector, "
            f"but adapter_config.json says use_dora={config.get('use_dora', False)!r}"
        )
    if bool(config.get("lora_bias")) != ("bias" in factors) and not embedding:
        raise UserError(
            f"the adapter of {name} {'has a' if 'bias' in factors else 'lacks its'} "
            "bias lora_B.bias, but adapter_config.json says "
            f"lora_bias={config.get('lora_bias', False)!r}"
        )
    if "bias" in factors and "magnitude" in factors:
        raise UserError(
            f"the adapter of {name} has a magnitude vector and lora_bias, which PEFT "
            "does not combine either"
        )
    if embedding and set(factors) != {"a", "b"}:
        raise UserError(
            f"the adapter of {name} is more than plain LoRA, which is all that "
            f"embeddings can have here: got {sorted(set(factors) - {'a', 'b'})}"
        )
    a, b = factors["a"], factors["b"]
    if a.ndim != 2 or b.ndim != 2 or not 0 < a.shape[1] == b.shape[0]:
        raise UserError(f"the adapter of {name} has factors that do not fit each other")
    if (a.shape[0], b.shape[1]) != tuple(shape):
        raise UserError(
            f"the adapter of {name} is for a layer of {a.shape[0]} inputs and "
            f"{b.shape[1]} outputs: got one of {shape[0]} and {shape[1]}. It belongs "
            "to another model"
        )
    for kind, value in factors.items():
        want = shape[1] if kind in ("magnitude", "bias") else shape[0]
        if kind not in ("a", "b") and value.shape != (want,):
            raise UserError(
                f"the {kind} of {name} has the shape {list(value.shape)}: expected "
                f"[{want}]"
            )
    return {**factors, "scale": peft_config.scale_of(config, name, a.shape[1])}

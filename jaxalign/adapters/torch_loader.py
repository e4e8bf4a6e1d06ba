"""Run an exported adapter in PyTorch, on a transformers model made like Llama.

    model = load(AutoModelForCausalLM.from_pretrained(base), directory)

The directory has ``lora/``, which PEFT loads, ``prefix/``, or both. Hooks and an
attention function, on top of sdpa, add what PEFT lacks: gates that read the input, and
prefixes of some layers. The KV cache never holds a prefix; it carries what the gates of
its tokens were, so that it can be reordered (beams), cropped and copied. Left padding
is right too. PEFT's ``disable_adapter`` switches off LoRA only.

This file stands alone: beside torch and transformers it needs safetensors, and peft for
LoRA.
"""

import json
import types
from pathlib import Path
from typing import Any


__all__ = ["load"]

_ATTENTION = "jaxalign_prefix"
_GATES = ("token_gate", "sequence_gate", "mean_gate")


def load(model: Any, directory: str | Path) -> Any:
    """Put an exported adapter on a base model, in place; return the model to use.

    Raises:
      ValueError: there is no adapter, or it does not fit the model, which is left as it
        was. Later, in use: a cache that a gate cannot go on from; another attention.
    """
    lora, prefix = Path(directory) / "lora", Path(directory) / "prefix"
    decoder: Any = getattr(model, "model", None)
    if hasattr(decoder, "jaxalign_adapter") or hasattr(model, "peft_config"):
        raise ValueError("got a model that has an adapter, expected a base model")
    if not hasattr(decoder, "layers") or not hasattr(decoder, "rotary_emb"):
        raise ValueError(f"got {type(model).__name__}, expected a model like Llama")
    if not lora.is_dir() and not prefix.is_dir():
        raise ValueError(f"{directory}: got neither lora/ nor prefix/, expected one")
    gates = _read_lora(lora, model) if lora.is_dir() else {}
    prefixes = _read_prefix(prefix, model) if prefix.is_dir() else {}
    adapted, seen = model, {}
    if lora.is_dir():
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, str(lora))
    for name, weight in gates.items():
        path, _, kind = name.rpartition(".")
        _gate_lora(model.get_submodule(path), name, {kind: weight}, seen)
    for index, leaves in prefixes.items():
        _add_prefix(decoder.layers[index].self_attn, f"layers.{index}", leaves, seen)
    if prefixes or any(not name.endswith(_GATES[0]) for name in gates):
        _follow(model, seen)
    decoder.jaxalign_adapter = str(directory)
    return adapted


def _read_lora(directory: Path, model: Any) -> dict[str, Any]:
    """Check LoRA against the model; return its gates."""
    modules, inputs = dict(model.named_modules()), {}
    for name, factor in _tensors(directory / "adapter_model.safetensors").items():
        path, _, leaf = name.removeprefix("base_model.model.").partition(".lora_")
        module = modules.get(path)
        if leaf == "A.weight":
            inputs[path] = factor.shape[1]
            _check(name, inputs[path], getattr(module, "in_features", "no such layer"))
        elif leaf == "B.weight":
            outputs = getattr(module, "out_features", "no such layer")
            _check(name, factor.shape[0], outputs)
    file = directory / "gates.safetensors"
    gates = _tensors(file) if file.is_file() else {}
    for name, weight in gates.items():
        path, _, kind = name.rpartition(".")
        # A call may leave tokens out at the head, so it has no means.
        kinds = _GATES if path.startswith("model.layers.") else _GATES[:1]
        _check(name, kind, kind if kind in kinds else " or ".join(kinds))
        _check(name, weight.numel(), inputs.get(path, "no gate, as there is no LoRA"))
    return gates


def _read_prefix(directory: Path, model: Any) -> dict[int, dict[str, Any]]:
    """Return every layer's prefix, its keys rotated to where it stands."""
    import torch

    tensors = _tensors(directory / "prefix.safetensors")
    file = directory / "prefix_config.json"
    _check(f"{file} is a file", file.is_file(), True)
    config = json.loads(file.read_text(encoding="utf-8"))
    layers, prefixes = model.model.layers, {}
    _check(f"{file}, num_layers", config["num_layers"], len(layers))
    heads, size = model.config.num_key_value_heads, layers[0].self_attn.head_dim
    shapes: dict[str, Any] = {"mix": [], "log_gate": []}
    shapes |= dict.fromkeys(("key", "value"), [heads, config["prefix_length"], size])
    shapes |= dict.fromkeys(_GATES, [model.config.hidden_size])
    for name, tensor in tensors.items():
        _, index, leaf = name.split(".")
        known = shapes if int(index) < len(layers) else {}
        _check(name, list(tensor.shape), known.get(leaf, "no such tensor"))
        prefixes.setdefault(int(index), {})[leaf] = tensor.float()
    angles = config["position"] * model.model.rotary_emb.inv_freq.float().cpu()
    cos, sin = angles.cos(), angles.sin()
    for index, leaves in prefixes.items():
        _check(f"layers.{index} lacks", {"key", "value"} - leaves.keys(), set())
        one, two = leaves["key"].chunk(2, -1)
        leaves["key"] = torch.cat([one * cos - two * sin, two * cos + one * sin], -1)
    return prefixes


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    _check(f"{path} is a file", path.is_file(), True)
    return load_file(path)


def _check(what: str, got: Any, expected: Any) -> None:
    if got != expected:
        raise ValueError(f"{what}: got {got}, expected {expected}")


def _gate_lora(module: Any, name: str, leaves: dict[str, Any], seen: Any) -> None:
    gate = _gate(module, name, leaves, seen)
    # g B A x = B A (g x); the hook's input is x before dropout.
    module.lora_dropout["default"].register_forward_hook(
        lambda _, args, out: out * gate(args[0]).to(out.dtype)
    )
    module.merge = lambda *_, **__: _check(f"{name} cannot be merged", "merge", None)


def _add_prefix(module: Any, name: str, leaves: dict[str, Any], seen: Any) -> None:
    gate = _gate(module, name, leaves, seen)

    def weigh(module: Any, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        module.jaxalign_strength = gate(x).expand(*x.shape[:2], 1)

    module.register_forward_pre_hook(weigh, with_kwargs=True)


def _gate(module: Any, name: str, leaves: dict[str, Any], seen: Any) -> Any:
    """Give a module its leaves; return the function from its input to its gate."""
    device = next(module.parameters()).device
    for leaf, tensor in leaves.items():
        tensor = tensor.float().to(device)
        module.register_buffer(f"jaxalign_{leaf}", tensor, persistent=False)
    kind = next((leaf for leaf in leaves if leaf.endswith("_gate")), None)

    def gate(x: Any) -> Any:  # [b, t, d] -> [b, t, 1]
        if kind is None:
            return x.new_ones(()).float()
        weight = getattr(module, f"jaxalign_{kind}").float()
        if kind == "log_gate":
            return weight.exp()
        value = (x.float() @ weight).sigmoid()
        if kind != "token_gate":
            value = _mean(value, name, kind, **seen)
        return value[..., None]

    return gate


def _mean(
    value: Any, name: str, kind: str, *, real: Any, past: int, history: dict[str, Any]
) -> Any:
    """Average over the tokens so far, or over all; padding counts for nothing."""
    import torch

    parts = torch.stack([value * real, real.expand_as(value)])  # [2, b, t]
    before = parts[..., :0]
    if past:
        before = history.get(name, before)[..., :past]
        _check(f"{name}, rows and tokens seen", before.shape[1:], (len(value), past))
    history[name] = torch.cat([before, parts], -1)
    sums = history[name].cumsum(-1)[..., past:]
    if kind == "mean_gate":
        _check(f"{name} reads the whole sequence (pass use_cache=False), seen", past, 0)
        sums = sums[..., -1:]
    return sums[0] / sums[1].clamp(min=1)


def _reorder(cache: Any, beams: Any) -> None:
    """Give every beam the history of the one that it goes on from."""
    type(cache).reorder_cache(cache, beams)
    for name, kept in cache.jaxalign_history.items():
        cache.jaxalign_history[name] = kept.index_select(1, beams.to(kept.device))


def _follow(model: Any, seen: dict[str, Any]) -> None:
    """Use attention with prefixes; keep ``seen``, what means need, up to date."""
    from transformers import AttentionInterface, AttentionMaskInterface, Cache

    def place(decoder: Any, args: Any, kwargs: Any) -> Any:
        # Positions count from a row's first real token, as those of generate do.
        mask, tokens = kwargs.get("attention_mask"), kwargs.get("input_ids")
        if kwargs.get("position_ids") is None and getattr(mask, "ndim", 0) == 2:
            tokens = kwargs["inputs_embeds"] if tokens is None else tokens
            places = (mask.long().cumsum(-1) - 1).clamp(min=0)
            kwargs["position_ids"] = places[:, -tokens.shape[1] :]
        return args, kwargs

    def look(module: Any, args: Any, kwargs: Any) -> None:
        past, history, mask = 0, {}, kwargs["attention_mask"]
        _check("attention", module.config._attn_implementation, _ATTENTION)
        _check("the mask's numbers are floats", mask.is_floating_point(), True)
        # Known by its type: transformers has renamed the argument (5.24).
        caches = [x for x in (*args, *kwargs.values()) if isinstance(x, Cache)]
        if caches:
            cache = caches[0]
            past = int(cache.get_seq_length(module.layer_idx))
            history = cache.__dict__.setdefault("jaxalign_history", {})
            cache.reorder_cache = types.MethodType(_reorder, cache)
        else:
            _check("without a cache, keys of the mask", mask.shape[-1], mask.shape[-2])
        # A token is real if it may see itself.
        own = min(past, mask.shape[-1] - mask.shape[-2])
        real = (mask[:, 0].diagonal(own, 1, 2) == 0).float()
        seen.update(real=real, past=past, history=history)

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, AttentionMaskInterface()["eager"])
    model.set_attn_implementation(_ATTENTION)
    model.model.register_forward_pre_hook(place, with_kwargs=True)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(look, with_kwargs=True, prepend=True)


def _attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> Any:
    """Attend to text and prefix, in one softmax or, with ``mix``, in two."""
    import torch
    from transformers import AttentionInterface

    sdpa = AttentionInterface()["sdpa"]
    if not hasattr(module, "jaxalign_key"):
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    keys, values = module.jaxalign_key[None], module.jaxalign_value[None]
    gate = module.jaxalign_strength[:, None]  # [b, 1, t, 1]
    mix = getattr(module, "jaxalign_mix", None)
    if mix is None and hasattr(module, "jaxalign_mean_gate"):  # as published
        keys, values = keys * gate[:, :, :1], values * gate[:, :, :1]
        gate = torch.ones_like(gate)
    keys, values = (
        x.to(query.dtype).expand(len(query), -1, -1, -1) for x in (keys, values)
    )
    if mix is not None:
        text, _ = sdpa(module, query, key, value, attention_mask, **kwargs)
        alone = {**kwargs, "is_causal": False}
        found, _ = sdpa(module, query, keys, values, None, **alone)
        strength = (mix.float().tanh() * gate.transpose(1, 2)).to(found.dtype)
        return text + strength * found, None
    bias = gate.log().to(attention_mask.dtype).expand(-1, -1, -1, keys.shape[2])
    mask = torch.cat([bias, attention_mask.expand(len(query), -1, -1, -1)], -1)
    key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return sdpa(module, query, key, value, mask, **kwargs)

"""Choices of layers."""

import pytest

from jaxalign.adapters import hybrid, selection
from jaxalign.adapters.hybrid import H2LPTConfig, HLPTConfig
from jaxalign.errors import UserError


@pytest.mark.parametrize(
    ("spec", "layers", "chosen"),
    [
        ("bottom:0.75", 32, range(24)),
        ("top:8", 32, range(24, 32)),
        ("0-11,28-31", 32, [*range(12), *range(28, 32)]),
        # A share is rounded, but never to none or to all.
        ("top:0.125", 3, [2]),
        ("bottom:0.75", 2, [0]),
        ("bottom:1.0", 3, range(3)),
        ("bottom:0.5", 1, [0]),
    ],
)
def test_choices(spec, layers, chosen) -> None:
    assert selection.parse_layers(spec, layers) == tuple(chosen)


@pytest.mark.parametrize("spec", ["bottom:0", "top:0.0", "bottom:33", "top:1.5"])
def test_choices_of_none_or_too_many(spec) -> None:
    with pytest.raises(UserError, match="of 32 layers: expected 1 to 32"):
        selection.parse_layers(spec, 32)


@pytest.mark.parametrize(
    ("config", "layers", "lora", "prefix"),
    [
        (HLPTConfig(), 32, 24, 8),  # the paper's LLaMA-7B
        (HLPTConfig(), 28, 21, 7),  # and GPT-J
        (HLPTConfig(), 30, 22, 8),
        (H2LPTConfig(), 32, 12, 4),
        (HLPTConfig(), 2, 1, 1),
        (H2LPTConfig(), 4, 2, 1),
    ],
)
def test_the_hybrids_split_the_layers(config, layers, lora, prefix) -> None:
    made = hybrid.parts(config, layers)
    below = selection.parse_layers(made.lora.layers, layers)
    above = selection.parse_layers(made.prefix.prefix_layers, layers)
    assert below == tuple(range(lora)) and above == tuple(
        range(layers - prefix, layers)
    )


def test_nothing_is_left_for_the_prefix() -> None:
    with pytest.raises(UserError, match="leaves none of the 4 layer.s. for a prefix"):
        hybrid.parts(HLPTConfig(layers="all"), 4)

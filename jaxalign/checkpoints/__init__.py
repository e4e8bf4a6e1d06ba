"""Checkpoints: Hugging Face and PEFT in and out, training state, small assets."""

from jaxalign.checkpoints import load, tensors


__all__ = ["load", "tensors"]

"""SmolVLM2: Idefics3 under another name, see there."""

from jaxalign.models.families import idefics3


__all__ = ["FAMILY"]

FAMILY = idefics3.FAMILY._replace(model_type="smolvlm")

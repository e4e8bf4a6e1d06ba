"""The parts of ``experiments/tiny_vlm.py``: a small real model that sees."""

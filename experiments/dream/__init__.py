"""The parts of ``experiments/dream.py`` and ``experiments/dream_mechanism.py``."""

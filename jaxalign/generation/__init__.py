"""Text from a model: the engine, sampling, constrained choice, and files of prompts."""

from jaxalign.generation import choice, engine, files, ready, sampling, steps


__all__ = ["choice", "engine", "files", "ready", "sampling", "steps"]

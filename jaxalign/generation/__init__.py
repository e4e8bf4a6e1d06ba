"""Text from a model: the engine, sampling, constrained choice, files and a server."""

__all__: list[str] = []

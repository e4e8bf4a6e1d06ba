"""``jaxalign serve``: answer OpenAI's clients over HTTP."""

from collections.abc import Sequence

from jaxalign.cli import devices, parsing


__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Parse and serve, until SIGTERM or Ctrl-C has let the last answer go."""
    from jaxalign.generation.serving.server import ServeConfig, serve

    parser = parsing.make_parser("serve", ServeConfig, description=__doc__ or "")
    config = parsing.parse(parser, arguments, ServeConfig)
    devices.set_up_jax()
    serve(config)
    return 0

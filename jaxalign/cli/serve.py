"""``jaxalign serve``: answer OpenAI's clients over HTTP."""

from collections.abc import Sequence

from jaxalign.cli import devices, parsing


__all__ = ["run"]

_ALIAS = "--served_model_name"
"""What others call ``--model_name``."""


def run(arguments: Sequence[str]) -> int:
    """Parse and serve, until SIGTERM or Ctrl-C has let the last answer go."""
    from jaxalign.generation.serving.server import ServeConfig, serve

    parser = parsing.make_parser("serve", ServeConfig, description=__doc__ or "")
    named = [
        argument.replace(_ALIAS, "--model_name", 1)
        if argument.split("=", 1)[0] == _ALIAS
        else argument
        for argument in arguments
    ]
    config = parsing.parse(parser, named, ServeConfig)
    devices.set_up_jax()
    serve(config)
    return 0

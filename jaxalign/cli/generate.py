"""``jaxalign generate``: complete the prompts of a file."""

from collections.abc import Sequence

from jaxalign.cli import devices, parsing


__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Parse and generate; the last line says how fast it was."""
    from jaxalign.generation.files import GenerateConfig, generate_file

    parser = parsing.make_parser("generate", GenerateConfig, description=__doc__ or "")
    config = parsing.parse(parser, arguments, GenerateConfig)
    devices.set_up_jax()
    report = generate_file(config)
    print(f"generated: {config.out}")
    print(
        f"{report.tokens} tokens in {report.seconds:.1f} s, "
        f"compile {report.compile_seconds:.1f} s"
    )
    return 0

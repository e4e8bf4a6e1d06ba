"""``jaxalign generate``: complete the prompts of a file.

``--context FILE`` puts a system text, or what ``jaxalign disentangle`` observed, before
the prompts; ``--context risks`` has that observed on the way, by ``--judge.*``.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxalign.cli import devices, parsing
from jaxalign.errors import UserError


if TYPE_CHECKING:
    from jaxalign.generation.files import GenerateConfig

__all__ = ["run"]

_RISKS = "risks"


def run(arguments: Sequence[str]) -> int:
    """Parse and generate; the last line says how fast it was."""
    from jaxalign.generation.files import GenerateConfig, generate_file

    parser = parsing.make_parser("generate", GenerateConfig, description=__doc__ or "")
    if parsing.given_option(arguments, "context") == _RISKS:
        if parsing.given_option(arguments, "shard") is not None:
            raise UserError(
                f"--context {_RISKS} looks at all prompts, and --shard is a part of "
                "them: run `jaxalign disentangle --shard i/n` and `jaxalign join`, and "
                "give that file as --context"
            )
        from jaxalign.judging.config import JudgeConfig

        parser.add_class_arguments(JudgeConfig, "judge")
        judge, config = parsing.parse_with("judge", parser, arguments, GenerateConfig)
        devices.set_up_jax()
        config = _observed(config, judge)
    else:
        config = parsing.parse(parser, arguments, GenerateConfig)
        devices.set_up_jax()
    report = generate_file(config)
    print(f"generated: {config.out}")
    print(
        f"{report.tokens} tokens in {report.seconds:.1f} s, "
        f"compile {report.compile_seconds:.1f} s"
    )
    return 0


def _observed(config: "GenerateConfig", judge: Mapping[str, Any]) -> "GenerateConfig":
    """Have the risks in the prompts observed; return the options with their file."""
    from jaxalign import configs
    from jaxalign.cli import disentangle
    from jaxalign.feedback.disentangle_file import DisentangleConfig, disentangle_file

    options = {
        "data": config.data,
        "out": f"{config.out}.observations.jsonl",
        "layout": config.layout,
        "image_dir": config.image_dir,
        "judge": judge,
    }
    observing = configs.build(DisentangleConfig, options)
    disentangle.say(observing, disentangle_file(observing))
    return dataclasses.replace(config, context=observing.out)

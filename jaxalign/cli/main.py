"""The ``jaxalign`` command: finds the subcommand and reports errors."""

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence

from jaxalign.errors import UserError, did_you_mean, naming_flags


__all__ = ["main"]

COMMANDS = {
    "demo": "fetch a small model, train it on packaged feedback, export and report",
    "train": "train on feedback records",
    "score": "write log-probabilities, losses and rewards of records",
    "generate": "complete the prompts of a file",
    "serve": "answer OpenAI's clients over HTTP",
    "data": "show what training would make of a file of records",
    "segment": "cut the responses of records into segments",
    "judge": "have a judge score the segments of records",
    "disentangle": "have a judge look for the risks in prompts",
    "distill": "answers of a teacher who is told more, as records for a student",
    "store": "show or export the judgements of a store",
    "rlaif": "rounds of sample, judge, pair, train and gate",
    "eval": "a model's figures on benchmarks, with intervals",
    "join": "make one file or evaluation of the parts that --shard made",
    "compare": "paired differences of two evaluations or more",
    "describe": "count what an adapter trains and what it costs, from config.json",
    "convert": "make of a checkpoint what many hosts restart from fastest",
    "export": "write a run as a Hugging Face checkpoint or a PEFT adapter",
    "fetch": "get a small real model without a hub",
    "env": "print versions, devices and kernels for a bug report",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand and exit: 0 done, 1 a bug, 2 a user error, 42 run me again."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_help()
        return
    if arguments[0] == "--version":
        from jaxalign import __version__

        print(f"jaxalign {__version__}")
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with naming_flags(), _beside_others():
        code = _run(arguments, debug)
    sys.exit(code)


@contextlib.contextmanager
def _beside_others() -> Iterator[None]:
    """End at once with 42 where one of several processes has gone.

    Python's own end would wait for it: https://docs.jax.dev/en/latest/fault_tolerance.html
    """
    try:
        yield
    except Exception as error:
        multihost = sys.modules.get("jaxalign.parallel.multihost")
        if multihost is None or not multihost.several():
            raise
        traceback.print_exc()
        if multihost.is_loss(error):
            multihost.leave("another process of this run has gone", 42)
        multihost.leave("this process failed, and ends the others", 1)


def _run(arguments: list[str], debug: bool) -> int:
    try:
        name = arguments[0]
        if name not in COMMANDS:
            raise UserError(
                f"unknown command {name!r}. {did_you_mean(name, COMMANDS)} "
                "See jaxalign --help"
            )
        command = importlib.import_module(f"jaxalign.cli.{name}")
        code = command.run(arguments[1:])
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"jaxalign: error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("jaxalign: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader of our output (head, say) has gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    return code or 0


def _print_help() -> None:
    print("usage: jaxalign COMMAND [options]\n")
    for name, what in COMMANDS.items():
        print(f"  {name:11} {what}")
    print(
        "\njaxalign COMMAND --help shows a command's options; --config FILE reads them "
        "from YAML,\n--print_config prints them; --debug shows the traceback of a user "
        "error."
    )


if __name__ == "__main__":
    main()

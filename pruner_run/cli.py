"""The command `pruner`.

A subcommand is a row of `COMMANDS`: a module with a dataclass `Options`, whose fields are the
command line, and a function `run` that takes it. The module is imported when its command is chosen
and not before, so that `pruner --help` is quick and imports no framework.
"""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tyro.extras import subcommand_cli_from_dict

BAD_INPUT = 2  # the exit status, as for an option that cannot be read


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        module: holds `Options` and `run`.
        summary: its line in `pruner --help`.
    """

    module: str
    summary: str


COMMANDS = {
    "convert": Command("pruner_run.convert", "Convert a checkpoint between JAX and PyTorch."),
    "demo": Command("pruner_run.demo", "Prune a recorded episode and draw which patches are kept."),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; None for the process's own.

    What a user did wrong ends with one line and status 2. Python's development mode, `python -X
    dev`, shows the traceback instead.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = next((argument for argument in arguments if argument in COMMANDS), "")
    options = subcommand_cli_from_dict(
        {each: _options(each, chosen=each == name) for each in COMMANDS},
        prog="pruner",
        description="π0.5 with visual token pruning (LightVLA), in JAX and PyTorch.",
        args=arguments,
        use_underscores=True,
    )
    try:
        importlib.import_module(COMMANDS[name].module).run(options)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"pruner {name}: error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _options(name: str, *, chosen: bool) -> Callable[[], Any]:
    """What the command line is parsed into; of a command that is not chosen, only its summary."""
    command = COMMANDS[name]
    if chosen:
        return importlib.import_module(command.module).Options

    def unchosen() -> None:
        raise AssertionError(f"{name}: parsed without being chosen")

    unchosen.__doc__ = command.summary
    return unchosen


if __name__ == "__main__":
    main()

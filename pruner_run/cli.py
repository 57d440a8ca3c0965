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
        parses: whether the module reads the rest of the command line itself, with a function
            `main` of the arguments and the program's name.
    """

    module: str
    summary: str
    parses: bool = False


COMMANDS = {
    "convert": Command("pruner_run.convert", "Convert a checkpoint between JAX and PyTorch."),
    "configs": Command("pruner_run.list_configs", "List the training configs."),
    "train": Command("pruner_run.train", "Train, in JAX or in PyTorch.", parses=True),
    "compute-norm-stats": Command(
        "pruner_run.compute_norm_stats", "Compute a dataset's normalisation statistics."
    ),
    "plan": Command("pruner_run.plan", "Say what a training run needs, and what fits."),
    "compare": Command("pruner_run.compare_runs", "Compare the curves of two training runs."),
    "serve": Command("pruner_run.serve", "Serve a policy to openpi's clients."),
    "client-check": Command(
        "pruner_run.client_check", "Try a policy server, and show where the time goes."
    ),
    "eval": Command("pruner_run.evaluate", "Try a policy in a simulator, or compare two trials."),
    "record": Command("pruner_run.record", "Record a simulator's scripted expert as a dataset."),
    "show": Command("pruner_run.show", "Show what a policy's pruner looks at in an episode."),
    "bench": Command(
        "pruner_run.bench", "Measure calls of a model, against the floor of the device."
    ),
    "demo": Command("pruner_run.demo", "Prune a recorded episode and draw which patches are kept."),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; None for the process's own.

    What a user did wrong ends with one line and status 2. Python's development mode, `python -X
    dev`, shows the traceback instead.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = next((argument for argument in arguments if argument in COMMANDS), "")
    if name and arguments[0] == name and COMMANDS[name].parses:
        importlib.import_module(COMMANDS[name].module).main(arguments[1:], f"pruner {name}")
        return
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

"""`pruner convert`: the converter's two commands as one, which goes the way the checkpoint asks."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from convert import cli
from convert.orbax_reading import open_orbax
from convert.reading import locate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Convert a checkpoint: an openpi JAX one to safetensors, safetensors to a JAX one.

    What the checkpoint is of is read off its arrays. Adapters are never dropped.

    Attributes:
        checkpoint_dir: the Orbax checkpoint, or the folder with safetensors.
        output_path: the folder to write.
        config_name: the openpi config it is expected to be of; another one is an error.
        precision: of the weights; bfloat16 to PyTorch and float32 to JAX, if not given.
        format: whose files, to PyTorch: openpi's, or those that LeRobot's π0.5 policy loads.
        lora: merge adapters into the weights (to PyTorch, if not given), or keep them.
        lora_scale: alpha / rank of the attention's adapters; what a config says, or 1.
        max_shard_size: of a file, to PyTorch, such as 5GB; one file if not given.
        omit_unused_lm_head: leave out the action expert's head for text, which nothing reads.
        asset_id: whose statistics LeRobot's files are to have, where there are several.
        verify: load both in their own framework, and compare loss and sampled actions.
        inspect_only: show what the checkpoint holds, and write nothing.
        allow_non_finite: take infinities and NaN.
        overwrite: replace what is at the output path.
    """

    checkpoint_dir: str
    output_path: Path | None = None
    config_name: str | None = None
    precision: Literal["bfloat16", "float32", "float16"] | None = None
    format: Literal["openpi", "lerobot"] | None = None
    lora: Literal["merge", "keep"] | None = None
    lora_scale: float | None = None
    max_shard_size: str | None = None
    omit_unused_lm_head: bool = False
    asset_id: str | None = None
    verify: bool = False
    inspect_only: bool = False
    allow_non_finite: bool = False
    overwrite: bool = False


def run(options: Options) -> None:
    """Inspects or converts.

    Raises:
        ValueError, OSError: as `convert.jax_to_pytorch`.
        SystemExit: the result does not act as its source.
    """
    if status := cli.run(direction(options)):
        sys.exit(status)


def direction(options: Options) -> cli.Options:
    """The command for this checkpoint, with what was given.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: it is no checkpoint, or an option is of the other command.
    """
    _, opener = locate(options.checkpoint_dir)
    command = cli.JaxToPytorch if opener is open_orbax else cli.PytorchToJax
    given = {name: value for name, value in vars(options).items() if value not in (None, False)}
    known = {field.name for field in dataclasses.fields(command)}
    if foreign := sorted(given.keys() - known):
        raise ValueError(f"{', '.join(foreign)}: expected only of a JAX checkpoint's conversion")
    return command(**given)

"""`pruner demo`: the pruner at work on the recorded episode that ships with the package.

The model is a small π0.5 with random weights, the same ones in every backend. It shows the
mechanism, and that the backends agree; what a trained model looks at, it does not show.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from rich.console import Console

from pruner_run import backend as backends
from pruner_run import demo_report, picture
from pruner_run.assets import DEMO_EPISODE, DEMO_TOKENIZER
from pruner_run.comparison import compare
from pruner_run.files import write_atomically
from pruner_run.measurement import Measurement, measure
from pruner_run.recording import Recording, read_recording
from pruner_run.tokenizer import PromptTokenizer
from pruner_spec.config import Pi0Config
from pruner_spec.flow import euler_step
from pruner_spec.parameters import random_parameters
from pruner_spec.randomness import Stream, normal, stream_key

FRAMES_DRAWN = 6  # at most, of those that are sampled
PICTURE, NUMBERS = "demo.png", "demo.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Prune a recorded episode with a small π0.5 and draw which patches are kept.

    Samples actions with and without pruning from the same random weights, in each backend, and
    compares them. Writes demo.png and demo.json.

    Attributes:
        backend: the framework; all that are installed unless given.
        keep_tokens: patches to keep a camera; as many as are voted for unless given.
        keep_ratio: the same, as a share of the camera's patches.
        scope: whether each camera's patches are pruned on their own or all together.
        frames: how many of the episode's frames, spread evenly.
        num_steps: denoising steps.
        seed: of the weights and of the noise.
        output: folder for the picture and the numbers.
    """

    backend: Literal["jax", "torch", "both"] | None = None
    keep_tokens: int | None = None
    keep_ratio: float | None = None
    scope: Literal["camera", "joint"] = "camera"
    frames: int = 6
    num_steps: int = 10
    seed: int = 0
    output: Path = Path("demo_output")


def run(options: Options) -> None:
    """Runs the demo.

    Raises:
        ValueError: an option is not valid, or a framework that was asked for is not installed.
        OSError: the output cannot be written.
    """
    chosen = backends.choose(options.backend)
    config = demo_config(options)
    noise = draw_noise(config, options)
    euler_step(options.num_steps)  # raises for a number that is not valid
    tokenizer = PromptTokenizer(DEMO_TOKENIZER, max_len=config.max_token_len)
    recording = read_recording(DEMO_EPISODE, tokenizer, config, count=options.frames)
    options.output.mkdir(parents=True, exist_ok=True)

    console = Console(highlight=False)
    demo_report.announce(console, recording, config, options.seed)
    # Read by PyTorch as it is imported. A tiny model's threads mostly wait for each other: more
    # than one gains little, and takes many times as long where other processes use the cores too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parameters = dict(random_parameters(config, options.seed))
    measurements = []
    for name in chosen:
        with console.status(f"{name}: sampling actions, unpruned and pruned"):
            loaded, observation = backends.load(name), recording.observation
            measurements.append(
                measure(loaded, config, parameters, observation, noise, options.num_steps)
            )
    agreement = None
    if len(measurements) == 2:
        agreement = compare(measurements[0], measurements[1], config)

    demo_report.show(console, measurements, agreement, config)
    numbers = demo_report.numbers(recording, measurements, agreement, config)
    write(options, demo_sheet(recording, measurements[0], config), numbers)
    console.print(f"Wrote {options.output / PICTURE} and {options.output / NUMBERS}")


def write(options: Options, sheet: picture.Sheet, numbers: dict[str, Any]) -> None:
    """The picture and, with the options they come from, the numbers."""
    given = dataclasses.asdict(options) | {"output": str(options.output)}
    text = json.dumps({"options": given} | numbers, indent=2)
    write_atomically(options.output / PICTURE, picture.to_png(picture.draw(sheet)))
    write_atomically(options.output / NUMBERS, text.encode())


def demo_config(options: Options) -> Pi0Config:
    """The model: unpruned, its prefix is 3·256 patches and 32 prompt tokens.

    Raises:
        ValueError: an option is not valid.
    """
    return Pi0Config(
        dtype="float32",
        paligemma_variant="tiny",
        action_expert_variant="tiny_expert",
        vision_variant="tiny/14",
        max_token_len=32,
        pi05=True,
        discrete_state_input=False,
        token_pruning_enabled=True,
        token_prune_keep_tokens=options.keep_tokens,
        token_prune_keep_ratio=options.keep_ratio,
        token_prune_scope=options.scope,
    )


def draw_noise(config: Pi0Config, options: Options) -> Float[np.ndarray, "T H A"]:
    """What each frame's actions are denoised from, the same in all backends.

    Raises:
        ValueError: the seed is not valid.
    """
    keys = stream_key(options.seed, 0, Stream.NOISE, np.arange(options.frames))
    return normal(keys, (config.action_horizon, config.action_dim))


def demo_sheet(recording: Recording, measurement: Measurement, config: Pi0Config) -> picture.Sheet:
    """The picture, of one backend's selection."""
    places = picture.spread_evenly(len(recording.frames), FRAMES_DRAWN)
    return picture.Sheet(
        title=f"“{recording.instruction}”",
        subtitle=(
            f"Lit: {demo_report.rule(config)} ({measurement.title}). Random weights: "
            "the mechanism of pruning, not what a trained model attends to."
        ),
        images={camera: images[places] for camera, images in recording.images.items()},
        kept=measurement.selection.kept[places],
        seconds=recording.seconds[places].tolist(),
    )

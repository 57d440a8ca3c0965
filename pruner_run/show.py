"""`pruner show`: what a policy's pruner looks at in an episode, in pictures, a video and a page.

Importance is what the selection goes by: the votes for a patch, and the highest score that any
patch gives to it. The heat map's colour is that score, and what was voted for is outlined.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import track

from pruner_run import attention, attention_video, demo_report, picture, show_page
from pruner_run import backend as backends
from pruner_run import policy as policies
from pruner_run.assets import DEMO_EPISODE
from pruner_run.attention import Attention
from pruner_run.data.config import DataConfig
from pruner_run.data.norm_stats import dataset_norm_stats
from pruner_run.data.samples import RobotSamples
from pruner_run.files import write_atomically
from pruner_run.policy import Policy
from pruner_run.tokenizer import load_tokenizer
from pruner_spec.parameters import random_parameters

FRAMES_DRAWN = 4  # in a picture, at most
_STATS_FRAMES = 2000  # that random weights' statistics are of, at most

HEAT_MAP, KEPT, VIDEO, PAGE = (
    "attention_heatmap.png",
    "kept_patches.png",
    "episode.mp4",
    "show.html",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """The policy that looks.

    Attributes:
        dir: a checkpoint of a run of this project, openpi's JAX or PyTorch one, or LeRobot's π0.5
            folder; random weights, if not given.
        config: a training config, of those that `pruner configs` lists; what the checkpoint says
            itself, if not given.
    """

    dir: str | None = None
    config: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Show what a policy's pruner looks at in an episode.

    Writes attention_heatmap.png, kept_patches.png, episode.mp4, and show.html, a page that a
    browser opens without a network.

    Attributes:
        policy: that looks.
        dataset: the folder of a LeRobot dataset of the policy's robot, or its name on the Hub; the
            episode that ships with the package, if not given.
        episode: its number.
        keep_tokens: patches to keep a camera, in place of the config's budget.
        every: the policy looks at one frame of so many.
        backend: the framework; that which the weights were written by, where it is installed.
        asset_id: whose normalisation statistics, in place of the config's.
        tokenizer: a SentencePiece model, in place of the config's.
        dtype: of the computation, in place of the config's.
        seed: of random weights.
        output: folder for the files.
    """

    policy: Shown = Shown()  # frozen
    dataset: str | None = None
    episode: int = 0
    keep_tokens: int | None = None
    every: int = 5
    backend: Literal["auto", "jax", "torch"] = "auto"
    asset_id: str | None = None
    tokenizer: Path | None = None
    dtype: Literal["bfloat16", "float32"] | None = None
    seed: int = 0
    output: Path = Path("show_output")


def run(options: Options) -> None:
    """Looks at the episode and writes the files.

    Raises:
        ValueError: the checkpoint, the dataset or an option does not fit.
        OSError: a file is missing or cannot be written.
    """
    if options.every < 1:
        raise ValueError(f"every: expected at least 1, got {options.every}")
    console = Console(highlight=False)
    dataset = str(DEMO_EPISODE) if options.dataset is None else options.dataset
    policy = _policy(options, dataset)
    model = policy.config.model
    if not model.prunes_at_inference:
        raise ValueError(
            f"keep_tokens: expected fewer than the {model.vision.num_patches} patches of a camera, "
            "got all of them"
        )
    samples = RobotSamples(_data(policy.config.data, dataset), model.action_horizon)
    frames = _frames(samples, options)
    options.output.mkdir(parents=True, exist_ok=True)
    seen = attention.look(policy, samples, track(frames, "looking", console=console))
    source = show_page.Source(
        policy=f"{policy.config.name}, {policy.metadata['backend']}, {model.dtype}",
        weights=options.policy.dir or f"random (seed {options.seed})",
        is_random=options.policy.dir is None,
        episode=f"{samples.root.name}, episode {options.episode}",
    )
    rate = max(1, round(samples.dataset.fps / options.every))
    write(options.output, seen, source, rate, console)
    _say(seen, console)


def write(
    folder: Path, seen: Attention, source: show_page.Source, rate: int, console: Console
) -> None:
    """The four files.

    Args:
        folder: there already.
        seen: what is drawn.
        source: what it is of.
        rate: frames a second of the video.
        console: where it is said what was written.
    """
    drawn = seen.at(picture.spread_evenly(len(seen.frames), FRAMES_DRAWN))
    for name, sheet in ((HEAT_MAP, heat_sheet(drawn, source)), (KEPT, kept_sheet(drawn, source))):
        write_atomically(folder / name, picture.to_png(picture.draw(sheet)))
    attention_video.write(folder / VIDEO, seen, source.line, rate)
    write_atomically(folder / PAGE, show_page.page(seen, source))
    for name in (HEAT_MAP, KEPT, VIDEO, PAGE):
        size = (folder / name).stat().st_size
        console.print(f"{folder / name}  {size / 2**20:.1f} MiB")


def heat_sheet(seen: Attention, source: show_page.Source) -> picture.Sheet:
    """Scores as colours, over the images."""
    return dataclasses.replace(
        kept_sheet(seen, source),
        subtitle=(
            "Colour: the highest score that any patch gives to a patch. Outlined: voted for by at "
            f"least one. {source.line}"
        ),
        heat=seen.best,
        kept=seen.votes > 0,
    )


def kept_sheet(seen: Attention, source: show_page.Source) -> picture.Sheet:
    """Which patches the model keeps."""
    return picture.Sheet(
        title=f"“{seen.instruction}”",
        subtitle=f"Lit: {demo_report.rule(seen.model)}. {source.line}",
        images=seen.images,
        kept=seen.kept,
        seconds=seen.seconds.tolist(),
    )


def _policy(options: Options, dataset: str) -> Policy:
    shown = options.policy
    if shown.dir is None:
        return _untrained(options, dataset)
    return policies.load(
        shown.dir,
        shown.config,
        options.backend,
        pruning=True,
        keep_tokens=options.keep_tokens,
        asset_id=options.asset_id,
        tokenizer_path=options.tokenizer,
        dtype=options.dtype,
        warm_up=False,
    )


def _untrained(options: Options, dataset: str) -> Policy:
    """A config's model with random weights, and statistics of the dataset it is shown.

    Raises:
        ValueError: no config is named.
    """
    from pruner_run import configs  # reads every config, which `pruner --help` need not

    if options.policy.config is None:
        raise ValueError(
            "policy: expected --policy.dir DIR, or --policy.config NAME for random weights; got "
            "neither"
        )
    config = configs.get(options.policy.config)
    model = dataclasses.replace(config.model, token_pruning_enabled=True)
    if options.keep_tokens is not None:
        model = dataclasses.replace(
            model, token_prune_keep_tokens=options.keep_tokens, token_prune_keep_ratio=None
        )
    if options.dtype is not None:
        model = dataclasses.replace(model, dtype=options.dtype)
    data = _data(config.data, dataset)
    tokenizer = load_tokenizer(options.tokenizer or config.tokenizer_path, model)
    installed = backends.choose(None if options.backend == "auto" else options.backend)
    framework = backends.load(installed[0])
    return Policy(
        framework.model(model, dict(random_parameters(model, options.seed))),
        dataclasses.replace(config, model=model, data=data),
        dataset_norm_stats(data, model.action_horizon, max_frames=_STATS_FRAMES),
        tokenizer,
        backend=framework.name,
    )


def _data(data: DataConfig, dataset: str) -> DataConfig:
    """The config of the policy's data, of another dataset."""
    return dataclasses.replace(
        data,
        repo_id=dataset,
        fake=False,
        prompt_from_task=data.prompt_from_task or data.default_prompt is None,
    )


def _frames(samples: RobotSamples, options: Options) -> list[int]:
    """Those of the episode that are looked at, by their numbers in the dataset."""
    episodes = samples.dataset.episodes
    if not 0 <= options.episode < len(episodes):
        raise ValueError(f"episode: expected 0..{len(episodes) - 1}, got {options.episode}")
    episode = episodes[options.episode]
    return list(range(episode.start, episode.stop, options.every))


def _say(seen: Attention, console: Console) -> None:
    """How much is kept, and where the model and the spec's ballots part."""
    kept = seen.kept.sum(axis=(1, 2))
    console.print(
        f"kept: {kept.mean():.1f} of {seen.kept[0].size} patches, {kept.min()} to {kept.max()}, in "
        f"{len(kept)} frames"
    )
    differing = np.sum(seen.kept != seen.elect(seen.model.keep_budget))
    if differing:
        console.print(
            f"{differing} of {seen.kept.size} times the model keeps or drops a patch where float64 "
            "does not: decisions that are closer than its precision"
        )

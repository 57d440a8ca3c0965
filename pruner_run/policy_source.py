"""What a policy is made of: a checkpoint, and the config that says which robot it drives.

Weights say how large a model is and nothing of the robot. That is recorded beside checkpoints of
ours and of LeRobot; for openpi's, a training config must be named: a robot whose actions were
relative to its state, and were taken for absolute ones, would do harm.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from convert import config_file, json_file
from convert.assets import FILE
from convert.lerobot_stats import POSTPROCESSOR_FILE, PREPROCESSOR_FILE, steps_of
from convert.source import Source, open_source
from pruner_run import configs, run_checkpoint
from pruner_run.configs import TrainConfig
from pruner_run.data.config import DataConfig
from pruner_run.data.normalization import NormStats
from pruner_run.tokenizer import openpi_cache
from pruner_spec.config import Pi0Config

# Of a run's model, what its weights do not say.
_SETTINGS = ("dtype", *(f.name for f in dataclasses.fields(Pi0Config) if "token_prun" in f.name))
_BUCKETS = "gs://"
# LeRobot's, that do what the transforms here do.
_LEROBOTS_STEPS = {
    "rename_observations_processor",
    "to_batch_processor",
    "device_processor",
    "normalizer_processor",
    "unnormalizer_processor",
    "tokenizer_processor",
    "pi05_prepare_state_tokenizer_processor_step",
    "pi0_new_line_processor",
    "smolvla_new_line_processor",
}
_OPEN = ("action_horizon", "max_token_len", "discrete_state_input")


@dataclasses.dataclass(frozen=True)
class PolicySource:
    """A checkpoint and its config, that fit each other.

    Attributes:
        framework: that the weights were written by, "jax" or "torch".
        config: its model is the checkpoint's.
        stats: that the checkpoint was trained with.
    """

    framework: str
    config: TrainConfig
    stats: NormStats


def open_policy_source(
    checkpoint_dir: str | os.PathLike[str],
    config: str | TrainConfig | None = None,
    asset_id: str | None = None,
) -> PolicySource:
    """Reads what lies beside the weights, and their names and shapes.

    Args:
        checkpoint_dir: of a run of ours, openpi's JAX or PyTorch one, or LeRobot's folder.
        config: a training config or its name; None for what the checkpoint says itself.
        asset_id: whose statistics, in place of the config's.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: it is no checkpoint, is of another model than the config's, does not say which
            robot it drives, or has no statistics of that name; lists those it has.
    """
    source = open_source(checkpoint_dir)
    if config is None:
        chosen = _own_config(source)
    else:
        chosen = configs.get(config) if isinstance(config, str) else config
        model = _agreed(chosen.model, source)
        chosen = dataclasses.replace(chosen, model=model)
    if asset_id is not None:
        chosen = dataclasses.replace(
            chosen, data=dataclasses.replace(chosen.data, asset_id=asset_id)
        )
    return PolicySource(
        framework="jax" if source.is_orbax else "torch",
        config=chosen,
        stats=_stats(source, chosen),
    )


def local(checkpoint_dir: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Where a checkpoint is: as it is given, or, of a bucket, where openpi's cache has it.

    Raises:
        FileNotFoundError: it is in a bucket, is not in the cache, and cannot be read from there;
            has the command that gets it.
    """
    given = os.fspath(checkpoint_dir).rstrip("/")
    if not given.startswith(_BUCKETS):
        return checkpoint_dir
    folder = openpi_cache() / given.removeprefix(_BUCKETS)
    if folder.exists():
        return folder
    if importlib.util.find_spec("gcsfs") is not None:
        return checkpoint_dir
    raise FileNotFoundError(
        f"{folder}: expected the checkpoint {given}, found none. To get it, once: "
        f"mkdir -p {folder.parent} && gcloud storage cp -r {given} {folder.parent}"
    )


def _own_config(source: Source) -> TrainConfig:
    """What the files beside the weights say."""
    folder = source.place.parent
    record = run_checkpoint.recorded(folder)
    if record is not None:
        return _of_run(folder, source, record)
    if _is_lerobots(folder):
        _check_steps(folder)
        assets = [name.rpartition("/")[0] for name in source.stats]
        data = DataConfig(asset_id=assets[0] if len(assets) == 1 else None, fake=not assets)
        return TrainConfig(name="lerobot", model=source.side.config, data=data)
    raise ValueError(
        f"config: expected a training config's name, such as {', '.join([*configs.CONFIGS][:4])}, "
        f"since nothing in {folder} says which robot it is for; got none"
    )


def _of_run(folder: epath.Path, source: Source, record: Mapping[str, Any]) -> TrainConfig:
    """The config of a run of ours; sizes are the weights' own."""
    try:
        settings = {name: record["model"][name] for name in _SETTINGS}
        model = dataclasses.replace(source.side.config, **settings)
        data = DataConfig(**record["data"])
        name = str(record["name"])
    except (KeyError, TypeError) as error:
        path = folder / run_checkpoint.RUN_FILE
        raise ValueError(f"{path}: expected a run's config, got {error!r}") from error
    known = configs.CONFIGS.get(name)
    if known is None:
        return TrainConfig(name=name, model=model, data=data)
    return dataclasses.replace(known, model=model, data=data)


def _is_lerobots(folder: epath.Path) -> bool:
    path = folder / config_file.NAME
    return path.exists() and "type" in json_file.read(path)


def _check_steps(folder: epath.Path) -> None:
    """Raises a ValueError for steps of LeRobot's that the transforms here lack: actions that are
    relative to the state, for one, would be taken for absolute ones."""
    for file in (PREPROCESSOR_FILE, POSTPROCESSOR_FILE):
        path = folder / file
        for step in steps_of(json_file.read(path), str(path)) if path.exists() else []:
            name, settings = step.get("registry_name"), step.get("config") or {}
            if name not in _LEROBOTS_STEPS and settings.get("enabled") is not False:
                raise ValueError(
                    f"{path}: expected steps of openpi's π0 and π0.5, got {name!r}; name a config "
                    "that does the same"
                )


def _agreed(model: Pi0Config, source: Source) -> Pi0Config:
    """The config's model, which must be the checkpoint's; adapters may be merged already."""
    found = source.side.config
    if model.has_lora and not found.has_lora:
        model = model.without_lora()
    known = [name for name in _OPEN if name not in source.assumed]
    wrong = [
        f"{name}: expected {getattr(model, name)!r}, got {getattr(found, name)!r}"
        for name in ("pi05", "action_dim", "vision", "paligemma", "action_expert", *known)
        if getattr(model, name) != getattr(found, name)
    ]
    if wrong:
        raise ValueError(
            "\n".join(
                [f"{source.place}: the checkpoint is of another model than the config", *wrong]
            )
        )
    return model


def _stats(source: Source, config: TrainConfig) -> NormStats:
    """The checkpoint's statistics of the config's asset; of generated data, none are needed."""
    if config.data.fake:
        return NormStats.identity(config.model.action_dim)
    found = sorted(each.removesuffix(FILE).rstrip("/") for each in source.stats)
    if config.data.asset_id is None and config.data.repo_id is None:
        raise ValueError(
            f"asset_id: expected one of {found}, in {source.place.parent}, since the config names "
            "none"
        )
    name = f"{config.data.stats_id}/{FILE}"
    if name not in source.stats:
        raise ValueError(
            f"asset_id: expected statistics of {config.data.stats_id!r} in the assets of "
            f"{source.place.parent}, got {found}"
        )
    return NormStats.parse(f"{source.place.parent}/assets/{name}", source.stats[name])

"""Policies of every robot, around a model that gives back its noise or around a tiny one."""

import dataclasses

import numpy as np

from parity_tests.cases import tiny_config
from pruner_run.assets import DEMO_TOKENIZER
from pruner_run.configs import TrainConfig
from pruner_run.data.config import DataConfig
from pruner_run.data.normalization import FeatureStats, NormStats
from pruner_run.policy import Policy
from pruner_run.tokenizer import load_tokenizer

MODEL = tiny_config(
    dtype="float32", vision_variant="tiny/56", action_dim=16, action_horizon=4, max_token_len=96
)


def config_of(robot: str, **data) -> TrainConfig:
    """A config for a robot's clients, with a tiny model."""
    return TrainConfig(
        name=f"{robot}_tiny",
        model=MODEL,
        data=DataConfig(robot=robot, asset_id="lab", **data),
        tokenizer_path=DEMO_TOKENIZER,
    )


ALOHA, LIBERO, DROID = (config_of(robot) for robot in ("aloha", "libero", "droid"))
PLAIN = config_of("plain", default_prompt="go on")

# Numbers in a state and an action.
DIMS = {"aloha": (14, 14), "libero": (8, 7), "droid": (8, 8), "plain": (5, 6)}


def stats_of(robot: str) -> NormStats:
    """Statistics in which no number is like another."""
    generator = np.random.default_rng(5)

    def feature(length: int) -> FeatureStats:
        return FeatureStats(
            mean=generator.normal(size=length),
            std=generator.uniform(1, 2, length),
            q01=generator.uniform(-2, -1, length),
            q99=generator.uniform(1, 2, length),
        )

    return NormStats(*map(feature, DIMS[robot]))


class EchoModel:
    """Gives back the noise, and remembers what it was given."""

    def __init__(self) -> None:
        self.observations = []

    def sample_actions(self, observation, noise, num_steps):
        self.observations.append(observation)
        return noise

    def warm_up(self, observation, noise, num_steps):
        self.sample_actions(observation, noise, num_steps)

    def kept(self):
        raise AssertionError("asked for a selection where nothing is pruned")


def echo_policy(config: TrainConfig, model=None, **options) -> Policy:
    """A policy of a config's transforms around an `EchoModel`."""
    tokenizer = load_tokenizer(config.tokenizer_path, config.model)
    model = EchoModel() if model is None else model
    stats = stats_of(config.data.robot)
    return Policy(model, config, stats, tokenizer, backend="echo", **options)


def pruned(config: TrainConfig, **settings) -> TrainConfig:
    """The config with a model that prunes."""
    model = dataclasses.replace(config.model, token_pruning_enabled=True, **settings)
    return dataclasses.replace(config, model=model)

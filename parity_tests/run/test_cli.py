"""The command line's surface: every command and option, with its default. Users rely on it."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest

from pruner_run import cli
from pruner_run.configs import CONFIGS, TrainConfig
from pruner_run.serve import Default
from pruner_run.show import Shown
from pruner_spec.inference import InferenceSettings

REQUIRED = dataclasses.MISSING
FLAGS = dict.fromkeys(
    ("no_graphs", "no_kernels", "compiled", "no_guess", "autotune", "float8"), False
)

SURFACE: dict[str, dict[str, Any]] = {
    "convert": {
        "checkpoint_dir": REQUIRED,
        "output_path": None,
        "config_name": None,
        "precision": None,
        "format": None,
        "lora": None,
        "lora_scale": None,
        "max_shard_size": None,
        "omit_unused_lm_head": False,
        "asset_id": None,
        "verify": False,
        "inspect_only": False,
        "allow_non_finite": False,
        "overwrite": False,
    },
    "configs": {},
    "compute-norm-stats": {
        "config_name": REQUIRED,
        "max_frames": None,
        "repo_id": None,
        "assets_base_dir": None,
    },
    "plan": {
        "config_name": REQUIRED,
        "devices": 1,
        "memory": 80.0,
        "fsdp_devices": None,
        "batch_size": None,
        "teraflops": 794.0,
    },
    "compare": {"runs": REQUIRED, "metric": "loss", "output": Path("comparison.png")},
    "serve": {
        "env": None,
        "policy": Default(),
        "backend": "auto",
        "default_prompt": None,
        "no_pruning": False,
        "token_prune_keep_ratio": None,
        "token_prune_keep_tokens": None,
        "asset_id": None,
        "tokenizer": None,
        "inference": "auto",
        **FLAGS,
        "dtype": None,
        "num_steps": 10,
        "seed": 0,
        "host": "127.0.0.1",
        "port": 8000,
        "api_key": None,
        "max_batch": 1,
        "batch_wait_ms": 2.0,
        "max_queue": 64,
        "max_clients": 64,
        "max_message_mb": 32,
        "no_profile": False,
    },
    "client-check": {
        "address": REQUIRED,
        "requests": 50,
        "prompt": "pick up the cube",
        "api_key": None,
        "seed": 0,
    },
    "show": {
        "policy": Shown(),
        "dataset": None,
        "episode": 0,
        "keep_tokens": None,
        "every": 5,
        "backend": "auto",
        "asset_id": None,
        "tokenizer": None,
        "dtype": None,
        "seed": 0,
        "output": Path("show_output"),
    },
    "eval": {
        "env": None,
        "policy": None,
        "policy_dir": None,
        "policy_config": None,
        "server": None,
        "api_key": None,
        "backend": "auto",
        "no_pruning": False,
        "token_prune_keep_ratio": None,
        "token_prune_keep_tokens": None,
        "asset_id": None,
        "tokenizer": None,
        "inference": "auto",
        **FLAGS,
        "num_steps": 10,
        "episodes": 10,
        "seed": 0,
        "seeds": None,
        "replan_steps": None,
        "videos": 0,
        "output": Path("eval_output"),
        "overwrite": False,
        "compare": None,
    },
    "record": {
        "env": REQUIRED,
        "policy": "expert",
        "episodes": 10,
        "seed": 0,
        "keep_failures": False,
        "settle_seconds": 1.0,
        "output": REQUIRED,
    },
    "bench": {
        "backend": None,
        "device": "cuda",
        "path": "fast",
        **FLAGS,
        "accuracy": False,
        "checkpoint": None,
        "starts": 1,
        "cameras": "3",
        "prompt": "50",
        "keep": "implicit,64,24,none",
        "batch": "1",
        "horizon": "50",
        "num_steps": "10",
        "config": "pi05",
        "dtype": "bfloat16",
        "implicit_kept": 60,
        "calls": 100,
        "plain_calls": None,
        "no_stages": False,
        "seed": 0,
        "output": Path("bench_output"),
        "overwrite": False,
        "report": (),
        "page": Path("docs/speed.md"),
    },
    "demo": {
        "backend": None,
        "keep_tokens": None,
        "keep_ratio": None,
        "scope": "camera",
        "frames": 6,
        "num_steps": 10,
        "seed": 0,
        "output": Path("demo_output"),
    },
}
POSITIONAL = {"config_name", "runs", "address", "policy"}
DOTTED = {"policy_dir": "policy.dir", "policy_config": "policy.config"}

# `pruner train CONFIG`: openpi's names for what openpi has.
TRAIN = [
    "name",
    "exp_name",
    "backend",
    "model",
    "data",
    "weight_path",
    "pytorch_weight_path",
    "weight_missing",
    "weight_ignored",
    "tokenizer_path",
    "seed",
    "batch_size",
    "num_train_steps",
    "lr_schedule",
    "optimizer",
    "ema_decay",
    "freeze",
    "augment",
    "accumulation",
    "gradient_checkpointing",
    "pytorch_compile",
    "token_prune_noise_schedule",
    "num_workers",
    "log_interval",
    "save_interval",
    "keep_period",
    "checkpoint_base_dir",
    "assets_base_dir",
    "fsdp_devices",
    "tensorboard_enabled",
    "wandb_enabled",
    "project_name",
    "policy_metadata",
    "resume",
    "overwrite",
]

SUPPRESSED = {"name", "model", "data", "policy_metadata"}


def status_of(arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    return exit_info.value.code


def test_these_are_all_commands():
    assert set(cli.COMMANDS) == {*SURFACE, "train"}


@pytest.mark.parametrize("name", SURFACE)
def test_a_commands_options(name, capsys):
    fields = dataclasses.fields(importlib.import_module(cli.COMMANDS[name].module).Options)
    assert {field.name: field.default for field in fields} == SURFACE[name]
    assert status_of([name, "--help"]) == 0
    said = capsys.readouterr().out
    options = [DOTTED.get(option, option) for option in SURFACE[name] if option not in POSITIONAL]
    assert [option for option in options if f"--{option}" not in said] == []


@pytest.mark.parametrize(
    ("flag", "changed"),
    [
        ("no_graphs", {"graphs": False}),
        ("no_kernels", {"kernels": False}),
        ("compiled", {"compiled": True}),
        ("no_guess", {"guess": False}),
        ("autotune", {"autotune": True}),
        ("float8", {"float8": True}),
    ],
)
@pytest.mark.parametrize(
    ("line", "way"),
    [
        ("serve policy:checkpoint --policy.dir place", "inference"),
        ("eval --policy.dir place", "inference"),
        ("bench --device cpu --config tiny --backend torch --output OUT", "path"),
    ],
    ids=["serve", "eval", "bench"],
)
def test_flags_of_the_fast_way(line, way, flag, changed, tmp_path, monkeypatch, capsys):
    """They reach `policy.load` and bench's workers; the plain way reads none."""
    given = []

    def load(*_, settings, **__):
        given.append(settings)
        raise ValueError("far enough")

    def start(job, *_):
        given.append(job.setup.settings)
        raise ValueError("far enough")

    monkeypatch.setattr("pruner_run.policy.load", load)
    monkeypatch.setattr("pruner_run.evaluate.run", lambda options: options.load("place", None))
    monkeypatch.setattr("pruner_run.bench_process.events", start)
    monkeypatch.setattr("pruner_run.bench_run.Bench.measure_ceilings", lambda *_: None)
    arguments = line.replace("OUT", str(tmp_path / "out")).split()
    first, rest = arguments[0], arguments[1:]
    for options, expected in (([], {}), ([f"--{flag}"], changed)):
        assert status_of([first, *options, *rest]) == cli.BAD_INPUT
        assert given.pop() == InferenceSettings(**expected)
    capsys.readouterr()
    assert status_of([first, f"--{flag}", f"--{way}", "plain", *rest]) == cli.BAD_INPUT
    said = " ".join(capsys.readouterr().err.split())
    assert f"{way}: expected the fast way with --{flag}, got 'plain'" in said
    assert given == []


def test_the_trainers_options(capsys):
    assert [field.name for field in dataclasses.fields(TrainConfig)] == TRAIN
    assert status_of(["train", "--help"]) == 0
    said = capsys.readouterr().out
    assert [name for name in CONFIGS if name not in said] == []
    assert status_of(["train", "debug_pi05", "--help"]) == 0
    said = capsys.readouterr().out
    options = [f"--{name}" for name in TRAIN if name not in SUPPRESSED]
    for option in (*options, "--model.token_pruning_enabled", "--data.repo_id"):
        assert option.split(".")[0] in said, option


def test_a_config_that_is_none(capsys):
    assert status_of(["train", "pi05_liberoo"]) == cli.BAD_INPUT
    assert "did you mean pi05_libero" in capsys.readouterr().err

"""LeRobot's folders: what is written into them, and what is read back. LeRobot itself isn't needed.

The expected files are as LeRobot 0.4.4, 0.5.1 and 0.6.1 load them.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load, save_file

from convert.lerobot import config_fields, policy_files
from convert.lerobot_stats import norm_stats_of
from pruner_spec.config import Pi0Config

PI05 = Pi0Config(pi05=True, action_horizon=10)
PI0 = Pi0Config(action_horizon=15)
TEXT_ONLY = Pi0Config(pi05=True, discrete_state_input=False)
models = pytest.mark.parametrize("config", [PI05, PI0], ids=["pi05", "pi0"])

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
PRE_STATE = "policy_preprocessor_step_2_normalizer_processor.safetensors"
POST_STATE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


def stats_of(length, seed):
    """Numbers that float32 can't hold, as JSON has them."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=length).tolist() for name in ("mean", "std", "q01", "q99")}


STATS = {"state": stats_of(8, seed=0), "actions": stats_of(7, seed=1)}


def changed(stats, key, **values):
    return stats | {key: stats[key] | values}


def without(stats, key, name):
    return stats | {key: {each: stats[key][each] for each in stats[key] if each != name}}


def parsed(files, name):
    return json.loads(files[name])


def write(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def assert_stats_equal(found, expected):
    assert {key: sorted(stats) for key, stats in found.items()} == {
        key: sorted(stats) for key, stats in expected.items()
    }
    for key, stats in expected.items():
        for name, values in stats.items():
            np.testing.assert_array_equal(found[key][name], np.asarray(values))


def test_policy_config_of_pi05():
    files = policy_files(PI05, STATS, precision="bfloat16")
    images = {
        f"observation.images.{camera}": {"type": "VISUAL", "shape": [3, 224, 224]}
        for camera in CAMERAS
    }
    config = parsed(files, "config.json")
    assert config == {
        "type": "pi05",
        "n_obs_steps": 1,
        "input_features": images | {"observation.state": {"type": "STATE", "shape": [8]}},
        "output_features": {"action": {"type": "ACTION", "shape": [7]}},
        "normalization_mapping": {
            "VISUAL": "IDENTITY",
            "STATE": "QUANTILES",
            "ACTION": "QUANTILES",
        },
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": "bfloat16",
        "chunk_size": 10,
        "n_action_steps": 10,
        "max_state_dim": 32,
        "max_action_dim": 32,
        "image_resolution": [224, 224],
        "tokenizer_max_length": 200,
    }
    # The model sees the cameras in this order.
    assert list(config["input_features"])[:3] == list(images)


def test_policy_config_of_pi0():
    config = parsed(policy_files(PI0, None, precision="float32"), "config.json")
    mode = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    assert (config["type"], config["dtype"]) == ("pi0", "float32")
    assert (config["chunk_size"], config["tokenizer_max_length"]) == (15, 48)
    assert config["normalization_mapping"] == mode
    assert config["input_features"]["observation.state"] == {"type": "STATE", "shape": [32]}
    assert config["output_features"] == {"action": {"type": "ACTION", "shape": [32]}}


def test_processors_of_pi05():
    files = policy_files(PI05, STATS, precision="float32")
    config = parsed(files, "config.json")
    features = config["input_features"] | config["output_features"]
    norm_map = config["normalization_mapping"]
    device = {"device": "cpu", "float_dtype": None}
    assert parsed(files, "policy_preprocessor.json") == {
        "name": "policy_preprocessor",
        "steps": [
            {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
            {"registry_name": "to_batch_processor", "config": {}},
            {
                "registry_name": "normalizer_processor",
                "config": {"eps": 1e-6, "features": features, "norm_map": norm_map},
                "state_file": PRE_STATE,
            },
            {
                "registry_name": "pi05_prepare_state_tokenizer_processor_step",
                "config": {"max_state_dim": 1},
            },
            {
                "registry_name": "tokenizer_processor",
                "config": {
                    "max_length": 200,
                    "task_key": "task",
                    "padding_side": "right",
                    "padding": "max_length",
                    "truncation": True,
                    "tokenizer_name": "google/paligemma-3b-pt-224",
                },
            },
            {"registry_name": "device_processor", "config": device},
        ],
    }
    outputs = config["output_features"]
    assert parsed(files, "policy_postprocessor.json") == {
        "name": "policy_postprocessor",
        "steps": [
            {
                "registry_name": "unnormalizer_processor",
                "config": {"eps": 1e-6, "features": outputs, "norm_map": norm_map},
                "state_file": POST_STATE,
            },
            {"registry_name": "device_processor", "config": device},
        ],
    }


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (PI05, "normalizer pi05_prepare_state_tokenizer_processor_step tokenizer device"),
        (TEXT_ONLY, "normalizer smolvla_new_line tokenizer device"),
        (PI0, "pi0_new_line tokenizer device normalizer"),
    ],
    ids=["state in the prompt", "state nowhere", "state as a token"],
)
def test_the_prompt_is_made_as_in_openpi(config, steps):
    files = policy_files(config, None, precision="float32")
    found = [step["registry_name"] for step in parsed(files, "policy_preprocessor.json")["steps"]]
    assert [name.removesuffix("_processor") for name in found] == [
        *("rename_observations", "to_batch"),
        *steps.split(),
    ]


def test_statistics_are_named_as_in_lerobot():
    files = policy_files(PI05, STATS, precision="float32")
    assert files.keys() == {
        *("config.json", "policy_preprocessor.json", "policy_postprocessor.json"),
        *(PRE_STATE, POST_STATE),
    }
    assert files[PRE_STATE] == files[POST_STATE]
    stored = load(files[PRE_STATE])
    names = ("mean", "std", "q01", "q99")
    assert stored.keys() == {
        f"{feature}.{name}" for feature in ("observation.state", "action") for name in names
    }
    np.testing.assert_array_equal(stored["action.q99"], np.asarray(STATS["actions"]["q99"]))


@models
def test_the_same_bytes_at_every_call(config):
    first = policy_files(config, STATS, precision="float32")
    backwards = {key: dict(reversed(STATS[key].items())) for key in reversed(STATS)}
    assert policy_files(config, backwards, precision="float32") == first


@models
def test_statistics_come_back_exactly(config, tmp_path):
    folder = write(tmp_path / "policy", policy_files(config, STATS, precision="bfloat16"))
    assert_stats_equal(norm_stats_of(folder), STATS)


def test_pi0_needs_no_quantiles(tmp_path):
    given = {
        key: {"mean": STATS[key]["mean"], "std": STATS[key]["std"], "q01": None} for key in STATS
    }
    folder = write(tmp_path / "policy", policy_files(PI0, given, precision="float32"))
    expected = {key: {name: given[key][name] for name in ("mean", "std")} for key in given}
    assert_stats_equal(norm_stats_of(folder), expected)


@models
def test_no_statistics(config, tmp_path):
    files = policy_files(config, None, precision="float32")
    assert files.keys() == {"config.json", "policy_preprocessor.json", "policy_postprocessor.json"}
    assert not any(b"state_file" in content for content in files.values())
    assert norm_stats_of(write(tmp_path / "policy", files)) is None


def test_a_folder_without_processors_has_no_statistics(tmp_path):
    files = policy_files(PI05, STATS, precision="float32")
    folder = write(tmp_path / "policy", {"config.json": files["config.json"]})
    assert norm_stats_of(folder) is None


def test_statistics_that_openpi_does_not_know_are_left_out(tmp_path):
    folder = write(tmp_path / "policy", policy_files(PI05, STATS, precision="float32"))
    for name in (PRE_STATE, POST_STATE):
        stored = load((folder / name).read_bytes())
        extra = {"action.min": np.zeros(7), "observation.images.top.mean": np.zeros((3, 1, 1))}
        save_file(stored | extra, folder / name)
    assert_stats_equal(norm_stats_of(folder), STATS)


@pytest.mark.parametrize(
    ("config", "stats", "message"),
    [
        (PI05, without(STATS, "state", "q01"), r"state: expected \['q01'\] too"),
        (PI05, changed(STATS, "actions", q99=None), r"actions: expected \['q99'\] too"),
        (PI0, without(STATS, "actions", "std"), r"actions: expected \['std'\] too"),
        (PI05, {"state": STATS["state"]}, r"expected \['actions', 'state'\], got \['state'\]"),
        (PI05, STATS | {"extra": {}}, "got .*'extra'"),
        (PI05, changed(STATS, "state", min=[0.0] * 8), r"got also \['min'\]"),
        (PI05, changed(STATS, "state", std=[1.0] * 7), r"one length in 1\.\.32"),
        (PI05, STATS | {"state": stats_of(33, seed=0)}, r"one length in 1\.\.32"),
        (PI05, STATS | {"state": stats_of((2, 3), seed=0)}, "vectors"),
        (PI05, STATS | {"state": stats_of(0, seed=0)}, "vectors"),
        (PI05, changed(STATS, "actions", q01=[float("nan")] * 7), "actions: q01: .*finite"),
    ],
)
def test_statistics_that_cannot_be(config, stats, message):
    with pytest.raises(ValueError, match=message):
        policy_files(config, stats, precision="float32")


@pytest.mark.parametrize(
    ("fields", "precision", "message"),
    [
        ({"paligemma_variant": "dummy", "action_expert_variant": "dummy"}, "float32", "paligemma"),
        ({"vision_variant": "So400m/16"}, "float32", "vision_variant: .*got 'So400m/16'"),
        ({}, "float16", "precision: .*'bfloat16', 'float32'.*got 'float16'"),
        ({"discrete_state_input": True}, "float32", "discrete_state_input: .*pi0 .*got True"),
    ],
)
def test_models_that_lerobot_lacks(fields, precision, message):
    with pytest.raises(ValueError, match=message):
        policy_files(Pi0Config(**fields), None, precision=precision)


@pytest.mark.parametrize("config", [PI05, PI0, TEXT_ONLY], ids=["pi05", "pi0", "text only"])
def test_the_config_comes_back(config):
    files = policy_files(config, STATS, precision="bfloat16")
    fields = config_fields(parsed(files, "config.json"), parsed(files, "policy_preprocessor.json"))
    assert Pi0Config(**fields) == config


def test_what_a_config_lacks_has_the_defaults_of_lerobot():
    assert config_fields({"type": "pi05"}) == {
        "pi05": True,
        "dtype": "float32",
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "vision_variant": "So400m/14",
        "action_dim": 32,
        "action_horizon": 50,
        "max_token_len": 200,
    }
    assert config_fields({"type": "pi0"})["max_token_len"] == 48


@pytest.mark.parametrize(
    ("policy_config", "message"),
    [
        ({"type": "act"}, r"type: .*\['pi0', 'pi05'\], got 'act'"),
        ({}, "type: .*got None"),
        ({"type": "pi05", "image_resolution": [448, 448]}, r"image_resolution: .*\[448, 448\]"),
        ({"type": "pi05", "max_period": 8.0}, "max_period: expected openpi's 4.0, got 8.0"),
        ({"type": "pi0", "max_state_dim": 14}, r"max_state_dim: .*\(32\), got 14"),
    ],
)
def test_policies_that_openpi_lacks(policy_config, message):
    with pytest.raises(ValueError, match=message):
        config_fields(policy_config)


def test_the_state_of_pi05_is_no_input_of_the_model():
    assert config_fields({"type": "pi05", "max_state_dim": 14})["action_dim"] == 32


@pytest.mark.parametrize("mode", ["MEAN_STD", "MIN_MAX", "IDENTITY"])
def test_another_normalization_is_refused(mode, tmp_path):
    files = policy_files(PI05, STATS, precision="float32")
    files["policy_postprocessor.json"] = files["policy_postprocessor.json"].replace(
        b'"ACTION": "QUANTILES"', f'"ACTION": "{mode}"'.encode()
    )
    with pytest.raises(ValueError, match=f"ACTION: expected openpi's QUANTILES, got {mode}"):
        norm_stats_of(write(tmp_path / "policy", files))


def test_statistics_without_a_mean_are_refused(tmp_path):
    folder = write(tmp_path / "policy", policy_files(PI05, STATS, precision="float32"))
    save_file({"action.q01": np.zeros(7), "action.q99": np.ones(7)}, folder / POST_STATE)
    with pytest.raises(ValueError, match=r"actions: expected \['mean', 'std'\] too"):
        norm_stats_of(folder)


@pytest.mark.parametrize("name", ["config.json", "policy_preprocessor.json", PRE_STATE])
def test_a_broken_file_is_named(name, tmp_path):
    folder = write(tmp_path / "policy", policy_files(PI05, STATS, precision="float32"))
    (folder / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name}: expected"):
        norm_stats_of(folder)


@pytest.mark.parametrize("name", ["config.json", POST_STATE])
def test_a_missing_file_is_named(name, tmp_path):
    folder = write(tmp_path / "policy", policy_files(PI05, STATS, precision="float32"))
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        norm_stats_of(folder)

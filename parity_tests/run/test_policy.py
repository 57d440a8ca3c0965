"""Policies: a robot's observation in, its actions out, from every kind of checkpoint."""

import dataclasses
import json

import numpy as np
import pytest

import pruner_run.backend
from convert import lerobot
from parity_tests import record
from parity_tests.convert.checkpoints import jax_tensors, save_jax, save_torch, torch_tensors
from parity_tests.harness import BACKENDS, error
from parity_tests.run.policies import (
    ALOHA,
    DIMS,
    DROID,
    LIBERO,
    MODEL,
    PLAIN,
    EchoModel,
    config_of,
    echo_policy,
    pruned,
    stats_of,
)
from parity_tests.tolerances import tolerance
from pruner_run import policy as policies
from pruner_run import run_checkpoint
from pruner_run.assets import DEMO_TOKENIZER
from pruner_run.data.transforms import apply, input_transforms
from pruner_run.kept_bits import kept_patches
from pruner_run.policy_source import open_policy_source
from pruner_run.tokenizer import load_tokenizer
from pruner_spec.config import CAMERAS
from pruner_spec.inference import InferenceSettings
from pruner_spec.parameters import random_parameters
from pruner_spec.training import TrainState

EXACT = tolerance("statistics", "float64")
ROBOTS = {config.data.robot: config for config in (ALOHA, LIBERO, DROID, PLAIN)}
robots = pytest.mark.parametrize("robot", ROBOTS)
backends = pytest.mark.parametrize("backend", BACKENDS)
both = pytest.mark.skipif(len(BACKENDS) != 2, reason="compares the two backends")
needs_jax = pytest.mark.skipif("jax" not in BACKENDS, reason="Orbax needs JAX")
needs_torch = pytest.mark.skipif("torch" not in BACKENDS, reason="runs in PyTorch")
PRUNED = pruned(LIBERO, token_prune_keep_tokens=5)


@robots
def test_what_training_normalises_a_policy_gives_back(robot):
    """Training's transforms, with actions, then a policy that answers with what they gave."""
    config = ROBOTS[robot]
    policy = echo_policy(config)
    observation = policy.example() | {"prompt": "go on"}
    generator = np.random.default_rng(2)
    actions = generator.uniform(0, 1, (MODEL.action_horizon, DIMS[robot][1]))
    tokenizer = load_tokenizer(DEMO_TOKENIZER, config.model)
    inputs = input_transforms(config.data, config.model, stats_of(robot), tokenizer)
    sample = apply(inputs, observation | {"actions": actions})
    answer = policy.infer(observation, noise=sample["actions"])
    assert answer.keys() == {"actions", "policy_timing", "pruning"}
    np.testing.assert_allclose(
        answer["actions"], actions, rtol=0, atol=tolerance("policy actions", "float32")
    )
    [given] = policy._model.observations
    for camera in CAMERAS:
        np.testing.assert_array_equal(
            given.images[camera][0], sample[f"image/{camera}"], strict=True
        )
        assert given.image_masks[camera].tolist() == [bool(sample[f"image_mask/{camera}"])]
    np.testing.assert_array_equal(given.tokenized_prompt[0], sample["tokenized_prompt"])
    np.testing.assert_array_equal(given.state[0], sample["state"].astype(np.float32))


@robots
def test_what_a_client_is_told(robot):
    told = echo_policy(ROBOTS[robot]).metadata
    assert json.loads(json.dumps(told)) == told
    assert told["robot"] == robot
    assert sum(told["state"].values()) == DIMS[robot][0]
    assert told["action_dim"] == DIMS[robot][1]
    assert told["needs_prompt"] == (robot != "plain")


def test_actions_that_a_client_sends_are_not_looked_at():
    policy = echo_policy(LIBERO)
    noise = np.zeros((MODEL.action_horizon, MODEL.action_dim))
    expected = policy.infer(policy.example(), noise=noise)["actions"]
    found = policy.infer(policy.example() | {"actions": "none"}, noise=noise)["actions"]
    np.testing.assert_array_equal(found, expected)


def test_nested_dictionaries_and_missing_cameras():
    policy = echo_policy(ALOHA)
    flat = policy.example()
    nested = {"state": flat["state"], "prompt": "", "images": {}}
    for key in ("cam_high", "cam_left_wrist", "cam_right_wrist"):
        nested["images"][key] = flat[f"images/{key}"].transpose(2, 0, 1)
    noise = np.ones((MODEL.action_horizon, MODEL.action_dim))
    expected = policy.infer(flat, noise=noise)
    found = policy.infer(nested, noise=noise)
    np.testing.assert_array_equal(found["actions"], expected["actions"])
    assert found["pruning"] == expected["pruning"]
    del nested["images"]["cam_left_wrist"]
    kept = policy.infer(nested)["pruning"]
    assert kept == {
        "kept": {"base_0_rgb": 16, "right_wrist_0_rgb": 16},
        "kept_total": 32,
        "patches": 32,
    }
    with pytest.raises(ValueError, match="images/cam_high"):
        policy.infer({"state": flat["state"], "prompt": "", "images": {}})


def test_cameras_are_counted_for_each_observation():
    policy = echo_policy(ALOHA, max_batch=2)
    first = policy.example()
    second = {key: value for key, value in first.items() if "wrist" not in key}
    found = [each["pruning"]["kept"] for each in policy.infer_batch([first, second])]
    assert found == [dict.fromkeys(CAMERAS, 16), {"base_0_rgb": 16}]
    assert policy.infer(second)["pruning"] == {
        "kept": found[1],
        "kept_total": 16,
        "patches": 16,
    }


def test_noise_is_a_function_of_seed_and_number():
    policy = echo_policy(LIBERO)
    first, second, third = (policy.infer(policy.example())["actions"] for _ in range(3))
    assert not np.array_equal(first, second)
    again = echo_policy(LIBERO, max_batch=4)
    example = again.example()
    for found, expected in zip(
        again.infer_batch([example] * 3), (first, second, third), strict=True
    ):
        np.testing.assert_array_equal(found["actions"], expected)
    other = echo_policy(LIBERO, seed=1)
    assert not np.array_equal(other.infer(other.example())["actions"], first)
    with pytest.raises(ValueError, match=r"noise: .* \(1, 4, 16\), got \(1, 4, 7\)"):
        policy.infer(policy.example(), noise=np.zeros((4, 7)))


def test_batches_are_padded_to_a_few_sizes():
    policy = echo_policy(LIBERO, max_batch=6)
    answers = policy.infer_batch([policy.example()] * 9)
    assert [each.batch_size for each in policy._model.observations] == [6, 4]
    assert [each["policy_timing"]["batch_size"] for each in answers] == [6] * 6 + [3] * 3
    assert policy.infer_batch([]) == []


def test_warming_up_meets_every_size_and_likely_prompts():
    policy = echo_policy(LIBERO, max_batch=3)
    policy.warm_up()
    met = {
        (each.batch_size, int(each.tokenized_prompt_mask.sum(axis=1)[0]))
        for each in policy._model.observations
    }
    assert {size for size, _ in met} == {1, 2, 3}
    lengths = {length for _, length in met}
    assert len(lengths) == len(met) / 3 > 1
    shortest = policy.prepare(policy.example()).inputs["tokenized_prompt_mask"].sum()
    assert min(lengths) >= shortest
    assert max(lengths) >= min(shortest + 32, MODEL.max_token_len)
    fresh = echo_policy(LIBERO)
    np.testing.assert_array_equal(
        policy.infer(policy.example())["actions"], fresh.infer(fresh.example())["actions"]
    )


def test_actions_that_are_not_finite_reach_no_robot():
    policy = echo_policy(LIBERO)
    noise = np.full((MODEL.action_horizon, MODEL.action_dim), np.nan)
    with pytest.raises(ValueError, match="actions: expected finite numbers from the model"):
        policy.infer(policy.example(), noise=noise)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The same weights as openpi's JAX and PyTorch trainers save them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {"torch": save_torch(folder / "torch", torch_tensors(MODEL), stats=False)}
    if "jax" in BACKENDS:
        found["jax"] = save_jax(folder / "jax", jax_tensors(MODEL), stats=False)
    for each in found.values():
        stats_of("libero").write(each / "assets/lab")
    return found


@pytest.fixture(scope="module")
def loaded(checkpoints, compile_fast):
    """A policy of each backend, that prunes."""
    made = {}

    def load(backend, dtype="float32"):
        if (backend, dtype) not in made:
            place = checkpoints.get(backend, checkpoints["torch"])
            made[backend, dtype] = policies.load(
                place, PRUNED, backend, dtype=dtype, max_batch=2, warm_up=False, num_steps=3
            )
        return made[backend, dtype]

    return load


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_backends_give_the_same_actions(dtype, loaded):
    """From their own formats, by noise that is given and noise that they draw."""
    jax, torch = loaded("jax", dtype), loaded("torch", dtype)
    observation = jax.example() | {"prompt": "pick up the cube"}
    noise = np.random.default_rng(1).standard_normal((MODEL.action_horizon, MODEL.action_dim))
    for options in ({"noise": noise}, {}):
        expected, found = (each.infer(observation, **options) for each in (jax, torch))
        difference = error(found["actions"], expected["actions"])
        if dtype == "bfloat16":
            record.report("actions of a policy", dtype, "jax | torch", difference)
        else:
            assert expected["pruning"] == found["pruning"]
            record.check("policy actions", dtype, "jax | torch", difference)


@backends
def test_a_policy_of_a_model(backend, loaded):
    """Its answers to several observations are those to each; and what it says of them."""
    policy = loaded(backend)
    assert policy.metadata["backend"] == backend
    assert policy.metadata["pruning"] == {
        "enabled": True,
        "keep_tokens": 5,
        "patches": 16,
        "scope": "camera",
    }
    observation = policy.example() | {"prompt": "pick up the cube"}
    other = observation | {"observation/state": np.zeros(8)}
    noise = np.random.default_rng(1).standard_normal((3, MODEL.action_horizon, MODEL.action_dim))
    answers = policy.infer_batch([observation, other, observation], noise=noise)
    alone = policy.infer(observation, noise=noise[2])
    assert answers[0]["actions"].shape == (MODEL.action_horizon, 7)
    bound = tolerance("policy actions", "float32")
    assert error(answers[2]["actions"], alone["actions"]) < bound
    assert error(answers[0]["actions"], alone["actions"]) > bound
    pruning = {**alone["pruning"]}
    assert [*pruning.pop("kept_bits")] == ["base_0_rgb", "left_wrist_0_rgb"]
    assert pruning == {
        "kept": {"base_0_rgb": 5, "left_wrist_0_rgb": 5},
        "kept_total": 10,
        "patches": 32,
    }
    chosen = policy.choose(policy.prepare(observation))
    kept = kept_patches(alone)
    np.testing.assert_array_equal(np.stack([*kept.values()]), chosen.pruned.kept[0])
    assert kept_patches({"pruning": policy._pruning({})}) == {}
    timing = alone["policy_timing"]
    assert timing.keys() == {"preprocess_ms", "infer_ms", "postprocess_ms", "batch_size"}
    assert min(timing.values()) > 0
    stages = policy.stages()
    assert stages.keys() == {"vision", "pruning", "prefix", "denoising"}
    assert min(stages.values()) > 0


@backends
def test_what_shares_a_batch_changes_no_answer(backend, compile_fast):
    """Other cameras, longer instructions and more voters beside it, and padding."""
    config = pruned(ALOHA)
    weights = dict(random_parameters(config.model, 3))
    model = pruner_run.backend.load(backend).model(config.model, weights)
    policy = echo_policy(config, model=model, max_batch=4, num_steps=2)
    example = policy.example()
    observations = [
        example | {"prompt": "go"},
        {key: each for key, each in example.items() if "wrist" not in key},
        {key: each for key, each in example.items() if "left" not in key}
        | {"prompt": "pick up the cube and put it to the left of the other one, then wait"},
    ]
    noise = np.random.default_rng(1).standard_normal((3, MODEL.action_horizon, MODEL.action_dim))
    together = policy.infer(observations, noise=noise)
    bound = tolerance("policy actions", "float32")
    for place, (observation, found) in enumerate(zip(observations, together, strict=True)):
        alone = policy.infer(observation, noise=noise[place])
        assert found["pruning"] == alone["pruning"]
        assert error(found["actions"], alone["actions"]) < bound


@needs_torch
def test_the_backend_is_that_of_the_weights_where_it_is_installed(checkpoints, monkeypatch):
    def chosen(*arguments):
        return policies.load(checkpoints["torch"], LIBERO, *arguments, warm_up=False).metadata[
            "backend"
        ]

    assert chosen() == "torch"
    if "jax" in BACKENDS:
        monkeypatch.setattr("pruner_run.backend.missing", lambda: ["torch"])
        assert chosen() == "jax"
        with pytest.raises(ValueError, match="torch cannot be found; pip install"):
            chosen("torch")
    with pytest.raises(ValueError, match="backend: expected 'auto', 'jax' or 'torch', got 'tf'"):
        chosen("tf")


@needs_torch
def test_budgets_in_place_of_the_configs(checkpoints):
    def described(**options):
        policy = policies.load(checkpoints["torch"], PRUNED, "torch", warm_up=False, **options)
        found = policy.infer(policy.example())["pruning"]
        return policy.metadata["pruning"]["enabled"], found["kept_total"]

    assert described(keep_ratio=0.25) == (True, 8)
    assert described(keep_tokens=3) == (True, 6)
    assert described(pruning=False) == (False, 32)
    with pytest.raises(ValueError, match="pruning: expected no budget where nothing is pruned"):
        described(pruning=False, keep_tokens=3)
    with pytest.raises(ValueError, match="keep_ratio: expected at most one budget"):
        described(keep_ratio=0.5, keep_tokens=3)


@needs_torch
@backends
def test_settings_of_the_fast_way(backend, checkpoints, caplog):
    settings = InferenceSettings(guess=False, autotune=True)

    def load(**options):
        given = {"settings": settings, "warm_up": False, **options}
        return policies.load(checkpoints["torch"], PRUNED, backend, **given)

    assert load(inference="fast")._model._stages.settings == settings
    assert not caplog.records
    with pytest.raises(
        ValueError, match="'auto' or 'fast' with guess=False, autotune=True, got 'p"
    ):
        load(inference="plain")
    load(inference="plain", settings=InferenceSettings())
    load()  # on a CPU
    assert "on a CPU the way is plain" in caplog.text


@needs_torch
@pytest.mark.parametrize("backend", [name for name in ("jax", "torch") if name in BACKENDS])
def test_a_checkpoint_of_our_trainer_says_all_itself(backend, tmp_path):
    config = dataclasses.replace(
        PRUNED, exp_name="run", backend=backend, checkpoint_base_dir=tmp_path, ema_decay=None
    )
    state = TrainState(4, dict(random_parameters(MODEL, 3)), None, {}, {})
    stats = {"lab/norm_stats.json": stats_of("libero").to_file()}
    place = run_checkpoint.save(config, 4, state, stats)
    policy = policies.load(place, None, "torch", tokenizer_path=DEMO_TOKENIZER, warm_up=False)
    assert policy.metadata["config"] == "libero_tiny"
    assert policy.metadata["robot"] == "libero"
    assert policy.metadata["pruning"]["keep_tokens"] == 5
    assert policy.infer(policy.example())["actions"].shape == (MODEL.action_horizon, 7)


@needs_torch
@pytest.mark.parametrize("has_stats", [True, False])
def test_a_folder_of_lerobots(has_stats, tmp_path, monkeypatch):
    """Its cameras, states and actions are the model's own."""
    monkeypatch.setattr(lerobot, "VARIANTS", ("tiny", "tiny_expert"))
    monkeypatch.setattr(lerobot, "VISION_VARIANT", MODEL.vision_variant)
    stats = {key: vars(each) for key, each in vars(stats_of("plain")).items()}
    files = lerobot.policy_files(MODEL, stats if has_stats else None, precision="float32")
    tensors = {f"model.{name}": each for name, each in torch_tensors(MODEL).items()}
    save_torch(tmp_path, tensors, stats=False)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    policy = policies.load(
        tmp_path, None, "torch", tokenizer_path=DEMO_TOKENIZER, dtype="float32", warm_up=False
    )
    state_dim, action_dim = DIMS["plain"] if has_stats else (16, 16)
    assert policy.metadata["state"] == {"state": state_dim}
    answer = policy.infer(policy.example())
    assert answer["actions"].shape == (MODEL.action_horizon, action_dim)
    steps = json.loads((tmp_path / "policy_preprocessor.json").read_text())
    steps["steps"].append(
        {"registry_name": "relative_actions_processor", "config": {"enabled": False}}
    )
    (tmp_path / "policy_preprocessor.json").write_text(json.dumps(steps))
    open_policy_source(tmp_path)
    steps["steps"][-1]["config"]["enabled"] = True
    (tmp_path / "policy_preprocessor.json").write_text(json.dumps(steps))
    with pytest.raises(ValueError, match=r"openpi's .*'relative_actions_processor'"):
        open_policy_source(tmp_path)


@needs_torch
def test_checkpoints_and_configs_that_do_not_fit(checkpoints, tmp_path, monkeypatch):
    place = checkpoints["torch"]

    def refused(config, **options):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            policies.load(place, config, **options)
        return str(error.value)

    assert "nothing in" in refused(None)
    assert "says which robot it is for" in refused(None)
    assert "did you mean pi05_libero" in refused("pi05_liberoo")
    assert "asset_id: expected statistics of 'trossen'" in refused(LIBERO, asset_id="trossen")
    assert "got ['lab']" in refused(LIBERO, asset_id="trossen")
    wider = dataclasses.replace(LIBERO, model=dataclasses.replace(MODEL, action_dim=32))
    assert "action_dim: expected 32, got 16" in refused(wider)
    assert "robot: expected a policy for 'droid', got one for 'libero'" in refused(
        LIBERO, robot="droid"
    )
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    without = dataclasses.replace(LIBERO, tokenizer_path=None)
    assert f"curl --create-dirs -o {tmp_path}/big_vision/paligemma" in refused(without)
    assert "max_batch: expected 1..64, got 0" in refused(LIBERO, max_batch=0)
    (place / "run.json").write_text('{"config": {"name": "x"}}')
    assert "run.json: expected a run's config, got KeyError('model')" in refused(None)
    (place / "run.json").unlink()


def test_the_pruners_own_selection_is_reported():
    class Voting(EchoModel):
        def kept(self):
            counts = {"base_0_rgb": [3, 3], "left_wrist_0_rgb": [1, 2]}
            return {
                camera: np.arange(16) < np.array(each)[:, None] for camera, each in counts.items()
            }

    policy = echo_policy(pruned(LIBERO), model=Voting(), max_batch=2)
    answers = policy.infer_batch([policy.example()] * 2)
    assert [each["pruning"]["kept_total"] for each in answers] == [4, 5]
    assert policy.metadata["pruning"]["keep_tokens"] is None
    assert {camera: each.sum() for camera, each in kept_patches(answers[1]).items()} == {
        "base_0_rgb": 3,
        "left_wrist_0_rgb": 2,
    }
    answers[0]["pruning"]["kept_bits"]["base_0_rgb"] = b"1"
    with pytest.raises(ValueError, match="expected bytes for 16 patches, got 1 bytes"):
        kept_patches(answers[0])


def test_several_observations_in_one_call():
    one, other = echo_policy(LIBERO, max_batch=2), echo_policy(LIBERO, max_batch=2)
    example = one.example()
    for found, expected in zip(
        one.infer([example] * 3), other.infer_batch([example] * 3), strict=True
    ):
        np.testing.assert_array_equal(found["actions"], expected["actions"])
    assert one.infer([]) == []


PIXELS = np.zeros((224, 224, 3), np.float32)


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (LIBERO, {"observation/image": 255 * (PIXELS + 1)}, r"floats in \[0, 1\], got 255 to 255"),
        (LIBERO, {"observation/image": PIXELS - 1}, r"floats in \[0, 1\], got -1 to -1"),
        (LIBERO, {"observation/image": np.zeros((1, 8193, 3), "u1")}, "at most 8192 pixels a side"),
        (LIBERO, {"observation/image": PIXELS * np.nan}, r"observation/image: .* got nan to nan"),
        (LIBERO, {"observation/image": [[1], [2, 3]]}, "observation/image: expected an array, got"),
        (LIBERO, {"observation/state": [[1], [2, 3]]}, "observation/state: expected an array, got"),
        (LIBERO, {"observation/state": np.full(8, 1e39)}, "state: expected normalised numbers up"),
        (LIBERO, {"image_mask/base_0_rgb": [True, False]}, "image_mask/base_0_rgb: expected True"),
        (LIBERO, {"prompt": "a" * 10_001}, "prompt: expected at most 10000 characters, got 10001"),
        (LIBERO, {"prompt": ["a", "b"]}, "prompt: expected one text, got 2"),
        (PLAIN, {"state": np.zeros(4)}, "state: expected 5 numbers, got 4"),
        (PLAIN, {"state": [0, 0, 0, 0, np.inf]}, "state: expected finite numbers, got 1 .*: inf"),
    ],
)
def test_what_transforms_would_take_in_silence(config, change, said):
    policy = echo_policy(config)
    with pytest.raises(ValueError, match=said):
        policy.infer(policy.example() | change)


def test_a_state_of_generated_data_has_any_length():
    """No statistics say how long it is."""
    policy = echo_policy(config_of("plain", fake=True, default_prompt="go on"))
    assert policy.infer(policy.example() | {"state": np.zeros(3)})["actions"].shape == (4, 6)


def test_an_observation_that_is_none():
    with pytest.raises(ValueError, match="observation: expected a dictionary, got ndarray"):
        echo_policy(LIBERO).infer(np.zeros(3))


def test_images_may_be_a_little_beyond_their_range():
    """As interpolation leaves them."""
    policy = echo_policy(LIBERO)
    policy.infer(policy.example() | {"observation/image": PIXELS - 0.01})

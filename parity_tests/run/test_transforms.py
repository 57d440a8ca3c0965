"""From robots to the model and back: openpi's numbers, by hand; and what does not fit is named."""

import dataclasses
import json

import numpy as np
import pytest
import tyro
from PIL import Image

from parity_tests.tolerances import tolerance
from pruner_run.assets import DEMO_EPISODE, DEMO_TOKENIZER
from pruner_run.data import transforms
from pruner_run.data.config import DataConfig
from pruner_run.data.images import ImageCache, parse_image, resize_with_pad
from pruner_run.data.normalization import FeatureStats, NormStats
from pruner_run.data.robots import make_bool_mask
from pruner_run.tokenizer import PromptTokenizer
from pruner_spec.config import CAMERAS, Pi0Config

EXACT = tolerance("statistics", "float64")
MODEL = Pi0Config(
    paligemma_variant="tiny",
    action_expert_variant="tiny_expert",
    vision_variant="tiny/56",
    action_horizon=2,
    action_dim=16,
    max_token_len=80,
    pi05=True,
)
TOKENIZER = PromptTokenizer(DEMO_TOKENIZER, max_len=MODEL.max_token_len)


def image(value: int, height: int = 224, width: int = 224) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def identity(length: int) -> FeatureStats:
    """Statistics that change numbers by a millionth only, by deviation or by quantiles."""
    return FeatureStats(
        mean=np.zeros(length),
        std=np.ones(length),
        q01=-np.ones(length),
        q99=np.ones(length),
    )


def numbers(data: DataConfig, sample: dict) -> dict:
    return transforms.apply(transforms.number_transforms(data), sample)


# An ALOHA state and two actions of it, its grippers half and fully open, then closed and open.
ALOHA_STATE = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.0]
ALOHA_ACTION = [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.0, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 1.0]
# Joints 1, 2, 8 and 9 turn the other way. A gripper half open is at 0.03822 m, where the crank
# stands at arcsin(0.38578) = 0.39606 rad, which is -0.14006 of the way from 0.5476 to 1.6296.
PI_STATE = [
    *(0.0, -0.1, -0.2, 0.3, 0.4, 0.5, -0.1400559217021429),
    *(0.7, -0.8, -0.9, 1.0, 1.1, 1.2, 0.945652797407483),
]
# A gripper's action of 0 is -0.6213 rad and of 1 is 1.491 rad, less 0.5476.
PI_ACTION = [
    *(0.0, -0.05, -0.1, 0.15, 0.2, 0.25, -1.1689),
    *(0.35, -0.4, -0.45, 0.5, 0.55, 0.6, 0.9434),
]
PI_DELTA = [
    *(0.0, 0.05, 0.1, -0.15, -0.2, -0.25, -1.1689),
    *(-0.35, 0.4, 0.45, -0.5, -0.55, -0.6, 0.9434),
]


@pytest.mark.parametrize(
    ("options", "state", "action"),
    [
        ({}, PI_STATE, PI_DELTA),
        ({"use_delta_joint_actions": False}, PI_STATE, PI_ACTION),
        ({"adapt_to_pi": False, "use_delta_joint_actions": False}, ALOHA_STATE, ALOHA_ACTION),
        (
            {"adapt_to_pi": False, "delta_action_mask": (True, True)},
            ALOHA_STATE,
            [0.0, -0.05, *ALOHA_ACTION[2:]],
        ),
    ],
)
def test_aloha_numbers(options, state, action):
    data = DataConfig(robot="aloha", **options)
    found = numbers(data, {"state": np.array(ALOHA_STATE), "actions": np.array([ALOHA_ACTION] * 2)})
    np.testing.assert_allclose(found["state"], state, rtol=0, atol=EXACT)
    np.testing.assert_allclose(found["actions"], [action] * 2, rtol=0, atol=EXACT)


def test_transforms_change_none_of_their_arguments():
    sample = {"state": np.array(ALOHA_STATE), "actions": np.array([ALOHA_ACTION])}
    numbers(DataConfig(robot="aloha"), sample)
    assert sample["state"].tolist() == ALOHA_STATE
    assert sample["actions"].tolist() == [ALOHA_ACTION]


def test_a_batch_of_numbers_is_as_one_after_the_other():
    rng = np.random.default_rng(0)
    state, actions = rng.uniform(size=(5, 14)), rng.uniform(size=(5, 3, 14))
    data = DataConfig(robot="aloha")
    together = numbers(data, {"state": state, "actions": actions})
    for n in range(5):
        alone = numbers(data, {"state": state[n], "actions": actions[n]})
        np.testing.assert_array_equal(together["state"][n], alone["state"])
        np.testing.assert_array_equal(together["actions"][n], alone["actions"])


def test_aloha_images():
    pick = transforms.PickImages(DataConfig(robot="aloha").of_robot)
    sample = transforms.flatten(
        {
            "images": {
                "cam_high": image(1, 4, 6).transpose(2, 0, 1),
                "cam_low": image(2, 4, 6),
                "cam_right_wrist": image(3, 4, 6),
            },
            "state": 0,
        }
    )
    found = pick(sample)
    assert set(found) == {f"{k}/{c}" for k in ("image", "image_mask") for c in CAMERAS} | {"state"}
    assert [int(found[f"image/{camera}"].max()) for camera in CAMERAS] == [1, 0, 3]
    assert {found[f"image/{camera}"].shape for camera in CAMERAS} == {(4, 6, 3)}
    assert [bool(found[f"image_mask/{camera}"]) for camera in CAMERAS] == [True, False, True]
    with pytest.raises(ValueError, match=r"images: expected some of .* got \['images/cam_left'\]"):
        pick(sample | {"images/cam_left": image(1)})
    del sample["images/cam_high"]
    with pytest.raises(ValueError, match=r"images: expected \['images/cam_high'\], got"):
        pick(sample)


def test_libero():
    data = DataConfig(robot="libero")
    sample = {
        "observation/image": image(5),
        "observation/wrist_image": image(6).transpose(2, 0, 1) / np.float32(255),
        "observation/state": np.arange(8, dtype=np.float32),
        "actions": np.full((2, 7), 0.5, np.float32),
        "prompt": "put it down",
    }
    found = transforms.PickImages(data.of_robot)(sample)
    found = numbers(data, found)
    assert [int(found[f"image/{camera}"].max()) for camera in CAMERAS] == [5, 6, 0]
    assert [bool(found[f"image_mask/{camera}"]) for camera in CAMERAS] == [True, True, False]
    assert found["state"].tolist() == list(range(8))
    assert found["actions"].tolist() == [[0.5] * 7] * 2
    again = numbers(dataclasses.replace(data, extra_delta_transform=True), sample)
    assert again["actions"].tolist() == [[0.5, -0.5, -1.5, -2.5, -3.5, -4.5, 0.5]] * 2
    del sample["observation/wrist_image"]
    with pytest.raises(ValueError, match=r"images: expected \['observation/wrist_image'\], got"):
        transforms.PickImages(data.of_robot)(sample)


def test_droid():
    data = DataConfig(robot="droid")
    sample = {
        "observation/exterior_image_1_left": image(5),
        "observation/wrist_image_left": image(6),
        "observation/joint_position": np.arange(7.0),
        "observation/gripper_position": np.array(9.0),
        "actions": np.ones((2, 8)),
    }
    found = numbers(data, transforms.PickImages(data.of_robot)(sample))
    assert [int(found[f"image/{camera}"].max()) for camera in CAMERAS] == [5, 6, 0]
    assert found["state"].tolist() == [*range(7), 9]
    assert found["actions"].tolist() == [[1.0] * 8] * 2
    with pytest.raises(ValueError, match=r"state: expected \['observation/joint_position', "):
        numbers(data, {"actions": 0})


def test_a_plain_robot_has_the_models_cameras():
    pick = transforms.PickImages(DataConfig().of_robot)
    found = pick({f"image/{CAMERAS[1]}": image(7)})
    assert [int(found[f"image/{camera}"].max()) for camera in CAMERAS] == [0, 7, 0]
    assert [bool(found[f"image_mask/{camera}"]) for camera in CAMERAS] == [False, True, False]
    masked = pick({f"image/{CAMERAS[1]}": image(7), f"image_mask/{CAMERAS[1]}": False})
    assert not any(masked[f"image_mask/{camera}"] for camera in CAMERAS)
    with pytest.raises(ValueError, match=r"images: expected .*base_0_rgb.*, got"):
        pick({"state": 0})


@pytest.mark.parametrize("quantiles", [False, True])
@pytest.mark.parametrize(
    ("data", "state_dim", "action_dim"),
    [
        (DataConfig(robot="aloha"), 14, 14),
        (DataConfig(robot="aloha", adapt_to_pi=False), 14, 14),
        (DataConfig(robot="libero", extra_delta_transform=True), 8, 7),
        (DataConfig(robot="droid", delta_action_mask=make_bool_mask(7, -1)), 8, 8),
        (DataConfig(delta_action_mask=(False, True)), 3, 5),
    ],
    ids=lambda value: getattr(value, "robot", None),
)
def test_actions_come_back(data, state_dim, action_dim, quantiles):
    """Through all of the inputs' transforms and then the outputs', they are what they were."""
    rng = np.random.default_rng(0)
    data = dataclasses.replace(data, default_prompt="go on", use_quantile_norm=quantiles)
    keys = {"libero": ["observation/state"]}.get(data.robot, list(data.of_robot.state))
    state = rng.uniform(-0.5, 0.5, state_dim)
    parts = np.split(state, [state_dim - 1]) if len(keys) == 2 else [state]
    actions = rng.uniform(0, 1, (MODEL.action_horizon, action_dim))
    sample = dict(zip(keys, parts, strict=True)) | {"actions": actions}
    sample |= {key: image(0) for key in data.of_robot.cameras.values()}
    stats = NormStats(
        state=FeatureStats(
            mean=rng.normal(size=state_dim),
            std=rng.uniform(1, 2, state_dim),
            q01=rng.uniform(-2, -1, state_dim),
            q99=rng.uniform(1, 2, state_dim),
        ),
        actions=FeatureStats(
            mean=rng.normal(size=action_dim),
            std=rng.uniform(1, 2, action_dim),
            q01=rng.uniform(-2, -1, action_dim),
            q99=rng.uniform(1, 2, action_dim),
        ),
    )
    given = transforms.apply(transforms.input_transforms(data, MODEL, stats, TOKENIZER), sample)
    assert given["state"].shape == (MODEL.action_dim,)
    assert given["actions"].shape == (MODEL.action_horizon, MODEL.action_dim)
    assert not given["state"][state_dim:].any()
    assert not given["actions"][:, action_dim:].any()
    output = transforms.apply(
        transforms.output_transforms(data, MODEL, stats),
        {"state": given["state"], "actions": given["actions"]},
    )
    assert set(output) == {"actions"}
    np.testing.assert_allclose(output["actions"], actions, rtol=0, atol=EXACT)


def test_normalising_by_hand():
    stats = FeatureStats(
        mean=np.array([1.0, 2.0, 9.0]),
        std=np.array([2.0, 0.0, 9.0]),
        q01=np.array([0.0, -2.0, 9.0]),
        q99=np.array([1.0, 2.0, 99.0]),
    )
    values = np.array([[0.0, 2.0], [0.5, 4.0]], dtype=np.float32)
    by_quantiles = stats.normalize(values, quantiles=True)
    assert by_quantiles.dtype == np.float32
    assert by_quantiles.round(4).tolist() == [[-1.0, 1.0], [0.0, 2.0]]
    by_deviation = stats.normalize(np.array([[2.0, 2.0], [1.0, 2.0 + 3e-6]]), quantiles=False)
    assert by_deviation.round(4).tolist() == [[0.5, 0.0], [0.0, 3.0]]
    # Beyond the statistics there is padding, which stays; of padded statistics the rest is unused.
    padded = stats.unnormalize(np.array([0.0, 0.0, 0.0, 7.0]), quantiles=False)
    assert padded.tolist() == [1.0, 2.0, 9.0, 7.0]
    with pytest.raises(ValueError, match="statistics: expected those of 4 numbers or more, got"):
        stats.normalize(np.zeros(4), quantiles=True)
    old = FeatureStats(mean=stats.mean, std=stats.std)
    with pytest.raises(ValueError, match="statistics: expected q01 and q99"):
        old.normalize(np.zeros(3), quantiles=True)
    with pytest.raises(ValueError, match="state: expected statistics with q01 and q99, got"):
        transforms.Normalize(NormStats(old, old), quantiles=True)


def test_statistics_that_change_nothing():
    stats, values = NormStats.identity(3), np.array([0.25, -1.0, 1.5])
    for quantiles in (True, False):
        there = stats.state.normalize(values, quantiles=quantiles)
        back = stats.actions.unnormalize(values, quantiles=quantiles)
        for found in (there, back):
            np.testing.assert_allclose(found, values, rtol=0, atol=EXACT)


def test_statistics_of_a_dataset():
    assert FeatureStats.read(DEMO_EPISODE, "observation.state").mean.shape == (14,)
    with pytest.raises(ValueError, match="expected mean, std, q01, q99 of nothing, missing"):
        FeatureStats.read(DEMO_EPISODE, "nothing")


def test_norm_stats_files(tmp_path):
    """openpi's format: a list a statistic, by feature; null or nothing where there is none."""
    stats = NormStats(state=identity(2), actions=identity(3))
    path = stats.write(tmp_path / "owner/name")
    assert path == tmp_path / "owner/name/norm_stats.json"
    written = json.loads(path.read_text())
    assert written["norm_stats"]["state"] == {
        "mean": [0.0, 0.0],
        "std": [1.0, 1.0],
        "q01": [-1.0, -1.0],
        "q99": [1.0, 1.0],
    }
    read = NormStats.read(path.parent)
    assert read.to_file() == stats.to_file() == path.read_bytes()
    written["norm_stats"]["state"] |= {"q01": None}
    path.write_text(json.dumps(written))
    assert NormStats.read(path.parent).state.q01 is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON with norm_stats of state and actions, got another file"),
        ('{"state": {}}', "expected JSON with norm_stats of state and actions, got another"),
        ('{"norm_stats": {"state": {}}}', "expected JSON with norm_stats of state and actions"),
        ('{"norm_stats": {"state": {}, "actions": {}}}', "expected mean and std, missing"),
        (
            '{"norm_stats": {"state": {"mean": [1], "std": [1, 2]}, "actions": {}}}',
            r"expected vectors of one length, got \{'mean': \[1\], 'std': \[2\]\}",
        ),
        (
            '{"norm_stats": {"state": {"mean": [NaN], "std": [1]}, "actions": {}}}',
            r"expected finite numbers, got others in \['mean'\]",
        ),
    ],
)
def test_norm_stats_files_that_are_none(tmp_path, text, message):
    (tmp_path / "norm_stats.json").write_text(text)
    with pytest.raises(ValueError, match=f"norm_stats.json: .*{message}"):
        NormStats.read(tmp_path)


def test_the_prompt():
    tokenize = transforms.Tokenize(TOKENIZER, discrete_state=False)
    default = transforms.DefaultPrompt("wait")
    own = tokenize(default({"prompt": np.array("go on"), "state": 0}))
    assert own["tokenized_prompt"].tolist() == TOKENIZER.tokenize("go on")[0].tolist()
    assert "prompt" not in own
    injected = tokenize(default({}))
    assert injected["tokenized_prompt"].tolist() == TOKENIZER.tokenize("wait")[0].tolist()
    with pytest.raises(ValueError, match="prompt: expected an instruction: a default_prompt, or"):
        tokenize(transforms.DefaultPrompt(None)({}))


@pytest.mark.parametrize("discrete", [True, False])
def test_the_state_is_digitised_after_it_is_normalised_and_before_it_is_padded(discrete):
    data = DataConfig(default_prompt="go on")
    model = dataclasses.replace(MODEL, discrete_state_input=discrete)
    stats = FeatureStats(
        mean=np.zeros(2), std=np.ones(2), q01=np.array([0.0, 10.0]), q99=np.array([4.0, 20.0])
    )
    chain = transforms.input_transforms(data, model, NormStats(stats, stats), TOKENIZER)
    sample = {"state": np.array([1.01, 15.01]), f"image/{CAMERAS[0]}": image(0, 100, 50)}
    found = transforms.apply(chain, sample)
    state = np.array([-0.495, 0.002])
    assert found["state"].round(4).tolist() == [*state, *[0.0] * (MODEL.action_dim - 2)]
    tokens, mask = TOKENIZER.tokenize("go on", state if discrete else None)
    assert found["tokenized_prompt"].tolist() == tokens.tolist()
    assert found["tokenized_prompt_mask"].tolist() == mask.tolist()
    assert {found[f"image/{camera}"].shape for camera in CAMERAS} == {(224, 224, 3)}


def test_more_numbers_than_the_model_has():
    with pytest.raises(ValueError, match="actions: expected at most action_dim=4 numbers, got 5"):
        transforms.Pad(4)({"state": np.zeros(3), "actions": np.zeros((2, 5))})
    with pytest.raises(ValueError, match="adapt_to_pi: expected actions of 14 numbers, got 5"):
        transforms.adapt_to_pi({"state": np.zeros(14), "actions": np.zeros((2, 5))})
    with pytest.raises(ValueError, match=r"mask: expected .* of 4 numbers, got 3 and 5"):
        transforms.DeltaActions((True,) * 4)({"state": np.zeros(3), "actions": np.zeros((2, 5))})


def test_masks():
    assert make_bool_mask(2, -1, 1) == (True, True, False, True)
    assert make_bool_mask(2, 0, 1) == (True, True, True)
    assert DataConfig(robot="aloha").delta_mask == make_bool_mask(6, -1, 6, -1)
    assert DataConfig(robot="libero").delta_mask is None
    assert DataConfig().delta_mask is DataConfig(robot="droid").delta_mask is None


def test_resizing_is_openpis():
    """Pillow's bilinear filter, the aspect kept, black around it, rounded down."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)
    resized = resize_with_pad(pixels)
    assert resized.shape == (224, 224, 3)
    assert not resized[:28].any()
    assert not resized[196:].any()
    inner = Image.fromarray(pixels).resize((224, 168), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resized[28:196], np.asarray(inner))
    tall = resize_with_pad(image(9, 301, 100))
    assert (tall.any(axis=(0, 2)).argmax(), int(tall.any(axis=(0, 2)).sum())) == (75, 74)
    same = image(3)
    assert resize_with_pad(same) is same


def test_images_of_any_form():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(2, 128, 3)
    np.testing.assert_array_equal(parse_image(pixels, "x"), pixels)
    np.testing.assert_array_equal(parse_image(pixels.transpose(2, 0, 1), "x"), pixels)
    floats = pixels.astype(np.float32) / 255
    np.testing.assert_array_equal(parse_image(floats, "x"), pixels)
    assert parse_image(np.full((1, 1, 3), 1.5), "x").max() == 255
    for wrong in (pixels[0], pixels[..., :2], pixels.astype(int), pixels[:0]):
        with pytest.raises(ValueError, match=r"cam: expected \[H, W, 3\] or \[3, H, W\] of uint8"):
            parse_image(wrong, "cam")


def test_the_cache_keeps_what_it_has_room_for():
    cache, made = ImageCache(limit=2 * image(0).nbytes), []

    def make(key: int) -> np.ndarray:
        made.append(key)
        return image(key)

    for key in (1, 2, 3, 1, 2, 3):
        assert cache.get(key, lambda key=key: make(key)).max() == key
    assert made == [1, 2, 3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"robot": "ant"}, "robot: expected one of .*'aloha'.*, got 'ant'"),
        ({"extra_delta_transform": True}, "extra_delta_transform: expected the robot 'libero'"),
        ({"action_sequence_keys": ("x", "y")}, "action_sequence_keys: expected one key, got"),
    ],
)
def test_configs_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_where_statistics_are():
    assert DataConfig(repo_id="owner/name").stats_id == "owner/name"
    assert DataConfig(repo_id="/data/pick_place").stats_id == "pick_place"
    assert DataConfig(repo_id="/data/pick_place", asset_id="trossen").stats_id == "trossen"
    with pytest.raises(ValueError, match="repo_id: expected a dataset's folder or its name"):
        _ = DataConfig().stats_id
    assert DataConfig().uses_quantiles(MODEL)
    assert not DataConfig().uses_quantiles(dataclasses.replace(MODEL, pi05=False))
    assert not DataConfig(use_quantile_norm=False).uses_quantiles(MODEL)


def test_the_command_line():
    given = "--repo-id a/b --robot aloha --repack state s actions a --delta-action-mask True False"
    config = tyro.cli(DataConfig, args=given.split())
    assert config.sources == {"state": "s", "actions": "a"}
    assert config.delta_mask == (True, False)
    given += " --action-sequence-keys b"
    assert tyro.cli(DataConfig, args=given.split()).sources == {"state": "s", "actions": "b"}

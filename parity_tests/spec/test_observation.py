"""The model's input: what is refused, what openpi's dictionary becomes, and what is encoded."""

import numpy as np
import pytest

from parity_tests.cases import tiny_config
from parity_tests.harness import BACKENDS, error
from parity_tests.record import check
from pruner_spec.config import CAMERAS
from pruner_spec.observation import EncodingPlan, Observation, check_actions, plan_encoding

BASE, LEFT, RIGHT = CAMERAS

CONVERT = {"numpy": np.asarray} | {name: each.array for name, each in BACKENDS.items()}
needs_jax = pytest.mark.skipif("jax" not in BACKENDS, reason="is about JAX")
arrays = pytest.mark.parametrize("to_array", CONVERT.values(), ids=CONVERT)


def fields():
    """Two samples, of the tiny model's sizes."""
    return {
        "images": {camera: np.zeros((2, 224, 224, 3), np.float32) for camera in CAMERAS},
        "image_masks": {camera: np.ones(2, bool) for camera in CAMERAS},
        "state": np.zeros((2, 7), np.float32),
        "tokenized_prompt": np.zeros((2, 5), np.int32),
        "tokenized_prompt_mask": np.ones((2, 5), bool),
    }


def dictionary(**changes):
    """The same as openpi has it, without masks."""
    data = fields()
    return {
        "image": data["images"],
        "state": data["state"],
        "tokenized_prompt": data["tokenized_prompt"],
        "tokenized_prompt_mask": data["tokenized_prompt_mask"],
    } | changes


def changed(name, value, camera=None):
    """The fields with one of them, or one camera's part of it, replaced; None takes it away."""
    data = fields()
    place, key = (data, name) if camera is None else (data[name], camera)
    if value is None:
        del place[key]
    else:
        place[key] = value
    return data


F32, I32 = np.float32, np.int32
IMAGE = [2, 224, 224, 3]

# (field, camera, value, the key the message begins with, what it expected, what it got)
REFUSED = [
    ("images", LEFT, None, "images", CAMERAS, [BASE, RIGHT]),
    ("images", "top", np.zeros(IMAGE, F32), "images", CAMERAS, [*CAMERAS, "top"]),
    ("image_masks", BASE, None, "image_masks", CAMERAS, [LEFT, RIGHT]),
    ("images", LEFT, np.zeros((2, 3, 224, 224), F32), LEFT, IMAGE, [2, 3, 224, 224]),
    ("images", LEFT, np.zeros((224, 224, 3), F32), LEFT, IMAGE, [224, 224, 3]),
    ("images", LEFT, np.zeros((2, 256, 224, 3), F32), LEFT, IMAGE, [2, 256, 224, 3]),
    ("images", RIGHT, np.zeros((1, 224, 224, 3), F32), RIGHT, IMAGE, [1, 224, 224, 3]),
    ("images", RIGHT, np.zeros(IMAGE, np.uint8), RIGHT, "float", "uint8"),
    ("images", RIGHT, np.zeros(IMAGE, np.int64), RIGHT, "float", "int64"),
    ("image_masks", BASE, np.ones((2, 1), bool), f"image_masks['{BASE}']", [2], [2, 1]),
    ("image_masks", BASE, np.ones(3, bool), f"image_masks['{BASE}']", [2], [3]),
    ("image_masks", BASE, np.ones(2, I32), f"image_masks['{BASE}']", "bool", "int32"),
    ("state", None, np.zeros(7, F32), "state", ["any", "any"], [7]),
    ("state", None, np.zeros((2, 1, 7), F32), "state", ["any", "any"], [2, 1, 7]),
    ("state", None, np.zeros((2, 7), I32), "state", "float", "int32"),
    ("tokenized_prompt", None, np.zeros(5, I32), "tokenized_prompt", [2, "any"], [5]),
    ("tokenized_prompt", None, np.zeros((3, 5), I32), "tokenized_prompt", [2, "any"], [3, 5]),
    ("tokenized_prompt", None, np.zeros((2, 5), F32), "tokenized_prompt", "int", "float32"),
    ("tokenized_prompt", None, np.zeros((2, 5), np.uint8), "tokenized_prompt", "int", "uint8"),
    ("tokenized_prompt", None, np.zeros((2, 5), bool), "tokenized_prompt", "int", "bool"),
    ("tokenized_prompt", None, np.zeros((2, 6), I32), "tokenized_prompt_mask", [2, 6], [2, 5]),
    ("tokenized_prompt_mask", None, np.ones((2, 5), I32), "tokenized_prompt_mask", "bool", "int32"),
]


def named(found):
    """As a message shows it."""
    return str(list(found)) if isinstance(found, list | tuple) else found


@pytest.mark.parametrize(("field", "camera", "value", "key", "expected", "got"), REFUSED)
def test_refused(field, camera, value, key, expected, got):
    key = f"images[{key!r}]" if key in CAMERAS else key
    with pytest.raises(ValueError, match="expected") as raised:
        Observation(**changed(field, value, camera))
    found = str(raised.value)
    assert found.startswith(f"{key}: expected ")
    assert named(expected) in found.partition(", got ")[0]
    assert found.endswith(f", got {named(got)}")


def test_arrays_of_the_batch_of_another_state_are_refused():
    """The state says how large the batch is."""
    expected = r"^images\['base_0_rgb'\]: expected the shape \[3, 224, 224, 3\], got \[2, "
    with pytest.raises(ValueError, match=expected):
        Observation(**changed("state", np.zeros((3, 7), F32)))


def test_cameras_are_put_in_order():
    data = fields()
    data["images"] = {camera: data["images"][camera] for camera in (RIGHT, BASE, LEFT)}
    data["image_masks"] = {camera: data["image_masks"][camera] for camera in (LEFT, RIGHT, BASE)}
    observation = Observation(**data)
    assert list(observation.images) == list(observation.image_masks) == [BASE, LEFT, RIGHT]


@arrays
def test_the_arrays_of_every_framework(to_array):
    observation = Observation(**fields()).map(to_array)
    observation.check(tiny_config())
    assert observation.batch_size == 2
    assert type(observation.images[RIGHT]) is type(to_array(np.zeros(1)))


@arrays
def test_the_arrays_of_every_framework_are_checked(to_array):
    observation = Observation(**fields()).map(to_array)
    with pytest.raises(ValueError, match=r"^images\['base_0_rgb'\]: .*kind float, got int32$"):
        observation.map(lambda array: to_array(np.zeros(array.shape, I32)))
    with pytest.raises(ValueError, match=r"^state: expected the shape \['any', 'any'\], got \[2\]"):
        observation.map(lambda array: array[..., 0])


@pytest.mark.parametrize("name", BACKENDS)
def test_bfloat16_images_are_floats(name):
    observation = Observation(**fields())
    rounded = observation.map(lambda array: BACKENDS[name].array(array, "bfloat16"))
    assert "bfloat16" in str(rounded.images[BASE].dtype)


@needs_jax
def test_abstract_arrays_are_checked():
    """Under `jax.jit` there are only shapes and dtypes."""
    import jax

    def trace(data):
        assert Observation(**data).batch_size == 2

    jax.eval_shape(trace, fields())
    with pytest.raises(ValueError, match=r"^image_masks\['left_wrist_0_rgb'\]: .*got \[1\]"):
        jax.eval_shape(trace, changed("image_masks", np.ones(1, bool), LEFT))


def test_map_reaches_every_array():
    """And leaves the observation it was called on as it was."""
    observation = Observation(**fields())
    mapped = observation.map(lambda array: array[:1])
    found = [*mapped.images.values(), *mapped.image_masks.values(), mapped.state]
    found += [mapped.tokenized_prompt, mapped.tokenized_prompt_mask]
    assert [array.shape for array in found] == [
        *[(1, 224, 224, 3)] * 3,
        *[(1,)] * 3,
        (1, 7),
        (1, 5),
        (1, 5),
    ]
    assert (mapped.batch_size, observation.batch_size) == (1, 2)


@pytest.mark.parametrize("length", [5, 40])
def test_sizes_of_the_config(length):
    Observation(**fields()).check(tiny_config(max_token_len=length))


def test_sizes_of_another_config_are_refused():
    observation = Observation(**fields())
    with pytest.raises(ValueError, match=r"^state: expected the shape \[2, 32\], got \[2, 7\]$"):
        observation.check(tiny_config(action_dim=32))
    expected = r"^tokenized_prompt: expected at most max_token_len=4 tokens, got 5$"
    with pytest.raises(ValueError, match=expected):
        observation.check(tiny_config(max_token_len=4))


def test_actions():
    config = tiny_config()
    check_actions("noise", np.zeros((2, 11, 7)), 2, config)
    for shape in [(1, 11, 7), (2, 11, 8), (2, 10, 7), (11, 7)]:
        found = str(list(shape)).replace("[", r"\[")
        with pytest.raises(
            ValueError, match=rf"^noise: expected the shape \[2, 11, 7\], got {found}"
        ):
            check_actions("noise", np.zeros(shape), 2, config)


def test_bytes_become_numbers_from_minus_one_to_one():
    """Every byte, as openpi's float32 has it: rounded after the division and the subtraction."""
    images = np.zeros((2, 224, 224, 3), np.uint8)
    images[1, 3, :, 2] = np.arange(224)
    images[1, 4, 192:, 2] = np.arange(224, 256)[:32]
    observation = Observation.from_dict(dictionary(image={BASE: images}))
    image = observation.images[BASE]
    found = [*image[1, 3, :, 2].tolist(), *image[1, 4, 192:, 2].tolist()]
    assert image.dtype == np.float32
    assert found == [float(F32(float(F32(byte / 255)) * 2 - 1)) for byte in range(256)]
    assert (found[0], found[51], found[255]) == (-1.0, float(F32(-0.6)), 1.0)
    np.testing.assert_array_equal(image[0], np.full((224, 224, 3), -1.0))


def test_bytes_stay_where_they_may():
    """A missing camera is black as they are; what must be resized becomes floats, and so do all."""
    images = np.full((2, 224, 224, 3), 7, np.uint8)
    observation = Observation.from_dict(dictionary(image={LEFT: images}), keep_bytes=True)
    assert observation.images[LEFT] is images
    for camera in (BASE, RIGHT):
        black = np.zeros((2, 224, 224, 3), np.uint8)
        np.testing.assert_array_equal(observation.images[camera], black, strict=True)
    for other in (np.zeros((2, 224, 224, 3), F32), np.zeros((2, 100, 50, 3), np.uint8)):
        data = dictionary(image={LEFT: images, BASE: other})
        kept, floats = (Observation.from_dict(data, each).images for each in (True, False))
        for camera in CAMERAS:
            np.testing.assert_array_equal(kept[camera], floats[camera], strict=True)
            assert kept[camera].dtype == F32


def test_floats_are_taken_as_they_are():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 224, 224, 3)).astype(F32)
    observation = Observation.from_dict(dictionary(image={RIGHT: images}))
    assert observation.images[RIGHT] is images


def test_a_missing_camera_is_black_and_masked():
    """Also where there is a mask that says otherwise."""
    images = {RIGHT: np.ones((2, 224, 224, 3), F32)}
    for masks in ({}, {BASE: np.ones(2, bool)}):
        observation = Observation.from_dict(dictionary(image=images, image_mask=masks))
        found = {camera: mask.tolist() for camera, mask in observation.image_masks.items()}
        assert found == {BASE: [False] * 2, LEFT: [False] * 2, RIGHT: [True] * 2}
        for camera, value in ((BASE, -1.0), (LEFT, -1.0), (RIGHT, 1.0)):
            image = observation.images[camera]
            np.testing.assert_array_equal(image, np.full((2, 224, 224, 3), value, F32), strict=True)


def test_masks_are_taken_where_there_are_any():
    data = dictionary(image_mask={LEFT: [True, False], RIGHT: np.array([0, 1])})
    observation = Observation.from_dict(data)
    found = {camera: mask.tolist() for camera, mask in observation.image_masks.items()}
    assert found == {BASE: [True, True], LEFT: [True, False], RIGHT: [False, True]}


@pytest.mark.parametrize("value", [0, 255])
def test_images_of_other_sizes_are_resized_and_padded(value):
    """Bytes become floats first: around the picture is black, which as a byte would be 0."""
    images = np.full((2, 100, 50, 3), value, np.uint8)
    observation = Observation.from_dict(dictionary(image={BASE: images}))
    image = observation.images[BASE]
    expected = np.full((2, 224, 224, 3), -1.0, F32)
    expected[:, :, 56:168] = value / 255 * 2 - 1
    assert image.dtype == np.float32
    check("same computation", "float32", "spec | by hand", error(image, expected))


@pytest.mark.parametrize(
    "shape", [(224, 224, 3), (2, 3, 224, 224), (2, 224, 224, 1), (2, 1, 224, 224, 3)], ids=str
)
def test_images_of_another_layout_are_refused(shape):
    found = str(list(shape)).replace("[", r"\[")
    expected = rf"'base_0_rgb'\]: expected the shape \[B, height, width, 3\], got {found}"
    with pytest.raises(ValueError, match=expected):
        Observation.from_dict(dictionary(image={BASE: np.zeros(shape, np.uint8)}))


@pytest.mark.parametrize("missing", ["image", "state", "tokenized_prompt", "tokenized_prompt_mask"])
def test_a_missing_key_is_named(missing):
    data = dictionary()
    del data[missing]
    with pytest.raises(ValueError, match=rf"expected the keys .*, missing \['{missing}'\]$"):
        Observation.from_dict(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"image": {"top": np.zeros((2, 224, 224, 3), F32)}},
        {"image_mask": {"top": np.ones(2, bool)}},
    ],
    ids=["image", "mask"],
)
def test_an_unknown_camera_is_named(changes):
    with pytest.raises(ValueError, match=r"expected cameras of \['base_0_rgb', .*, got \['top'\]$"):
        Observation.from_dict(dictionary(**changes))


def test_keys_the_model_does_not_read_are_ignored():
    observation = Observation.from_dict(dictionary(actions=np.zeros((2, 11, 7)), prompt="fold"))
    assert observation.batch_size == 2


@pytest.mark.parametrize(
    ("cameras", "prompt", "expected"),
    [
        # A camera counts if any sample has it, a prompt's length is the longest's.
        ([(1, 0, 0), (0, 0, 1)], [[1] * 9 + [0] * 31, [1] * 3 + [0] * 37], ((BASE, RIGHT), 16)),
        ([(1, 1, 1)], [[1] * 16 + [0] * 24], (CAMERAS, 16)),
        ([(0, 1, 0)], [[1] * 17 + [0] * 23], ((LEFT,), 32)),
        # Never longer than the prompt's array.
        ([(0, 0, 1)], [[1] * 33 + [0] * 7], ((RIGHT,), 40)),
        ([(1, 1, 0)], [[1] * 10], ((BASE, LEFT), 10)),
        # A gap in the mask is not the prompt's end.
        ([(1, 1, 0)], [[1, 0, 0] + [0] * 15 + [1] + [0] * 21], ((BASE, LEFT), 32)),
        # No camera at all, no prompt at all.
        ([(0, 0, 0), (0, 0, 0)], [[1] * 40, [0] * 40], ((BASE,), 40)),
        ([(1, 1, 1)], [[0] * 40], (CAMERAS, 16)),
        ([(1, 1, 1)], [[0] * 5], (CAMERAS, 5)),
        ([(1, 1, 1)], [[]], (CAMERAS, 0)),
    ],
)
def test_plan_of_what_is_encoded(cameras, prompt, expected):
    found = plan_encoding(np.array(cameras, dtype=bool), np.array(prompt, dtype=bool))
    assert found == EncodingPlan(*expected)
    assert hash(found) == hash(EncodingPlan(*expected))

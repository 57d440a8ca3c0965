"""Resizing: where the picture lies, and that it is `jax.image.resize`'s."""

import numpy as np
import pytest

from parity_tests.harness import BACKENDS, error
from parity_tests.record import check
from pruner_spec.images import PAD_VALUE, resize_geometry, resize_matrix, resize_with_pad

needs_jax = pytest.mark.skipif("jax" not in BACKENDS, reason="compares with JAX")


def random_images(size, dtype="float32", batch=2):
    return np.random.default_rng(0).uniform(-1, 1, (batch, *size, 3)).astype(dtype)


@pytest.mark.parametrize(
    ("size", "target", "rows", "columns"),
    [
        ((224, 224), (224, 224), (0, 224), (0, 224)),
        ((480, 640), (224, 224), (28, 196), (0, 224)),
        ((640, 480), (224, 224), (0, 224), (28, 196)),
        ((3, 4), (8, 8), (1, 7), (0, 8)),
        ((5, 8), (8, 8), (1, 6), (0, 8)),
        ((10, 10), (4, 6), (0, 4), (1, 5)),
        ((1, 1), (224, 224), (0, 224), (0, 224)),
        ((1, 1000), (224, 224), (111, 112), (0, 224)),
        # Rounding, as in openpi: 225 / (225 / 224) is a little less than 224.
        ((225, 225), (224, 224), (0, 223), (0, 223)),
    ],
)
def test_geometry(size, target, rows, columns):
    assert resize_geometry(size, target) == (slice(*rows), slice(*columns))


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        ((0, 5), (8, 8), "height: .*got 0"),
        ((5, 0), (8, 8), "width: .*got 0"),
        ((5, 5), (-1, 8), "height: .*got -1"),
        ((5, 5), (8, 0), "width: .*got 0"),
    ],
)
def test_lengths_that_are_none_raise(size, target, expected):
    with pytest.raises(ValueError, match=f"^{expected}$"):
        resize_geometry(size, target)


@pytest.mark.parametrize(
    ("length", "resized", "expected"),
    [
        (2, 2, [[1, 0], [0, 1]]),
        (2, 4, [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]),
        (4, 2, [[3 / 7, 3 / 7, 1 / 7, 0], [0, 1 / 7, 3 / 7, 3 / 7]]),
        (3, 1, [[2 / 7, 3 / 7, 2 / 7]]),
    ],
)
def test_weights(length, resized, expected):
    """Half-pixel centres; a shrinking image is averaged, with weights that sum to 1 at borders."""
    found = resize_matrix(length, resized)
    check("same computation", "float64", "spec | by hand", error(found, expected))


@needs_jax
@pytest.mark.parametrize(
    "size",
    [(480, 640), (720, 320), (256, 256), (100, 50), (37, 53), (300, 5), (1, 1), (224, 100)],
    ids=str,
)
def test_the_picture_is_that_of_jax_image_resize(size):
    """In float64: in float32 JAX's own weights are off by up to 4e-5."""
    import jax

    images = random_images(size, "float64")
    rows, columns = resize_geometry(size, (224, 224))
    shape = (2, rows.stop - rows.start, columns.stop - columns.start, 3)
    with jax.enable_x64(True):
        expected = np.full((2, 224, 224, 3), -1.0)
        expected[:, rows, columns] = jax.image.resize(images, shape, method="linear")
    found = resize_with_pad(images, 224, 224)
    check(
        "same computation", "float64", "spec | jax.image.resize", error(found, expected), str(size)
    )


@pytest.mark.parametrize("size", [(480, 640), (100, 50)], ids=str)
def test_float32_is_kept(size):
    images = random_images(size)
    found = resize_with_pad(images, 224, 224)
    assert found.dtype == np.float32
    expected = resize_with_pad(images.astype(np.float64), 224, 224)
    check("same computation", "float32", "spec | spec in float64", error(found, expected))


def test_an_image_that_fits_is_left_as_it_is():
    images = random_images((224, 224))
    np.testing.assert_array_equal(resize_with_pad(images, 224, 224), images)


def test_around_the_picture_is_black():
    found = resize_with_pad(np.ones((1, 10, 20, 3), np.float32), 16, 16)
    assert PAD_VALUE == -1.0
    assert found[0, :, 0, 0].tolist() == [-1.0] * 4 + [1.0] * 8 + [-1.0] * 4
    np.testing.assert_array_equal(found, np.broadcast_to(found[:, :, :1, :1], found.shape))


@pytest.mark.parametrize("value", [-1.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [(37, 37), (500, 500)], ids=str)
def test_a_constant_image_stays_constant_and_within_its_range(size, value):
    images = np.full((1, *size, 3), value)
    found = resize_with_pad(images, 224, 224)
    check("same computation", "float64", "spec | by hand", error(found, np.full_like(found, value)))
    assert np.abs(found).max() <= 1.0


def test_samples_rows_and_colours_are_not_mixed():
    """Three images, twice as large, each with a bright pixel of another place and colour."""
    images = np.full((3, 2, 4, 3), -1.0)
    for place, (row, column, colour) in enumerate([(0, 0, 0), (1, 3, 1), (0, 2, 2)]):
        images[place, row, column, colour] = 1.0
    bright = resize_with_pad(images, 8, 8) > 0
    assert [np.argwhere(image).tolist() for image in bright] == [
        [[2, 0, 0], [2, 1, 0], [3, 0, 0], [3, 1, 0]],
        [[4, 6, 1], [4, 7, 1], [5, 6, 1], [5, 7, 1]],
        [[2, 4, 2], [2, 5, 2], [3, 4, 2], [3, 5, 2]],
    ]

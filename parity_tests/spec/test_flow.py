"""Flow matching's clock, against literal numbers and against openpi's arithmetic in XLA."""

import math

import numpy as np
import pytest

from parity_tests.harness import BACKENDS, error
from parity_tests.record import check
from pruner_spec import flow

ROOT = math.sqrt(0.5)

# For width 8 the periods are 0.004, 0.04, 0.4 and 4; sines, then cosines.
EMBEDDED = {
    1.0: [0, 0, 0, 1, 1, 1, -1, 0],
    0.5: [0, 0, 1, ROOT, 1, -1, 0, ROOT],
    0.1: [0, 0, 1, math.sin(math.pi / 20), 1, -1, 0, math.cos(math.pi / 20)],
}

needs_jax = pytest.mark.skipif("jax" not in BACKENDS, reason="compares with JAX")
widths = pytest.mark.parametrize("width", [64, 1024])


def openpi_frequencies(jnp, width):
    fraction = jnp.linspace(0.0, 1.0, width // 2)
    period = 4e-3 * (4.0 / 4e-3) ** fraction
    return 1.0 / period * 2 * jnp.pi


def openpi_angles(jax, time, width):
    frequencies = openpi_frequencies(jax.numpy, width)
    highest = jax.lax.Precision.HIGHEST
    return jax.numpy.einsum("i,j->ij", time, frequencies, precision=highest)


def openpi_embedding(jax, time, width):
    angles = openpi_angles(jax, time, width)
    return jax.numpy.concatenate([jax.numpy.sin(angles), jax.numpy.cos(angles)], axis=-1)


def test_ten_euler_times():
    """Accumulated in float32: not what is nearest to 0.8, 0.7, ... 0.1."""
    expected = [
        1.0,
        0.9,
        0.79999995,
        0.6999999,
        0.5999999,
        0.4999999,
        0.39999992,
        0.29999992,
        0.19999993,
        0.09999993,
    ]
    found = flow.euler_times(10)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


@pytest.mark.parametrize("num_steps", range(1, 51))
def test_as_many_euler_times_as_steps(num_steps):
    assert len(flow.euler_times(num_steps)) == num_steps


@needs_jax
def test_euler_times_are_bit_for_bit_those_of_openpis_loop():
    import jax

    @jax.jit
    @jax.vmap
    def openpi(dt):
        def condition(carry):
            _, time, _ = carry
            return time >= -dt / 2

        def step(carry):
            times, time, count = carry
            return times.at[count].set(time), time + dt, count + 1

        start = (jax.numpy.zeros(60), jax.numpy.float32(1.0), 0)
        times, _, count = jax.lax.while_loop(condition, step, start)
        return times, count

    all_times, counts = openpi(np.float32([-1.0 / num_steps for num_steps in range(1, 51)]))
    for num_steps, (times, count) in enumerate(zip(all_times, counts, strict=True), start=1):
        np.testing.assert_array_equal(flow.euler_times(num_steps), np.asarray(times)[:count])


@pytest.mark.parametrize(("num_steps", "step"), [(1, -1.0), (4, -0.25), (10, -0.1)])
def test_euler_step(num_steps, step):
    found = flow.euler_step(num_steps)
    assert isinstance(found, np.float32)
    assert found == np.float32(step)


@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True, "10", None])
@pytest.mark.parametrize("function", [flow.euler_times, flow.euler_step])
def test_a_number_of_steps_that_is_none_raises(function, num_steps):
    with pytest.raises(ValueError, match=r"^num_steps: expected an integer >= 1, got "):
        function(num_steps)


def test_time_embedding():
    found = flow.time_embedding(np.array(list(EMBEDDED)), 8, "float64")
    assert found.dtype == np.float64
    check("same computation", "float64", "spec | by hand", error(found, list(EMBEDDED.values())))


def test_time_embedding_in_float32_is_that_of_float64_to_three_digits():
    """No better: the fastest angles are up to 1570, where float32's numbers are 1e-4 apart."""
    found = flow.time_embedding(np.array(list(EMBEDDED), np.float32), 8)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(
        found.round(3), np.array(list(EMBEDDED.values()), np.float32).round(3)
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_periods(dtype):
    found = flow.time_periods(8, dtype)
    assert found.dtype == dtype
    check("same computation", dtype, "spec | by hand", error(found, [0.004, 0.04, 0.4, 4.0]))
    assert found[-1] == 4.0


@needs_jax
@pytest.mark.parametrize("width", [56, 64, 84, 1024])
def test_frequencies_are_bit_for_bit_openpis(width):
    """Of width 84 the last fraction, 41 times the reciprocal of 41, would not be 1."""
    import jax

    expected = jax.jit(lambda: openpi_frequencies(jax.numpy, width))()
    found = flow.time_frequencies(width)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.asarray(expected))


@needs_jax
@widths
def test_time_embedding_is_that_of_openpis_training(width):
    """The same angles; JAX's sines differ from NumPy's in the last digit."""
    import jax

    times = np.random.default_rng(0).uniform(0.001, 1.0, 64).astype(np.float32)
    expected = jax.jit(lambda time: openpi_embedding(jax, time, width))(times)
    found = flow.time_embedding(times, width)
    check("same computation", "float32", "spec | openpi's formula", error(found, expected))


@needs_jax
@widths
@pytest.mark.parametrize("num_steps", [1, 7, 10])
def test_euler_time_embeddings_are_those_of_openpis_compiled_sampling(width, num_steps):
    """Bit for bit the same angles, of which NumPy's sines are taken."""
    import jax

    times = flow.euler_times(num_steps)
    broadcast = jax.numpy.broadcast_to
    angles_at = jax.jit(lambda time: openpi_angles(jax, broadcast(time, 2), width)[0])
    embedding_at = jax.jit(lambda time: openpi_embedding(jax, broadcast(time, 2), width)[0])
    angles = np.stack([angles_at(time) for time in times])
    found = flow.euler_time_embeddings(num_steps, width)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.concatenate([np.sin(angles), np.cos(angles)], axis=-1))
    expected = np.stack([embedding_at(time) for time in times])
    check("same computation", "float32", "spec | openpi's formula", error(found, expected))


def test_euler_time_embeddings_in_float64_are_the_time_embeddings():
    found = flow.euler_time_embeddings(10, 64, "float64")
    expected = flow.time_embedding(flow.euler_times(10), 64, "float64")
    assert found.shape == (10, 64)
    check("same computation", "float64", "spec | spec", error(found, expected))


@pytest.mark.parametrize(
    ("step", "num_train_steps", "scale"),
    [(0, 1000, 1.0), (250, 1000, 0.75), (500, 1000, 0.5), (1000, 1000, 0.0), (0, 1, 1.0)],
)
def test_noise_schedule(step, num_train_steps, scale):
    assert flow.pruner_noise_scale(step, num_train_steps) == scale


@pytest.mark.parametrize(("step", "num_train_steps"), [(-1, 10), (11, 10), (0, 0), (0, -1)])
def test_steps_outside_of_the_training_raise(step, num_train_steps):
    expected = f"^step: expected 0 <= step <= {num_train_steps}, got {step}$"
    with pytest.raises(ValueError, match=expected):
        flow.pruner_noise_scale(step, num_train_steps)

"""Flow matching's clock: the Euler schedule, the time embedding, the pruner's noise schedule."""

import math
import numbers

import numpy as np
from jaxtyping import Float, Float32

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0


def euler_times(num_steps: int) -> Float32[np.ndarray, "steps"]:
    """The times at which the velocity is evaluated, from 1 towards 0.

    Time is accumulated in float32, as openpi does: in float64 it drifts from openpi's by enough to
    move the actions by 3.5e-5.

    Raises:
        ValueError: `num_steps` is not a positive integer.
    """
    dt = euler_step(num_steps)
    times = []
    time = np.float32(1.0)
    while time >= -dt / 2:
        times.append(time)
        time = time + dt
    return np.array(times, dtype=np.float32)


def euler_step(num_steps: int) -> np.float32:
    """dt, negative: time runs from 1, where there is only noise, to 0."""
    is_count = isinstance(num_steps, numbers.Integral) and not isinstance(num_steps, bool)
    if not is_count or num_steps < 1:
        raise ValueError(f"num_steps: expected an integer >= 1, got {num_steps!r}")
    return np.float32(-1.0 / num_steps)


def time_periods(width: int, dtype: str = "float32") -> Float[np.ndarray, "half_width"]:
    """Periods of the time embedding, from `MIN_PERIOD` to `MAX_PERIOD`.

    In float32 they are bit for bit openpi's at the widths of all its experts, rounded where XLA
    rounds: the fastest period makes angles of 1570 radians, so that a last digit of the period
    shows in the fourth of the sine.

    Args:
        width: width W of the embedding, even and above 2.
        dtype: "float32" or "float64", that of the angles.
    """
    one = np.dtype(dtype).type
    count = width // 2
    # As XLA's linspace: by the reciprocal of the interval, with the end set exactly.
    fraction = np.arange(count, dtype=dtype) * (one(1) / one(count - 1))
    fraction[-1] = 1
    growth = np.power(MAX_PERIOD / MIN_PERIOD, fraction, dtype=np.float64).astype(dtype)
    return one(MIN_PERIOD) * growth


def time_frequencies(width: int, dtype: str = "float32") -> Float[np.ndarray, "half_width"]:
    """Angular frequencies 2π/period of the time embedding, as openpi's training multiplies them."""
    one = np.dtype(dtype).type
    return one(1) / time_periods(width, dtype) * one(2 * math.pi)


def time_embedding(
    time: Float[np.ndarray, "B"], width: int, dtype: str = "float32"
) -> Float[np.ndarray, "B W"]:
    """Sines, then cosines, of the time's angles. The reference for the backends' own."""
    angles = time.astype(dtype)[:, None] * time_frequencies(width, dtype)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def euler_time_embeddings(
    num_steps: int, width: int, dtype: str = "float32"
) -> Float[np.ndarray, "steps W"]:
    """The time embeddings of the Euler steps: a table, the same for every call and backend.

    In float32 the angles are (2π · time) · (1 / period): in openpi's compiled sampling loop, where
    time is a scalar, XLA multiplies the scalars first. Up to 1e-4 lies between this and
    `time_embedding`, which is what openpi's training computes.
    """
    one = np.dtype(dtype).type
    scaled = euler_times(num_steps).astype(dtype) * one(2 * math.pi)
    angles = scaled[:, None] * (one(1) / time_periods(width, dtype))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def pruner_noise_scale(step: int, num_train_steps: int) -> float:
    """LightVLA's schedule of the noise on the scores: linear from 1 to 0 over training.

    Raises:
        ValueError: `step` is not within 0..num_train_steps.
    """
    if not 0 <= step <= num_train_steps or num_train_steps < 1:
        raise ValueError(f"step: expected 0 <= step <= {num_train_steps}, got {step}")
    return 1.0 - step / num_train_steps

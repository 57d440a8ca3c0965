"""Named random streams: what is drawn depends on (seed, step, stream, sample) and nothing else.

Not on the backend, the order or split of the batch, nor the number of devices. Every sample of
every step has a key of its own for each stream, made by folding those numbers into
`jax.random.key(seed)` one after the other. The generator is JAX's: Threefry-2x32 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011), its counter laid out as under
`jax_threefry_partitionable`, the default since JAX 0.5.

Keys, bits and uniforms are the same in all backends bit for bit. `normal`, `beta` and
`flow_matching_time` are so within a few ulps, since logarithms and powers are rounded differently
from one backend, device and compiler to the next. In float64 they are the same functions of the
same 23 bits, rounded later: what a float64 model is trained with, so that two backends can be held
to each other far below a float32 ulp.
"""

import enum
import hashlib
import math
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Shaped, UInt32

SEED_LIMIT = 2**63  # that of `jax.random.key`
UINT32_LIMIT = 2**32

MANTISSA_BITS = 23
LOWEST_ABOVE_MINUS_ONE = -1.0 + 2.0**-24  # float32's neighbour of -1, where erf⁻¹ is finite

# Giles, "Approximating the erfinv function" (2010), single precision, as in XLA; from the highest
# power down. The first is a polynomial in w - 2.5 for w < 5, the second in √w - 3 above.
ERF_INV_CENTRAL = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
    -0.00125372503, -0.00417768164, 0.246640727, 1.50140941,
)  # fmt: skip
ERF_INV_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
    -0.0076224613, 0.00943887047, 1.00167406, 2.83297682,
)  # fmt: skip

THREEFRY_PARITY = 0x1BD11BDA
THREEFRY_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))

FLOW_TIME_ALPHA, FLOW_TIME_SCALE, FLOW_TIME_MIN = 1.5, 0.999, 0.001  # openpi's


class Stream(enum.StrEnum):
    """The streams of this project. Renaming one changes its numbers."""

    NOISE = "noise"
    TIME = "time"
    PRUNER_NOISE = "pruner_noise"
    AUGMENTATION = "augmentation"
    DEBUG_DATA = "debug_data"


def stream_key(
    seed: int, step: int, stream: str, sample_indices: Shaped[Any, "B"]
) -> UInt32[np.ndarray, "B 2"]:
    """One key per sample: `seed`, then `step`, the stream's name and the sample folded in.

    Args:
        seed: of the run, 0 <= seed < 2**63. Equal to `jax.random.key(seed)` with x64 enabled;
            without, JAX would drop the bits from 2**32 up, and seeds would coincide.
        step: 0 <= step < 2**32.
        stream: a `Stream`, or any other name that is not empty.
        sample_indices: integers [B], each 0 <= index < 2**32; the samples' places in the global
            batch or the data set, not in a device's share.

    Raises:
        ValueError: an argument is not an integer or not within its range; the name is empty.
    """
    indices = to_uint32("sample_indices", sample_indices, ndim=1)
    return fold_in(stream_base_key(seed, step, stream), indices)


def stream_base_key(seed: int, step: int, stream: str) -> UInt32[np.ndarray, "2"]:
    """The key that all samples share, before their index is folded in. Arguments as above."""
    key = fold_in(seed_key(seed), to_uint32("step", step, ndim=0))
    return fold_in(key, np.asarray(stream_id(stream)))


def seed_key(seed: int) -> UInt32[np.ndarray, "2"]:
    """`jax.random.key`'s words for a seed, high and low, whether or not x64 is enabled."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise ValueError(f"seed: expected an integer, got {seed!r}")
    if not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"seed: expected 0 <= seed < 2**63, got {seed}")
    return np.array(divmod(int(seed), UINT32_LIMIT), dtype=np.uint32)


def stream_id(stream: str) -> np.uint32:
    """The first four bytes of the SHA-256 of the name in UTF-8, big-endian."""
    if not isinstance(stream, str) or not stream:
        raise ValueError(f"stream: expected a name that is not empty, got {stream!r}")
    return np.uint32(int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "big"))


def to_uint32(name: str, values: Shaped[Any, "*shape"], ndim: int) -> UInt32[np.ndarray, "*shape"]:
    """Values of the host that must be integers within 0 <= value < 2**32, as an array.

    Raises:
        ValueError: they are not, or have another number of dimensions than `ndim`.
    """
    array = np.asarray(values)
    integral = array.ndim == ndim and array.dtype.kind in "iu"
    if not integral or ((array < 0) | (array >= UINT32_LIMIT)).any():
        expected = "[B]" if ndim else "[]"
        raise ValueError(f"{name}: expected integers {expected} in 0..2**32 - 1, got {values!r}")
    return array.astype(np.uint32)


def fold_in(
    key: UInt32[np.ndarray, "*#batch 2"], data: UInt32[np.ndarray, "*#batch"]
) -> UInt32[np.ndarray, "*batch 2"]:
    """A new key from a key and a number, as `jax.random.fold_in`."""
    high = np.zeros_like(data)
    return np.stack(threefry2x32((key[..., 0], key[..., 1]), (high, data)), axis=-1)


def threefry2x32(
    key: tuple[UInt32[np.ndarray, "*#shape"], UInt32[np.ndarray, "*#shape"]],
    count: tuple[UInt32[np.ndarray, "*#shape"], UInt32[np.ndarray, "*#shape"]],
) -> tuple[UInt32[np.ndarray, "*shape"], UInt32[np.ndarray, "*shape"]]:
    """The 20 rounds of Threefry-2x32: two words of count, enciphered with two words of key."""
    keys = (*key, key[0] ^ key[1] ^ THREEFRY_PARITY)
    with np.errstate(over="ignore"):  # scalars warn where arrays wrap in silence
        x0, x1 = count[0] + keys[0], count[1] + keys[1]
        for block in range(5):
            for rotation in THREEFRY_ROTATIONS[block % 2]:
                x0 = x0 + x1
                x1 = x0 ^ (x1 << rotation | x1 >> (32 - rotation))
            x0 = x0 + keys[(block + 1) % 3]
            x1 = x1 + keys[(block + 2) % 3] + (block + 1)
    return x0, x1


def element_count(shape: tuple[int, ...]) -> int:
    """How many elements a sample has.

    Raises:
        ValueError: they are more than 2**32: the counter's high word is taken to be 0.
    """
    size = math.prod(shape)
    if size > UINT32_LIMIT:
        raise ValueError(f"shape: expected at most 2**32 elements per sample, got {size}")
    return size


def random_bits(
    keys: UInt32[np.ndarray, "B 2"], shape: tuple[int, ...]
) -> UInt32[np.ndarray, "B *shape"]:
    """Uniform bits; each sample's depend on its own key alone. As `jax.random.bits`.

    Args:
        keys: one per sample, of `stream_key`.
        shape: of one sample.
    """
    count = np.arange(element_count(shape), dtype=np.uint32)
    high, low = threefry2x32((keys[:, :1], keys[:, 1:]), (np.zeros_like(count), count))
    return (high ^ low).reshape(len(keys), *shape)


def uniform(
    keys: UInt32[np.ndarray, "B 2"], shape: tuple[int, ...]
) -> Float32[np.ndarray, "B *shape"]:
    """Uniform in [0, 1): multiples of 2**-23. As `jax.random.uniform`."""
    mantissa = random_bits(keys, shape) >> (32 - MANTISSA_BITS)
    return mantissa.astype(np.float32) * 2.0**-MANTISSA_BITS


def normal(
    keys: UInt32[np.ndarray, "B 2"], shape: tuple[int, ...], dtype: str = "float32"
) -> Float[np.ndarray, "B *shape"]:
    """Normal with mean 0 and variance 1, never beyond ±5.42. As `jax.random.normal`.

    Args:
        keys: one per sample, of `stream_key`.
        shape: of one sample.
        dtype: "float32" or "float64", of the arithmetic and the result.
    """
    symmetric = uniform(keys, shape).astype(dtype) * 2.0 + LOWEST_ABOVE_MINUS_ONE
    return math.sqrt(2.0) * erf_inv(symmetric)


def erf_inv(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """The inverse of the error function for -1 < x < 1, by XLA's single precision polynomials."""
    w = -np.log1p(-x * x)
    central = _polynomial(ERF_INV_CENTRAL, w - 2.5)
    tail = _polynomial(ERF_INV_TAIL, np.sqrt(w) - 3.0)
    return np.where(w < 5.0, central, tail) * x


def _polynomial(
    coefficients: tuple[float, ...], x: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def beta(
    keys: UInt32[np.ndarray, "B 2"], shape: tuple[int, ...], alpha: float, dtype: str = "float32"
) -> Float[np.ndarray, "B *shape"]:
    """Beta(alpha, 1), by the inverse of its distribution function xᵅ; in [0, 1].

    `jax.random.beta` has the same distribution but other numbers: it rejects and draws again.
    The arguments are those of `normal`.

    Raises:
        ValueError: `alpha` is not positive and finite.
    """
    # The power in float64, then one rounding: what is defined here is the nearest float32.
    return (uniform(keys, shape).astype(np.float64) ** beta_exponent(alpha)).astype(dtype)


def beta_exponent(alpha: float) -> float:
    """1/alpha, the power of a uniform number that is Beta(alpha, 1), rounded to float32.

    Rounded, because JAX without x64 has no other: an exact 2/3 makes 5 ulps of difference near 0.
    """
    if not 0.0 < alpha < math.inf:
        raise ValueError(f"alpha: expected a positive finite number, got {alpha!r}")
    return float(np.float32(1.0 / alpha))


def flow_matching_time(
    keys: UInt32[np.ndarray, "B 2"], dtype: str = "float32"
) -> Float[np.ndarray, "B"]:
    """π0's training times, Beta(1.5, 1)·0.999 + 0.001: the noisy end, 1, is the likeliest.

    In [0.001, 1).
    """
    return beta(keys, (), FLOW_TIME_ALPHA, dtype) * FLOW_TIME_SCALE + FLOW_TIME_MIN

"""Named random streams: what is drawn depends on (seed, step, stream, sample) and nothing else.

`jax.random` itself, behind the names of `pruner_spec.randomness`. Keys are raw words, uint32
[B, 2], as in the other backends; all functions may be traced, and none heeds the x64 flag, but for
draws in float64, which need it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int, PRNGKeyArray, Shaped, UInt32

from pruner_spec import randomness as spec


def stream_key(
    seed: int, step: int | Int[Array, ""], stream: str, sample_indices: Shaped[Any, "B"]
) -> UInt32[Array, "B 2"]:
    """One key per sample: `seed`, then `step`, the stream's name and the sample folded in.

    Args:
        seed: of the run, 0 <= seed < 2**63; static.
        step: 0 <= step < 2**32.
        stream: a `spec.Stream`, or any other name that is not empty.
        sample_indices: integers [B], each 0 <= index < 2**32. Arrays of JAX, traced or not, are
            not read back to be checked, here and in `step`; they are taken modulo 2**32.

    Raises:
        ValueError: an argument is not an integer or not within its range; the name is empty.
    """
    key = _wrap(jnp.asarray(spec.seed_key(seed)))
    key = jax.random.fold_in(key, _to_uint32("step", step, ndim=0))
    key = jax.random.fold_in(key, spec.stream_id(stream))
    indices = _to_uint32("sample_indices", sample_indices, ndim=1)
    return jax.random.key_data(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices))


def _to_uint32(name: str, values: Shaped[Any, "*shape"], ndim: int) -> UInt32[Array, "*shape"]:
    if not isinstance(values, Array):
        return jnp.asarray(spec.to_uint32(name, values, ndim))
    if values.ndim != ndim or not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(f"{name}: expected {ndim}-d integers, got {jax.typeof(values)}")
    return values.astype(jnp.uint32)


def _wrap(keys: UInt32[Array, "*batch 2"]) -> PRNGKeyArray:
    if not jax.config.jax_threefry_partitionable:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError("jax_threefry_partitionable: expected True, JAX's default, got False")
    return jax.random.wrap_key_data(keys, impl="threefry2x32")


def random_bits(keys: UInt32[Array, "B 2"], shape: tuple[int, ...]) -> UInt32[Array, "B *shape"]:
    """Uniform bits; each sample's depend on its own key alone.

    Args:
        keys: one per sample, of `stream_key`.
        shape: of one sample.
    """
    return _draw(jax.random.bits, keys, shape, jnp.uint32)


def _draw(sampler: Callable[..., Array], keys: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    spec.element_count(shape)
    return jax.vmap(lambda key: sampler(key, shape, dtype))(_wrap(keys))


def uniform(keys: UInt32[Array, "B 2"], shape: tuple[int, ...]) -> Float32[Array, "B *shape"]:
    """Uniform in [0, 1): multiples of 2**-23."""
    return _draw(jax.random.uniform, keys, shape, jnp.float32)


def normal(
    keys: UInt32[Array, "B 2"], shape: tuple[int, ...], dtype: str = "float32"
) -> Float[Array, "B *shape"]:
    """Normal with mean 0 and variance 1, never beyond ±5.42.

    Args:
        keys: one per sample, of `stream_key`.
        shape: of one sample.
        dtype: "float32" or "float64", of the arithmetic and the result.
    """
    if dtype == "float32":
        return _draw(jax.random.normal, keys, shape, jnp.float32)
    symmetric = uniform(keys, shape).astype(dtype) * 2.0 + spec.LOWEST_ABOVE_MINUS_ONE
    return _erf_inv(symmetric) * math.sqrt(2.0)


def _erf_inv(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The single precision polynomials: in float64 JAX has others."""
    w = -jnp.log1p(-x * x)
    central = jnp.polyval(jnp.asarray(spec.ERF_INV_CENTRAL, x.dtype), w - 2.5)
    tail = jnp.polyval(jnp.asarray(spec.ERF_INV_TAIL, x.dtype), jnp.sqrt(w) - 3.0)
    return jnp.where(w < 5.0, central, tail) * x


def beta(
    keys: UInt32[Array, "B 2"], shape: tuple[int, ...], alpha: float, dtype: str = "float32"
) -> Float[Array, "B *shape"]:
    """Beta(alpha, 1), by the inverse of its distribution function xᵅ; in [0, 1].

    Raises:
        ValueError: `alpha` is not positive and finite.
    """
    return uniform(keys, shape).astype(dtype) ** spec.beta_exponent(alpha)


def flow_matching_time(keys: UInt32[Array, "B 2"], dtype: str = "float32") -> Float[Array, "B"]:
    """π0's training times, Beta(1.5, 1)·0.999 + 0.001: the noisy end, 1, is the likeliest.

    In [0.001, 1).
    """
    return beta(keys, (), spec.FLOW_TIME_ALPHA, dtype) * spec.FLOW_TIME_SCALE + spec.FLOW_TIME_MIN

"""Named random streams: what is drawn depends on (seed, step, stream, sample) and nothing else.

`jax.random`'s Threefry-2x32 in PyTorch. Keys and bits are uint32 at the boundary, as in the other
backends. PyTorch has next to no arithmetic for that dtype, so inside they are int32, which wraps
just the same.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Float32, Int32, Shaped, UInt32
from torch import Tensor

from pruner_spec import randomness as spec


def stream_key(
    seed: int,
    step: int,
    stream: str,
    sample_indices: Shaped[Any, "B"],
    device: torch.device | str | None = None,
) -> UInt32[Tensor, "B 2"]:
    """One key per sample: `seed`, then `step`, the stream's name and the sample folded in.

    Meant to be called outside of compiled code; the draws below may be compiled.

    Args:
        seed: of the run, 0 <= seed < 2**63.
        step: 0 <= step < 2**32.
        stream: a `spec.Stream`, or any other name that is not empty.
        sample_indices: integers [B], each 0 <= index < 2**32. Tensors are not read back to be
            checked; they are taken modulo 2**32.
        device: of the keys, and so of all that is drawn from them; where the indices are by
            default.

    Raises:
        ValueError: an argument is not an integer or not within its range; the name is empty.
    """
    base = torch.from_numpy(spec.stream_base_key(seed, step, stream)).view(torch.int32)
    indices = _to_int32(sample_indices)
    high, low = base.to(indices.device)
    keys = torch.stack(_threefry2x32((high, low), (torch.zeros_like(indices), indices)), dim=-1)
    return keys.view(torch.uint32).to(device)


def _to_int32(sample_indices: Shaped[Any, "B"]) -> Int32[Tensor, "B"]:
    """The bits of uint32 numbers."""
    if not isinstance(sample_indices, Tensor):
        indices = spec.to_uint32("sample_indices", sample_indices, ndim=1)
        return torch.from_numpy(indices).view(torch.int32)
    dtype = sample_indices.dtype
    if sample_indices.ndim != 1 or dtype.is_floating_point or dtype == torch.bool:
        found = f"{dtype} {list(sample_indices.shape)}"
        raise ValueError(f"sample_indices: expected 1-d integers, got {found}")
    return sample_indices.to(torch.int32)


def _threefry2x32(
    key: tuple[Int32[Tensor, "*#shape"], Int32[Tensor, "*#shape"]],
    count: tuple[Int32[Tensor, "*#shape"], Int32[Tensor, "*#shape"]],
) -> tuple[Int32[Tensor, "*shape"], Int32[Tensor, "*shape"]]:
    """The 20 rounds of Threefry-2x32: two words of count, enciphered with two words of key.

    All in place: a tensor a round would take eight times as long on a CPU, mapping fresh memory.
    """
    keys = (*key, key[0] ^ key[1] ^ spec.THREEFRY_PARITY)
    x0, x1 = count[0] + keys[0], count[1] + keys[1]
    scratch = torch.empty_like(x1)
    for block in range(5):
        for rotation in spec.THREEFRY_ROTATIONS[block % 2]:
            x0 += x1
            _rotate_left(x1, rotation, out=scratch)
            torch.bitwise_xor(x0, scratch, out=x1)
        x0 += keys[(block + 1) % 3]
        x1 += keys[(block + 2) % 3] + (block + 1)
    return x0, x1


def _rotate_left(x: Int32[Tensor, "*shape"], bits: int, out: Int32[Tensor, "*shape"]) -> None:
    """The shift to the right copies the sign bit; the mask takes the copies away."""
    torch.bitwise_right_shift(x, 32 - bits, out=out)
    out &= (1 << bits) - 1
    out.add_(x, alpha=1 << bits)


def random_bits(keys: UInt32[Tensor, "B 2"], shape: tuple[int, ...]) -> UInt32[Tensor, "B *shape"]:
    """Uniform bits; each sample's depend on its own key alone.

    Args:
        keys: one per sample, of `stream_key`.
        shape: of one sample.
    """
    return _signed_bits(keys, shape).view(torch.uint32)


def _signed_bits(keys: UInt32[Tensor, "B 2"], shape: tuple[int, ...]) -> Int32[Tensor, "B *shape"]:
    high, low = keys.view(torch.int32)[:, :, None].unbind(1)
    count = torch.arange(spec.element_count(shape), device=keys.device).to(torch.int32)
    x0, x1 = _threefry2x32((high, low), (torch.zeros_like(count), count))
    return x0.bitwise_xor_(x1).view(len(keys), *shape)


def uniform(keys: UInt32[Tensor, "B 2"], shape: tuple[int, ...]) -> Float32[Tensor, "B *shape"]:
    """Uniform in [0, 1): multiples of 2**-23."""
    mantissa = _signed_bits(keys, shape) >> (32 - spec.MANTISSA_BITS)
    mantissa &= (1 << spec.MANTISSA_BITS) - 1
    return mantissa.to(torch.float32).mul_(2.0**-spec.MANTISSA_BITS)


def normal(
    keys: UInt32[Tensor, "B 2"], shape: tuple[int, ...], dtype: str = "float32"
) -> Float[Tensor, "B *shape"]:
    """Normal with mean 0 and variance 1, never beyond ±5.42.

    Args:
        keys: one per sample, of `stream_key`.
        shape: of one sample.
        dtype: "float32" or "float64", of the arithmetic and the result.
    """
    symmetric = uniform(keys, shape).to(getattr(torch, dtype))
    symmetric.mul_(2.0).add_(spec.LOWEST_ABOVE_MINUS_ONE)
    return _erf_inv(symmetric).mul_(math.sqrt(2.0))


def _erf_inv(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """XLA's polynomials: in the tail `torch.erfinv` gives different digits."""
    w = torch.log1p(-x * x).neg_()
    central = _polynomial(spec.ERF_INV_CENTRAL, w - 2.5)
    tail = _polynomial(spec.ERF_INV_TAIL, torch.sqrt(w).sub_(3.0))
    return torch.where(w < 5.0, central, tail).mul_(x)


def _polynomial(
    coefficients: tuple[float, ...], x: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total.mul_(x).add_(coefficient)
    return total


def beta(
    keys: UInt32[Tensor, "B 2"], shape: tuple[int, ...], alpha: float, dtype: str = "float32"
) -> Float[Tensor, "B *shape"]:
    """Beta(alpha, 1), by the inverse of its distribution function xᵅ; in [0, 1].

    Raises:
        ValueError: `alpha` is not positive and finite.
    """
    # On a CPU, PyTorch's float32 powers depend on where in the tensor an element lies: those that
    # fill no vector register take another path. Float64's do too, but not once rounded.
    power = uniform(keys, shape).double() ** spec.beta_exponent(alpha)
    return power.to(getattr(torch, dtype))


def flow_matching_time(keys: UInt32[Tensor, "B 2"], dtype: str = "float32") -> Float[Tensor, "B"]:
    """π0's training times, Beta(1.5, 1)·0.999 + 0.001: the noisy end, 1, is the likeliest.

    In [0.001, 1).
    """
    return beta(keys, (), spec.FLOW_TIME_ALPHA, dtype) * spec.FLOW_TIME_SCALE + spec.FLOW_TIME_MIN

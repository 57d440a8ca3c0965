"""What libraries do badly at inference, in Triton: chains of pointwise steps, products of few rows.

A denoising step multiplies 50 rows with 0.6 GB of weights and does little else: it is bound by
memory and by launches, so each function here is one launch, and reads each weight once. Where
`available` says no, the functions compute the same with PyTorch's operations (`kernels_plain`).

No gradients. Safe in CUDA graphs: nothing waits for the host, and memory is PyTorch's allocator's.
The first call with new sizes compiles (seconds, kept on disk by Triton) and must come before the
capture. Two calls with the same numbers give the same bits. Tiles are fixed by size; `autotune`
tries a few.

A `kernel` may have either order in memory: [inputs, outputs] or a transposed copy's view,
`kernel.T.contiguous().T`, whose narrow tiles are whole cache lines. It may also be float8, with
`kernel_scale` (`quantize`): half the bytes, on GPUs that have float8 (compute capability 8.9).

Dimension letters: R rows, B batch, S tokens, T tokens attended to, D width, N outputs, F MLP,
K heads, G kv heads, H head_dim.
"""

import functools
import importlib.util
import os
from types import ModuleType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pruner_torch import kernels_checks as checks
from pruner_torch import kernels_plain as plain
from pruner_torch.kernels_checks import FLOAT8

MAX_ROWS = 128  # above, a library's product is as fast, and the functions here compose it
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def available(tensor: Tensor) -> bool:
    """Whether the Triton kernels apply to tensors like this one.

    On NVIDIA GPUs from Ampere on, in bfloat16, float16 and float32, if Triton is installed and
    nothing is being traced; and wherever Triton interprets, as in tests.
    """
    if tensor.dtype not in _DTYPES or torch.compiler.is_compiling() or not _has_triton():
        return False
    if tensor.is_cuda:
        return torch.version.hip is None and _capability(tensor.device) >= (8, 0)
    return os.environ.get("TRITON_INTERPRET") == "1" and tensor.device.type == "cpu"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _pointwise() -> ModuleType:
    from pruner_torch import kernels_pointwise

    return kernels_pointwise


def _tiles() -> ModuleType:
    from pruner_torch import kernels_tiles

    return kernels_tiles


def _rows() -> ModuleType:
    from pruner_torch import kernels_rows

    return kernels_rows


def _split() -> ModuleType:
    from pruner_torch import kernels_split

    return kernels_split


def rms_normalize(
    x: Float[Tensor, "R D"],
    scale: Float[Tensor, "D"] | None,
    shift: Float[Tensor, "D"] | None,
) -> Float[Tensor, "R D"]:
    """Rows over their root mean square, times the scale, plus the shift; in float32.

    Args:
        x: its rows may lie apart, their elements not.
        scale: float32, with the one of "one plus scale" in it.
        shift: float32.

    Returns:
        In x's dtype.

    Raises:
        ValueError: sizes or strides do not fit.
    """
    checks.check_rows(x)
    checks.check_columns("scale", scale, x.shape[1])
    checks.check_columns("shift", shift, x.shape[1])
    if not available(x):
        return plain.rms_normalize(x, scale, shift)
    with torch.cuda.device_of(x):
        return _pointwise().rms_normalize(x, scale, shift)


def rotate(
    qkv: Float[Tensor, "B S (K+2*G)*H"],
    cos: Float[Tensor, "B S H/2"],
    sin: Float[Tensor, "B S H/2"],
    num_heads: int,
    out_query: Float[Tensor, "B S K H"],
    out_key: Float[Tensor, "B S G H"],
    out_value: Float[Tensor, "B S G H"],
) -> None:
    """Splits a packed projection; turns queries and keys by RoPE over the halves of a head.

    Args:
        qkv: heads of queries, then of keys, then of values.
        cos, sin: float32.
        num_heads: K.
        out_query, out_key, out_value: written; views into larger buffers, if need be.

    Raises:
        ValueError: sizes or strides do not fit.
    """
    checks.check_rotation(qkv.shape, cos, sin, num_heads, out_query, out_key, out_value)
    checks.check_dense(qkv)
    if not available(qkv):
        return plain.rotate(qkv, cos, sin, num_heads, out_query, out_key, out_value)
    with torch.cuda.device_of(qkv):
        _pointwise().rotate(qkv, cos, sin, num_heads, out_query, out_key, out_value)


def gelu_product(gate_up: Float[Tensor, "R 2*F"]) -> Float[Tensor, "R F"]:
    """gelu(gate) * up. The GELU is computed in float32 and rounded, as `gemma.Mlp` has it.

    Raises:
        ValueError: an odd width, or elements of a row that lie apart.
    """
    checks.check_rows(gate_up)
    checks.check_halves("gate_up", gate_up)
    if not available(gate_up):
        return plain.gelu_product(gate_up)
    with torch.cuda.device_of(gate_up):
        return _pointwise().gelu_product(gate_up)


def normed_linear(
    x: Float[Tensor, "R D"],
    scale: Float[Tensor, "D"] | None,
    shift: Float[Tensor, "D"] | None,
    kernel: Float[Tensor, "D N"],
    kernel_scale: Float[Tensor, "N"] | None = None,
) -> Float[Tensor, "R N"]:
    """`rms_normalize`, then a product; up to `MAX_ROWS` rows in one launch.

    Args:
        x, scale, shift: as in `rms_normalize`.
        kernel: of x's dtype; or float8.
        kernel_scale: float32, of a float8 kernel.

    Raises:
        ValueError: sizes, strides or dtypes do not fit.
    """
    checks.check_normed(x, scale, shift, kernel, kernel_scale)
    if not _fits(x, kernel):
        normed = rms_normalize(x, scale, shift)
        return normed @ plain.dequantize(kernel, kernel_scale, x.dtype)
    with torch.cuda.device_of(x):
        return _rows().normed_linear(x, scale, shift, kernel, kernel_scale)


def normed_rotated(
    x: Float[Tensor, "B S D"],
    scale: Float[Tensor, "D"] | None,
    shift: Float[Tensor, "D"] | None,
    kernel: Float[Tensor, "D outputs"],
    cos: Float[Tensor, "B S H/2"],
    sin: Float[Tensor, "B S H/2"],
    num_heads: int,
    out_query: Float[Tensor, "B S K H"],
    out_key: Float[Tensor, "B S G H"],
    out_value: Float[Tensor, "B S G H"],
    kernel_scale: Float[Tensor, "N"] | None = None,
) -> None:
    """`normed_linear`, then `rotate`; up to `MAX_ROWS` tokens in one launch.

    Raises:
        ValueError: sizes, strides or dtypes do not fit.
    """
    rows = x.flatten(0, 1)
    checks.check_normed(rows, scale, shift, kernel, kernel_scale)
    shape = (*x.shape[:2], kernel.shape[1])
    checks.check_rotation(shape, cos, sin, num_heads, out_query, out_key, out_value)
    if not _fits(x, kernel) or out_key.shape[-1] % 32:
        qkv = normed_linear(rows, scale, shift, kernel, kernel_scale).view(shape)
        return rotate(qkv, cos, sin, num_heads, out_query, out_key, out_value)
    with torch.cuda.device_of(x):
        outputs = (out_query, out_key, out_value)
        _rows().normed_rotated(
            rows, scale, shift, kernel, cos, sin, num_heads, *outputs, kernel_scale
        )


def normed_gated(
    x: Float[Tensor, "R D"],
    scale: Float[Tensor, "D"] | None,
    shift: Float[Tensor, "D"] | None,
    gate_up: Float[Tensor, "D 2*F"],
    kernel_scale: Float[Tensor, "2*F"] | None = None,
) -> Float[Tensor, "R F"]:
    """`normed_linear` with gate and up, then `gelu_product`; up to `MAX_ROWS` rows in one launch.

    Raises:
        ValueError: sizes, strides or dtypes do not fit.
    """
    checks.check_normed(x, scale, shift, gate_up, kernel_scale)
    checks.check_halves("gate_up", gate_up)
    if not _fits(x, gate_up):
        return gelu_product(normed_linear(x, scale, shift, gate_up, kernel_scale))
    with torch.cuda.device_of(x):
        return _rows().normed_gated(x, scale, shift, gate_up, kernel_scale)


def linear_residual(
    x: Float[Tensor, "R D"],
    kernel: Float[Tensor, "D N"],
    residual: Float[Tensor, "R N"],
    gate: Float[Tensor, "N"] | None,
    kernel_scale: Float[Tensor, "N"] | None = None,
) -> Float[Tensor, "R N"]:
    """residual + (x · kernel) * gate, rounded once; up to `MAX_ROWS` rows in one launch.

    Args:
        x: its rows may lie apart, their elements not.
        kernel: of x's dtype; or float8.
        residual: like x.
        gate: of any dtype; None for 1.
        kernel_scale: float32, of a float8 kernel.

    Raises:
        ValueError: sizes, strides or dtypes do not fit.
    """
    checks.check_product(x, kernel, kernel_scale)
    checks.check_rows(residual)
    checks.check_columns("gate", gate, kernel.shape[1])
    if residual.shape != (x.shape[0], kernel.shape[1]):
        expected = [x.shape[0], kernel.shape[1]]
        raise ValueError(f"expected a residual of {expected}, got {list(residual.shape)}")
    if not _fits(x, kernel):
        return plain.linear_residual(x, kernel, residual, gate, kernel_scale)
    with torch.cuda.device_of(x):
        return _split().linear_residual(x, kernel, residual, gate, kernel_scale)


def attend(
    query: Float[Tensor, "B S K H"],
    key: Float[Tensor, "B T 1 H"],
    value: Float[Tensor, "B T 1 H"],
    key_mask: Bool[Tensor, "B T"] | None,
) -> Float[Tensor, "B S K*H"]:
    """Softmax attention of queries that are scaled already, all heads to the same keys.

    Args:
        query, key, value: views into larger buffers, if need be. Values of masked keys are to be
            finite: they are multiplied by 0.
        key_mask: False for keys that nobody attends to; where all are, values are averaged.

    Raises:
        ValueError: sizes or strides do not fit.
    """
    batch, keys = key.shape[:2]
    shape = (batch, keys, 1, query.shape[3])
    if key.shape != shape or value.shape != shape or query.shape[0] != batch:
        shapes = ", ".join(str(list(each.shape)) for each in (query, key, value))
        raise ValueError(f"expected [B, S, K, H] and twice [B, T, 1, H], got {shapes}")
    if key_mask is not None and key_mask.shape != (batch, keys):
        raise ValueError(f"expected a mask of {[batch, keys]}, got {list(key_mask.shape)}")
    checks.check_dense(query, key, value)
    if not available(query):
        return plain.attend(query, key, value, key_mask)
    with torch.cuda.device_of(query):
        return _split().attend(query, key, value, key_mask)


def quantize(kernel: Float[Tensor, "D N"]) -> tuple[Float[Tensor, "D N"], Float[Tensor, "N"]]:
    """A kernel in float8 (e4m3), and the float32 scale of each of its outputs.

    The largest weight of an output becomes 448, the largest float8. In memory it is transposed,
    which suits the products here and cuBLAS.
    """
    wide = kernel.to(torch.float32)
    largest = wide.abs().amax(dim=0)
    kernel_scale = torch.where(largest > 0, largest, 1) / torch.finfo(FLOAT8).max
    return (wide / kernel_scale).T.contiguous().to(FLOAT8).T, kernel_scale


def autotune(
    rows: int,
    qkv: Float[Tensor, "D outputs"],
    out: Float[Tensor, "K*H D"],
    gate_up: Float[Tensor, "D 2*F"],
    down: Float[Tensor, "F D"],
    head_dim: int,
) -> None:
    """Times a few tiles of each product of a layer on this GPU, and keeps the best: 10 s.

    For products of `rows` rows with kernels of these sizes, from then on in this process. To be
    called before graphs are captured.
    """
    device, dtype, width = qkv.device, out.dtype, qkv.shape[0]
    x = torch.randn(rows, width, device=device).to(dtype)
    scale, shift = torch.ones(width, device=device), torch.zeros(width, device=device)
    heads = out.shape[0] // head_dim
    groups = (qkv.shape[1] // head_dim - heads) // 2
    angle = torch.ones(1, rows, head_dim // 2, device=device)
    query, key, value = (x.new_empty(1, rows, n, head_dim) for n in (heads, groups, groups))
    wide, attended = x.new_ones(rows, down.shape[0]), x.new_ones(rows, out.shape[0])
    runs = {
        ("normed_linear", qkv): lambda: normed_linear(x, scale, shift, qkv),
        ("normed_rotated", qkv): lambda: normed_rotated(
            x[None], scale, shift, qkv, angle, angle, heads, query, key, value
        ),
        ("normed_pair", gate_up): lambda: normed_gated(x, scale, shift, gate_up),
        ("linear_residual", out): lambda: linear_residual(attended, out, x, None),
        ("linear_residual", down): lambda: linear_residual(wide, down, x, None),
    }
    for (product, kernel), run in runs.items():
        _tiles().tune(product, rows, product != "linear_residual", kernel, run)


def set_overlap(overlap: bool) -> None:
    """Whether launches from here on may start while the one before them ends. Off at first.

    Each then asks for its weights before the one before it is done, and waits for it before it
    reads anything else (programmatic dependent launch). From Hopper on.

    Raises:
        ValueError: there is no such GPU.
    """
    if overlap and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)):
        raise ValueError("launches overlap from compute capability 9.0 on, which is not here")
    _pointwise().set_overlap(overlap)


def _fits(x: Tensor, kernel: Tensor) -> bool:
    """Whether one launch computes the product of x with a kernel."""
    rows = x.shape[:-1].numel()
    if not 0 < rows <= MAX_ROWS or not available(x):
        return False
    # Rows are scaled before they are normalised, which float16 has no room for.
    if x.dtype == torch.float16:
        return False
    return kernel.dtype != FLOAT8 or not x.is_cuda or _capability(x.device) >= (8, 9)

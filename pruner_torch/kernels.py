"""The chain of a Gemma layer at inference, in Triton where it applies.

A denoising step multiplies 50 rows with 0.6 GB of weights and does little else: it is bound by
memory and by launches, so each function here is one launch that reads each weight once. Of many
rows a library's product is as fast, and Triton computes what stands around it.

Triton applies on NVIDIA GPUs from Ampere on, in bfloat16 and float32; elsewhere, and while
something is being traced, the functions compute the same with PyTorch's operations
(`kernels_plain`). The kernels themselves are `pruner_kernels`'s, which JAX launches too.

A product of few rows takes a `kernel` whose outputs lie first in memory: a transposed copy's view,
`kernel.T.contiguous().T`. Any other goes to a library, and so does one in float8.

No gradients. Safe in CUDA graphs: nothing waits for the host, and memory is PyTorch's allocator's.
The first call with new sizes compiles (seconds, kept on disk by Triton) and must come before the
capture. Two calls with the same numbers give the same bits.

Dimension letters: R rows, B batch, S tokens, T room for keys, D width, N outputs, F MLP, K heads,
G kv heads, H head_dim (of actions: horizon), A action dim, E width of the action expert.
"""

import functools
import importlib.util
import os
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pruner_kernels import few_rows, tiles
from pruner_torch import kernels_checks as checks
from pruner_torch import kernels_plain as plain
from pruner_torch.float8 import Quantized
from pruner_torch.kernels_plain import PackedQuery, Rows

if TYPE_CHECKING:
    from pruner_torch.deployed import ExpertLayer

MAX_ROWS = 128  # above, a library's product is as fast
_DTYPES = (torch.bfloat16, torch.float32)


def available(tensor: Tensor) -> bool:
    """Whether the Triton kernels apply to tensors like this one; also wherever Triton interprets,
    as in tests."""
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


def _launch() -> ModuleType:
    from pruner_torch import kernels_launch  # here, since it imports Triton

    return kernels_launch


def _vision() -> ModuleType:
    from pruner_torch import kernels_vision

    return kernels_vision


def _packed() -> ModuleType:
    from pruner_torch import kernels_packed  # here, since it imports the driver's bindings

    return kernels_packed


def packs(rows: int, layer: "ExpertLayer", head_dim: int, actions: int) -> bool:
    """Whether a layer's products are the fastest of packed rows, as `embed_actions` writes them
    where it is told to; from there on they remain packed.

    A Hopper GPU in bfloat16, few rows, and sizes like those of an action expert; kernels that lie
    outputs first, and what an adaptive norm adds and gates.

    Args:
        rows: tokens of all samples.
        layer: its kernels.
        head_dim: of its heads.
        actions: numbers of an action.
    """
    kernels = layer.qkv, layer.out, layer.gate_up, layer.down
    if any(isinstance(kernel, Quantized) for kernel in kernels):
        return False
    if not _has_kernel(layer.qkv, packed=True):
        return False
    heads, mlp = len(layer.out) // head_dim, len(layer.down)
    groups = (layer.qkv.shape[1] // head_dim - heads) // 2
    sizes = rows, len(layer.qkv), mlp, heads, groups, head_dim, 8 * layer.qkv.itemsize
    if not (few_rows.applies(*sizes) and few_rows.steps(actions)):
        return False
    if not all(map(_is_outputs_first, kernels)):
        return False
    width = len(layer.qkv)
    return few_rows.compiles(few_rows.gated(rows, width, width // 64, mlp))


def scale_rows(x: Float[Tensor, "R D"], scale: Float[Tensor, "D"]) -> Rows:
    """Hidden states as a norm with this scale takes them.

    Args:
        x: its rows may lie apart, their elements not.
        scale: in `wide` precision, with the one of "one plus scale" in it.

    Raises:
        ValueError: sizes or strides do not fit.
    """
    checks.check_rows(x)
    checks.check_columns("scale", scale, x.shape[1])
    if not available(x):
        return plain.scale_rows(x, scale)
    with torch.cuda.device_of(x):
        return _launch().add_scaled(x, None, None, scale)


def project(
    rows: Rows,
    kernel: Float[Tensor, "D N"],
    added: Float[Tensor, "N"] | None,
    cos: Float[Tensor, "B S half"],
    sin: Float[Tensor, "B S half"],
    key: Float[Tensor, "B T G H"],
    value: Float[Tensor, "B T G H"],
    place: int,
    num_heads: int,
) -> tuple[Float[Tensor, "B S K H"], Float[Tensor, "B T G H"], Float[Tensor, "B T G H"]]:
    """A norm, a packed projection, RoPE of queries and keys over the halves of a head.

    Args:
        rows: of B * S tokens.
        kernel: heads of queries, then of keys, then of values.
        added: the norm's shift times the kernel, in `wide` precision; None for none.
        cos, sin: in `wide` precision.
        key, value: of T tokens, of which S from `place` on are written.
        place: of the first token.
        num_heads: K; 0 for keys and values alone.

    Returns:
        queries, `key`, `value`.

    Raises:
        ValueError: sizes, strides or dtypes do not fit.
    """
    checks.check_normed(rows, kernel)
    checks.check_columns("added", added, kernel.shape[1])
    checks.check_projection(len(rows.x), kernel.shape[1], cos, sin, key, value, place, num_heads)
    packed = plain.is_packed(rows.scaled)
    if not _has_kernel(rows.x, packed):
        return plain.project(rows, kernel, added, cos, sin, key, value, place, num_heads)
    with torch.cuda.device_of(rows.x):
        if packed:
            call = _packed().project
        elif _is_of_few(rows.x, kernel) and num_heads and key.shape[-1] % 32 == 0:
            call = _launch().project
        else:
            call = _launch().rotate
        query = call(rows, kernel, added, cos, sin, key, value, place, num_heads)
    return query, key, value


def gated(
    rows: Rows, gate_up: Float[Tensor, "D 2*F"] | Quantized, added: Float[Tensor, "2*F"] | None
) -> Tensor:
    """A norm, gate and up in one product, gelu(gate) * up; GELU in its tanh approximation.

    Args:
        rows: as in `project`.
        gate_up: the gate first; of the rows' dtype, or in float8.
        added: as in `project`.

    Returns:
        [R, F], packed if the rows are.

    Raises:
        ValueError: sizes, strides or dtypes do not fit.
    """
    checks.check_normed(rows, gate_up)
    checks.check_halves("gate_up", gate_up)
    checks.check_columns("added", added, gate_up.shape[1])
    packed = plain.is_packed(rows.scaled)
    if not _has_kernel(rows.x, packed):
        return plain.gated(rows, gate_up, added)
    with torch.cuda.device_of(rows.x):
        if packed:
            return _packed().gated(rows, gate_up, added)
        call = _launch().gated if _is_of_few(rows.x, gate_up) else _launch().gelu_product
        return call(rows, gate_up, added)


def merge(
    x: Tensor,
    kernel: Float[Tensor, "F D"] | Quantized,
    residual: Float[Tensor, "R D"],
    gate: Float[Tensor, "D"] | None,
    scale: Float[Tensor, "D"],
) -> Rows:
    """residual + (x · kernel) * gate, rounded once, as the norm that follows takes it.

    Args:
        x: [R, F], whose rows may lie apart, their elements not; or packed, as what is scaled then
            is, too.
        kernel: of x's dtype, or in float8.
        residual: like x.
        gate: of any dtype; None for 1.
        scale: of the norm that follows, as in `scale_rows`.

    Raises:
        ValueError: sizes, strides or dtypes do not fit.
    """
    checks.check_rows(residual)
    packed = plain.is_packed(x)
    if packed:
        checks.check_packed(x, len(residual), kernel.shape[0])
    else:
        checks.check_product(x, kernel)
    checks.check_columns("gate", gate, kernel.shape[1])
    checks.check_columns("scale", scale, kernel.shape[1])
    expected = [len(residual if packed else x), kernel.shape[1]]
    if list(residual.shape) != expected:
        raise ValueError(f"expected a residual of {expected}, got {list(residual.shape)}")
    if not _has_kernel(x, packed):
        return plain.merge(x, kernel, residual, gate, scale)
    with torch.cuda.device_of(x):
        if packed:
            return _packed().merge(x, kernel, residual, gate, scale)
        if _is_of_few(x, kernel):
            return _launch().merge(x, kernel, residual, gate, scale)
        return _launch().add_scaled(residual, _launch().product(x, kernel), gate, scale)


def attend(
    query: Float[Tensor, "B S K H"] | PackedQuery,
    key: Float[Tensor, "B T 1 H"],
    value: Float[Tensor, "B T 1 H"],
    key_mask: Bool[Tensor, "B T"] | None,
    packed: bool = False,
) -> Tensor:
    """Softmax attention of queries that are scaled already, all heads to the same keys.

    Args:
        query, key, value: views into larger buffers, if need be. Values of masked keys are to be
            finite: they are multiplied by 0.
        key_mask: False for keys that nobody attends to; where all are, values are averaged.
        packed: how the result is written; True for packed queries.

    Returns:
        [B, S, K * H], or packed.

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
    checks.check_dense(key, value)
    in_tiles = isinstance(query, PackedQuery)
    if not _has_kernel(key, in_tiles):
        return plain.attend(query, key, value, key_mask, packed)
    with torch.cuda.device_of(key):
        if in_tiles:
            return _packed().attend(query, key, value, key_mask)
        checks.check_dense(query)
        return _launch().attend(query, key, value, key_mask, packed)


def embed_actions(
    noisy: Float[Tensor, "B H A"],
    kernel: Float[Tensor, "A E"],
    bias: Float[Tensor, "E"],
    scale: Float[Tensor, "E"],
    dtype: torch.dtype,
    packed: bool = False,
) -> Rows:
    """Tokens of noisy actions, as the first norm takes them; `wide` until they are written.

    Args:
        noisy, kernel, bias: in `wide` precision.
        scale: as in `scale_rows`.
        dtype: of the tokens.
        packed: how what is scaled is written.

    Raises:
        ValueError: sizes or strides do not fit.
    """
    rows = noisy.flatten(0, 1)
    checks.check_product(rows, kernel)
    checks.check_columns("bias", bias, kernel.shape[1])
    checks.check_columns("scale", scale, kernel.shape[1])
    has_kernel = available(noisy) and kernel.is_contiguous()
    if packed:
        has_kernel &= _is_hoppers(noisy.device, dtype) and few_rows.steps(len(kernel))
    if not has_kernel:
        return plain.embed_actions(noisy, kernel, bias, scale, dtype, packed)
    with torch.cuda.device_of(noisy):
        call = _packed().embed_actions if packed else _launch().embed_actions
        return call(rows, kernel, bias, scale, dtype)


def euler_step(
    rows: Rows,
    scale: Float[Tensor, "E"],
    shift: Float[Tensor, "E"] | None,
    kernel: Float[Tensor, "E A"],
    bias: Float[Tensor, "A"],
    noisy: Float[Tensor, "B H A"],
    step: float,
) -> Float[Tensor, "B H A"]:
    """noisy + step * velocity: the final norm, and a map in `wide` precision.

    Args:
        rows: of B samples, each of whose last H tokens are its actions.
        scale, shift: of the final norm, in `wide` precision.
        kernel, bias, noisy: in `wide` precision.
        step: dt, negative.

    Raises:
        ValueError: sizes or strides do not fit.
    """
    checks.check_rows(rows.x)
    checks.check_actions(rows.x, kernel, noisy)
    checks.check_columns("scale", scale, rows.x.shape[1])
    checks.check_columns("shift", shift, rows.x.shape[1])
    checks.check_columns("bias", bias, kernel.shape[1])
    packed = plain.is_packed(rows.scaled)
    has_kernel = available(noisy) and _has_kernel(rows.x, packed) and kernel.is_contiguous()
    if packed:
        has_kernel &= few_rows.steps(len(bias))
    if not has_kernel:
        return plain.euler_step(rows, scale, shift, kernel, bias, noisy, step)
    with torch.cuda.device_of(noisy):
        call = _packed().euler_step if packed else _launch().euler_step
        return call(rows, scale, shift, kernel, bias, noisy.contiguous(), step)


def attend_patches(qkv: Float[Tensor, "B N 3*D"], num_heads: int) -> Float[Tensor, "B N D"]:
    """Softmax attention of an image's patches to each other.

    Args:
        qkv: a packed projection: heads of queries, then of keys, then of values.
        num_heads: K.

    Raises:
        ValueError: there are not three times so many heads.
    """
    if qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"expected 3 times {num_heads} heads, got {qkv.shape[2]} elements")
    if not available(qkv) or not tiles.has_patch_tiles(len(qkv), qkv.itemsize):
        return plain.attend_patches(qkv, num_heads)
    with torch.cuda.device_of(qkv):
        return _vision().attend_patches(qkv, num_heads)


def add_layer_norm(
    x: Float[Tensor, "*batch D"],
    y: Float[Tensor, "*batch D"],
    scale: Float[Tensor, "D"],
    shift: Float[Tensor, "D"],
    epsilon: float,
) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
    """x + y in x's dtype, and its layer norm, computed in `wide` precision.

    Args:
        x: of a residual stream.
        y: like x.
        scale, shift: of the norm, of any dtype.
        epsilon: added to the variance.

    Raises:
        ValueError: sizes, strides or dtypes do not fit.
    """
    if y.shape != x.shape or y.dtype != x.dtype:
        expected, found = (f"{list(each.shape)} in {each.dtype}" for each in (x, y))
        raise ValueError(f"expected y of {expected}, got {found}")
    checks.check_dense(x, y)
    checks.check_columns("scale", scale, x.shape[-1])
    checks.check_columns("shift", shift, x.shape[-1])
    if not available(x):
        return plain.add_layer_norm(x, y, scale, shift, epsilon)
    with torch.cuda.device_of(x):
        return _vision().add_layer_norm(x, y, scale, shift, epsilon)


def _is_of_few(x: Tensor, kernel: Tensor | Quantized) -> bool:
    """Whether one launch computes the product of x with a kernel."""
    if isinstance(kernel, Quantized):
        return False
    return 0 < len(x) <= MAX_ROWS and _is_outputs_first(kernel)


def _has_kernel(x: Tensor, packed: bool) -> bool:
    """Whether Triton applies to tensors like this one; to packed rows, whether CUDA C++ does."""
    return available(x) and (not packed or _is_hoppers(x.device, x.dtype))


def _is_hoppers(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed rows of this device and dtype are CUDA C++'s."""
    is_half = device.type == "cuda" and dtype == torch.bfloat16
    return is_half and _capability(device) == few_rows.CAPABILITY


def _is_outputs_first(kernel: Tensor) -> bool:
    return kernel.stride(0) == 1 and kernel.stride(1) == len(kernel)

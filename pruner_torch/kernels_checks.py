"""What the functions of `kernels` are given, held against what they take."""

from torch import Tensor

from pruner_kernels.few_rows import packed_shape
from pruner_torch import kernels_plain as plain
from pruner_torch.float8 import Quantized
from pruner_torch.kernels_plain import Rows


def check_rows(x: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"expected rows [R, D], got {list(x.shape)}")
    check_dense(x)


def check_dense(*tensors: Tensor) -> None:
    for x in tensors:
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"expected rows of adjacent elements, got strides {x.stride()}")


def check_columns(name: str, values: Tensor | None, width: int) -> None:
    if values is not None and (values.shape != (width,) or values.stride() != (1,)):
        found = f"{list(values.shape)} with stride {list(values.stride())}"
        raise ValueError(f"expected a {name} of {[width]}, adjacent, got {found}")


def check_halves(name: str, x: Tensor | Quantized) -> None:
    if x.shape[1] % 2:
        raise ValueError(f"expected {name} of an even width, got {list(x.shape)}")


def check_normed(rows: Rows, kernel: Tensor | Quantized) -> None:
    """Rows before a product, which may be packed."""
    check_product(rows.x if plain.is_packed(rows.scaled) else rows.scaled, kernel)
    if plain.is_packed(rows.scaled):
        check_packed(rows.scaled, *rows.x.shape)


def check_packed(x: Tensor, rows: int, width: int) -> None:
    expected = packed_shape(rows, width)
    if x.shape != expected or not x.is_contiguous():
        found = f"{list(x.shape)} with strides {list(x.stride())}"
        raise ValueError(f"expected packed rows of {list(expected)}, adjacent, got {found}")


def check_product(x: Tensor, kernel: Tensor | Quantized) -> None:
    check_rows(x)
    if len(kernel.shape) != 2 or kernel.shape[0] != x.shape[1]:
        found = list(kernel.shape)
        raise ValueError(f"expected a kernel of {x.shape[1]} inputs, got {found}")
    if not isinstance(kernel, Quantized) and kernel.dtype != x.dtype:
        raise ValueError(f"expected a kernel in {x.dtype}, got {kernel.dtype}")


def check_projection(
    rows: int,
    outputs: int,
    cos: Tensor,
    sin: Tensor,
    key: Tensor,
    value: Tensor,
    place: int,
    num_heads: int,
) -> None:
    batch, room, groups, head_dim = key.shape
    length = cos.shape[1]
    expected = {
        "rows": (batch * length,),
        "outputs": ((num_heads + 2 * groups) * head_dim,),
        "cos": (batch, length, head_dim // 2),
        "sin": (batch, length, head_dim // 2),
        "value": (batch, room, groups, head_dim),
    }
    found = {"rows": (rows,), "outputs": (outputs,), "cos": cos.shape, "sin": sin.shape}
    found["value"] = value.shape
    for name, sizes in expected.items():
        if tuple(found[name]) != sizes:
            raise ValueError(f"expected {name} of {list(sizes)}, got {list(found[name])}")
    if not 0 <= place <= room - length:
        raise ValueError(f"expected {length} tokens within room for {room}, got place {place}")
    check_dense(cos, sin, key, value)


def check_actions(x: Tensor, kernel: Tensor, noisy: Tensor) -> None:
    batch, horizon, actions = noisy.shape
    if kernel.shape != (x.shape[1], actions):
        found = list(kernel.shape)
        raise ValueError(f"expected a kernel of {[x.shape[1], actions]}, got {found}")
    if len(x) % batch or len(x) // batch < horizon:
        expected = f"{batch} samples of at least {horizon} tokens"
        raise ValueError(f"expected rows of {expected}, got {len(x)}")

"""What the functions of `kernels` are given, held against what they take."""

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn


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


def check_halves(name: str, x: Tensor) -> None:
    if x.shape[1] % 2:
        raise ValueError(f"expected {name} of an even width, got {list(x.shape)}")


def check_product(x: Tensor, kernel: Tensor, kernel_scale: Tensor | None) -> None:
    check_rows(x)
    if kernel.ndim != 2 or kernel.shape[0] != x.shape[1]:
        found = list(kernel.shape)
        raise ValueError(f"expected a kernel of {x.shape[1]} inputs, got {found}")
    if (kernel.dtype == FLOAT8) != (kernel_scale is not None):
        raise ValueError(f"a scale is for float8 kernels, and they need it; got {kernel.dtype}")
    if kernel.dtype not in (x.dtype, FLOAT8):
        raise ValueError(f"expected a kernel in {x.dtype} or {FLOAT8}, got {kernel.dtype}")
    check_columns("kernel_scale", kernel_scale, kernel.shape[1])


def check_normed(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    kernel: Tensor,
    kernel_scale: Tensor | None,
) -> None:
    check_product(x, kernel, kernel_scale)
    check_columns("scale", scale, x.shape[1])
    check_columns("shift", shift, x.shape[1])


def check_rotation(
    shape: tuple[int, ...],
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    out_query: Tensor,
    out_key: Tensor,
    out_value: Tensor,
) -> None:
    batch, length, groups, head_dim = out_key.shape
    expected = {
        "qkv": (batch, length, (num_heads + 2 * groups) * head_dim),
        "cos": (batch, length, head_dim // 2),
        "sin": (batch, length, head_dim // 2),
        "out_query": (batch, length, num_heads, head_dim),
        "out_value": (batch, length, groups, head_dim),
    }
    found = {"qkv": shape, "cos": cos.shape, "sin": sin.shape}
    found |= {"out_query": out_query.shape, "out_value": out_value.shape}
    for name, sizes in expected.items():
        if tuple(found[name]) != sizes:
            raise ValueError(f"expected {name} of {list(sizes)}, got {list(found[name])}")
    check_dense(cos, sin, out_query, out_key, out_value)

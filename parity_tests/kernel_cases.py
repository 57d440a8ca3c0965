"""What the kernels of `pruner_torch.kernels` compute, held against float64 in NumPy.

Run as a program, it tries every case and prints what it found as JSON: in a process of its own,
since Triton is told to interpret before it is imported. Memory that nobody has written is NaN, and
so is everything around the inputs.
"""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parity_tests.harness import DEVICE
from pruner_spec.sequence import MASKED_LOGIT
from pruner_torch import kernels, kernels_plain

FULL = DEVICE == "cuda"  # the sizes of π0.5; otherwise such as an interpreter has patience for
WIDTH, MLP, HEADS, HEAD_DIM = (1024, 4096, 8, 256) if FULL else (96, 40, 3, 32)
KEYS = (160, 1018) if FULL else (40, 130)
ROWS = (1, 3, 50, 51, 100)
DTYPES = ("float32", "bfloat16")
Call = Callable[[Any], Tensor]  # of a module, `kernels` or `kernels_plain`


class Numbers:
    """Random arrays, and the tensors that they are in a dtype."""

    def __init__(self, dtype: str) -> None:
        self.generator = np.random.default_rng(7)
        self.dtype = getattr(torch, dtype)

    def __call__(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """Normal, rounded to the dtype; a view, with NaN behind each row and after all of them."""
        values = mean + scale * self.generator.standard_normal(shape)
        room = (*shape[:-2], shape[-2] + 2, shape[-1] + 8) if len(shape) > 1 else shape
        tensor = torch.full(room, float("nan"), dtype=self.dtype, device=DEVICE)
        view = tensor[..., : shape[-2], : shape[-1]] if len(shape) > 1 else tensor
        return view.copy_(torch.from_numpy(values))

    def table(self, *shape: int, mean: float = 0.0) -> Tensor:
        """Normal, in float32, without room."""
        values = mean + 0.5 * self.generator.standard_normal(shape)
        return torch.from_numpy(values.astype(np.float32)).to(DEVICE)

    def kernel(self, inputs: int, outputs: int, *, transposed: bool = False) -> Tensor:
        """Such that a product is about as large as its input."""
        if transposed:
            return self(outputs, inputs, scale=inputs**-0.5).T
        return self(inputs, outputs, scale=inputs**-0.5)

    def empty(self, *shape: int) -> Tensor:
        """NaN, to be written."""
        return torch.full(shape, float("nan"), dtype=self.dtype, device=DEVICE)


def double(x: Tensor) -> np.ndarray:
    """In float64, in NumPy."""
    return x.to(torch.float64).cpu().numpy()


def rms_norm(x: np.ndarray, scale: Tensor | None, shift: Tensor | None) -> np.ndarray:
    """In float64."""
    y = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    y = y if scale is None else y * double(scale)
    return y if shift is None else y + double(shift)


def gelu(x: np.ndarray) -> np.ndarray:
    """In float64."""
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def turned(x: np.ndarray, cos: Tensor, sin: Tensor) -> np.ndarray:
    """RoPE of [B, S, K, H] in float64."""
    first, second = np.split(x, 2, axis=-1)
    c, s = double(cos)[:, :, None], double(sin)[:, :, None]
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def heads(qkv: np.ndarray, cos: Tensor, sin: Tensor, groups: int) -> np.ndarray:
    """Queries and keys turned, values not: [B, S, K + 2G, H]."""
    split = qkv.reshape(*qkv.shape[:2], -1, cos.shape[-1] * 2)
    last = split.shape[2] - groups
    return np.concatenate([turned(split[:, :, :last], cos, sin), split[:, :, last:]], axis=2)


def norms(numbers: Numbers, width: int) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """With a scale and a shift, a scale alone, and none."""
    scale, shift = numbers.table(width, mean=1.0), numbers.table(width)
    yield from (("shifted", scale, shift), ("scaled", scale, None), ("bare", None, None))


def rms_normalize(numbers: Numbers) -> Iterator[tuple[str, Call, np.ndarray]]:
    for rows in (1, 3, 51):
        x = numbers(rows, WIDTH + (4 if rows == 3 else 0), scale=3.0)
        for name, *norm in norms(numbers, x.shape[1]):
            expected = rms_norm(double(x), *norm)
            yield f"{rows} {name}", lambda k, x=x, n=norm: k.rms_normalize(x, *n), expected


def gelu_product(numbers: Numbers) -> Iterator[tuple[str, Call, np.ndarray]]:
    for rows in (1, 3, 51):
        x = numbers(rows, 2 * MLP + 2 * rows, scale=2.0)
        gate, up = np.split(double(x), 2, axis=-1)
        yield f"{rows}", lambda k, x=x: k.gelu_product(x), gelu(gate) * up


def outputs(numbers: Numbers, batch: int, length: int, groups: int) -> list[Tensor]:
    """Room for queries, and for keys and values inside longer caches."""
    query = numbers.empty(batch, length, HEADS, HEAD_DIM)
    caches = (numbers.empty(batch, length + 5, groups, HEAD_DIM) for _ in range(2))
    return [query, *(cache[:, 3 : 3 + length] for cache in caches)]


def written(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What was written; all NaN if anything was beside it. The host need not wait for it."""
    result = torch.cat([query, key, value], dim=2)
    for view in (key, value):
        assert view._base is not None
        before, after = view._base[:, :3], view._base[:, 3 + view.shape[1] :]
        untouched = before.isnan().all() & after.isnan().all()
        result = torch.where(untouched, result, float("nan"))
    return result


def angles(numbers: Numbers, batch: int, length: int) -> tuple[Tensor, Tensor]:
    angle = 3 * numbers.table(batch, length, HEAD_DIM // 2)
    return angle.cos(), angle.sin()


def rotate(numbers: Numbers) -> Iterator[tuple[str, Call, np.ndarray]]:
    for batch, length, groups in ((1, 50, 1), (2, 3, 2)):
        qkv = numbers(batch, length, (HEADS + 2 * groups) * HEAD_DIM)
        cos, sin = angles(numbers, batch, length)

        def call(k: Any, qkv: Tensor = qkv, c: Tensor = cos, s: Tensor = sin, g: int = groups):
            views = outputs(numbers, *qkv.shape[:2], g)
            k.rotate(qkv, c, s, HEADS, *views)
            return written(*views)

        yield f"{batch}x{length}, {groups} groups", call, heads(double(qkv), cos, sin, groups)


def normed_linear(numbers: Numbers) -> Iterator[tuple[str, Call, np.ndarray]]:
    for rows in ROWS:
        width = WIDTH + (4 if rows == 3 else 0)
        x = numbers(rows, width, scale=3.0)
        kernel = numbers.kernel(width, MLP, transposed=rows > 50)
        for name, *norm in norms(numbers, width):
            if name == "shifted" or rows == 50:
                expected = rms_norm(double(x), *norm) @ double(kernel)
                call = lambda k, x=x, n=norm, w=kernel: k.normed_linear(x, *n, w)  # noqa: E731
                yield f"{rows} {name}", call, expected


def normed_gated(numbers: Numbers) -> Iterator[tuple[str, Call, np.ndarray]]:
    for rows in ROWS:
        x = numbers(rows, WIDTH, scale=3.0)
        kernel = numbers.kernel(WIDTH, 2 * MLP, transposed=rows > 50)
        name, *norm = next(norms(numbers, WIDTH))
        gate, up = np.split(rms_norm(double(x), *norm) @ double(kernel), 2, axis=-1)
        call = lambda k, x=x, n=norm, w=kernel: k.normed_gated(x, *n, w)  # noqa: E731
        yield f"{rows} {name}", call, gelu(gate) * up


def normed_rotated(numbers: Numbers) -> Iterator[tuple[str, Call, np.ndarray]]:
    for batch, length, groups in ((1, 50, 1), (2, 3, 2)):
        x = numbers(1, batch * length, WIDTH, scale=3.0).contiguous().view(batch, length, WIDTH)
        kernel = numbers.kernel(WIDTH, (HEADS + 2 * groups) * HEAD_DIM, transposed=batch == 2)
        cos, sin = angles(numbers, batch, length)
        name, *norm = next(norms(numbers, WIDTH))
        expected = heads(rms_norm(double(x), *norm) @ double(kernel), cos, sin, groups)

        def call(
            k: Any,
            x: Tensor = x,
            norm: list[Tensor | None] = norm,
            kernel: Tensor = kernel,
            angle: tuple[Tensor, Tensor] = (cos, sin),
            groups: int = groups,
        ) -> Tensor:
            views = outputs(numbers, *x.shape[:2], groups)
            k.normed_rotated(x, *norm, kernel, *angle, HEADS, *views)
            return written(*views)

        yield f"{batch}x{length}, {groups} groups, {name}", call, expected


def linear_residual(numbers: Numbers) -> Iterator[tuple[str, Call, np.ndarray]]:
    for rows in ROWS:
        # As many inputs as are shared among programs, and a number that is not.
        inputs = 37 if rows == 3 else 4 * 128
        x, residual = numbers(rows, inputs), numbers(rows, MLP)
        kernel = numbers.kernel(inputs, MLP, transposed=rows > 50)
        gate = None if rows == 1 else numbers.table(MLP)
        expected = double(x) @ double(kernel) * (1 if gate is None else double(gate))
        call = lambda k, x=x, w=kernel, r=residual, g=gate: k.linear_residual(x, w, r, g)  # noqa: E731
        yield f"{rows} of {inputs}", call, double(residual) + expected


def quantized(numbers: Numbers) -> Iterator[tuple[str, Call, np.ndarray]]:
    """Of float8 weights; what they were before is not what is asked for."""
    x, residual = numbers(50, 512, scale=3.0), numbers(50, MLP)
    kernel, scale = kernels.quantize(numbers.kernel(512, MLP))
    weights = double(kernel.float()) * double(scale)
    name, *norm = next(norms(numbers, 512))
    normed = rms_norm(double(x), *norm) @ weights
    yield f"linear, {name}", lambda k: k.normed_linear(x, *norm, kernel, scale), normed
    gate, up = np.split(normed, 2, axis=-1)
    yield f"gated, {name}", lambda k: k.normed_gated(x, *norm, kernel, scale), gelu(gate) * up
    added = double(x) @ weights + double(residual)
    yield "residual", lambda k: k.linear_residual(x, kernel, residual, None, scale), added


def attend(numbers: Numbers) -> Iterator[tuple[str, Call, np.ndarray]]:
    for batch, length, keys in ((1, 50, KEYS[0]), (2, 5, KEYS[1]), (2, 51, KEYS[1] - 7), (1, 1, 1)):
        query = numbers(batch, length, HEADS, HEAD_DIM, scale=2 * HEAD_DIM**-0.5)
        caches = (numbers(batch, keys, HEAD_DIM)[:, :, None] for _ in range(2))
        key, value = caches
        mask = torch.from_numpy(numbers.generator.random((batch, keys)) < 0.6).to(DEVICE)
        mask[-1] = batch == 1  # of two samples the last has no key at all
        for name, given in (("all keys", None), ("masked", mask)):
            logits = np.einsum("bskh,bth->bskt", double(query), double(key[:, :, 0]))
            if given is not None:
                logits = np.where(given.cpu().numpy()[:, None, None], logits, MASKED_LOGIT)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            expected = np.einsum("bskt,bth->bskh", weights, double(value[:, :, 0]))
            call = lambda k, q=query, x=key, v=value, m=given: k.attend(q, x, v, m)  # noqa: E731
            yield f"{batch}x{length} of {keys}, {name}", call, expected.reshape(batch, length, -1)


FAMILIES = {
    family.__name__: family
    for family in (
        *(rms_normalize, rotate, gelu_product, normed_linear, normed_rotated, normed_gated),
        *(linear_residual, attend, quantized),
    )
}


def bits(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def poisoned(call: Call, module: Any) -> Tensor:
    """The result, where memory that is not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return call(module)
    finally:
        torch.use_deterministic_algorithms(False)


def captured(call: Call, *, overlap: bool) -> Tensor:
    """The result of a CUDA graph's second replay, of calls that wait for one another if at all."""
    graph = torch.cuda.CUDAGraph()
    kernels.set_overlap(overlap)
    call(kernels)
    with torch.cuda.graph(graph):
        results = [call(kernels) for _ in range(3)]
    kernels.set_overlap(False)
    graph.replay()
    for result in results:
        result.fill_(float("nan"))
    graph.replay()
    assert len({bits(result) for result in results}) == 1
    return results[-1]


def errors(found: Tensor, expected: np.ndarray) -> dict[str, float]:
    """The largest and the mean difference, over the largest value expected; infinite for NaN."""
    difference = np.abs(double(found) - expected) / np.abs(expected).max()
    if not np.isfinite(difference).all():
        return {"largest": float("inf"), "mean": float("inf")}
    return {"largest": float(difference.max()), "mean": float(difference.mean())}


def found(family: str, dtype: str) -> Iterator[dict[str, Any]]:
    """What was found in each case of a family."""
    overlaps = []
    if FULL:
        overlaps = [False, True] if torch.cuda.get_device_capability() >= (9, 0) else [False]
    for name, call, expected in FAMILIES[family](Numbers(dtype)):
        first = poisoned(call, kernels)
        yield {
            "family": family,
            "case": name,
            "dtype": dtype,
            "triton": kernels.available(first),
            "shape": list(first.shape) == list(expected.shape),
            "same": bits(first) == bits(poisoned(call, kernels)),
            "captured": all(
                bits(captured(call, overlap=overlap)) == bits(first) for overlap in overlaps
            ),
            "error": errors(first, expected),
            "plain": errors(call(kernels_plain), expected),
        }


def main() -> None:
    assert FULL or os.environ.get("TRITON_INTERPRET") == "1"
    rows = [row for family in FAMILIES for dtype in DTYPES for row in found(family, dtype)]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

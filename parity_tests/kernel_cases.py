"""What the functions of `pruner_torch.kernels` compute, held against float64 in NumPy.

Run as a program, it tries every case and prints what it found as JSON: in a process of its own,
since Triton is told to interpret before it is imported. Memory that nobody has written is NaN, and
so are the surroundings of the inputs, and what a function has no need to read.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from parity_tests.harness import DEVICE
from pruner_kernels import tiles
from pruner_kernels.tiles import PROCESSORS, cdiv
from pruner_spec.sequence import MASKED_LOGIT
from pruner_torch import kernels, kernels_autotune, kernels_plain
from pruner_torch.deployed import ExpertLayer
from pruner_torch.kernels_plain import Rows

FULL = DEVICE == "cuda"  # the sizes of π0.5; otherwise such as an interpreter has patience for
WIDTH, MLP, HEADS, HEAD_DIM, ACTION_DIM = (1024, 4096, 8, 256, 32) if FULL else (72, 40, 3, 96, 7)
KEYS = (178, 306, 1018) if FULL else (178, 130, 40)
FEW, MANY = (1, 3, 50, 51, 100), 130  # rows, up to `kernels.MAX_ROWS` and above
DTYPES = ("float32", "bfloat16")
Call = Callable[[Any], Tensor | Rows]  # of a module, `kernels` or `kernels_plain`


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to compute.

    Attributes:
        name: its sizes.
        launch: the function of `kernels_launch` that computes it.
        call: computes it.
        expected: in float64; where the result is `Rows`, their x.
        scale: of the norm that takes the `Rows`.
    """

    name: str
    launch: str
    call: Call
    expected: np.ndarray
    scale: Tensor | None = None


class Numbers:
    """Random arrays, and the tensors that they are in a dtype."""

    def __init__(self, dtype: str) -> None:
        self.generator = np.random.default_rng(7)
        self.dtype = getattr(torch, dtype)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal; see `roomy`."""
        return self.roomy(scale * self.generator.standard_normal(shape), self.dtype)

    def actions(self, *shape: int) -> Tensor:
        """Normal, in float32; see `roomy`."""
        return self.roomy(self.generator.standard_normal(shape), torch.float32)

    def table(self, *shape: int, mean: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal; see `dense`."""
        return self.dense(mean + 0.5 * self.generator.standard_normal(shape), dtype)

    def kernel(self, inputs: int, outputs: int, *, outputs_first: bool = True) -> Tensor:
        """Such that a product is about as large as its input."""
        if outputs_first:
            values = inputs**-0.5 * self.generator.standard_normal((outputs, inputs))
            return self.dense(values, self.dtype).T
        return self(inputs, outputs, scale=inputs**-0.5)

    def normed(self, rows: int, width: int, parts: int) -> Rows:
        """For a product, which does not read x."""
        return Rows(self.empty(rows, width), self(rows, width), self.squares(rows, width, parts))

    def squares(self, rows: int, width: int, parts: int) -> Tensor:
        """Sums of squares, in parts of which every other is 0."""
        squares = width * self.generator.uniform(0.5, 4, (parts, rows))
        squares[1::2] = 0
        return self.dense(squares, torch.float32)

    def angles(self, batch: int, length: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines."""
        angle = 3 * self.generator.standard_normal((batch, length, head_dim // 2))
        return self.roomy(np.cos(angle), torch.float32), self.roomy(np.sin(angle), torch.float32)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """NaN."""
        return torch.full(shape, float("nan"), dtype=dtype or self.dtype, device=DEVICE)

    def dense(self, values: np.ndarray, dtype: torch.dtype) -> Tensor:
        """Without gaps, between NaN."""
        around = self.empty(values.size + 16, dtype=dtype)
        return around[8:-8].view(values.shape).copy_(torch.from_numpy(values))

    def roomy(self, values: np.ndarray, dtype: torch.dtype) -> Tensor:
        """A view, with NaN behind each row and after all of them."""
        *leading, rows, columns = values.shape
        around = self.empty(*leading, rows + 2, columns + 8, dtype=dtype)
        return around[..., :rows, :columns].copy_(torch.from_numpy(values))


def double(x: Tensor) -> np.ndarray:
    """In float64, in NumPy."""
    return x.to(torch.float64).cpu().numpy()


def factor(squares: Tensor, width: int) -> np.ndarray:
    """1 / rms of each row, [R, 1], in float64."""
    return 1 / np.sqrt(double(squares).sum(0)[:, None] / width + 1e-6)


def product(rows: Rows, kernel: Tensor, added: Tensor | None) -> np.ndarray:
    """The norm's, in float64."""
    result = double(rows.scaled) @ double(kernel) * factor(rows.squares, len(kernel))
    return result if added is None else result + double(added)


def gelu(x: np.ndarray) -> np.ndarray:
    """In float64."""
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def turned(x: np.ndarray, cos: Tensor, sin: Tensor) -> np.ndarray:
    """RoPE of [B, S, K, H] in float64."""
    first, second = np.split(x, 2, axis=-1)
    c, s = double(cos)[:, :, None], double(sin)[:, :, None]
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def calling(name: str, *arguments: Any) -> Call:
    """A module's function of these."""
    return lambda module: getattr(module, name)(*arguments)


def scale_rows(numbers: Numbers) -> Iterator[Case]:
    for rows, width in ((1, WIDTH), (3, WIDTH + 4), (51, 37), (MANY, WIDTH)):
        x, scale = numbers(rows, width, scale=3.0), numbers.table(width, mean=1.0)

        def call(module: Any, x: Tensor = x, scale: Tensor = scale) -> Rows:
            result = module.scale_rows(x, scale)
            return dataclasses.replace(result, x=result.x.clone())

        yield Case(f"{rows} x {width}", "add_scaled", call, double(x), scale)


def project(numbers: Numbers) -> Iterator[Case]:
    for launch, batch, length, groups, heads, head_dim, parts, place in (
        ("project", 1, 1, 1, HEADS, HEAD_DIM, 1, 3),
        ("project", 1, 3, 1, HEADS, HEAD_DIM, 5, 0),
        ("project", 1, 50, 1, HEADS, HEAD_DIM, 5, 3),
        ("project", 1, 51, 1, HEADS, HEAD_DIM, 1, 3),
        ("project", 2, 50, 1, HEADS, HEAD_DIM, 5, 3),
        ("project", 2, 3, 2, HEADS, 32, 1, 4),
        ("rotate", 2, 3, 2, HEADS, 20, 1, 4),  # not in tiles
        ("rotate", 2, 5, 2, 0, HEAD_DIM, 5, 3),
        ("rotate", 1, 50, 1, HEADS, HEAD_DIM, 5, 3),  # inputs first
        ("rotate", 1, MANY, 1, HEADS, HEAD_DIM, 1, 3),
    ):
        width = WIDTH + 4 if length == 3 else WIDTH
        outputs_first = (launch, length) != ("rotate", 50)
        kernel = numbers.kernel(width, (heads + 2 * groups) * head_dim, outputs_first=outputs_first)
        added = None if length == 51 else numbers.table(kernel.shape[1])
        rows = numbers.normed(batch * length, width, parts)
        cos, sin = numbers.angles(batch, length, head_dim)
        packed = product(rows, kernel, added).reshape(batch, length, -1, head_dim)
        turning, still = np.split(packed, [heads + groups], axis=2)
        name = f"{batch}x{length} x {width}, {heads} heads of {head_dim}, {groups} groups"
        shape = (batch, place + length + 2, groups, head_dim)
        call = projecting(numbers, shape, place, heads, rows, kernel, added, cos, sin)
        yield Case(name, launch, call, np.concatenate([turned(turning, cos, sin), still], axis=2))


def projecting(
    numbers: Numbers, shape: tuple[int, ...], place: int, heads: int, *arguments: Any
) -> Call:
    """Queries, keys and values; all NaN if anything was written beside them."""

    def call(module: Any) -> Tensor:
        batch, room, groups, head_dim = shape
        around = [numbers.empty(batch, room, groups + 1, head_dim + 8) for _ in range(2)]
        caches = [each[:, :, :groups, :head_dim] for each in around]
        query, *found = module.project(*arguments, *caches, place, heads)
        news = [cache[:, place : place + query.shape[1]] for cache in found]
        result = torch.cat([query, *news], dim=2)
        for cache, new in zip(around, news, strict=True):  # the host need not wait for it
            untouched = cache.isnan().sum() == cache.numel() - new.numel()
            result = torch.where(untouched, result, float("nan"))
        return result

    return call


def gated(numbers: Numbers) -> Iterator[Case]:
    sizes = [("gated", rows, WIDTH, MLP) for rows in FEW]
    sizes[1] = ("gated", 3, 37, MLP)
    sizes += [("gelu_product", 3, 40, 1034), ("gelu_product", MANY, WIDTH, MLP)]
    for place, (launch, rows, inputs, outputs) in enumerate(sizes):
        given = numbers.normed(rows, inputs, 1 if place % 2 else 5)
        kernel = numbers.kernel(inputs, 2 * outputs, outputs_first=outputs == MLP)
        added = None if rows == 51 else numbers.table(2 * outputs)
        gate, up = np.split(product(given, kernel, added), 2, axis=-1)
        call = calling("gated", given, kernel, added)
        yield Case(f"{rows} x {inputs} x {outputs}", launch, call, gelu(gate) * up)


def merge(numbers: Numbers) -> Iterator[Case]:
    # Inputs that 4 programs share, 2, and 1.
    sizes = [("merge", rows, MLP if FULL else 512) for rows in FEW]
    sizes += [("merge", 3, 258), ("merge", 3, 37)]
    sizes += [("add_scaled", 3, 36), ("add_scaled", MANY, WIDTH)]
    for launch, rows, inputs in sizes:
        x, residual = numbers(rows, inputs), numbers(rows, WIDTH)
        kernel = numbers.kernel(inputs, WIDTH, outputs_first=inputs != 36)
        gate = None if rows in (1, 51) else numbers.table(WIDTH)
        gate = gate if gate is None or rows == 3 else gate.to(numbers.dtype)
        scale = numbers.table(WIDTH, mean=1.0)
        added = double(x) @ double(kernel) * (1 if gate is None else double(gate))
        call = calling("merge", x, kernel, residual, gate, scale)
        yield Case(f"{rows} x {inputs}", launch, call, double(residual) + added, scale)


def attend(numbers: Numbers) -> Iterator[Case]:
    sizes = [(1, 1, 1), (1, 50, KEYS[0]), (1, 51, KEYS[1]), (2, 5, KEYS[2]), (2, 51, KEYS[1] - 7)]
    if numbers.dtype == torch.bfloat16:
        sizes.append((1, 16 * PROCESSORS // HEADS + 1, 33))  # which takes the larger tiles
    for batch, length, keys in sizes:
        query = numbers(batch, length, HEADS, HEAD_DIM, scale=2 * HEAD_DIM**-0.5)
        key, value = (numbers(batch, keys, HEAD_DIM)[:, :, None] for _ in range(2))
        visible = numbers.generator.random((batch, keys, 2)) < 0.6
        mask = torch.from_numpy(visible).to(DEVICE)[..., 0]
        mask[1:] = False  # of two samples the second has no key at all
        for name, given in (("all keys", None), ("masked", mask)):
            logits = np.einsum("bskh,bth->bskt", double(query), double(key[:, :, 0]))
            if given is not None:
                logits = np.where(given.cpu().numpy()[:, None, None], logits, MASKED_LOGIT)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            expected = np.einsum("bskt,bth->bskh", weights, double(value[:, :, 0]))
            call = calling("attend", query, key, value, given)
            expected = expected.reshape(batch, length, -1)
            yield Case(f"{batch}x{length} of {keys}, {name}", "attend", call, expected)
            if HEADS * HEAD_DIM % 32 == 0:
                call = unpacking(calling("attend", query, key, value, given, True), batch * length)
                of = expected.reshape(batch * length, -1)
                yield Case(f"{batch}x{length} of {keys}, {name}, packed", "attend", call, of)


def unpacking(call: Call, rows: int) -> Call:
    """The rows of what is packed, without the room behind them, which nobody writes."""
    return lambda module: kernels_plain.unpack(call(module), rows)


def embed_actions(numbers: Numbers) -> Iterator[Case]:
    for batch, horizon, actions, width in (
        (1, 50, ACTION_DIM, WIDTH),
        (2, 3, 5, 37),
        (1, 1, 1, 8),
    ):
        noisy = numbers.actions(batch, horizon, actions)
        kernel, bias = numbers.table(actions, width), numbers.table(width)
        scale = numbers.table(width, mean=1.0)
        expected = double(noisy).reshape(-1, actions) @ double(kernel) + double(bias)
        call = calling("embed_actions", noisy, kernel, bias, scale, numbers.dtype)
        yield Case(f"{batch}x{horizon} x {actions}", "embed_actions", call, expected, scale)


def euler_step(numbers: Numbers) -> Iterator[Case]:
    for batch, horizon, tokens, actions, width, parts in (
        (1, 50, 50, ACTION_DIM, WIDTH, 5),
        (1, 50, 51, ACTION_DIM, WIDTH, 1),  # of which the first is π0's state
        (2, 3, 4, 5, 300, 5),
        (1, 1, 1, 1, 8, 1),
    ):
        x, squares = numbers(batch * tokens, width), numbers.squares(batch * tokens, width, parts)
        rows = Rows(x, numbers.empty(*x.shape), squares)
        scale = numbers.table(width, mean=1.0)
        shift = None if horizon < tokens else numbers.table(width)
        kernel, bias = numbers.table(width, actions), numbers.table(actions)
        noisy = numbers.actions(batch, horizon, actions)
        normed = double(x) * factor(squares, width) * double(scale)
        normed = normed if shift is None else normed + double(shift)
        velocity = (normed @ double(kernel) + double(bias)).reshape(batch, tokens, -1)
        expected = double(noisy) - 0.1 * velocity[:, -horizon:]
        call = calling("euler_step", rows, scale, shift, kernel, bias, noisy, -0.1)
        yield Case(f"{batch}x{horizon} of {tokens} x {width}", "euler_step", call, expected)


FAMILIES = {
    family.__name__: family
    for family in (scale_rows, project, gated, merge, attend, embed_actions, euler_step)
}


def tensors(result: Tensor | Rows) -> dict[str, Tensor]:
    return {"x": result} if isinstance(result, Tensor) else vars(result)


def bits(result: Tensor | Rows) -> bytes:
    each = (x.contiguous().view(torch.uint8) for x in tensors(result).values())
    return b"".join(x.cpu().numpy().tobytes() for x in each)


def poisoned(call: Call, module: Any) -> Tensor | Rows:
    """The result, where memory that is not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return call(module)
    finally:
        torch.use_deterministic_algorithms(False)


def captured(call: Call) -> bytes:
    """The result of a CUDA graph's second replay."""
    graph = torch.cuda.CUDAGraph()
    call(kernels)
    with torch.cuda.graph(graph):
        results = [call(kernels) for _ in range(3)]
    graph.replay()
    for result in results:
        for x in tensors(result).values():
            x.fill_(float("nan"))
    graph.replay()
    (found,) = {bits(result) for result in results}
    return found


def error(found: Tensor, expected: np.ndarray) -> dict[str, float]:
    """The largest and the mean difference, over the largest value expected; infinite for NaN."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    difference = np.abs(double(found) - expected) / np.abs(expected).max()
    if not np.isfinite(difference).all():
        return {"largest": float("inf"), "mean": float("inf")}
    return {"largest": float(difference.max()), "mean": float(difference.mean())}


def errors(result: Tensor | Rows, case: Case) -> dict[str, dict[str, float]]:
    """Of each part of a result; what stands beside x is held against that as it was found."""
    if isinstance(result, Tensor):
        return {"x": error(result, case.expected)}
    assert case.scale is not None
    x, scaled = double(result.x), kernels_plain.unpack(result.scaled, len(result.x))
    return {
        "x": error(result.x, case.expected),
        "scaled": error(scaled, x * double(case.scale)),
        "squares": error(result.squares.sum(dim=0), np.square(x).sum(-1)),
    }


def found(family: str, dtype: str) -> Iterator[dict[str, Any]]:
    """What was found in each case of a family."""
    from pruner_torch import kernels_launch  # here, since it imports Triton

    for case in FAMILIES[family](Numbers(dtype)):
        launch = getattr(kernels_launch, case.launch)
        with mock.patch.object(kernels_launch, case.launch, wraps=launch) as launched:
            first = poisoned(case.call, kernels)
        plain = case.call(kernels_plain)
        kinds = [[x.dtype for x in tensors(result).values()] for result in (first, plain)]
        yield {
            "family": family,
            "case": case.name,
            "dtype": dtype,
            "launched": launched.call_count == 1,
            "dtypes": kinds[0] == kinds[1],
            "same": bits(first) == bits(poisoned(case.call, kernels)),
            "captured": not FULL or captured(case.call) == bits(first),
            "errors": errors(first, case),
            "plain": errors(plain, case),
        }


def tuned(dtype: str) -> Iterator[dict[str, Any]]:
    """All tiles that are tried for a layer: how far each is from the first, and who launches them.

    The one that is tried last is the fastest.
    """
    numbers = Numbers(dtype)
    rows, keys, head_dim = (50, KEYS[0], HEAD_DIM) if FULL else (5, 150, 32)
    inner = MLP if FULL else 512
    sizes = [(WIDTH, (HEADS + 2) * head_dim), (HEADS * head_dim, WIDTH), (WIDTH, 2 * inner)]
    sizes.append((inner, WIDTH))
    layers = []
    for _ in range(2):
        qkv, out, gate_up, down = (numbers.kernel(*size) for size in sizes)
        layers.append(ExpertLayer(None, qkv, out, None, gate_up, down))
    results: dict[tiles.Key, list[Any]] = {}

    def seconds(run: Callable[[], Any], device: torch.device) -> float:
        (*_, key) = (*tiles._products, *tiles._attention)
        results.setdefault(key, []).append(run())
        return 1 / len(results[key])

    with (
        mock.patch.object(kernels_autotune, "_seconds", seconds),
        mock.patch.object(tiles, "_products", {}),
        mock.patch.object(tiles, "_attention", {}),
    ):
        kernels_autotune.autotune(layers, rows, keys, head_dim)
        counts = {key: len(each) for key, each in results.items()}
        kernels_autotune.autotune(layers, rows, keys, head_dim)
        found = {"again": counts != {key: len(each) for key, each in results.items()}}
        for key, (first, *others) in results.items():
            if key[0] == "merge":  # its tiles are seen in what it leaves
                columns = tiles.product_tiles("merge", rows, *key[2:]).columns
                found["parts"] = len(others[-1][0].squares) == cdiv(WIDTH, columns)
            yield {
                "family": "tuned",
                "case": str(key),
                "dtype": dtype,
                "candidates": counts[key],
                "error": max(apart(each, first) for each in others),
                **found,
            }


def apart(found: list[Any], expected: list[Any]) -> float:
    """The largest error of the layers' results, held against those by other tiles."""
    largest = []
    for pair in zip(found, expected, strict=True):
        ours, theirs = (tensors(result) for result in pair)
        for name in ours:
            x, y = (
                each[name] if name != "squares" else each[name].sum(0) for each in (ours, theirs)
            )
            largest.append(error(x, double(y))["largest"])
    return max(largest)


def main() -> None:
    assert FULL or os.environ.get("TRITON_INTERPRET") == "1"
    rows = [row for family in FAMILIES for dtype in DTYPES for row in found(family, dtype)]
    rows += [row for dtype in DTYPES for row in tuned(dtype)]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

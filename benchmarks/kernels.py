"""The Triton kernels on a GPU, at the sizes of π0.5: are they right, and do they pay.

    python -m benchmarks.kernels --output results.json
    python -m benchmarks.kernels --autotune --rows 10

Each is held against float64, with NaN in all memory that it has not written, and timed in a CUDA
graph that goes through 18 layers' weights, so that none is in a cache: beside PyTorch's operations
eagerly and compiled, with kernels as they are stored and transposed, and with float8 weights. Last
comes a whole denoising step of the action expert. The floor is the bytes that must be moved, at the
speed of a device copy in the same run. A few minutes; needs PyTorch, Triton and NumPy alone.
"""

import argparse
import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.graph_timing import copy_speed, error, microseconds
from pruner_torch import kernels, kernels_plain, kernels_split, kernels_tiles

LAYERS, WIDTH, MLP, HEADS, HEAD_DIM = 18, 1024, 4096, 8, 256
PREFIX_WIDTH, PREFIX_MLP = 2048, 16384
DTYPE = torch.bfloat16
Call = Callable[[int], Any]  # of a layer


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to compute.

    Attributes:
        name: of the kernel, and its sizes.
        moved: bytes that are read and written at least once.
        calls: ways to compute it, given a layer, by name.
        expected: the first layer's result, from float64 inputs; None where it is not checked.
    """

    name: str
    moved: int
    calls: dict[str, Call]
    expected: Callable[[], Tensor] | None = None


def main() -> None:
    """Prints a table, and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Verbatim)
    parser.add_argument("--rows", type=int, default=50, help="tokens of a denoising step")
    parser.add_argument("--keys", type=int, nargs="+", default=[160, 292, 1018], help="and keys")
    parser.add_argument("--prefix", type=int, nargs="+", default=[110, 968], help="prefix tokens")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--autotune", action="store_true", help="try the other tiles first")
    parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    speed = copy_speed()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}, device copy {speed / 1e12:.2f} TB/s")
    layers = Layers(options.rows)
    if options.autotune:
        first = (weights[0] for weights in (layers.qkv, layers.out, layers.gate_up, layers.down))
        kernels.autotune(options.rows, *first, head_dim=HEAD_DIM)
        print(*kernels_tiles.tuned().items(), sep="\n")
    rows = []
    for case in cases(layers, options):
        if options.only in case.name:
            rows += list(measured(case, speed))
    if options.output is not None:
        settings = {key: str(value) for key, value in vars(options).items()}
        found = {"versions": versions, "bytes_per_second": speed, "options": settings}
        options.output.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")


class _Verbatim(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    """On the GPU."""
    return (scale * torch.randn(shape, device="cuda")).to(dtype)


def transposed(kernel: Tensor) -> Tensor:
    """The same numbers, columns first in memory."""
    return kernel.T.contiguous().T


class Layers:
    """The action expert's weights of all layers, tables of its norms, and its input."""

    def __init__(self, rows: int) -> None:
        outputs = (HEADS + 2) * HEAD_DIM
        self.x = normal(rows, WIDTH, scale=3.0)
        self.wide = normal(rows, MLP)
        self.attended = normal(rows, HEADS * HEAD_DIM)
        self.scale = 1 + normal(LAYERS, WIDTH, scale=0.3, dtype=torch.float32)
        self.shift = normal(LAYERS, WIDTH, scale=0.3, dtype=torch.float32)
        self.gate = normal(LAYERS, WIDTH)
        self.qkv = self._kernels(WIDTH, outputs)
        self.out = self._kernels(HEADS * HEAD_DIM, WIDTH)
        self.gate_up = self._kernels(WIDTH, 2 * MLP)
        self.down = self._kernels(MLP, WIDTH)
        angle = normal(1, rows, HEAD_DIM // 2, dtype=torch.float32)
        self.angle = (angle.cos(), angle.sin())

    def _kernels(self, inputs: int, outputs: int) -> list[Tensor]:
        return [normal(inputs, outputs, scale=inputs**-0.5) for _ in range(LAYERS)]

    def double(self) -> "Layers":
        """The input and the tables in float64."""
        found = copy.copy(self)
        for name in ("x", "scale", "shift", "gate"):
            setattr(found, name, getattr(self, name).double())
        found.angle = (self.angle[0].double(), self.angle[1].double())
        return found

    def norm(self, layer: int) -> tuple[Tensor, Tensor]:
        """Scale and shift."""
        return self.scale[layer], self.shift[layer]


def cases(layers: Layers, options: argparse.Namespace) -> Iterator[Case]:
    """All of them; library functions are compiled unless told otherwise."""
    compiled = None if options.no_compile else functools.partial(torch.compile, dynamic=False)
    yield from products(layers, compiled)
    for keys in options.keys:
        yield attention(options.rows, keys)
    for tokens in options.prefix:
        yield attention(tokens, tokens)
        yield from pointwise(tokens, compiled)
    yield from steps(layers, options.keys, compiled)


def ways(
    name: str,
    weights: list[Tensor] | None,
    call: Callable[..., Any],
    compiled: Callable[..., Any] | None,
) -> dict[str, Call]:
    """A function of `call(function, layer, weight, *kernel_scale)` in all ways there are."""
    fused, plain = getattr(kernels, name), getattr(kernels_plain, name)
    if weights is None:
        found = {"triton": functools.partial(call, fused), "eager": functools.partial(call, plain)}
        if compiled is not None:
            found["compiled"] = functools.partial(call, compiled(plain))
        return found
    columns_first = [transposed(weight) for weight in weights]
    small = [kernels.quantize(weight) for weight in weights]
    found = {
        "triton": lambda layer: call(fused, layer, weights[layer]),
        "triton, transposed": lambda layer: call(fused, layer, columns_first[layer]),
        "triton, float8": lambda layer: call(fused, layer, *small[layer]),
        "eager": lambda layer: call(plain, layer, weights[layer]),
        "eager, transposed": lambda layer: call(plain, layer, columns_first[layer]),
    }
    if compiled is not None:
        fast = compiled(plain)
        found["compiled"] = lambda layer: call(fast, layer, weights[layer])
    return found


def products(layers: Layers, compiled: Callable[..., Any] | None) -> Iterator[Case]:
    """Those of a denoising step; bytes are those of the kernels, all else stays in the cache."""
    x, wide, rows = layers.x, layers.wide, len(layers.x)

    def normed(function: Any, layer: int, *weight: Tensor) -> Tensor:
        return function(x, *layers.norm(layer), *weight)

    def residual(
        function: Any, layer: int, weight: Tensor, *scale: Tensor, inputs: Tensor
    ) -> Tensor:
        return function(inputs, weight, x, layers.gate[layer], *scale)

    for name, weights, call in (
        ("normed_linear", layers.qkv, normed),
        ("normed_gated", layers.gate_up, normed),
        ("linear_residual", layers.out, functools.partial(residual, inputs=layers.attended)),
        ("linear_residual", layers.down, functools.partial(residual, inputs=wide)),
    ):
        yield Case(
            f"{name} {rows} x {' x '.join(map(str, weights[0].shape))}",
            weights[0].nbytes,
            ways(name, weights, call, compiled),
            functools.partial(call, doubled(getattr(kernels_plain, name)), 0, weights[0]),
        )


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of all its tensors in float64."""

    def call(*arguments: Any) -> Any:
        wide = (each.double() if isinstance(each, Tensor) else each for each in arguments)
        return function(*wide)

    return call


def pointwise(tokens: int, compiled: Callable[..., Any] | None) -> Iterator[Case]:
    """Those of the prefix."""
    x = normal(tokens, PREFIX_WIDTH)
    scale = 1 + normal(PREFIX_WIDTH, scale=0.3, dtype=torch.float32)
    gate_up = normal(tokens, 2 * PREFIX_MLP)
    qkv = normal(1, tokens, (HEADS + 2) * HEAD_DIM)
    angle = normal(1, tokens, HEAD_DIM // 2, dtype=torch.float32)
    sizes = (HEADS, 1, 1)
    outputs = [torch.empty(1, tokens, n, HEAD_DIM, device="cuda", dtype=DTYPE) for n in sizes]

    def norm(function: Any, layer: int) -> Tensor:
        return function(x, scale, None)

    def gelu(function: Any, layer: int) -> Tensor:
        return function(gate_up)

    def rotate(function: Any, layer: int) -> Tensor:
        function(qkv, angle.cos(), angle.sin(), HEADS, *outputs)
        return torch.cat(outputs, dim=2) if layer < 0 else outputs[0]

    for name, call, moved in (
        ("rms_normalize", norm, 2 * x.nbytes),
        ("gelu_product", gelu, gate_up.nbytes * 3 // 2),
        ("rotate", rotate, 2 * qkv.nbytes),
    ):
        expected = functools.partial(call, doubled(getattr(kernels_plain, name)), 0)
        check = None if name == "rotate" else expected  # which the tests check
        yield Case(f"{name} {tokens}", moved, ways(name, None, call, compiled), check)


def attention(tokens: int, keys: int) -> Case:
    """Of one sample, without a mask; and with one where PyTorch needs it."""
    query = normal(1, tokens, HEADS, HEAD_DIM, scale=HEAD_DIM**-0.5)
    key, value = (normal(1, keys, 1, HEAD_DIM) for _ in range(2))
    mask = torch.rand(1, keys, device="cuda") < 0.9
    calls: dict[str, Call] = {
        "triton": lambda layer: kernels.attend(query, key, value, None),
        "triton, masked": lambda layer: kernels.attend(query, key, value, mask),
        "eager": lambda layer: kernels_plain.attend(query, key, value, None),
        "eager, masked": lambda layer: kernels_plain.attend(query, key, value, mask),
    }
    for rows, parts in ((16, 1), (16, 2), (16, 4), (16, 8), (32, 1), (32, 4), (64, 1)):
        tiles = kernels_tiles.AttentionTiles(rows, parts=parts)
        calls[f"triton, {rows} rows, {parts} parts"] = functools.partial(
            lambda layer, tiles: kernels_split.attend(query, key, value, None, tiles), tiles=tiles
        )
    for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        calls[backend.lower()] = functools.partial(_sdpa, backend, query, key, value)
    # The heads as rows of one product: one head, heads * tokens queries.
    rows = query.flatten(1, 2)[:, :, None]
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        calls[f"{backend.lower()}, heads as rows"] = functools.partial(
            _sdpa, backend, rows, key, value
        )
    moved = 2 * (query.nbytes + key.nbytes)
    return Case(
        f"attend {tokens} to {keys}",
        moved,
        calls,
        lambda: doubled(kernels_plain.attend)(query, key, value, None),
    )


def _sdpa(backend: str, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
    with sdpa_kernel([getattr(SDPBackend, backend)]):
        return kernels_plain.attend(query, key, value, None).flatten(1)


def steps(
    layers: Layers, all_keys: list[int], compiled: Callable[..., Any] | None
) -> Iterator[Case]:
    """The layers of a denoising step one after the other; its products' bytes."""
    weights = [layers.qkv, layers.out, layers.gate_up, layers.down]
    turned = [[transposed(each) for each in kernel] for kernel in weights]
    small = [[kernels.quantize(each) for each in kernel] for kernel in weights]
    moved = sum(each.nbytes for kernel in weights for each in kernel)
    for keys in all_keys:
        cache = normal(2, LAYERS, 1, keys, 1, HEAD_DIM)
        query = torch.empty(1, len(layers.x), HEADS, HEAD_DIM, device="cuda", dtype=DTYPE)
        run = functools.partial(step, layers=layers, cache=cache, query=query)
        stored = [[(each,) for each in kernel] for kernel in weights]
        columns_first = [[(each,) for each in kernel] for kernel in turned]
        calls: dict[str, Call] = {
            "triton": functools.partial(run, kernels, stored),
            "triton, transposed": functools.partial(run, kernels, columns_first),
            "triton, float8": functools.partial(run, kernels, small),
            "triton, transposed, overlapped": functools.partial(run, kernels, columns_first),
            "triton, float8, overlapped": functools.partial(run, kernels, small),
            "eager": functools.partial(run, kernels_plain, stored),
        }
        if compiled is not None and keys == all_keys[0]:
            calls["compiled"] = functools.partial(
                run, kernels_plain, stored, each=compiled(expert_layer)
            )
        wide = [[(each.double(),) for each in kernel] for kernel in weights]
        doubles = {"layers": layers.double(), "cache": cache.double(), "query": query.double()}
        expected = functools.partial(step, kernels_plain, wide, 0, **doubles)
        yield Case(f"step, {keys} keys", moved, calls, expected)


def step(
    module: Any,
    weights: list[list[tuple[Tensor, ...]]],
    layer: int,
    *,
    layers: Layers,
    cache: Tensor,
    query: Tensor,
    each: Callable[..., Tensor] | None = None,
) -> Tensor:
    """All layers of the action expert, over a prefix's keys and values."""
    x, each = layers.x, each or expert_layer
    for i, kernel in enumerate(zip(*weights, strict=True)):
        tables = (*layers.norm(i), layers.gate[i], *layers.angle)
        x = each(module, x, *kernel, tables, cache[0, i], cache[1, i], query)
    return x


def expert_layer(
    module: Any,
    x: Tensor,
    qkv: tuple[Tensor, ...],
    out: tuple[Tensor, ...],
    gate_up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
    tables: tuple[Tensor, ...],
    key: Tensor,
    value: Tensor,
    query: Tensor,
) -> Tensor:
    """Five launches."""
    scale, shift, gate, cos, sin = tables
    outputs = (query, key[:, -len(x) :], value[:, -len(x) :])
    module.normed_rotated(x[None], scale, shift, qkv[0], cos, sin, HEADS, *outputs, *qkv[1:])
    attended = module.attend(query, key, value, None)[0]
    x = module.linear_residual(attended, out[0], x, gate, *out[1:])
    wide = module.normed_gated(x, scale, shift, gate_up[0], *gate_up[1:])
    return module.linear_residual(wide, down[0], x, gate, *down[1:])


def measured(case: Case, speed: float) -> Iterator[dict[str, Any]]:
    """A row for each way to compute a case; printed as it is found."""
    print(f"\n{case.name}: {case.moved / 1e6:.1f} MB, floor {1e6 * case.moved / speed:.1f} µs")
    expected = None if case.expected is None else case.expected()
    for name, call in case.calls.items():
        moved = case.moved // 2 if "float8" in name else case.moved
        row = {"case": case.name, "way": name, "bytes": moved, "floor_us": 1e6 * moved / speed}
        try:
            kernels.set_overlap("overlapped" in name)
            if expected is not None and "masked" not in name:
                row["error"] = error(call, expected)
            row["us"] = microseconds(call, 1 if case.name.startswith("step") else LAYERS)
        except Exception as problem:  # a way that this GPU or version has not: the others go on
            row["failed"] = f"{type(problem).__name__}: {str(problem)[:200]}"
        finally:
            kernels.set_overlap(False)
        yield row
        print(line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    """Of the table."""
    if "failed" in row:
        return f"  {row['way']:34} {row['failed'].splitlines()[0]}"
    rate = row["bytes"] / row["us"] / 1e6
    off = f"error {row['error']:.1e}" if "error" in row else ""
    times = row["us"] / row["floor_us"]
    return f"  {row['way']:34} {row['us']:9.2f} µs {rate:6.2f} TB/s {times:6.2f} x floor  {off}"


if __name__ == "__main__":
    main()

"""The Triton kernels on a GPU, at the sizes of π0.5: are they right, and do they pay.

    python -m benchmarks.kernels --output results.json

Each function of `kernels` is held against float64, with NaN in all memory that it has not written,
and timed in a CUDA graph that goes through 18 layers' weights, so that none is in a cache: beside
PyTorch's operations eagerly and compiled, and beside its product alone, as a library computes it.
Of many rows the difference is what stands around the product. Last comes a whole denoising step.
The floor is the bytes that must be moved, at the speed of a device copy in the same run. A few
minutes; needs PyTorch, Triton and NumPy alone.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.graph_timing import copy_speed, error, microseconds
from pruner_torch import kernels, kernels_plain
from pruner_torch.kernels_plain import Rows

LAYERS, HEADS, HEAD_DIM, ACTION_DIM = 18, 8, 256, 32
WIDTH, MLP = 1024, 4096
PREFIX_WIDTH, PREFIX_MLP = 2048, 16384
DTYPE, DEVICE = torch.bfloat16, "cuda"
FUNCTIONS = ("scale_rows", "project", "gated", "merge", "attend", "embed_actions", "euler_step")


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to compute.

    Attributes:
        name: of the function, and its sizes.
        moved: bytes that are read and written at least once.
        function: of a module and what it has to work with; a tensor.
        data: that, a layer each.
        product: the library's of a layer, alone; None where there is none.
    """

    name: str
    moved: int
    function: Callable[[Any, Any], Tensor]
    data: list[Any]
    product: Callable[[Any], Tensor] | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """Weights of a layer, and inputs of its functions.

    Attributes:
        rows, attended, wide: inputs of the products.
        qkv, out, gate_up, down: kernels.
        qkv_added, gate_up_added: what the norms' shifts add; None for the prefix.
        gate, scale: of the residual, and of the norm that follows.
        cos, sin: of the rows' positions.
        query, key, value, mask: for the attention, of which the rows' keys are the last.
    """

    rows: Rows
    attended: Tensor
    wide: Tensor
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_added: Tensor | None
    gate_up_added: Tensor | None
    gate: Tensor | None
    scale: Tensor
    cos: Tensor
    sin: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor


@dataclasses.dataclass(frozen=True)
class Step:
    """All layers, and the maps from actions and to them."""

    layers: list[Layer]
    noisy: Tensor
    action_in: tuple[Tensor, Tensor]
    action_out: tuple[Tensor, Tensor]


def main() -> None:
    """Prints a table, and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Verbatim)
    parser.add_argument("--rows", type=int, default=50, help="tokens of a denoising step")
    parser.add_argument("--keys", type=int, nargs="+", default=[178, 306, 1018], help="and keys")
    parser.add_argument("--prefix", type=int, nargs="+", default=[128, 968], help="prefix tokens")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    speed = copy_speed()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}, device copy {speed / 1e12:.2f} TB/s")
    rows = []
    for case in cases(options):
        if options.only in case.name:
            rows += list(measured(case, speed, compile=not options.no_compile))
    if options.output is not None:
        settings = {key: str(value) for key, value in vars(options).items()}
        found = {"versions": versions, "bytes_per_second": speed, "options": settings}
        options.output.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")


class _Verbatim(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All of them."""
    layers = expert_layers(options.rows, options.keys[0])
    yield from products("step", layers)
    for keys in options.keys:
        yield attention([dataclasses.replace(layer, **random_keys(keys)) for layer in layers])
    for tokens in options.prefix:
        prefix = list(random_layers(tokens, tokens, PREFIX_WIDTH, PREFIX_MLP))
        yield scaling(prefix)
        yield from products("prefix", prefix)
        yield attention(prefix)
    for keys in options.keys:
        yield step([dataclasses.replace(layer, **random_keys(keys)) for layer in layers])


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype)


def table(*shape: int, mean: float = 0.0) -> Tensor:
    """Normal, in float32."""
    return mean + normal(*shape, scale=0.3, dtype=torch.float32)


def expert_layers(rows: int, keys: int) -> list[Layer]:
    """Of the action expert: outputs lie first in memory, and norms have shifts and gates."""
    found = []
    for layer in random_layers(rows, keys, WIDTH, MLP):
        names = ("qkv", "out", "gate_up", "down")
        weights = {name: getattr(layer, name).T.contiguous().T for name in names}
        added = {f"{name}_added": table(weights[name].shape[1]) for name in ("qkv", "gate_up")}
        parts = WIDTH // 32  # as `merge` leaves them
        squares = (layer.rows.squares / parts).repeat(parts, 1)
        given = dataclasses.replace(layer.rows, squares=squares)
        changed = {"rows": given, "gate": normal(WIDTH)} | weights | added
        found.append(dataclasses.replace(layer, **changed))
    return found


def random_layers(rows: int, keys: int, width: int, mlp: int) -> Iterator[Layer]:
    """Of the language model: inputs lie first in memory, and norms have scales alone."""
    heads = HEADS * HEAD_DIM
    for _ in range(LAYERS):
        scale, angle = table(width, mean=1.0), table(1, rows, HEAD_DIM // 2)
        yield Layer(
            rows=kernels_plain.scale_rows(normal(rows, width, scale=3.0), scale),
            attended=normal(rows, heads),
            wide=normal(rows, mlp),
            qkv=normal(width, heads + 2 * HEAD_DIM, scale=width**-0.5),
            out=normal(heads, width, scale=heads**-0.5),
            gate_up=normal(width, 2 * mlp, scale=width**-0.5),
            down=normal(mlp, width, scale=mlp**-0.5),
            qkv_added=None,
            gate_up_added=None,
            gate=None,
            scale=scale,
            cos=angle.cos(),
            sin=angle.sin(),
            query=normal(1, rows, HEADS, HEAD_DIM, scale=HEAD_DIM**-0.5),
            **random_keys(keys),
        )


def random_keys(keys: int) -> dict[str, Tensor]:
    """So many, nearly all of which are seen."""
    key, value = (normal(1, keys, 1, HEAD_DIM) for _ in range(2))
    return {"key": key, "value": value, "mask": torch.rand(1, keys, device=DEVICE) < 0.9}


def project(module: Any, layer: Layer) -> Tensor:
    return projected(module, layer, layer.rows)[0]


def projected(module: Any, layer: Layer, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    angles, place = (layer.cos, layer.sin), layer.key.shape[1] - layer.cos.shape[1]
    cache = (layer.key, layer.value)
    return module.project(rows, layer.qkv, layer.qkv_added, *angles, *cache, place, HEADS)


def gated(module: Any, layer: Layer) -> Tensor:
    return module.gated(layer.rows, layer.gate_up, layer.gate_up_added)


def merge_attended(module: Any, layer: Layer) -> Tensor:
    return module.merge(layer.attended, layer.out, layer.rows.x, layer.gate, layer.scale).x


def merge_wide(module: Any, layer: Layer) -> Tensor:
    return module.merge(layer.wide, layer.down, layer.rows.x, layer.gate, layer.scale).x


def products(name: str, layers: list[Layer]) -> Iterator[Case]:
    """With what stands around them."""
    rows, width = layers[0].rows.x.shape
    for function, given, kernel in (
        (project, attrgetter("rows.scaled"), attrgetter("qkv")),
        (gated, attrgetter("rows.scaled"), attrgetter("gate_up")),
        (merge_attended, attrgetter("attended"), attrgetter("out")),
        (merge_wide, attrgetter("wide"), attrgetter("down")),
    ):
        weights = kernel(layers[0])
        inputs, outputs = weights.shape
        # What is merged is read, and written twice; of gate and up their product is written.
        results = {gated: outputs // 2, project: outputs}.get(function, 3 * width)
        yield Case(
            f"{name}: {function.__name__} {rows} x {inputs} x {outputs}",
            weights.nbytes + rows * (inputs + results) * weights.itemsize,
            function,
            layers,
            lambda layer, given=given, kernel=kernel: given(layer) @ kernel(layer),
        )


def scaling(layers: list[Layer]) -> Case:
    """The first norm's."""
    x = layers[0].rows.x
    name = f"prefix: scale_rows {len(x)} x {x.shape[1]}"
    return Case(name, 2 * x.nbytes, scaled, layers)


def scaled(module: Any, layer: Layer) -> Tensor:
    return module.scale_rows(layer.rows.x, layer.scale).scaled


def attention(layers: list[Layer]) -> Case:
    query, key = layers[0].query, layers[0].key
    name = f"attend {query.shape[1]} to {key.shape[1]}"
    return Case(name, 2 * (query.nbytes + key.nbytes), attend, layers)


def attend(module: Any, layer: Layer) -> Tensor:
    return module.attend(layer.query, layer.key, layer.value, layer.mask)


def step(layers: list[Layer]) -> Case:
    """Of denoising; its products' bytes."""
    rows, keys = len(layers[0].rows.x), layers[0].key.shape[1]
    maps = {
        "action_in": (table(ACTION_DIM, WIDTH), table(WIDTH)),
        "action_out": (table(WIDTH, ACTION_DIM), table(ACTION_DIM)),
    }
    moved = sum(x.nbytes for each in layers for x in (each.qkv, each.out, each.gate_up, each.down))
    data = Step(layers, table(1, rows, ACTION_DIM), **maps)
    return Case(f"step: all, {keys} keys", moved, denoise, [data])


def denoise(module: Any, step: Step) -> Tensor:
    """A step of the action expert, over a prefix's keys and values."""
    scale, dtype = step.layers[0].scale, step.layers[0].rows.x.dtype
    rows = module.embed_actions(step.noisy, *step.action_in, scale, dtype)
    each = COMPILED.layer if module is COMPILED else functools.partial(expert_layer, module)
    for layer in step.layers:
        rows = each(layer, rows)
    return module.euler_step(rows, scale, scale, *step.action_out, step.noisy, -0.1)


def expert_layer(module: Any, layer: Layer, rows: Rows) -> Rows:
    """Five launches."""
    query, key, value = projected(module, layer, rows)
    attended = module.attend(query, key, value, layer.mask).flatten(0, 1)
    rows = module.merge(attended, layer.out, rows.x, layer.gate, layer.scale)
    wide = module.gated(rows, layer.gate_up, layer.gate_up_added)
    return module.merge(wide, layer.down, rows.x, layer.gate, layer.scale)


def plain_layer(layer: Layer, rows: Rows) -> Rows:
    return expert_layer(kernels_plain, layer, rows)


COMPILED = SimpleNamespace(
    layer=torch.compile(plain_layer, dynamic=False),
    **{name: torch.compile(getattr(kernels_plain, name), dynamic=False) for name in FUNCTIONS},
)


def ways(case: Case) -> dict[str, Callable[[int], Tensor]]:
    """To compute a case, given a layer."""
    modules = {
        "triton": kernels,
        "eager": kernels_plain,
        "compiled": COMPILED,
    }
    return {
        name: lambda layer, module=module: case.function(module, case.data[layer])
        for name, module in modules.items()
    }


def measured(case: Case, speed: float, *, compile: bool) -> Iterator[dict[str, Any]]:
    """A row for each way to compute a case; printed as it is found."""
    floor, product = 1e6 * case.moved / speed, case.product
    print(f"\n{case.name}: {case.moved / 1e6:.1f} MB, floor {floor:.1f} µs")
    expected = case.function(kernels_plain, doubled(case.data[0]))
    torch.compiler.reset()  # which gives up after some sizes
    calls = ways(case)
    if not compile:
        del calls["compiled"]
    if product is not None:
        calls["product alone"] = lambda layer: product(case.data[layer])
    for way, call in calls.items():
        row = {"case": case.name, "way": way, "bytes": case.moved, "floor_us": floor}
        try:
            if way != "product alone":
                row["error"] = error(call, expected)
            row["us"] = microseconds(call, len(case.data))
        except Exception as problem:  # a way that this GPU or version has not: the others go on
            row["failed"] = f"{type(problem).__name__}: {str(problem)[:200]}"
        yield row
        print(line(row), flush=True)


def doubled(value: Any) -> Any:
    """The same in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(map(doubled, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{key: doubled(x) for key, x in vars(value).items()})
    return value


def line(row: dict[str, Any]) -> str:
    """Of the table."""
    if "failed" in row:
        return f"  {row['way']:20} {row['failed'].splitlines()[0]}"
    rate = row["bytes"] / row["us"] / 1e6
    off = f"error {row['error']:.1e}" if "error" in row else ""
    times = row["us"] / row["floor_us"]
    return f"  {row['way']:20} {row['us']:9.2f} µs {rate:6.2f} TB/s {times:6.2f} x floor  {off}"


if __name__ == "__main__":
    main()

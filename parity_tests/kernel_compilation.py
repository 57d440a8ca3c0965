"""What the compiler makes of the kernels at the sizes of π0.5, for a GPU that need not be here.

    python -m parity_tests.kernel_compilation 90

prints JSON: registers and stack of a thread, shared memory of a program and how much it may have,
products on tensor cores. Triton compiles without a driver once it is told the target; nothing is
launched.
"""

import functools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pruner_torch import kernels_float8, kernels_launch
from pruner_torch.kernels_plain import Rows

# Shared memory that a program may have, by compute capability: A100; RTX 4090; H100 and H200.
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
DUMPER = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Driver:
    """As much of a GPU's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A size alone, of which a library's product takes no time."""
    return torch.empty(shape, dtype=dtype, device="meta")


def table(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.float32)


def step(batch: int) -> dict[str, Callable[[], Any]]:
    """Of a denoising step; squares are in as many parts as `merge` leaves."""
    width, mlp, heads, head_dim, horizon, actions, room = 1024, 4096, 8, 256, 50, 32, 1018
    x, scale = empty(batch * horizon, width), table(width)
    rows = Rows(x, x, table(width // 32, len(x)))
    angle = table(batch, horizon, head_dim // 2)
    key, value = empty(2, batch, room, 1, head_dim)
    query = empty(batch, horizon, heads, head_dim)
    mask = empty(batch, room, dtype=torch.bool)
    qkv, out = empty((heads + 2) * head_dim, width).T, empty(width, heads * head_dim).T
    gate_up, down = empty(2 * mlp, width).T, empty(width, mlp).T
    project = (rows, qkv, table(qkv.shape[1]), angle, angle, key, value, room - horizon, heads)
    noisy = table(batch, horizon, actions)
    embed = (noisy.flatten(0, 1), table(actions, width), scale, scale, x.dtype)
    euler = (rows, scale, scale, table(width, actions), table(actions), noisy, -0.1)
    return {
        "project": lambda: kernels_launch.project(*project),
        "attend": lambda: kernels_launch.attend(query, key, value, mask),
        "merge, out": lambda: kernels_launch.merge(empty(len(x), len(out)), out, x, scale, scale),
        "gated": lambda: kernels_launch.gated(rows, gate_up, table(2 * mlp)),
        "merge, down": lambda: kernels_launch.merge(empty(len(x), mlp), down, x, scale, scale),
        "embed_actions": lambda: kernels_launch.embed_actions(*embed),
        "euler_step": lambda: kernels_launch.euler_step(*euler),
    }


def prefix() -> dict[str, Callable[[], Any]]:
    """Of the prefix: what stands around its products, and its attention."""
    width, mlp, heads, head_dim, length = 2048, 16384, 8, 256, 968
    x, scale, angle = empty(length, width), table(width), table(1, length, head_dim // 2)
    rows = Rows(x, x, table(1, length))
    key, value = empty(2, 1, length, 1, head_dim)
    query = empty(1, length, heads, head_dim)
    qkv, gate_up = empty(width, (heads + 2) * head_dim), empty(width, 2 * mlp)
    project = (rows, qkv, None, angle, angle, key, value, 0, heads)
    return {
        "scale_rows": lambda: kernels_launch.add_scaled(x, None, None, scale),
        "add_scaled": lambda: kernels_launch.add_scaled(x, x, None, scale),
        "rotate": lambda: kernels_launch.rotate(*project),
        "gelu_product": lambda: kernels_launch.gelu_product(rows, gate_up, None),
        "attend, prefix": lambda: kernels_launch.attend(query, key, value, None),
    }


def float8() -> dict[str, Callable[[], Any]]:
    """Of products in float8, which GPUs have from Ada on."""
    inputs = {width: empty(968, width) for width in (2048, 16384)}
    return {
        f"quantize_rows, {width}": functools.partial(kernels_float8.quantize_rows, x)
        for width, x in inputs.items()
    }


def launches(capability: int) -> dict[str, Callable[[], Any]]:
    """All of them; of a step for one sample and for two, whose rows are more than 64."""
    two = {f"{name}, 2 samples": launch for name, launch in step(2).items()}
    return step(1) | two | prefix() | (float8() if capability >= 89 else {})


def compiled(capability: int) -> Iterator[dict[str, Any]]:
    """A row a launch."""
    target: Any = Driver(capability)
    driver.set_active(target)
    run, last = JITFunction.run, []

    def only_compile(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        last.append(run(self, *arguments, grid=grid, warmup=True, **options))
        return last[-1]

    shared = SHARED[capability]
    limited = mock.patch.object(kernels_launch, "shared_memory", return_value=shared)
    with limited, mock.patch.object(JITFunction, "run", only_compile):
        for name, launch in launches(capability).items():
            launch()
            yield {"launch": name} | usage(last[-1])


def usage(kernel: Any) -> dict[str, int]:
    """Registers and stack of a thread, shared memory of a program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(DUMPER), "-res-usage", file.name]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers, stack), *_ = re.findall(r"REG:(\d+) STACK:(\d+)", found)
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
        "limit": SHARED[kernel.metadata.target.arch],
        "products": len(re.findall(r"wgmma\.mma_async|mma\.sync", kernel.asm["ptx"])),
    }


def main() -> None:
    print(json.dumps(list(compiled(int(sys.argv[1])))))


if __name__ == "__main__":
    main()

"""What the compiler makes of the kernels at the sizes of π0.5, for a GPU that need not be here.

    python -m parity_tests.kernel_compilation 90

prints JSON: registers and stack of a thread, shared memory of a program and how much it may have,
products on tensor cores. Triton compiles without a driver once it is told the target; nothing is
launched.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pruner_torch import kernels_pointwise, kernels_rows, kernels_split, kernels_tiles

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


def launches() -> dict[str, Callable[[], Any]]:
    """Of a denoising step and of the prefix."""
    rows, table = zeros(50, 1024), zeros(2560, dtype=torch.float32)
    norm = (table[:1024], table[:1024])
    angle = zeros(1, 50, 128, dtype=torch.float32)
    cache = zeros(2, 1, 1018, 1, 256)
    heads = (zeros(1, 50, 8, 256), cache[0, :, -50:], cache[1, :, -50:])
    mask = torch.ones(1, 1018, dtype=torch.bool)
    found: dict[str, Callable[[], Any]] = {
        "rms_normalize": lambda: kernels_pointwise.rms_normalize(rows, *norm),
        "gelu_product": lambda: kernels_pointwise.gelu_product(zeros(968, 32768)),
        "rotate": lambda: kernels_pointwise.rotate(zeros(1, 50, 2560), angle, angle, 8, *heads),
        "attend": lambda: kernels_split.attend(heads[0], cache[0], cache[1], mask),
        "attend, prefix": lambda: kernels_split.attend(
            zeros(1, 968, 8, 256), cache[0, :, :968], cache[1, :, :968], None
        ),
    }
    for name, kernel, scale in (
        ("", lambda *shape: zeros(*shape), None),
        (", transposed", lambda *shape: zeros(*shape[::-1]).T, None),
        (", float8", lambda *shape: zeros(*shape[::-1]).to(torch.float8_e4m3fn).T, table),
    ):
        found |= {
            f"normed_linear{name}": lambda k=kernel, s=scale: kernels_rows.normed_linear(
                rows, *norm, k(1024, 2560), s
            ),
            f"normed_rotated{name}": lambda k=kernel, s=scale: kernels_rows.normed_rotated(
                rows, *norm, k(1024, 2560), angle, angle, 8, *heads, s
            ),
            f"normed_gated{name}": lambda k=kernel, s=scale: kernels_rows.normed_gated(
                rows, *norm, k(1024, 8192), s
            ),
            f"linear_residual{name}": lambda k=kernel, s=scale: kernels_split.linear_residual(
                zeros(50, 4096), k(4096, 1024), rows, rows[0], s
            ),
        }
    return found


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def compiled(capability: int) -> Iterator[dict[str, Any]]:
    """A row a launch; launches overlap where they can."""
    driver.set_active(Driver(capability))
    kernels_tiles.shared_memory = lambda device: SHARED[capability]
    kernels_pointwise.set_overlap(capability >= 90)
    run, last = JITFunction.run, []

    def only_compile(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        last.append(run(self, *arguments, grid=grid, warmup=True, **options))
        return last[-1]

    JITFunction.run = only_compile
    try:
        for name, launch in launches().items():
            if capability < 89 and "float8" in name:
                continue
            launch()
            yield {"launch": name} | usage(last[-1])
    finally:
        JITFunction.run = run
        kernels_pointwise.set_overlap(False)


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

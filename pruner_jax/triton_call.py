"""Triton kernels in a JAX program: written once, in Triton, and launched by either framework.

XLA takes PTX in a custom call of its own and launches it as it does the kernels it writes, in CUDA
graphs too. Triton compiles a kernel when a program that calls it is lowered.
"""

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array, Shaped

TARGET = "__gpu$xla.gpu.ptx"
LEAST_CAPABILITY = 80  # A100
ALIGNMENT = 16  # bytes; XLA's buffers have 128, a program's arguments at least 16
# Where Triton's name is not a letter and the bits.
TYPES = {"bool": "i1", "bfloat16": "bf16", "float8_e4m3fn": "fp8e4nv", "float8_e5m2": "fp8e5"}

Constant = tuple[str, str, Any]  # name, repr (1, 1.0 and True are equal) and value
Output = tuple[str, tuple[int, ...], np.dtype]  # name, shape and dtype


def capability() -> int:
    """Compute capability of the default device: 90 is 9.0, and 0 that it is no GPU of NVIDIA's."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return 0
    major, minor = str(device.compute_capability).split(".")
    return 10 * int(major) + int(minor)


@functools.cache
def available() -> bool:
    """Whether programs for the default device may call Triton kernels."""
    return importlib.util.find_spec("triton") is not None and capability() >= LEAST_CAPABILITY


def triton_call(
    kernel: Any,
    arguments: Mapping[str, Any],
    *,
    grid: Sequence[int],
    aliases: Mapping[str, Shaped[Array, "..."]] | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
) -> tuple[Shaped[Array, "..."], ...]:
    """Launches a kernel, in a function that `jax.jit` compiles for CUDA.

    Args:
        kernel: a `triton.jit` function. It may write to outputs only.
        arguments: by the name of a kernel's parameter. An array is an input, and a
            `jax.ShapeDtypeStruct` an output; the kernel gets a pointer to either, row-major and
            aligned to 16 bytes. All else is a compile-time constant, as if it were annotated so.
        grid: programs on each of at most three axes.
        aliases: the other parameters. Each is an output that starts as the array given here and is
            written over it, in place where the array is not used again; else XLA copies it.
        num_warps: of a program.
        num_stages: of the loops that Triton pipelines.

    Returns:
        The outputs, those of `aliases` too, in the order of the kernel's parameters.

    Raises:
        ValueError: `arguments` and `aliases` are not the kernel's parameters, each once; or, on
            lowering, that the kernel needs scratch memory, which a call has none of.
    """
    names, aliases = list(kernel.arg_names), dict(aliases or {})
    if sorted([*arguments, *aliases]) != sorted(names):
        raise ValueError(f"expected an argument each for {names}, got {[*arguments, *aliases]}")
    inputs = {name: value for name, value in arguments.items() if _is_array(value)}
    specs = {
        name: value for name, value in arguments.items() if isinstance(value, jax.ShapeDtypeStruct)
    } | aliases
    constants = {
        name: value for name, value in arguments.items() if name not in inputs.keys() | specs.keys()
    }
    found = _launch.bind(
        *map(jnp.asarray, inputs.values()),
        *map(jnp.asarray, aliases.values()),
        kernel=kernel,
        names=(*inputs, *aliases),
        outputs=tuple(
            (name, tuple(specs[name].shape), np.dtype(specs[name].dtype))
            for name in names
            if name in specs
        ),
        constants=tuple((name, repr(value), value) for name, value in constants.items()),
        grid=(*map(int, grid), 1, 1)[:3],
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return tuple(found)


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel as XLA launches it.

    Attributes:
        name: of its entry.
        ptx: its text.
        threads: of a program.
        shared: bytes of shared memory of a program.
        pointers: its parameters, those that Triton appends too.
    """

    name: str
    ptx: str
    threads: int
    shared: int
    pointers: int


@functools.cache
def compiled(
    kernel: Any,
    pointers: tuple[tuple[str, str], ...],
    constants: tuple[Constant, ...],
    capability: int,
    num_warps: int,
    num_stages: int,
) -> Compiled:
    """Compiles a kernel, once a process.

    Args:
        kernel: a `triton.jit` function.
        pointers: names of parameters and their types, such as ("x_ptr", "*bf16").
        constants: the other parameters.
        capability: of the device, such as 90.
        num_warps: of a program.
        num_stages: of the loops that Triton pipelines.

    Raises:
        ValueError: it needs scratch memory.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict(pointers)
    place = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={place[name]: value for name, _, value in constants},
        attrs={place[name]: [["tt.divisibility", ALIGNMENT]] for name in types},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    binary: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    metadata, ptx = binary.metadata, binary.asm["ptx"]
    scratch = metadata.global_scratch_size + metadata.profile_scratch_size
    if scratch:
        raise ValueError(f"expected {metadata.name} to need no scratch memory, got {scratch} bytes")
    entry = re.search(rf"\.entry\s+{re.escape(metadata.name)}\s*\((.*?)\)", ptx, re.DOTALL)
    assert entry, metadata.name
    return Compiled(
        name=metadata.name,
        ptx=ptx,
        threads=32 * metadata.num_warps,
        shared=metadata.shared,
        pointers=entry[1].count(".param"),
    )


def type_name(dtype: np.dtype) -> str:
    """Triton's name of a pointer to a dtype: "*bf16"."""
    letter = {"f": "fp", "i": "i", "u": "u"}.get(dtype.kind, "")
    return "*" + TYPES.get(dtype.name, f"{letter}{8 * dtype.itemsize}")


_launch = Primitive("triton_call")
_launch.multiple_results = True


@_launch.def_abstract_eval
def _shapes(*operands: Any, outputs: tuple[Output, ...], **_: Any) -> list[Any]:
    return [ShapedArray(shape, dtype) for _, shape, dtype in outputs]


def _custom_call(
    *operands: Shaped[Array, "..."],
    kernel: Any,
    names: tuple[str, ...],
    outputs: tuple[Output, ...],
    constants: tuple[Constant, ...],
    grid: tuple[int, int, int],
    num_warps: int,
    num_stages: int,
) -> Sequence[Shaped[Array, "..."]]:
    """What a program has in the call's place, once it is lowered.

    XLA puts results where `output_indices` says and operands, in their order, where there is room.
    An aliased operand is in its result's place already. As an operand it comes after all that the
    kernel reads, where Triton's own pointers are: to scratch memory, of which there is none.
    """
    given = dict(zip(names, operands, strict=True))
    specs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in outputs}
    pointers = [name for name in kernel.arg_names if name in given or name in specs]
    types = tuple((name, type_name((given | specs)[name].dtype)) for name in pointers)
    binary = compiled(kernel, types, constants, capability(), num_warps, num_stages)

    read = [name for name in pointers if name not in specs]
    written = [name for name in specs if name in given]
    unread = [np.zeros((), np.uint8)] * (binary.pointers - len(pointers) - len(written))
    places = {name: place for place, name in enumerate(specs)}
    call = jax.ffi.ffi_call(
        TARGET,
        list(specs.values()),
        input_output_aliases={
            len(read) + index: places[name] for index, name in enumerate(written)
        },
    )
    # As XLA's `KernelCall::Parse` reads them (xla/service/gpu/kernel_call.cc).
    numbers = dict(zip(("grid_x", "grid_y", "grid_z"), grid, strict=True))
    numbers |= {"block_x": binary.threads, "block_y": 1, "block_z": 1}
    numbers["shared_mem_bytes"] = binary.shared
    return call(
        *(given[name] for name in read + written),
        *unread,
        name=binary.name,
        kernel_type="ptx",
        kernel_data=binary.ptx,
        output_indices=tuple(np.int32(pointers.index(name)) for name in specs),
        **{name: np.int32(number) for name, number in numbers.items()},
    )


mlir.register_lowering(
    _launch, mlir.lower_fun(_custom_call, multiple_results=True), platform="cuda"
)

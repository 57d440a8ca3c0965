"""Products of few rows on Hopper: where `few_rows.cu` applies, its launches, its compilation.

NVRTC compiles a launch for its sizes, in a third of a second; PyTorch's CUDA wheels bring it, and
`cuda-bindings`, through which it is reached.

Dimension letters: R rows, D width, N outputs, F inputs of a merge, B batch, H head_dim.
"""

import dataclasses
import functools
import importlib
import logging
import struct
from pathlib import Path
from typing import Any

from pruner_kernels.tiles import HOPPER, cdiv

CAPABILITY = (9, 0)  # Hopper's, whose instructions later GPUs do not have
MAX_ROWS = 64
MAX_PARTS = 16  # of the sums of squares
MAX_KEYS = 1024  # of attention: a block of a cluster has a warp for 16
MAX_ACTIONS = 32  # numbers of an action: a thread has a weight of each in registers
QUERIES = 16  # (token, head) pairs of a tile
CHUNK = 128  # inputs that arrive together
BLOCKS = 4  # of a cluster

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel of `few_rows.cu`, for its sizes.

    Attributes:
        kernel: its name, and the arguments of its template; its parameters are pointers.
        rows: R.
        grid: blocks that are launched, on three axes.
        shared: bytes of shared memory, of a block.
        threads: of a block.
    """

    kernel: str
    rows: int
    grid: tuple[int, int, int]
    shared: int
    threads: int = 384


def applies(
    rows: int, width: int, mlp: int, heads: int, groups: int, head_dim: int, bits: int = 16
) -> bool:
    """Whether all products of an expert's layer are computed here; its attention has one kv head.

    Args:
        rows: tokens of all samples.
        width: of the residual stream.
        mlp: F of the gated MLP.
        heads: of queries.
        groups: heads of keys.
        head_dim: of all heads.
        bits: of an element.
    """
    return (
        (bits, groups) == (16, 1)
        and 0 < rows <= MAX_ROWS
        and width in range(CHUNK, 64 * MAX_PARTS + 1, CHUNK)
        and mlp in range(BLOCKS * CHUNK, 4096 + 1, BLOCKS * CHUNK)
        and heads * head_dim in range(BLOCKS * CHUNK, 4096 + 1, BLOCKS * CHUNK)
        and head_dim % 64 == 0
    )


def packed_shape(rows: int, width: int) -> tuple[int, int, int, int]:
    """Of packed rows, [D / 32, 4, R up to a multiple of 8, 8]; `few_rows.cu` says how they lie."""
    return width // 32, 4, 8 * cdiv(rows, 8), 8


def attends(keys: int, head_dim: int) -> bool:
    """Whether `attend` applies, to whose queries `project` then gives its layout."""
    return 0 < keys <= MAX_KEYS and head_dim == 256


def steps(actions: int) -> bool:
    """Whether `embed_actions` and `euler_step` apply to actions of so many numbers."""
    return actions in (8, 16, MAX_ACTIONS)


def queries_shape(batch: int, length: int, heads: int, head_dim: int) -> tuple[int, ...]:
    """Of packed queries: [B, tiles, H / 32, 4, 16, 8], of a sample's (token, head) pairs."""
    return batch, cdiv(length * heads, QUERIES), head_dim // 32, 4, QUERIES, 8


def project(
    rows: int,
    width: int,
    parts: int,
    heads: int,
    head_dim: int,
    length: int,
    room: int,
    place: int,
    packed: bool,
) -> Launch:
    """`rows.project`, of packed rows.

    Args:
        rows: R.
        width: D.
        parts: of the sums of squares.
        heads: of queries; there is one of keys, and one of values.
        head_dim: of each.
        length: tokens of a sample.
        room: keys of a sample in memory.
        place: of a sample's first token among them.
        packed: whether queries are, for `attend`.
    """
    sizes = f"{width}, {parts}, {heads}, {head_dim}, {length}, {room}, {place}, {int(packed)}"
    turns = 2 * 8 * cdiv(rows, 8) * 36 * 4
    shared = _normed(rows, width, parts) + 2 * 32 * 4 + turns + _exchange(rows)
    grid = (heads + 2) * head_dim // 64, 1, 1
    return Launch(f"project<{sizes}>", rows, grid, shared)


def gated(rows: int, width: int, parts: int, places: int) -> Launch:
    """`rows.gated`, of packed rows to packed rows; `places` are half of the kernel's outputs."""
    shared = _normed(rows, width, parts) + 2 * 32 * 4 + _exchange(rows)
    grid = places // 32, 1, 1
    return Launch(f"gated<{width}, {parts}, {places}>", rows, grid, shared)


def merge(rows: int, inputs: int, width: int) -> Launch:
    """`rows.merge`, of packed rows; what it scales is packed, and its squares in D / 64 parts."""
    tiles = cdiv(cdiv(rows, 8), BLOCKS)
    shared = _aligned(_incoming(rows, inputs // BLOCKS)) + BLOCKS * 4 * tiles * 32 * 16
    shared += _exchange(rows) + 64 * 4 + 4 * 8 * tiles * 4 + 64 * 2 + 8 * tiles * 72 * 2 + 8
    grid = BLOCKS * (width // 64), 1, 1
    return Launch(f"merge<{inputs}, {width}>", rows, grid, _aligned(shared))


def attend(
    batch: int, length: int, heads: int, head_dim: int, keys: int, room: int, masked: bool
) -> Launch:
    """`attention.attend`, of packed queries to packed rows.

    Args:
        batch: samples.
        length: tokens of each.
        heads: of queries; there is one of keys.
        head_dim: of each.
        keys: that are attended to; the last `length` are of these tokens.
        room: keys of a sample in memory.
        masked: whether a mask [B, keys] says which.
    """
    sharing = _sharing(keys)
    parts = cdiv(cdiv(keys, 16), sharing)
    warps = 4 * cdiv(parts, 4)
    sizes = f"{heads}, {head_dim}, {length}, {keys}, {room}, {int(masked)}, {sharing}"
    shared = 2 * (QUERIES * head_dim + 16 * parts * (head_dim + 8) + QUERIES * (16 * parts + 8))
    shared += 64 * head_dim + sharing * QUERIES * 16 + 2 * 4 * warps * QUERIES + 2 * 8
    grid = sharing * cdiv(length * heads, QUERIES), batch, 1
    return Launch(f"attend<{sizes}>", batch * length, grid, shared, 32 * warps)


def _sharing(keys: int) -> int:
    """Blocks that share a tile's keys: few, so that the next launch finds room beside them."""
    return 2 if keys <= 256 else BLOCKS


def embed_actions(rows: int, actions: int, width: int) -> Launch:
    """`rows.embed_actions`, what is scaled is packed."""
    return Launch(f"embed_actions<{actions}, {width}>", rows, (rows, 1, 1), 0, width // 2)


def euler_step(rows: int, width: int, parts: int, actions: int, step: float) -> Launch:
    """`rows.euler_step`, of as many actions as rows; what is new may be written over `noisy`."""
    (bits,) = struct.unpack("i", struct.pack("f", step))
    sizes = f"{width}, {parts}, {actions}, {bits}"
    return Launch(f"euler_step<{sizes}>", rows, (rows, 1, 1), 0, width // 2)


def _normed(rows: int, width: int, parts: int) -> int:
    norm = 4 * (4 * cdiv(parts * rows, 4) + 64)
    return _aligned(_aligned(_incoming(rows, width)) + norm)


def _incoming(rows: int, span: int) -> int:
    return span * 8 * cdiv(rows, 8) * 2 + 8 * (span // CHUNK + 1)


def _exchange(rows: int) -> int:
    return 2 * 4 * cdiv(cdiv(rows, 8), 2) * 32 * 16


def _aligned(size: int) -> int:
    return 16 * cdiv(size, 16)


@functools.cache
def available() -> bool:
    """Whether NVRTC can be reached."""
    try:
        checked(_nvrtc().nvrtcVersion())
    except (ImportError, RuntimeError):  # not installed; installed without the library
        return False
    return True


@functools.cache
def compiles(launch: Launch) -> bool:
    """Whether NVRTC can be reached, and compiles this."""
    try:
        return available() and bool(compiled(launch))
    except RuntimeError as error:
        logger.warning("Triton's kernels are taken in the place of faster ones, %s", error)
        return False


@functools.cache
def compiled(launch: Launch) -> tuple[str, bytes]:
    """The kernel's name, and what the driver loads: compiled once a process.

    Raises:
        RuntimeError: NVRTC does not compile it, with what it says.
    """
    nvrtc = _nvrtc()
    assert launch.shared <= HOPPER, launch
    columns = sorted({8 * cdiv(launch.rows, 8), QUERIES})
    text = "".join(map(_multiply, columns)) + Path(__file__).with_name("few_rows.cu").read_text()
    program = checked(nvrtc.nvrtcCreateProgram(text.encode(), b"few_rows.cu", 0, [], []))
    try:
        expression = launch.kernel.encode()
        checked(nvrtc.nvrtcAddNameExpression(program, expression))
        options = [b"-arch=sm_90a", b"-std=c++17"]
        options += [b"-DROWS=%d" % launch.rows, b"-DSHARED=%d" % launch.shared]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program)))
            checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"{launch.kernel} does not compile: {log.decode(errors='replace')}")
        name = checked(nvrtc.nvrtcGetLoweredName(program, expression)).decode()
        code = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program)))
        checked(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return name, bytes(code)


def _multiply(columns: int) -> str:
    """The instruction that multiplies 64 outputs with so many rows, and adds."""
    count = columns // 2
    totals = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    a, tile, add = ", ".join(f"%{count + i}" for i in range(4)), f"%{count + 4}", f"%{count + 5}"
    return f"""
__device__ __forceinline__ void multiply(float (&d)[{count}], unsigned a0, unsigned a1, unsigned a2,
                                         unsigned a3, unsigned long long tile, int add) {{
    asm volatile("{{ .reg .pred p; setp.ne.b32 p, {add}, 0;\\n"
                 "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 "
                 "{{{totals}}}, {{{a}}}, {tile}, p, 1, 1, 0; }}"
                 : {operands} : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(tile), "r"(add));
}}
#line 1 "few_rows.cu"
"""


def _nvrtc() -> Any:
    return importlib.import_module("cuda.bindings.nvrtc")  # here, since few have it


def checked(returned: tuple[Any, ...]) -> Any:
    """What a function of `cuda.bindings` returns beside its error.

    Raises:
        RuntimeError: there is an error.
    """
    error, *values = returned
    if int(error):
        raise RuntimeError(f"{type(error).__name__}: {error.name}")
    return values[0] if values else None

"""JAX's denoising steps as one custom call, on the CPU: what its program says is computed here.

Launches are known by what built them (`few_rows`), and computed by PyTorch's plain functions on
the memory that XLA gives the call, a layer's rows packed as they are on a GPU.
"""

import contextlib
import ctypes
import functools
import inspect
import math
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

import jax.numpy as jnp
from flax import nnx

from parity_tests.cases import tiny_config
from parity_tests.harness import BACKENDS, DEVICE
from parity_tests.tolerances import tolerance
from pruner_jax import (
    chain,
    deployed,
    ffi_handler,
    forward,
    gemma,
    kernels,
    kernels_plain,
    triton_call,
)
from pruner_jax.pi0 import Pi0
from pruner_kernels import driver, few_rows, program
from pruner_kernels.few_rows import Launch
from pruner_kernels.program import Copy, Program
from pruner_spec.config import GemmaVariant
from pruner_torch import kernels_plain as computed
from pruner_torch.kernels_plain import PackedQuery

if DEVICE != "cpu" or len(BACKENDS) < 2:
    pytest.skip("computes on the CPU with both backends", allow_module_level=True)

DEPTH, STEPS, PREFIX, HORIZON, ACTIONS = 3, 4, 13, 5, 8
WIDTH, MLP, HEADS, HEAD_DIM = 128, 512, 2, 256  # the least of a layer that packed rows have
BUILDERS = ("embed_actions", "project", "attend", "gated", "merge", "euler_step")


class Emulator:
    """Runs a program as `Runner` does, on the host.

    Attributes:
        made: by which function of `few_rows`, and of what arguments, each launch was made.
        dtype: of rows, kernels and caches.
    """

    made: ClassVar[dict[Launch, tuple[str, dict[str, Any]]]] = {}
    programs: ClassVar[list[Program]] = []
    dtype: ClassVar[torch.dtype] = torch.float32

    def __init__(self, given: Program) -> None:
        self.program = given
        self.programs.append(given)

    def __call__(self, pointers: Sequence[int], stream_of: Callable[[], int]) -> None:
        def address(place: tuple[int, int]) -> int:
            return pointers[place[0]] + place[1]

        def copy(each: Copy) -> None:
            ctypes.memmove(address(each.to), address(each.source), each.size)

        for each in self.program.before:
            copy(each)
        for launch, places in self.program.launches:
            name, arguments = self.made[launch]
            getattr(self, name)(*map(address, places), **arguments)
        for each in self.program.after:
            copy(each)

    def embed_actions(self, *at: int, rows: int, actions: int, width: int) -> None:
        noisy, kernel = tensor(at[0], 1, rows, actions), tensor(at[1], actions, width)
        bias, scale = (tensor(each, width) for each in at[2:4])
        found = computed.embed_actions(noisy, kernel, bias, scale, self.dtype, True)
        write_rows(at[4:], found)

    def project(
        self,
        *at: int,
        rows: int,
        width: int,
        parts: int,
        heads: int,
        head_dim: int,
        length: int,
        room: int,
        place: int,
        packed: bool,
    ) -> None:
        assert packed
        outputs, half, batch = (heads + 2) * head_dim, head_dim // 2, rows // length
        given = self.rows(at[0], at[1], rows, width, parts)
        kernel, added = self.narrow(at[2], outputs, width).T, tensor(at[3], outputs)
        angles = [tensor(each, batch, length, half) for each in at[4:6]]
        caches = [self.narrow(each, batch, room, 1, head_dim) for each in at[7:9]]
        query, *_ = computed.project(given, kernel, added, *angles, *caches, place, heads)
        write(at[6], computed.pack_query(query).packed)

    def attend(
        self,
        *at: int,
        batch: int,
        length: int,
        heads: int,
        head_dim: int,
        keys: int,
        room: int,
        masked: bool,
    ) -> None:
        assert masked
        shape = few_rows.queries_shape(batch, length, heads, head_dim)
        query = PackedQuery(self.narrow(at[0], *shape), length, heads)
        caches = [self.narrow(each, batch, room, 1, head_dim)[:, :keys] for each in at[1:3]]
        mask = tensor(at[3], batch, keys, dtype=torch.bool)
        write(at[4], computed.attend(query, *caches, mask, True))

    def gated(self, *at: int, rows: int, width: int, parts: int, places: int) -> None:
        given = self.rows(at[0], at[1], rows, width, parts)
        kernel, added = self.narrow(at[2], 2 * places, width).T, tensor(at[3], 2 * places)
        write(at[4], computed.gated(given, kernel, added))

    def merge(self, *at: int, rows: int, inputs: int, width: int) -> None:
        x = self.narrow(at[0], *few_rows.packed_shape(rows, inputs))
        kernel, residual = self.narrow(at[1], width, inputs).T, self.narrow(at[2], rows, width)
        gate, scale = self.narrow(at[3], width), tensor(at[4], width)
        found = computed.merge(x, kernel, residual, gate, scale)
        parts = tensor(at[7], width // 64, rows)
        parts.zero_()[0] = found.squares
        write(at[5], found.x)
        write(at[6], found.scaled)

    def euler_step(
        self, *at: int, rows: int, width: int, parts: int, actions: int, step: float
    ) -> None:
        x = self.narrow(at[0], rows, width)
        given = computed.Rows(x, x, tensor(at[1], parts, rows))
        scale, shift = (tensor(each, width) for each in at[2:4])
        kernel, bias = tensor(at[4], width, actions), tensor(at[5], actions)
        noisy = tensor(at[6], 1, rows, actions)
        write(at[7], computed.euler_step(given, scale, shift, kernel, bias, noisy, step))

    def narrow(self, address: int, *shape: int) -> torch.Tensor:
        return tensor(address, *shape, dtype=self.dtype)

    def rows(self, scaled: int, squares: int, rows: int, width: int, parts: int) -> computed.Rows:
        """What a product reads of rows; of x it knows the shape."""
        packed = self.narrow(scaled, *few_rows.packed_shape(rows, width))
        x = torch.empty(rows, width, dtype=self.dtype)
        return computed.Rows(x, packed, tensor(squares, parts, rows))


def tensor(address: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Over memory, which has to begin where a bulk copy may."""
    assert address % 16 == 0
    memory = (ctypes.c_byte * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def write(address: int, found: torch.Tensor) -> None:
    tensor(address, *found.shape, dtype=found.dtype).copy_(found)


def write_rows(at: Sequence[int], found: computed.Rows) -> None:
    for address, part in zip(at, (found.x, found.scaled, found.squares), strict=True):
        write(address, part)


@pytest.fixture
def emulated(monkeypatch):
    """As on Hopper, but that the host computes; gives the programs that were made."""
    for name in BUILDERS:
        monkeypatch.setattr(few_rows, name, recorded(name, getattr(few_rows, name)))
    monkeypatch.setattr(chain, "Runner", Emulator)
    monkeypatch.setattr(ffi_handler, "programs", {})
    monkeypatch.setattr(Emulator, "programs", [])
    monkeypatch.setattr(kernels, "packs", lambda *sizes: True)
    return Emulator.programs


def recorded(name: str, build: Any) -> Any:
    """A function of `few_rows`, with a note of what it made."""

    def function(*given: Any) -> Launch:
        launch = build(*given)
        Emulator.made[launch] = name, dict(inspect.signature(build).bind(*given).arguments)
        return launch

    return function


@functools.cache
def model(dtype: str = "float32") -> Pi0:
    sizes = {"num_heads": HEADS, "num_kv_heads": 1, "head_dim": HEAD_DIM, "depth": DEPTH}
    config = tiny_config(
        dtype=dtype,
        action_dim=ACTIONS,
        action_horizon=HORIZON,
        paligemma_variant=GemmaVariant(width=72, mlp_dim=136, vocab_size=256, **sizes),
        action_expert_variant=GemmaVariant(width=WIDTH, mlp_dim=MLP, vocab_size=256, **sizes),
    )
    return nnx.eval_shape(lambda: Pi0(config, seed=None))


def inputs(batch: int, dtype: str = "float32") -> tuple[Any, ...]:
    """Of `forward.denoise`: random weights and caches, the suffix's rooms full of NaN."""
    graph, state = nnx.split(model(dtype))

    def shapes(state: Any) -> tuple[Any, ...]:
        weights = deployed.deploy(nnx.merge(graph, state))
        clock = deployed.clock_of(nnx.merge(graph, state))
        return weights, deployed.schedule(clock, weights.action, STEPS, jnp.dtype(dtype))

    generator = np.random.default_rng(0)

    def drawn(like: Any) -> Any:
        size = like.shape[-1] ** -0.5 if len(like.shape) > 1 else 1
        return jnp.asarray(size * generator.standard_normal(like.shape), like.dtype)

    weights, schedule = jax.eval_shape(shapes, state)
    names = ("action", "action_in", "action_out")
    weights = deployed.Deployed(
        **dict.fromkeys(("vision", "embedding", "final_norm")),
        language=(),
        **jax.tree.map(drawn, {name: getattr(weights, name) for name in names}),
    )
    schedule = jax.tree.map(drawn, schedule)
    room = (batch, PREFIX, 1, HEAD_DIM), (batch, HORIZON, 1, HEAD_DIM)
    caches = [
        np.concatenate([generator.standard_normal(room[0]), np.full(room[1], np.nan)], axis=1)
        for _ in range(2 * DEPTH)
    ]
    caches = [jnp.asarray(each, dtype) for each in caches]
    valid = jnp.arange(PREFIX) < jnp.asarray([9, 13])[:batch, None]
    positions = valid.sum(axis=1)[:, None] + jnp.arange(HORIZON)
    angles = gemma.rotary(positions, HEAD_DIM, jnp.dtype(dtype))
    cache = forward.Cache(tuple(caches[:DEPTH]), tuple(caches[DEPTH:]), valid, angles)
    noise = jnp.asarray(generator.standard_normal((batch, HORIZON, ACTIONS)), jnp.float32)
    return weights, schedule, cache, noise[:, 0], noise


def denoised(way: Any, graphs: bool = True, prefix: Any = lambda caches: caches) -> Any:
    """A new function, which is traced anew; its prefix gives keys and values."""

    def function(weights: Any, schedule: Any, cache: Any, state: Any, noise: Any) -> Any:
        cache = forward.Cache(*prefix((cache.key, cache.value)), cache.valid, cache.suffix)
        given = weights, schedule, cache, state, noise
        return forward.denoise(
            model(cache.key[0].dtype.name), *given, operations=way, graphs=graphs
        )

    return jax.jit(function)


@pytest.mark.parametrize(("batch", "dtype"), [(1, "float32"), (2, "float32"), (2, "bfloat16")])
def test_the_program_computes_the_steps(emulated, monkeypatch, batch, dtype):
    monkeypatch.setattr(Emulator, "dtype", getattr(torch, dtype))
    given = inputs(batch, dtype)
    expected = np.asarray(denoised(kernels_plain)(*given))
    call = denoised(kernels)
    found = [np.asarray(call(*given)), np.asarray(call(*given[:-1], 2 * given[-1]))]
    assert np.isfinite(expected).all()
    level = "kernel" if dtype == "bfloat16" else "same computation"
    bound = tolerance(level, dtype) * np.abs(expected).max()
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=bound)
    assert not np.allclose(found[1], expected, rtol=0, atol=bound)
    (each,) = emulated
    assert each.graphs
    assert len(each.launches) == STEPS * (5 * DEPTH + 2)


@pytest.mark.parametrize("which", ["steps", "attends", "packs"])
def test_what_has_no_kernels_is_a_scan(emulated, monkeypatch, which):
    monkeypatch.setattr(kernels if which == "packs" else few_rows, which, lambda *sizes: False)
    text = denoised(kernels).lower(*inputs(1)).as_text()
    assert emulated == []
    assert ffi_handler.TARGET not in text
    assert "stablehlo.while" in text


EXPERT = {"width": 1024, "mlp": 4096, "heads": 8, "groups": 1, "head_dim": 256}


@pytest.mark.parametrize(
    ("change", "packs"),
    [
        ({}, True),
        ({"capability": 80}, False),
        ({"capability": 100}, False),
        ({"dtype": jnp.float32}, False),
        ({"rows": 65}, False),
        ({"groups": 2}, False),
        ({"compiles": False}, False),
    ],
)
def test_who_packs(monkeypatch, change, packs):
    """An expert's layers on Hopper, in bfloat16, as far as the kernels have their sizes."""
    given = (
        {"rows": 50, "capability": 90, "dtype": jnp.bfloat16, "compiles": True} | EXPERT | change
    )
    monkeypatch.setattr(triton_call, "capability", lambda: given["capability"])
    monkeypatch.setattr(triton_call, "available", lambda: True)
    monkeypatch.setattr(few_rows, "compiles", lambda launch: given["compiles"])
    width, inner = given["width"], given["heads"] * given["head_dim"]
    outputs = inner + 2 * given["groups"] * given["head_dim"]
    shapes = [(outputs, width), (width, inner), (2 * given["mlp"], width), (width, given["mlp"])]
    qkv, out, up, down = (jax.ShapeDtypeStruct(each, given["dtype"]) for each in shapes)
    layer = deployed.ExpertLayer(None, qkv, out, None, up, down)
    assert kernels.packs(given["rows"], layer, given["head_dim"]) == packs
    assert not kernels_plain.packs(given["rows"], layer, given["head_dim"])


def test_programs_are_known_by_what_they_do(emulated):
    """The same in every process; of every prefix the same products, if it is one sample."""
    given = inputs(1)
    for graphs in (True, True, False):
        denoised(kernels, graphs).lower(*given)
    keys = [each.key for each in emulated]
    assert len(keys) == len(ffi_handler.programs) == 2  # what is there is not made again
    assert [each.graphs for each in emulated] == [True, False]
    assert len(set(keys)) == 2
    names = {launch.kernel for launch, _ in emulated[0].launches}
    assert len(names) == 7
    assert not [name for name in names if name.startswith("project") and str(PREFIX) in name]


def test_nothing_is_moved(emulated):
    """Kernels are read as they lie, caches written in place; a graph sees no other addresses."""
    given = inputs(2)

    def prefix(caches: Any) -> Any:
        return jax.tree.map(lambda each: called("prefix", each, shapes=each), caches)

    text = denoised(kernels, prefix=prefix).lower(*given).compile().as_text()
    moved = re.findall(r"= (\w+\[[\d,]*\])\S* (copy|transpose)\(", text)
    assert moved == []
    lines = [line for line in text.splitlines() if f'"{ffi_handler.TARGET}"' in line]
    (line,) = [line for line in lines if "prefix" not in line]
    operands = re.search(r"custom-call\((.*?)\),", line)[1].count("%")
    # A layer's kernels and tables, keys and values; the last norm's; two maps; cos, sin, mask, x.
    assert operands == DEPTH * (4 + 6 + 2) + 2 + 4 + 4
    (each,) = emulated
    pointed = {which for _, places in each.launches for which, _ in places}
    (before,), (after,) = each.before, each.after
    assert not {before.source[0], after.to[0]} & pointed
    assert len(re.findall(r"\{\d+\}: \(\d+, \{\}", line)) == 2 * DEPTH


def test_the_scratch_is_a_layers(emulated):
    """However many layers and steps there are; and no launch's buffers overlap."""
    text = denoised(kernels).lower(*inputs(1)).as_text()
    (scratch,) = re.findall(r", tensor<(\d+)xui8>\)", text)
    rows = 4 * 8 * (WIDTH * 4 + MLP * 2 + HEADS * HEAD_DIM * 4)
    assert int(scratch) < 2 * rows
    (each,) = emulated
    last = max(which for _, places in each.launches for which, _ in places)
    for launch, places in each.launches:
        own = [offset for which, offset in places if which == last]
        assert all(offset % chain.ALIGNMENT == 0 for offset in own)
        in_place = Emulator.made[launch][0] == "euler_step"
        assert len(set(own)) == len(own) - in_place


@pytest.mark.parametrize(
    ("change", "message"),
    [("no table", "a row of a table"), ("dtype", "float32, got"), ("stored", "the transpose")],
)
def test_what_has_no_launch_is_said(change, message):
    recorder: Any = chain.Chain()
    half, kernel = jnp.bfloat16, recorder.read(jnp.zeros((1024, 128), jnp.bfloat16))
    row = chain.TableRow(recorder.read(jnp.zeros((2, 1024), jnp.float32)), np.asarray(1))
    narrow = chain.TableRow(recorder.read(jnp.zeros((2, 1024), half)), np.asarray(1))
    x = recorder.read(jnp.zeros((8, 128), half))
    rows = kernels_plain.Rows(x, x, recorder.read(jnp.zeros((1, 8))))
    given = {"no table": (kernel.T, None), "dtype": (kernel.T, narrow), "stored": (kernel, row)}
    recorder.gated(rows, kernel.T, row)
    with pytest.raises(ValueError, match=message):
        recorder.gated(rows, *given[change])


def called(name: str, *arrays: Any, shapes: Any = None) -> Any:
    shapes = jax.ShapeDtypeStruct((3,), jnp.float32) if shapes is None else shapes
    return jax.ffi.ffi_call(ffi_handler.TARGET, shapes)(*arrays, program=name)


@pytest.fixture
def programs(monkeypatch):
    monkeypatch.setattr(ffi_handler, "programs", {})
    ffi_handler.register()
    return ffi_handler.programs


def test_a_program_is_given_operands_and_results(programs):
    """Many, in their order; more than once in a function."""

    def summed(pointers: list[int], stream_of: Callable[[], int]) -> None:
        *given, first, second = (tensor(each, 3) for each in pointers)
        first.copy_(sum(place * each for place, each in enumerate(given)))
        second.copy_(given[-1])

    programs["summed"] = summed
    arrays = [jnp.arange(3.0) + place for place in range(260)]
    shapes = 2 * [jax.ShapeDtypeStruct((3,), jnp.float32)]

    @jax.jit
    def twice(*arrays: Any) -> Any:
        total, last = called("summed", *arrays, shapes=shapes)
        return total, *called("summed", total, last, shapes=shapes)

    expected = sum(place * np.asarray(each) for place, each in enumerate(arrays))
    total, other, last = twice(*arrays)
    np.testing.assert_array_equal(total, expected)
    np.testing.assert_array_equal(other, arrays[-1])
    np.testing.assert_array_equal(last, arrays[-1])
    np.testing.assert_array_equal(twice(*reversed(arrays))[1], arrays[0])


def test_what_a_program_raises_is_jaxs_error(programs):
    def fails(pointers: list[int], stream_of: Callable[[], int]) -> None:
        raise ValueError("expected π, got 3")

    programs |= {"fails": fails, "asks": lambda pointers, stream_of: stream_of()}
    ran = jax.jit(called, static_argnums=0)
    for name, message in [
        ("fails", "ValueError: expected π, got 3"),
        ("asks", "RuntimeError: .*not available"),  # a CPU has no stream
        ("other", "expected one of 2 programs of this process, got other"),
    ]:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(ran(name, jnp.zeros(3)))
    unnamed = jax.ffi.ffi_call(ffi_handler.TARGET, jax.ShapeDtypeStruct((3,), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"an attribute program, got \[\]"):
        jax.block_until_ready(jax.jit(unnamed)(jnp.zeros(3)))


class Device:
    """A driver that notes what it is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.graphs = 0
        for name in ("function", "run", "copy", "captured", "replay", "forget"):
            monkeypatch.setattr(driver, name, getattr(self, name))
        monkeypatch.setattr(driver, "device_of", lambda stream: contextlib.nullcontext(0))

    def function(self, launch: Launch, device: int) -> None:
        self.asked.append(("function", launch.kernel))

    def run(
        self, launch: Launch, pointers: Sequence[int], stream: int, device: int, overlaps: bool
    ) -> None:
        self.asked.append(("run", launch.kernel, *pointers, stream, overlaps))

    def copy(self, *given: int) -> None:
        self.asked.append(("copy", *given))

    def captured(self, launches: Callable[[int], None]) -> int:
        launches(99)
        self.graphs += 1
        return self.graphs

    def replay(self, graph: int, stream: int) -> None:
        self.asked.append(("replay", graph, stream))

    def forget(self, graph: int) -> None:
        self.asked.append(("forget", graph))


FIRST, SECOND = (Launch(name, 1, (1, 1, 1), 16) for name in ("first", "second"))
SMALL = Program(
    ((FIRST, ((0, 0), (2, 128))), (SECOND, ((2, 128), (2, 0)))),
    before=(Copy((2, 0), (1, 0), 64),),
    after=(Copy((3, 0), (2, 0), 32),),
)
POINTERS = (1000, 2000, 3000, 4000)
COPIES = [("copy", 3000, 2000, 64, 7), ("copy", 4000, 3000, 32, 7)]


def launched(stream: int) -> list[Any]:
    return [
        ("run", "first", 1000, 3128, stream, False),  # waits for what others launched
        ("run", "second", 3128, 3000, stream, True),
    ]


def test_a_graph_is_captured_once(monkeypatch):
    """Whatever the addresses of what is copied; its functions are loaded before."""
    device, runner = Device(monkeypatch), program.Runner(SMALL)
    runner(POINTERS, lambda: 7)
    loaded = [("function", "first"), ("function", "second")]
    first, last = COPIES
    assert device.asked == [first, *loaded, *launched(99), ("replay", 1, 7), last]
    device.asked.clear()
    runner((1000, 2001, 3000, 4001), lambda: 8)
    assert [each[0] for each in device.asked] == ["copy", "replay", "copy"]
    assert runner.captures == 1


def test_without_graphs_all_is_launched_at_once(monkeypatch):
    device = Device(monkeypatch)
    runner = program.Runner(Program(SMALL.launches, SMALL.before, SMALL.after, graphs=False))
    for _ in range(2):
        device.asked.clear()
        runner(POINTERS, lambda: 7)
        first, last = COPIES
        assert device.asked == [first, *launched(7), last]
    assert runner.captures == 0


def test_graphs_are_bounded(monkeypatch):
    """The least recently used goes first."""
    device, runner = Device(monkeypatch), program.Runner(SMALL)

    def call(place: int) -> None:
        runner((place, *POINTERS[1:]), lambda: 7)

    for place in range(program.MAX_GRAPHS):
        call(place)
    call(0)
    call(program.MAX_GRAPHS)
    assert [each for each in device.asked if each[0] == "forget"] == [("forget", 2)]
    call(0)
    assert runner.captures == program.MAX_GRAPHS + 1
    call(1)
    assert runner.captures == program.MAX_GRAPHS + 2
    assert len(runner._graphs) == program.MAX_GRAPHS


def test_threads_capture_one_graph(monkeypatch):
    Device(monkeypatch)
    runner = program.Runner(SMALL)
    threads = [threading.Thread(target=runner, args=(POINTERS, lambda: 7)) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert runner.captures == 1

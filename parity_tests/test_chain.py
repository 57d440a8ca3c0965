"""JAX's denoising steps as one custom call: on the CPU what its program says is computed here.

Launches are known by what built them (`few_rows`), and computed by PyTorch's plain functions on
the memory that XLA gives the call, a layer's rows packed as they are on a GPU.
"""

import ctypes
import functools
import inspect
import math
import re
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
from pruner_kernels import few_rows
from pruner_kernels.few_rows import Launch
from pruner_kernels.program import Copy, Program
from pruner_spec.config import GemmaVariant
from pruner_torch import kernels_plain as computed
from pruner_torch.kernels_plain import PackedQuery

if len(BACKENDS) < 2:
    pytest.skip("PyTorch computes what JAX has launched", allow_module_level=True)

HOPPER = DEVICE == "cuda" and triton_call.capability() == 90 and few_rows.available()

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
    if DEVICE != "cpu":
        pytest.skip("computes on the CPU")
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


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("batch", [1, 2])
def test_the_launches_compute_the_steps(monkeypatch, batch):
    """Captured or not with the same bits; the addresses of a call's own arrays are in no graph."""
    monkeypatch.setattr(ffi_handler, "programs", {})
    given = inputs(batch, "bfloat16")
    expected = np.asarray(denoised(kernels_plain)(*given))
    bound = tolerance("kernel", "bfloat16") * np.abs(expected).max()
    for graphs in (True, False):
        call = denoised(kernels, graphs)
        for _ in range(3):
            found = np.asarray(call(*given))
            np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
            again = np.asarray(call(*given[:-1], given[-1] + 0))
            np.testing.assert_array_equal(again, found)
    captured, launched = ffi_handler.programs.values()
    assert 0 < captured.captures < 6
    assert launched.captures == 0


@pytest.mark.parametrize("which", ["attends", "packs"])
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
        ({"actions": 7}, False),
        ({"groups": 2}, False),
        ({"compiles": False}, False),
    ],
)
def test_who_packs(monkeypatch, change, packs):
    """An expert's layers on Hopper, in bfloat16, as far as the kernels have their sizes."""
    given = (
        {"rows": 50, "actions": 32, "capability": 90, "dtype": jnp.bfloat16, "compiles": True}
        | EXPERT
        | change
    )
    monkeypatch.setattr(triton_call, "capability", lambda: given["capability"])
    monkeypatch.setattr(triton_call, "available", lambda: True)
    monkeypatch.setattr(few_rows, "compiles", lambda launch: given["compiles"])
    width, inner = given["width"], given["heads"] * given["head_dim"]
    outputs = inner + 2 * given["groups"] * given["head_dim"]
    shapes = [(outputs, width), (width, inner), (2 * given["mlp"], width), (width, given["mlp"])]
    qkv, out, up, down = (jax.ShapeDtypeStruct(each, given["dtype"]) for each in shapes)
    layer = deployed.ExpertLayer(None, qkv, out, None, up, down)
    sizes = given["rows"], layer, given["head_dim"], given["actions"]
    assert kernels.packs(*sizes) == packs
    assert not kernels_plain.packs(*sizes)


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
        def call(each: Any) -> Any:
            return jax.ffi.ffi_call(ffi_handler.TARGET, each)(each, program="prefix")

        return jax.tree.map(call, caches)

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

"""Triton kernels in a JAX program: the custom call that XLA is given, and on a GPU what it does.

`launch_cases` has the cases of `pruner_kernels`'s kernels.
"""

import collections
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
triton = pytest.importorskip("triton")

import jax.numpy as jnp
import triton.language as tl
from flax import nnx

from parity_tests.cases import tiny_config
from parity_tests.harness import BACKENDS, DEVICE
from parity_tests.tolerances import tolerance
from pruner_jax import deployed, forward, forward_vision, kernels, kernels_plain, triton_call
from pruner_jax.pi0 import Encoded, Pi0
from pruner_spec.config import GemmaVariant

if "jax" not in BACKENDS:
    pytest.skip("without jax", allow_module_level=True)

on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
ROWS, COLUMNS = 3, 257
SHIFT = 0.1


@triton.jit
def _add(x, out, y, COUNT, SHIFT, BLOCK: tl.constexpr):
    """out = x + y + SHIFT."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < COUNT
    total = tl.load(x + place, mask=inside) + tl.load(y + place, mask=inside) + SHIFT
    tl.store(out + place, total, mask=inside)


@triton.jit
def _accumulate(total, largest, y, COLUMNS, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """Adds y to total, in place, and the largest of each row of the sum."""
    row, place = tl.program_id(0), tl.arange(0, BLOCK)
    inside = place < COLUMNS
    at = row * COLUMNS + place
    found = tl.load(total + at, mask=inside, other=0) + tl.load(y + at, mask=inside, other=0)
    tl.store(total + at, found, mask=inside)
    if KIND == "max":
        tl.store(largest + row, tl.max(tl.where(inside, found, float("-inf"))))


def add(x: Any, y: Any, shift: Any = SHIFT) -> Any:
    arguments = {"x": x, "y": y, "out": jax.ShapeDtypeStruct(x.shape, x.dtype)}
    constants = {"COUNT": x.size, "SHIFT": shift, "BLOCK": 128}
    (out,) = triton_call.triton_call(_add, arguments | constants, grid=[-(-x.size // 128)])
    return out


def accumulate(total: Any, y: Any) -> Any:
    rows, columns = total.shape
    arguments = {"y": y, "largest": jax.ShapeDtypeStruct((rows,), total.dtype)}
    constants = {"COLUMNS": columns, "BLOCK": 512, "KIND": "max"}
    return triton_call.triton_call(
        _accumulate, arguments | constants, aliases={"total": total}, grid=(rows, 1), num_warps=8
    )


def drawn(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.fixture
def lower(monkeypatch):
    """The custom calls of a function that is lowered for an H100, a line each."""
    monkeypatch.setattr(triton_call, "capability", lambda: 90)

    def calls(function: Any, *arrays: np.ndarray) -> list[str]:
        lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))
        return [line for line in lowered.as_text().splitlines() if triton_call.TARGET in line]

    return calls


def number(call: str, name: str) -> int:
    return int(re.search(rf"\b{name} = (\d+) : i32", call)[1])


def names(text: str) -> dict[str, int]:
    """How often a program calls each kernel."""
    lines = [line for line in text.splitlines() if triton_call.TARGET in line]
    found = [re.search(r'kernel_type = "ptx", name = "(\w+)"', line) for line in lines]
    return dict(collections.Counter(each[1] for each in found))


def output_indices(call: str) -> list[int]:
    return [
        int(i) for i in re.findall(r"(\d+) : i32", re.search(r"output_ind\w+ = (.*?)]", call)[1])
    ]


def test_the_result_stands_among_the_operands(lower):
    x = drawn(ROWS, COLUMNS)
    (call,) = lower(add, x, x)
    assert 'kernel_type = "ptx", name = "_add"' in call
    assert ".target sm_90a" in call
    assert [number(call, f"grid_{axis}") for axis in "xyz"] == [7, 1, 1]
    assert [number(call, f"block_{axis}") for axis in "xyz"] == [128, 1, 1]
    assert number(call, "shared_mem_bytes") == 0
    assert output_indices(call) == [1]
    assert "output_operand_aliases" not in call.replace("output_operand_aliases = []", "")
    # x and y; and the two pointers to scratch memory that Triton appends
    assert "(tensor<3x257xf32>, tensor<3x257xf32>, tensor<ui8>, tensor<ui8>)" in call
    assert "-> tensor<3x257xf32>" in call
    assert call.count("dense<[1, 0]> : tensor<2xindex>") == 3  # row-major


def test_an_array_is_written_over(lower):
    x = drawn(ROWS, COLUMNS)
    (call,) = lower(accumulate, x, x)
    assert [number(call, f"grid_{axis}") for axis in "xyz"] == [ROWS, 1, 1]
    assert number(call, "block_x") == 256
    assert number(call, "shared_mem_bytes") > 0  # the warps' maxima
    assert output_indices(call) == [0, 1]
    # y; and what `total` starts as, where the kernel reads nothing
    assert "(tensor<3x257xf32>, tensor<3x257xf32>, tensor<ui8>)" in call
    assert "-> (tensor<3x257xf32>, tensor<3xf32>)" in call
    assert "output_tuple_indices = [0], operand_index = 1" in call


def test_the_entry_has_as_many_pointers_as_it_is_given(lower):
    x = drawn(ROWS, COLUMNS)
    for function in (add, accumulate):
        (call,) = lower(function, x, x)
        given = re.search(r"@\S+\((.*?)\)", call)[1].count("%") + len(output_indices(call))
        assert given == call.count(".param .u64")


def test_a_kernel_is_compiled_once(lower, monkeypatch):
    compiled, compile_ = [], triton.compile
    monkeypatch.setattr(triton, "compile", lambda *a, **k: compiled.append(a) or compile_(*a, **k))
    triton_call.compiled.cache_clear()

    def chain(x: Any, y: Any) -> Any:
        for _ in range(100):
            x = add(x, y)
        return jax.lax.scan(lambda x, _: (add(x, y), None), x, length=3)[0]

    x = drawn(ROWS, COLUMNS)
    assert len(lower(chain, x, x)) == 101
    assert len(compiled) == 1
    # Another dtype, and constants that are equal but no less different: each is another kernel.
    half = x.astype(jnp.bfloat16)
    assert len(lower(lambda x: add(x, x, 1) + add(x, x, True) + add(x, x, 1.0), half)) == 3
    assert len(compiled) == 4


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("bool", "*i1"),
        ("int8", "*i8"),
        ("uint32", "*u32"),
        ("int64", "*i64"),
        ("float16", "*fp16"),
        ("bfloat16", "*bf16"),
        ("float32", "*fp32"),
        ("float8_e4m3fn", "*fp8e4nv"),
        ("float8_e5m2", "*fp8e5"),
    ],
)
def test_pointers_have_the_names_of_triton(dtype, name):
    assert triton_call.type_name(jnp.dtype(dtype)) == name


def test_each_parameter_is_given_once():
    x = drawn(4)
    with pytest.raises(ValueError, match="expected an argument each"):
        triton_call.triton_call(_add, {"x": x, "y": x}, grid=(1,))
    given = {"x": x, "y": x, "out": x, "COUNT": 4, "SHIFT": 0, "BLOCK": 4}
    with pytest.raises(ValueError, match="expected an argument each"):
        triton_call.triton_call(_add, given, aliases={"out": x}, grid=(1,))


def test_programs_for_the_cpu_may_not_call_kernels():
    if DEVICE == "cpu":
        assert not triton_call.available()
    x = drawn(4)
    with pytest.raises(NotImplementedError, match="platform cpu"):
        jax.jit(add).trace(x, x).lower(lowering_platforms=("cpu",))


@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16"])
def test_a_kernel_runs(dtype):
    assert triton_call.available()
    x, y = (drawn(2, ROWS, COLUMNS) * 100).astype(jnp.dtype(dtype))
    shift = 3 if dtype == "int32" else 0.5
    found = np.asarray(jax.jit(lambda x, y: add(x, y, shift))(x, y))
    assert np.array_equal(found, (x + y) + np.asarray(shift).astype(x.dtype))


@on_gpu
def test_a_kernel_runs_in_a_loop():
    x, y = drawn(2, ROWS, COLUMNS)
    found = jax.jit(lambda x, y: jax.lax.scan(lambda x, _: (add(x, y), None), x, length=5)[0])(x, y)
    expected = x
    for _ in range(5):
        expected = (expected + y) + np.float32(SHIFT)
    assert np.array_equal(found, expected)


@on_gpu
@pytest.mark.parametrize("donated", [(), (0,)])
def test_a_loop_writes_over_its_carry(donated):
    x, y = drawn(2, ROWS, COLUMNS)

    def function(x: Any, y: Any) -> Any:
        def step(total: Any, _: None) -> Any:
            return accumulate(total, y)

        return jax.lax.scan(step, x, length=5)

    given = jnp.asarray(x)
    found, largest = jax.jit(function, donate_argnums=donated)(given, y)
    sums = [x]
    for _ in range(5):
        sums.append(sums[-1] + y)
    assert np.array_equal(found, sums[-1])
    assert np.array_equal(largest, [each.max(1) for each in sums[1:]])
    assert donated or np.array_equal(given, x)


@on_gpu
def test_what_is_used_again_is_not_written_over():
    x, y = drawn(2, ROWS, COLUMNS)

    def function(x: Any, y: Any) -> Any:
        before = x * 2
        total, _ = accumulate(before, y)
        return total, before

    total, before = jax.jit(function)(x, y)
    assert np.array_equal(before, x * 2)
    assert np.array_equal(total, x * 2 + y)


@functools.cache
def launched() -> dict[str, list[dict[str, Any]]]:
    """What `launch_cases` found: interpreted where there is no GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "parity_tests.launch_cases"],
        cwd=pathlib.Path(__file__).parent.parent,
        env=os.environ | ({} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif("torch" not in BACKENDS, reason="Triton interprets PyTorch's tensors")
@pytest.mark.parametrize(
    ("family", "count"),
    [("products", 30), ("pointwise", 52), ("attention", 12), ("ends", 8), ("vision", 48)],
)
def test_launches_compute_what_the_plain_functions_do(family, count):
    level = "kernel" if DEVICE == "cuda" else "kernel, interpreted"
    assert len(launched()[family]) == count
    for row in launched()[family]:
        assert row["error"] <= tolerance(level, row["dtype"]), row


@pytest.mark.slow
@pytest.mark.skipif("torch" not in BACKENDS, reason="Triton interprets PyTorch's tensors")
def test_rows_in_float8():
    """The scales of the plain way, its values, and their product."""
    assert len(launched()["float8_rows"]) == 8
    for row in launched()["float8_rows"]:
        assert row["called"], row
        assert row["scales"], row
        assert row["others"] == 0, row
        assert row["product"] <= tolerance("float8 product", row["dtype"]), row


@pytest.mark.slow
@pytest.mark.skipif("torch" not in BACKENDS, reason="Triton interprets PyTorch's tensors")
def test_the_pruner():
    """Scores are the reference's; the selection by given ones and the prefix, to the last bit."""
    rows = [*launched()["pruning"], *launched()["prefixes"]]
    scores = [row for row in rows if "error" in row]
    assert len(scores) >= 4
    for row in scores:
        assert row["error"] <= tolerance("scores", "float32"), row
    assert len(rows) - len(scores) >= 20 + 6
    assert [row for row in rows if not row.get("same", True)] == []


@pytest.mark.slow
@pytest.mark.skipif("torch" not in BACKENDS, reason="Triton interprets PyTorch's tensors")
def test_tiles_that_are_timed_compute_the_same():
    level = "kernel" if DEVICE == "cuda" else "kernel, interpreted"
    rows = launched()["tuned"]
    # A layer's four products of either dtype; and attention, which has one cut in float32.
    assert [row["dtype"] for row in rows] == 4 * ["float32"] + 5 * ["bfloat16"]
    for row in rows:
        assert row["candidates"] > 2, row
        assert row["error"] <= tolerance(level, row["dtype"]), row


@pytest.mark.slow
@pytest.mark.skipif("torch" not in BACKENDS, reason="Triton interprets PyTorch's tensors")
def test_a_whole_call_over_launches():
    for row in launched()["calls"]:
        assert row["error"] <= tolerance("same computation", row["dtype"]), row
        assert row["launches"][0] > 0, row
        assert row["launches"][1] == 0, row


@pytest.mark.parametrize(("pi05", "float8"), [(True, False), (False, False), (True, True)])
def test_a_layer_is_five_launches(monkeypatch, pi05, float8):
    """Two ends of a step; π0's state token attends to fewer keys, and comes in by JAX's products.

    Of the language model's layers all but the last attend, and in float8 round rows twice; what
    stands around their products is four launches, of the last one's a single one.
    """
    monkeypatch.setattr(triton_call, "capability", lambda: 90)
    monkeypatch.setattr(triton_call, "available", lambda: True)
    depth, sizes = 3, {"num_heads": 3, "num_kv_heads": 1, "head_dim": 32, "vocab_size": 256}
    config = tiny_config(
        dtype="bfloat16",
        pi05=pi05,
        paligemma_variant=GemmaVariant(width=72, depth=depth, mlp_dim=136, **sizes),
        action_expert_variant=GemmaVariant(width=56, depth=depth, mlp_dim=104, **sizes),
    )
    model = nnx.eval_shape(lambda: Pi0(config, seed=None))
    graph, state = nnx.split(model)

    def inputs(state: Any) -> tuple[Any, ...]:
        model = nnx.merge(graph, state)
        weights = deployed.deploy(model, float8)
        steps = deployed.schedule(deployed.clock_of(model), weights.action, 10, model.dtype)
        tokens = jnp.zeros((2, 3, config.vision.num_patches, 72), model.dtype)
        prompt = jnp.zeros((2, 9, 72), model.dtype)
        encoded = Encoded(tokens, jnp.ones((2, 3), bool), prompt, jnp.ones((2, 9), bool))
        actions = jnp.zeros((2, config.action_horizon, config.action_dim))
        return weights, steps, encoded, model.select(encoded), actions[:, 0], actions

    act = functools.partial(forward.act, model, operations=kernels)
    traced = jax.jit(act, static_argnums=6).trace(*jax.eval_shape(inputs, state), None)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    expected = {"project": depth, "gated": depth, "merge": 2 * depth, "euler_step": 1}
    expected |= {"rotate": depth, "gelu_product": depth - 1}
    if pi05:
        expected |= {"embed_actions": 1, "attend": 2 * depth - 1, "add_scaled": 2 * depth - 1}
    else:
        expected |= {"attend": depth - 1, "add_scaled": 2 * depth}
    if float8:
        expected["quantize_rows"] = 2 * (depth - 1)
    assert names(text) == expected


@pytest.mark.parametrize("rows", [kernels.MAX_ROWS, kernels.MAX_ROWS + 1])
def test_many_rows_are_a_librarys_and_a_launch(lower, monkeypatch, rows):
    monkeypatch.setattr(triton_call, "available", lambda: True)
    x, stored, vector = drawn(rows, 64), drawn(128, 64), drawn(64)
    angles, room = drawn(1, rows, 16), drawn(1, rows + 3, 1, 32)
    few = rows <= kernels.MAX_ROWS

    def function(x: Any, stored: Any, vector: Any, angles: Any, room: Any) -> Any:
        given = kernels.scale_rows(x, vector)
        turned = kernels.project(given, stored.T, None, angles, angles, room, room, 3, 2)
        gated = kernels.gated(given, stored.T, None)
        return turned, kernels.merge(gated, stored[:64].T, x, vector, vector)

    found = names("\n".join(lower(function, x, stored, vector, angles, room)))
    if few:
        assert found == {"add_scaled": 1, "project": 1, "gated": 1, "merge": 1}
    else:
        assert found == {"add_scaled": 2, "rotate": 1, "gelu_product": 1}


def test_keys_that_nobody_has_written_are_not_copied(lower, monkeypatch):
    """Where there are none yet, `rotate` starts from none; else it writes over those there are."""
    monkeypatch.setattr(triton_call, "available", lambda: True)
    x, qkv, room = drawn(6, 64), drawn(6, 128), drawn(2, 5, 1, 32)
    angles, empty = drawn(2, 3, 16), jax.ShapeDtypeStruct(room.shape, room.dtype)

    def rotated(given: Any, x: Any, qkv: Any, angles: Any) -> Any:
        rows = kernels_plain.scale_rows(x, jnp.ones(64))
        return kernels.rotate(qkv, rows, None, angles, angles, given, given, 2, 2)

    (new,) = lower(functools.partial(rotated, empty), x, qkv, angles)
    (over,) = lower(rotated, room, x, qkv, angles)
    assert "output_tuple_indices" not in new
    assert over.count("output_tuple_indices") == 2


@pytest.mark.parametrize("scope", ["camera", "joint"])
@pytest.mark.parametrize("keep", [None, 5])
def test_the_pruner_is_four_launches(monkeypatch, scope, keep):
    """At inference, and only of the fast way."""
    monkeypatch.setattr(triton_call, "capability", lambda: 90)
    monkeypatch.setattr(triton_call, "available", lambda: True)
    config = tiny_config(
        dtype="bfloat16",
        token_pruning_enabled=True,
        token_prune_scope=scope,
        token_prune_keep_tokens=keep,
    )
    model = nnx.eval_shape(lambda: Pi0(config, seed=None))
    shape = (2, 3, config.vision.num_patches, config.paligemma.width)
    encoded = Encoded(
        jnp.zeros(shape, model.dtype),
        jnp.ones((2, 3), bool),
        jnp.zeros((2, 9, shape[-1]), model.dtype),
        jnp.ones((2, 9), bool),
    )

    def function(encoded: Any, way: Any) -> Any:
        return model.prune(encoded, model.select(encoded, way), 7, way)

    def lowered(way: Any) -> str:
        traced = jax.jit(function, static_argnums=1).trace(encoded, way)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    expected = dict.fromkeys(("logits", "scores", "elect", "pack_prefix"), 1)
    assert names(lowered(kernels)) == expected
    assert names(lowered(kernels_plain)) == {}


def test_a_vision_block_is_four_launches(monkeypatch):
    monkeypatch.setattr(triton_call, "capability", lambda: 90)
    monkeypatch.setattr(triton_call, "available", lambda: True)
    config = tiny_config(dtype="bfloat16")
    model = nnx.eval_shape(lambda: Pi0(config, seed=None))
    graph, state = nnx.split(model)
    weights = jax.eval_shape(lambda state: deployed.deploy(nnx.merge(graph, state)).vision, state)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)

    def see(weights: Any, images: Any) -> Any:
        return forward_vision.see(weights, images, config.vision, model.dtype, kernels)

    text = jax.jit(see).trace(weights, images).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@{triton_call.TARGET}(") == 4 * config.vision.depth

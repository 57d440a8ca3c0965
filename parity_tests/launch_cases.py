"""What JAX's launches of `pruner_kernels` compute, held against `kernels_plain` in float64.

Run as a program, it tries every case and prints what it found as JSON. Where there is no GPU,
Triton interprets: in a process of its own, since it is told so before it is imported. A launch is
then a callback, in compiled functions too.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity_tests.cases import BUDGETS, PRUNER_CASES, PRUNING, tiny_config
from parity_tests.harness import BACKENDS, DEVICE, draw_batch, error, others, parameters
from pruner_jax import (
    float8,
    kernels,
    kernels_autotune,
    kernels_float8,
    kernels_launch,
    kernels_plain,
    kernels_pointwise,
    kernels_pruner,
    kernels_vision,
    pruner,
    triton_call,
)
from pruner_jax.deployed import ExpertLayer
from pruner_jax.inference import Sampler
from pruner_jax.kernels_plain import Rows
from pruner_jax.pi0 import Encoded
from pruner_jax.tables import TableRow
from pruner_kernels import tiles
from pruner_spec import pruner as reference
from pruner_spec.config import GemmaVariant
from pruner_spec.inference import InferenceSettings

FULL = DEVICE == "cuda"
WAYS = kernels, kernels_plain
DTYPES = ("float32", "bfloat16")
STEPS, STEP = 3, 1  # the step that a launch is at
EPSILON = 1e-6
Row = dict[str, Any]


def interpreted(
    kernel: Any,
    arguments: Mapping[str, Any],
    *,
    grid: Sequence[int],
    aliases: Mapping[str, Any] | None = None,
    **_: int,
) -> tuple[Any, ...]:
    """`triton_call`, by Triton's interpreter; what a kernel has not written is NaN."""
    aliases = aliases or {}
    arrays = {
        name: value
        for name, value in arguments.items()
        if isinstance(value, jax.Array | np.ndarray)
    }
    arrays |= aliases
    specs = {
        name: value for name, value in arguments.items() if isinstance(value, jax.ShapeDtypeStruct)
    } | {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in aliases.items()}
    written = [name for name in kernel.arg_names if name in specs]

    def run(*values: Any) -> list[np.ndarray]:
        given = {name: tensor(value) for name, value in zip(arrays, values, strict=True)}
        for name in specs.keys() - aliases.keys():
            empty = np.full(specs[name].shape, np.nan, np.float32)
            given[name] = tensor(empty).to(getattr(torch, specs[name].dtype.name))
        kernel[(*grid, 1, 1)[:3]](**{**arguments, **given})
        assert not given.get("counters", torch.zeros(1)).any()
        return [BACKENDS["torch"].numpy(given[name]) for name in written]

    return tuple(jax.pure_callback(run, [specs[name] for name in written], *arrays.values()))


def tensor(value: Any) -> torch.Tensor:
    """A copy."""
    value = np.array(value)
    if value.dtype == jnp.bfloat16:
        return torch.from_numpy(value.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(value)


class Draw:
    """Random arrays, rounded to a dtype; and the same in float64."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.generator = jnp.dtype(dtype), np.random.default_rng(7)

    def __call__(self, *shape: int, wide: bool = False) -> jax.Array:
        values = self.generator.standard_normal(shape)
        return jnp.asarray(values, dtype=jnp.float32 if wide else self.dtype)

    def vector(self, size: int, tabled: bool, *, wide: bool = True) -> Any:
        """Of all steps, or one of a table."""
        if not tabled:
            return self(size, wide=wide)
        return TableRow(self(STEPS, size, wide=wide), jnp.int32(STEP))

    def rows(self, count: int, width: int, tabled: bool) -> Rows:
        rows = kernels_plain.scale_rows(self(count, width), self.vector(width, tabled))
        squares = rows.squares * jnp.asarray([[0.25], [0.5], [0.25]])  # in parts
        return Rows(rows.x, rows.scaled, squares)

    def kernel(self, inputs: int, outputs: int) -> jax.Array:
        """Not yet transposed."""
        return self(outputs, inputs) / np.sqrt(inputs).astype(self.dtype)


def double(tree: Any) -> Any:
    """Every float in float64."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def apart(function: str | Callable[..., Any], arrays: tuple[Any, ...], *rest: Any) -> float:
    """The largest error of a function's results; the first kernel in `arrays` is transposed.

    A function that has no name in `kernels` is told which way to take.
    """

    def call(way: Any) -> Any:
        named = (
            function if callable(function) else lambda way, *given: getattr(way, function)(*given)
        )

        def compute(*arrays: Any) -> Any:
            result = named(way, *arrays, *rest)
            if isinstance(result, Rows):  # whose parts are each way's own
                return [result.x, result.scaled, result.squares.sum(axis=0)]
            return jax.tree.leaves(result)

        return jax.jit(compute)

    with jax.enable_x64(True):
        expected = call(kernels_plain)(*double(arrays))
    found = call(kernels)(*arrays)
    pairs = zip(found, expected, strict=True)
    errors = [error(np.asarray(x).astype(np.float64), np.asarray(y)) for x, y in pairs]
    return float(np.max(errors))  # NaN, if any is


def products() -> Iterator[Row]:
    """One sample and several, with tables and without, parts that are shared and that are not.

    More than 128 rows are a library's products, and launches after them.
    """
    for dtype in DTYPES:
        for batch, length, width, tabled in (
            (1, 5, 64, True),
            (3, 7, 72, False),
            (1, 50, 512, True),
            (3, 45, 64, True),
            (2, 65, 72, False),
        ):
            draw, count = Draw(dtype), batch * length
            heads, groups, head_dim, room, place = 3, 2, 32, length + 4, 3
            rows, gate = draw.rows(count, width, tabled), None
            added = draw.vector((heads + 2 * groups) * head_dim, tabled)
            angles = (draw(batch, length, head_dim // 2, wide=True) for _ in range(2))
            cache = (draw(batch, room, groups, head_dim) for _ in range(2))
            stored = draw.kernel(width, (heads + 2 * groups) * head_dim)
            yield {
                "case": f"project {count} x {width}",
                "dtype": dtype,
                "error": apart("project", (rows, stored.T, added, *angles, *cache), place, heads),
            }
            stored, added = draw.kernel(width, 2 * 24), draw.vector(2 * 24, tabled)
            yield {
                "case": f"gated {count} x {width}",
                "dtype": dtype,
                "error": apart("gated", (rows, stored.T, None if width == 72 else added)),
            }
            gate = draw.vector(80, tabled, wide=False) if width != 72 else None
            stored, scale = draw.kernel(width, 80), draw.vector(80, tabled)
            yield {
                "case": f"merge {count} x {width}",
                "dtype": dtype,
                "error": apart(
                    "merge", (draw(count, width), stored.T, draw(count, 80), gate, scale)
                ),
            }


def pointwise() -> Iterator[Row]:
    """What stands around a library's products, as the prefix has it and as the suffix."""
    for dtype in DTYPES:
        for batch, length, width, heads, tabled in ((2, 5, 72, 3, True), (1, 3, 256, 8, False)):
            draw, count = Draw(dtype), batch * length
            groups, head_dim, inner = 2, 24, 1100
            size = f"{batch} x {length} x {width}, tabled {tabled}"
            rows = draw.rows(count, width, tabled)
            angles = [draw(batch, length, head_dim // 2, wide=True) for _ in range(2)]
            for behind, queries in itertools.product((0, 4), (heads, 0)):
                outputs = (queries + 2 * groups) * head_dim
                # Of few rows a product is wide.
                qkv, added = draw(count, outputs, wide=behind == 0), draw.vector(outputs, tabled)
                room, where = length + behind, f"{queries} queries, {behind} behind"
                cache = [draw(batch, room, groups, head_dim) for _ in range(2)]
                found = {
                    "": apart(
                        "rotate", (qkv, rows, added, *angles, *cache), min(behind, 3), queries
                    ),
                    ", new": apart(_new_keys, (qkv, rows, *angles), room, groups, queries),
                }
                for how, wrong in found.items():
                    yield {"case": f"rotate{how}, {where}, {size}", "dtype": dtype, "error": wrong}
            x, y = draw(count, width), draw(count, width, wide=tabled)
            scale, gate = draw.vector(width, tabled), draw.vector(width, tabled, wide=False)
            added = draw.vector(2 * inner, tabled)
            others = {
                "scale_rows": (x, scale),
                "add_scaled": (x, y, None, scale),
                "add_scaled, gate": (x, y, gate, scale),
                "gelu_product": (draw(count, 2 * inner), rows, None),
                "gelu_product, added": (draw(count, 2 * inner, wide=tabled), rows, added),
            }
            for name, given in others.items():
                yield {
                    "case": f"{name}, {size}",
                    "dtype": dtype,
                    "error": apart(name.partition(",")[0], given),
                }


def _new_keys(
    way: Any, qkv: Any, rows: Rows, cos: Any, sin: Any, room: int, groups: int, heads: int
) -> Any:
    """`rotate` into keys and values that are not there yet; what is behind them nobody wrote."""
    (batch, length, half), dtype = cos.shape, rows.x.dtype
    empty = jax.ShapeDtypeStruct((batch, room, groups, 2 * half), dtype)
    query, key, value = way.rotate(qkv, rows, None, cos, sin, empty, empty, 0, heads)
    assert key.shape == value.shape == empty.shape
    return query, key[:, :length], value[:, :length]


def attention() -> Iterator[Row]:
    """To all keys, and to as many as the mask has; by programs that share keys, and that do not."""
    for dtype in DTYPES:
        for batch, length, keys, room in ((1, 5, 200, 203), (2, 40, 70, 70), (3, 5, 33, 40)):
            draw = Draw(dtype)
            query, key, value = (
                draw(batch, length, 4, 32),
                *(draw(batch, room, 1, 32) for _ in "kv"),
            )
            mask = jnp.asarray(draw.generator.random((batch, keys)) < 0.7)
            for name, given in (("masked", mask), ("all", None)):
                yield {
                    "case": f"{name}, {batch} x {length} x {keys}",
                    "dtype": dtype,
                    "error": apart("attend", (query, key, value, given)),
                }


def ends() -> Iterator[Row]:
    """Embedding of actions, and Euler steps of samples with a token before their actions."""
    for dtype in DTYPES:
        for tabled in (True, False):
            draw, (batch, horizon, actions, width) = Draw(dtype), (2, 5, 7, 72)
            noisy, scale = draw(batch, horizon, actions, wide=True), draw.vector(width, tabled)
            inwards = draw(actions, width, wide=True), draw(width, wide=True)
            yield {
                "case": f"embed_actions, {tabled}",
                "dtype": dtype,
                "error": apart("embed_actions", (noisy, *inwards, scale), draw.dtype),
            }
            rows = draw.rows(batch * (horizon + 1), width, tabled)
            shift = draw.vector(width, tabled) if tabled else None
            outwards = draw(width, actions, wide=True), draw(actions, wide=True)
            yield {
                "case": f"euler_step, {tabled}",
                "dtype": dtype,
                "error": apart("euler_step", (rows, scale, shift, *outwards, noisy), -0.1),
            }


def vision() -> Iterator[Row]:
    """What stands between a block's products; rows and columns of whole tiles, and of parts."""
    for dtype in DTYPES:
        for (batch, patches, width, heads), tabled in itertools.product(
            ((2, 9, 72, 3), (1, 16, 256, 4), (1, 1, 6, 1)), (False, True)
        ):
            draw, size = Draw(dtype), f"{batch} x {patches} x {width}, tabled {tabled}"
            x, y = (draw(batch, patches, width) for _ in "xy")
            packed, bias = (draw.vector(n, tabled, wide=False) for n in (3 * width, width))
            norm = [draw.vector(width, tabled) for _ in range(2)]
            inputs = {
                "attend_patches": ((draw(batch, patches, 3 * width), packed), heads),
                "split_bias": ((draw(batch, patches, 3 * width), packed), heads),
                "gelu_bias": ((3 * x, bias),),
                "add_layer_norm": ((x, y, bias, *norm), EPSILON),
            }
            for name, given in inputs.items():
                yield {"case": f"{name}, {size}", "dtype": dtype, "error": apart(name, *given)}


def float8_rows() -> Iterator[Row]:
    """Rows of all sizes, one of zeros; how many values are others, and the product of all."""
    launch = kernels_float8.quantize_rows
    for dtype in DTYPES:
        for rows, width in ((3, 1152), (5, 80), (1, 16), (40, 2048)):
            draw = Draw(dtype)
            sizes = 10.0 ** draw.generator.integers(-6, 6, (rows, 1))
            sizes[rows // 2] *= rows == 1
            x = draw(rows, width) * jnp.asarray(sizes, draw.dtype)
            kernel = float8.quantize(draw(width, 48))
            with mock.patch.object(kernels_float8, "quantize_rows", wraps=launch) as called:
                product = jax.jit(kernels.product)(x, kernel)
            found, expected = (jax.jit(way.quantize_rows)(x) for way in (kernels_float8, float8))
            a, b = (dequantized(each) for each in (found, kernel))
            scale = np.asarray(expected.scale, np.float64)[:, None]
            size, values = np.maximum(scale, 1), [np.asarray(y.values) for y in (found, expected)]
            yield {
                "case": f"{rows} x {width}",
                "dtype": dtype,
                "called": called.call_count == 1,
                "scales": np.array_equal(found.scale, expected.scale),
                "others": others(*values, np.asarray(x).astype(np.float64) / scale),
                "product": error(np.asarray(product, np.float64) / size, a @ b.T / size),
            }


def dequantized(rows: float8.Quantized) -> np.ndarray:
    values, scale = (np.asarray(each).astype(np.float64) for each in (rows.values, rows.scale))
    return values * scale[:, None]


def pruning() -> Iterator[Row]:
    """Scores against the reference's, and the selection by given ones to the last bit."""
    for case in PRUNER_CASES.values():
        if case.patches > 256 and not FULL:
            continue
        inputs = case.inputs()
        patches, task = (jnp.asarray(x, jnp.bfloat16) for x in (inputs.patches, inputs.task))
        found = jax.jit(kernels_pruner.importance_score)(patches, task, inputs.task_mask)
        exact = (np.asarray(x).astype(np.float64) for x in (patches, task))
        expected = reference.importance_score(*exact, inputs.task_mask)
        yield {"case": case.name, "error": error(found, expected)}
        scores, mask = jnp.asarray(inputs.noise, jnp.float32), jnp.asarray(inputs.patch_mask)
        budget = jnp.arange(len(mask), dtype=jnp.int32)
        for name, given in {**BUDGETS, "a number each": {"keep_tokens": budget}}.items():
            how = given.get("keep_tokens"), given.get("min_keep", 1)
            expected = pruner._select(scores, mask, *how)
            elect = jax.jit(lambda *arrays, how=how: kernels_pruner.elect(*arrays, *how))
            kept, counts = elect(scores, mask)
            same = np.array_equal(kept, expected.kept) and np.array_equal(counts, expected.counts)
            yield {"case": f"{case.name}, {name}", "same": same}


def prefixes() -> Iterator[Row]:
    """Packed to few slots, and to all; NaN in a camera, and cameras that are not there."""
    for dtype, name in zip(DTYPES, ("implicit, joint", "5 a camera"), strict=True):
        config = tiny_config(dtype=dtype, **PRUNING[name])
        model = BACKENDS["jax"].model(config, parameters(config)).module
        draw, width = Draw(dtype), config.paligemma.width
        encoded = Encoded(
            patches=draw(3, 3, config.vision.num_patches, width).at[1, 2, 4, 0].set(jnp.nan),
            camera_mask=jnp.asarray(
                [[True, True, True], [True, False, True], [False, True, False]]
            ),
            prompt=draw(3, 21, width),
            prompt_mask=jnp.arange(21)[None, :] < jnp.asarray([[21], [9], [1]]),
        )
        healthy = dataclasses.replace(encoded, patches=jnp.nan_to_num(encoded.patches))
        agree = [jax.jit(model.select, static_argnums=1)(healthy, way) for way in WAYS]
        same = [jax.tree.leaves(each) for each in agree]
        equal = all(map(np.array_equal, *same))
        yield {"case": f"{name}, {dtype}", "same": equal}
        broken = dataclasses.replace(agree[1], counts=agree[1].counts.at[1, 0, 1].set(3))
        for room in (int(broken.kept.sum(axis=-1).max()), broken.kept.shape[1]):
            prune = jax.jit(model.prune, static_argnums=(2, 3))
            ways = [prune(encoded, broken, room, way) for way in WAYS]
            pairs = zip(*(jax.tree.leaves(each) for each in ways), strict=True)
            equal = all(
                x.dtype == y.dtype and np.array_equal(*(np.asarray(z, np.float64) for z in (x, y)),
                                                      equal_nan=True)
                for x, y in pairs
            )  # fmt: skip
            yield {"case": f"{name}, {dtype}, {room} slots", "same": equal}


def calls() -> Iterator[Row]:
    """Whole calls, with kernels and without."""

    def variant(width: int, mlp_dim: int) -> GemmaVariant:
        return GemmaVariant(
            width=width, depth=2, mlp_dim=mlp_dim, num_heads=3, num_kv_heads=1, head_dim=32,
            vocab_size=256,
        )  # fmt: skip

    for pi05 in (True, False):
        config = tiny_config(
            dtype="float32", pi05=pi05, token_pruning_enabled=True,
            paligemma_variant=variant(72, 136), action_expert_variant=variant(56, 104),
        )  # fmt: skip
        model, batch = BACKENDS["jax"].model(config, parameters(config)), draw_batch(config)
        noise, actions, launches = jnp.asarray(batch.noise), [], []
        for settings in (InferenceSettings(), InferenceSettings(kernels=False)):
            launch = kernels_launch.triton_call
            with mock.patch.object(kernels_launch, "triton_call", wraps=launch) as launched:
                sampler = Sampler(model.module, settings)
                actions.append(np.asarray(sampler.sample_actions(batch.observation, noise, 2)))
            launches.append(launched.call_count)
        yield {
            "case": "pi05" if pi05 else "pi0",
            "dtype": "float32",
            "error": error(*actions),
            "launches": launches,
        }


def tuned() -> Iterator[Row]:
    """All tiles that are tried for a layer: how far each is from the first."""
    rows, keys, heads, head_dim, width, inner = 5, 150, 3, 32, 96, 512
    for dtype in DTYPES:
        draw, layers = Draw(dtype), []
        for _ in range(2):
            qkv, out, gate_up, down = (
                draw.kernel(width, (heads + 2) * head_dim),
                draw.kernel(heads * head_dim, width),
                draw.kernel(width, 2 * inner),
                draw.kernel(inner, width),
            )
            layers.append(ExpertLayer(None, qkv, out, None, gate_up, down))
        results: dict[tiles.Key, list[Any]] = {}

        def seconds(run: Any, *inputs: Any, results: Any = results) -> float:
            (*_, key) = (*tiles._products, *tiles._attention)
            found = jax.jit(lambda *inputs: run(*inputs))(*inputs)
            results.setdefault(key, []).append(found)
            return 1 / len(results[key])

        with (
            mock.patch.object(kernels_autotune, "_seconds", seconds),
            mock.patch.object(tiles, "_products", {}),
            mock.patch.object(tiles, "_attention", {}),
        ):
            kernels_autotune.autotune(layers, rows, keys, head_dim)
        for key, (first, *rest) in results.items():
            yield {
                "case": str(key),
                "dtype": dtype,
                "candidates": 1 + len(rest),
                "error": max(_apart(each, first) for each in rest),
            }


def _apart(found: Any, expected: Any) -> float:
    """The largest error of the layers' results, held against those by other tiles."""
    is_rows = lambda x: isinstance(x, Rows)  # noqa: E731
    largest = []
    for pair in zip(
        *(jax.tree.leaves(each, is_leaf=is_rows) for each in (found, expected)), strict=True
    ):
        if isinstance(pair[0], Rows):  # squares are in parts, which are each way's own
            ours, theirs = ([x.x, x.scaled, x.squares.sum(axis=0)] for x in pair)
        else:
            ours, theirs = ([x] for x in pair)
        for x, y in zip(ours, theirs, strict=True):
            largest.append(error(*(np.asarray(each).astype(np.float64) for each in (x, y))))
    return max(largest)


FAMILIES = {
    family.__name__: family
    for family in (
        *(products, pointwise, attention, ends, vision, float8_rows),
        *(pruning, prefixes, calls, tuned),
    )
}


def main() -> None:
    BACKENDS["jax"].full_precision()
    if not FULL:
        assert os.environ.get("TRITON_INTERPRET") == "1"
        for module in (kernels_float8, kernels_launch, kernels_pointwise, kernels_vision):
            module.triton_call = interpreted
        kernels_pruner.triton_call = interpreted
        triton_call.available = lambda: True
    with np.errstate(all="ignore"):
        print(json.dumps({name: list(family()) for name, family in FAMILIES.items()}))


if __name__ == "__main__":
    main()

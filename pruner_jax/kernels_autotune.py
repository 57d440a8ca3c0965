"""The tiles of a denoising step's kernels, timed on the GPU at hand: the fastest are kept.

A candidate is timed over the weights of all layers, which are more than the L2 cache holds, in a
function that is compiled for it alone: tiles are looked up when a function is traced.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pruner_jax import kernels
from pruner_jax.kernels_plain import Rows
from pruner_kernels import tiles

if TYPE_CHECKING:
    from pruner_jax.deployed import ExpertLayer


def autotune(layers: "Sequence[ExpertLayer]", rows: int, keys: int | None, head_dim: int) -> None:
    """Times a few tiles of the layers' products and of their attention, and keeps the fastest.

    In this process, for these sizes; what was timed before is not timed again. Nothing is where
    Triton does not apply, or for more than `kernels.MAX_ROWS` rows. There are some 26 candidates,
    each of which is compiled first.

    Args:
        layers: of the action expert.
        rows: tokens of the suffix, of one sample.
        keys: that they attend to; None where no kernel attends.
        head_dim: of their heads.
    """
    first = layers[0]
    if rows > kernels.MAX_ROWS or not kernels.available(first.qkv):
        return
    from pruner_jax.kernels_launch import shared_memory  # here, since it imports Triton

    heads = first.out.shape[1] // head_dim
    groups = (len(first.qkv) // head_dim - heads) // 2
    shared, dtype = shared_memory(), first.qkv.dtype
    x, attended, activated = (
        _varied(dtype, rows, kernel.shape[1]) for kernel in (first.qkv, first.out, first.down)
    )
    angles = jnp.ones((1, rows, head_dim // 2), jnp.float32)
    cache = jnp.zeros((1, rows, groups, head_dim), dtype)
    scale, added, added_up = (
        jnp.ones(size, jnp.float32) for size in (x.shape[1], len(first.qkv), len(first.gate_up))
    )

    def tune(name: str, stored: Array, run: Callable[..., Any], *inputs: Any) -> None:
        seconds = functools.partial(_seconds, run, layers, *inputs)
        outputs, width = stored.shape
        tiles.tune_product(name, rows, width, outputs, dtype.itemsize, shared, seconds)

    def merge(inputs: Array, stored: Array) -> Rows:
        return kernels.merge(inputs, stored.T, x, scale, scale)

    tune("merge", first.out, lambda layers, y: [merge(y, each.out) for each in layers], attended)
    tune("merge", first.down, lambda layers, y: [merge(y, each.down) for each in layers], activated)
    given = Rows(x, x, _squares(x, activated, shared))

    def project(layers: Any, given: Any, key: Array, value: Array) -> list[Any]:
        queries = []
        for each in layers:
            turned = (added, angles, angles, key, value, 0, heads)
            query, key, value = kernels.project(given, each.qkv.T, *turned)
            queries.append(query)
        return [*queries, key, value]

    if head_dim % 32 == 0:  # else a library multiplies
        tune("project", first.qkv, project, given, cache, cache)
    tune(
        "gated",
        first.gate_up,
        lambda layers, given: [kernels.gated(given, each.gate_up.T, added_up) for each in layers],
        given,
    )
    if keys is None:
        return

    def attend(layers: Any, query: Array, key: Array, value: Array, mask: Array) -> Any:
        for _ in layers:  # each reads what the one before wrote: XLA launches what is alike once
            query = kernels.attend(query, key, value, mask).reshape(query.shape)
        return query

    query = _varied(dtype, rows, heads * head_dim).reshape(1, rows, heads, head_dim)
    key, value = (_varied(dtype, keys, head_dim).reshape(1, keys, 1, head_dim) for _ in "kv")
    inputs = (query, key, value, jnp.ones((1, keys), bool))
    seconds = functools.partial(_seconds, attend, layers, *inputs)
    tiles.tune_attention(1, rows * heads, keys, dtype.itemsize, shared, seconds)


def _squares(x: Array, inputs: Array, shared: int) -> Float[Array, "P R"]:
    """Sums of squares in as many parts as `merge` leaves them."""
    (rows, width), read = x.shape, inputs.shape[1]
    cut = tiles.product_tiles("merge", rows, read, width, x.dtype.itemsize, shared)
    parts = tiles.cdiv(width, cut.columns)
    return jnp.full((parts, rows), width / parts, jnp.float32)


def _varied(dtype: Any, rows: int, width: int) -> Float[Array, "rows width"]:
    """Numbers about 1 large."""
    place = jnp.arange(rows * width, dtype=jnp.float32)
    return jnp.cos(place).reshape(rows, width).astype(dtype)


def _seconds(run: Callable[..., Any], *inputs: Any) -> float:
    """How long a call of a function takes that is traced now."""
    # One launch after the other, as a step has them, also where XLA could launch several at once.
    options = {"xla_gpu_enable_command_buffer": ""}
    call = jax.jit(lambda *inputs: run(*inputs), compiler_options=options)

    def clocked(calls: int = 5) -> float:
        """Of a call, of which others follow: the host's part is done in the meantime."""
        started = time.perf_counter()
        for _ in range(calls - 1):
            call(*inputs)
        jax.block_until_ready(call(*inputs))
        return (time.perf_counter() - started) / calls

    clocked()  # compiles
    return statistics.median(clocked() for _ in range(12))

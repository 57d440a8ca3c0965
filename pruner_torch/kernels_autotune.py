"""The tiles of a denoising step's kernels, timed on the GPU at hand: the fastest are kept.

A candidate is timed as it will run: in a CUDA graph, over the weights of all layers, which are more
than the L2 cache holds.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from pruner_kernels import tiles
from pruner_torch import kernels
from pruner_torch.graphs import Graphs
from pruner_torch.kernels_plain import Rows

if TYPE_CHECKING:
    from pruner_torch.deployed import ExpertLayer


@torch.no_grad()
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
    from pruner_torch.kernels_launch import shared_memory  # here, since it imports Triton

    heads = len(first.out) // head_dim
    groups = (first.qkv.shape[1] // head_dim - heads) // 2
    shared = shared_memory(first.qkv.device)
    x, attended, activated = (
        _varied(first.qkv, rows, len(kernel)) for kernel in (first.qkv, first.out, first.down)
    )
    angles = torch.ones(1, rows, head_dim // 2, dtype=torch.float32, device=x.device)
    key, value = (x.new_zeros(1, rows, groups, head_dim) for _ in "kv")
    scale, added, added_up = (
        torch.ones(size, dtype=torch.float32, device=x.device)
        for size in (x.shape[1], first.qkv.shape[1], first.gate_up.shape[1])
    )

    def tune(name: str, kernel: Tensor, run: Callable[[], Any]) -> None:
        seconds = functools.partial(_seconds, run, x.device)
        inputs, outputs = kernel.shape
        tiles.tune_product(name, rows, inputs, outputs, x.itemsize, shared, seconds)

    def merge(inputs: Tensor, kernel: Tensor) -> Rows:
        return kernels.merge(inputs, kernel, x, scale, scale)

    with torch.cuda.device_of(x):
        tune("merge", first.out, lambda: [merge(attended, each.out) for each in layers])
        tune("merge", first.down, lambda: [merge(activated, each.down) for each in layers])
        given = Rows(x, x, _squares(x, activated, shared))

        def project() -> list[Any]:
            turned = (added, angles, angles, key, value, 0, heads)
            return [kernels.project(given, each.qkv, *turned)[0] for each in layers]

        if head_dim % 32 == 0:  # else a library multiplies
            tune("project", first.qkv, project)
        tune(
            "gated",
            first.gate_up,
            lambda: [kernels.gated(given, each.gate_up, added_up) for each in layers],
        )
        if keys is None:
            return
        query = _varied(x, rows, heads * head_dim).view(1, rows, heads, head_dim)
        past = [_varied(x, keys, head_dim).view(1, keys, 1, head_dim) for _ in "kv"]
        mask = torch.ones(1, keys, dtype=torch.bool, device=x.device)

        def attend() -> list[Tensor]:
            return [kernels.attend(query, past[0], past[1], mask) for _ in layers]

        seconds = functools.partial(_seconds, attend, x.device)
        tiles.tune_attention(1, rows * heads, keys, x.itemsize, shared, seconds)


def _squares(x: Tensor, inputs: Tensor, shared: int) -> Float[Tensor, "P R"]:
    """Sums of squares in as many parts as `merge` leaves them."""
    (rows, width), read = x.shape, inputs.shape[1]
    cut = tiles.product_tiles("merge", rows, read, width, x.itemsize, shared)
    parts = tiles.cdiv(width, cut.columns)
    return torch.full((parts, rows), width / parts, dtype=torch.float32, device=x.device)


def _varied(like: Tensor, rows: int, width: int) -> Float[Tensor, "rows width"]:
    """Numbers about 1 large."""
    place = torch.arange(rows * width, device=like.device, dtype=torch.float32)
    return place.cos().view(rows, width).to(like.dtype)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """How long launches take, in a CUDA graph."""
    from triton.testing import do_bench  # here, since it imports Triton

    graphs = Graphs(device, 1)
    replay = functools.partial(graphs, "tiles", None, run, ())
    milliseconds: Any = do_bench(replay, warmup=5, rep=30, return_mode="median")
    return 1e-3 * milliseconds

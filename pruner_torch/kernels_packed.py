"""Launches of `pruner_kernels/few_rows.cu`, of packed rows on Hopper.

Names and arguments are those of `kernels`, whose checks have passed. A launch begins while the one
before it still runs, and waits for it once all its weights are on their way.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pruner_kernels import driver, few_rows
from pruner_kernels.few_rows import Launch, packed_shape
from pruner_torch.kernels_plain import PackedQuery, Rows


def project(
    given: Rows,
    kernel: Float[Tensor, "D N"],
    added: Float[Tensor, "N"],
    cos: Float[Tensor, "B S half"],
    sin: Float[Tensor, "B S half"],
    key: Float[Tensor, "B T 1 H"],
    value: Float[Tensor, "B T 1 H"],
    place: int,
    num_heads: int,
) -> Float[Tensor, "B S K H"] | PackedQuery:
    """`kernels.project`."""
    (batch, length), (room, _, head_dim) = cos.shape[:2], key.shape[1:]
    _check_vectors(added, cos, sin)
    _check_adjacent(key, value)
    packed = few_rows.attends(place + length, head_dim)
    # Of one sample they begin at its first token, so that all prefixes have one launch.
    if batch == 1:
        key, value, room, place = key[:, place:], value[:, place:], length, 0
    shape = batch, length, num_heads, head_dim
    query = key.new_empty(few_rows.queries_shape(*shape) if packed else shape)
    rows, width = given.x.shape
    launch = few_rows.project(
        rows, width, len(given.squares), num_heads, head_dim, length, room, place, packed
    )
    turns = cos.contiguous(), sin.contiguous()
    _run(launch, given.scaled, given.squares, kernel, added, *turns, query, key, value)
    return PackedQuery(query, length, num_heads) if packed else query


def attend(
    query: PackedQuery,
    key: Float[Tensor, "B T 1 H"],
    value: Float[Tensor, "B T 1 H"],
    key_mask: Bool[Tensor, "B T"] | None,
) -> Float[Tensor, "K*H/32 4 N 8"]:
    """`kernels.attend`."""
    batch, keys, _, head_dim = key.shape
    length, heads = query.length, query.heads
    _check_adjacent(key, value)
    room = keys if batch == 1 else key.stride(0) // head_dim
    out = key.new_empty(packed_shape(batch * length, heads * head_dim))
    masked = key_mask is not None
    launch = few_rows.attend(batch, length, heads, head_dim, keys, room, masked)
    mask = key_mask.contiguous() if masked else None
    _run(launch, query.packed, key, value, mask, out)
    return out


def gated(
    given: Rows, gate_up: Float[Tensor, "D 2*F"], added: Float[Tensor, "2*F"]
) -> Float[Tensor, "F/32 4 N 8"]:
    """`kernels.gated`."""
    _check_vectors(added)
    (rows, width), places = given.x.shape, gate_up.shape[1] // 2
    out = given.x.new_empty(packed_shape(rows, places))
    launch = few_rows.gated(rows, width, len(given.squares), places)
    _run(launch, given.scaled, given.squares, gate_up, added, out)
    return out


def merge(
    x: Float[Tensor, "F/32 4 N 8"],
    kernel: Float[Tensor, "F D"],
    residual: Float[Tensor, "R D"],
    gate: Float[Tensor, "D"],
    scale: Float[Tensor, "D"],
) -> Rows:
    """`kernels.merge`."""
    _check_vectors(scale)
    _check_vectors(gate, dtype=x.dtype)
    (rows, width), inputs = residual.shape, len(kernel)
    out, scaled = x.new_empty(rows, width), x.new_empty(packed_shape(rows, width))
    squares = torch.empty(width // 64, rows, dtype=torch.float32, device=x.device)
    launch = few_rows.merge(rows, inputs, width)
    _run(launch, x, kernel, residual.contiguous(), gate, scale, out, scaled, squares)
    return Rows(out, scaled, squares)


def embed_actions(
    noisy: Float[Tensor, "R A"],
    kernel: Float[Tensor, "A E"],
    bias: Float[Tensor, "E"],
    scale: Float[Tensor, "E"],
    dtype: torch.dtype,
) -> Rows:
    """`kernels.embed_actions`."""
    _check_vectors(noisy, kernel, bias, scale)
    rows, (actions, width) = len(noisy), kernel.shape
    x = torch.empty(rows, width, dtype=dtype, device=noisy.device)
    scaled = x.new_empty(packed_shape(rows, width))
    squares = noisy.new_empty(1, rows)
    launch = few_rows.embed_actions(rows, actions, width)
    _run(launch, noisy.contiguous(), kernel, bias, scale, x, scaled, squares)
    return Rows(x, scaled, squares)


def euler_step(
    given: Rows,
    scale: Float[Tensor, "E"],
    shift: Float[Tensor, "E"] | None,
    kernel: Float[Tensor, "E A"],
    bias: Float[Tensor, "A"],
    noisy: Float[Tensor, "B H A"],
    step: float,
) -> Float[Tensor, "B H A"]:
    """`kernels.euler_step`, of all tokens."""
    _check_vectors(scale, shift, kernel, bias, noisy)
    out = torch.empty_like(noisy)
    (rows, width), actions = given.x.shape, noisy.shape[2]
    launch = few_rows.euler_step(rows, width, len(given.squares), actions, step)
    _run(launch, given.x, given.squares, scale, shift, kernel, bias, noisy, out)
    return out


def _check_adjacent(*caches: Float[Tensor, "B T 1 H"]) -> None:
    for cache in caches:
        head_dim = cache.shape[-1]
        if cache.stride()[1:] != (head_dim, head_dim, 1) or cache.stride(0) % head_dim:
            found = list(cache.stride())
            raise ValueError(f"expected adjacent keys and values, got strides {found}")


def _check_vectors(*vectors: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
    for vector in vectors:
        if vector is None or vector.dtype != dtype:
            found = "none" if vector is None else f"one in {vector.dtype}"
            raise ValueError(f"expected one in {dtype} beside packed rows, got {found}")


def _run(launch: Launch, *arguments: Tensor | None) -> None:
    """Launches on the current stream; None is a null pointer."""
    pointers = [0 if each is None else each.data_ptr() for each in arguments]
    stream, device = torch.cuda.current_stream().cuda_stream, torch.cuda.current_device()
    driver.run(launch, pointers, stream, device)

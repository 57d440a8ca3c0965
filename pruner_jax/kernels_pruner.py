"""Launches of `pruner_kernels.pruner`: the pruner at inference, from tokens to the packed prefix.

No gradients. Scores are rounded otherwise than the plain ones; the selection by given scores and
the prefix are the same to the last bit.

Dimension letters: B batch, C cameras, P pools, N patches (of a pool; in `pack_prefix` of all
cameras), M patches after pruning, T task tokens, D width.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pruner_jax.triton_call import triton_call
from pruner_kernels import pruner
from pruner_kernels.tiles import cdiv, election_tiles, power_of_two, score_tiles, weight_columns

MAX_TASK = 256  # tokens; a program holds the weights of all of them


def importance_score(
    patches: Float[Array, "P N D"],
    task: Float[Array, "P T D"],
    task_mask: Bool[Array, "P T"],
) -> Float[Array, "P N N"]:
    """`pruner.importance_score`, in float32; of bfloat16, float16 or float32."""
    (pools, count, width), length = patches.shape, task.shape[1]
    tile = score_tiles(length, width, patches.dtype.itemsize)
    rows = tile["ROWS"]
    logits, gram = triton_call(
        pruner.logits,
        {
            "patches": patches,
            "task": task,
            "logits": _output((pools, count, length), jnp.float32),
            "gram": _output((pools, length, length), jnp.float32),
            "count": count,
            "length": length,
            "patches_pool": count * width,
            "patches_row": width,
            "task_pool": length * width,
            "task_row": width,
            "WIDTH": width,
            **tile,
        },
        grid=(cdiv(count, rows) + cdiv(length, rows), cdiv(length, tile["COLUMNS"]), pools),
        num_stages=3,
    )
    block = max(power_of_two(length), 16)
    (scores,) = triton_call(
        pruner.scores,
        {
            "logits": logits,
            "gram": gram,
            "task_mask": task_mask,
            "scores": _output((pools, count, count), jnp.float32),
            "count": count,
            "length": length,
            "mask_pool": length,
            "mask_token": 1,
            "ROOT": math.sqrt(width),
            "ROWS": rows,
            "COLUMNS": weight_columns(length),
            "TASK": block,
        },
        grid=(cdiv(count, rows), pools),
        num_warps=4 if block <= 64 else 8,
    )
    return scores


def elect(
    scores: Float[Array, "P N N"],
    patch_mask: Bool[Array, "P N"],
    keep_tokens: int | Int[Array, "P"] | None,
    min_keep: int,
) -> tuple[Bool[Array, "P N"], Int[Array, "P 1 2"]]:
    """`pruner.Selection`'s `kept` and `counts`, by float32 scores; see `pruner.select_hard`."""
    pools, count = patch_mask.shape
    budget = None if keep_tokens is None or isinstance(keep_tokens, int) else keep_tokens
    kept, counts, *_ = triton_call(
        pruner.elect,
        {
            "scores": scores,
            "patch_mask": patch_mask,
            "budget": budget,
            "kept": _output((pools, count), jnp.bool_),
            "counts": _output((pools, 1, 2), jnp.int32),
            "votes_of": _output((pools, count), jnp.int32),
            "best_of": _output((pools, count), jnp.float32),
            "count": count,
            "keep_tokens": keep_tokens if isinstance(keep_tokens, int) else 0,
            "min_keep": min_keep,
            "mask_pool": count,
            "mask_patch": 1,
            "HAS_BUDGET": budget is not None,
            "HAS_KEEP": keep_tokens is not None,
            **election_tiles(count),
        },
        grid=(pools,),
        num_warps=8,
    )
    return kept, counts


def pack_prefix(
    patches: Float[Array, "B C N D"],
    prompt: Float[Array, "B L D"],
    camera_mask: Bool[Array, "B C"],
    prompt_mask: Bool[Array, "B L"],
    kept: Bool[Array, "B C*N"],
    counts: Int[Array, "B P 2"],
    capacity: int,
) -> tuple[
    Float[Array, "B S D"], Bool[Array, "B S"], Int[Array, "B S"], Int[Array, "B"]
]:  # fmt: skip
    """The fields of `pi0.Prefix`: the patches of a selection, packed to `capacity`, the prompt."""
    (batch, cameras, of_camera, width), length = patches.shape, prompt.shape[1]
    count, pools, size = kept.shape[1], counts.shape[1], capacity + length
    tokens, valid, positions, lengths = triton_call(
        pruner.pack_prefix,
        {
            "patches": patches,
            "prompt": prompt,
            "camera_mask": camera_mask,
            "prompt_mask": prompt_mask,
            "kept": kept,
            "counts": counts,
            "tokens": _output((batch, size, width), patches.dtype),
            "valid": _output((batch, size), jnp.bool_),
            "positions": _output((batch, size), jnp.int32),
            "lengths": _output((batch,), jnp.int32),
            "count": count,
            "length": length,
            "capacity": capacity,
            "pools": pools,
            "of_camera": of_camera,
            "patches_sample": count * width,
            "patches_row": width,
            "prompt_sample": length * width,
            "prompt_row": width,
            "camera_sample": cameras,
            "camera": 1,
            "mask_sample": length,
            "mask_token": 1,
            "WIDTH": width,
            "BLOCK": power_of_two(count),
            "PROMPT": power_of_two(length),
            "POOLS": power_of_two(pools),
            "COLUMNS": power_of_two(width),
        },
        grid=(size, batch),
    )
    return tokens, valid, positions, lengths


def _output(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)

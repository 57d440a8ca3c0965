"""Launches of `pruner_kernels.pruner`: the pruner at inference, from tokens to the packed prefix.

No gradients. Scores are rounded otherwise than the plain ones; the selection by given scores and
the prefix are the same to the last bit.

Dimension letters: B batch, C cameras, P pools, N patches (of a pool; in `pack_prefix` of all
cameras), M patches after pruning, T task tokens, D width.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pruner_kernels import pruner
from pruner_kernels.tiles import cdiv, election_tiles, power_of_two, score_tiles, weight_columns

MAX_TASK = 256  # tokens; a program holds the weights of all of them


def importance_score(
    patches: Float[Tensor, "P N D"],
    task: Float[Tensor, "P T D"],
    task_mask: Bool[Tensor, "P T"],
) -> Float[Tensor, "P N N"]:
    """`pruner.importance_score`, in float32; of bfloat16, float16 or float32, rows adjacent."""
    (pools, count, width), length, device = patches.shape, task.shape[1], patches.device
    patches, task = (x if x.stride(-1) == 1 else x.contiguous() for x in (patches, task))
    logits = torch.empty((pools, count, length), dtype=torch.float32, device=device)
    gram = torch.empty((pools, length, length), dtype=torch.float32, device=device)
    tile = score_tiles(length, width, patches.itemsize)
    rows = tile["ROWS"]
    tiles = cdiv(count, rows) + cdiv(length, rows)
    pruner.logits[(tiles, cdiv(length, tile["COLUMNS"]), pools)](
        patches, task, logits, gram, count, length, *patches.stride()[:2], *task.stride()[:2],
        WIDTH=width, **tile, num_warps=4, num_stages=3,
    )  # fmt: skip
    scores = torch.empty((pools, count, count), dtype=torch.float32, device=device)
    block = max(power_of_two(length), 16)
    pruner.scores[(cdiv(count, rows), pools)](
        logits, gram, task_mask, scores, count, length, *task_mask.stride(),
        ROOT=math.sqrt(width), ROWS=rows, COLUMNS=weight_columns(length), TASK=block,
        num_warps=4 if block <= 64 else 8,
    )  # fmt: skip
    return scores


def elect(
    scores: Float[Tensor, "P N N"],
    patch_mask: Bool[Tensor, "P N"],
    keep_tokens: int | Int[Tensor, "P"] | None,
    min_keep: int,
) -> tuple[Bool[Tensor, "P N"], Int[Tensor, "P 1 2"]]:
    """`pruner.Selection`'s `kept` and `counts`, by float32 scores; see `pruner.select_hard`."""
    (pools, count), device = patch_mask.shape, scores.device
    budget = keep_tokens if isinstance(keep_tokens, Tensor) else None
    keep = 0 if keep_tokens is None or budget is not None else int(keep_tokens)
    kept = torch.empty((pools, count), dtype=torch.bool, device=device)
    counts = torch.empty((pools, 1, 2), dtype=torch.int64, device=device)
    votes = torch.empty((pools, count), dtype=torch.int32, device=device)
    best = torch.empty((pools, count), dtype=torch.float32, device=device)
    pruner.elect[(pools,)](
        scores.contiguous(), patch_mask, budget, kept, counts, votes, best, count, keep, min_keep,
        *patch_mask.stride(), HAS_BUDGET=budget is not None, HAS_KEEP=keep_tokens is not None,
        **election_tiles(count), num_warps=8,
    )  # fmt: skip
    return kept, counts


def pack_prefix(
    patches: Float[Tensor, "B C N D"],
    prompt: Float[Tensor, "B L D"],
    camera_mask: Bool[Tensor, "B C"],
    prompt_mask: Bool[Tensor, "B L"],
    kept: Bool[Tensor, "B C*N"],
    counts: Int[Tensor, "B P 2"],
    capacity: int,
) -> tuple[
    Float[Tensor, "B S D"], Bool[Tensor, "B S"], Int[Tensor, "B S"], Int[Tensor, "B"]
]:  # fmt: skip
    """The fields of `pi0.Prefix`: the patches of a selection, packed to `capacity`, the prompt."""
    (batch, _, of_camera, width), length, device = patches.shape, prompt.shape[1], patches.device
    rows, count = patches.flatten(1, 2), kept.shape[1]
    rows, prompt = (x if x.stride(-1) == 1 else x.contiguous() for x in (rows, prompt))
    size = (batch, capacity + length)
    tokens = torch.empty((*size, width), dtype=patches.dtype, device=device)
    valid = torch.empty(size, dtype=torch.bool, device=device)
    positions = torch.empty(size, dtype=torch.int64, device=device)
    lengths = torch.empty(batch, dtype=torch.int64, device=device)
    pruner.pack_prefix[(size[1], batch)](
        rows, prompt, camera_mask, prompt_mask, kept.contiguous(), counts.contiguous(),
        tokens, valid, positions, lengths, count, length, capacity, counts.shape[1], of_camera,
        *rows.stride()[:2], *prompt.stride()[:2], *camera_mask.stride(), *prompt_mask.stride(),
        WIDTH=width, BLOCK=power_of_two(count), PROMPT=power_of_two(length),
        POOLS=power_of_two(counts.shape[1]), COLUMNS=power_of_two(width), num_warps=4,
    )  # fmt: skip
    return tokens, valid, positions, lengths

"""The pruner at inference, from tokens to the packed prefix in four launches.

What `pruner` and `Pi0.assemble` compute in both backends; a mask, a count or a position costs a
launch there, and each of the patches is read many times. The tokens are multiplied as they are, in
bfloat16 on tensor cores, whose products are exact in float32, and scaled by their root mean squares
afterwards.
"""

import triton.language as tl

from pruner_kernels.language import dot, jit
from pruner_spec.pruner import RMS_EPSILON

EPSILON = tl.constexpr(RMS_EPSILON)


@jit
def logits(
    patches, task, logits, gram, count, length, patches_pool, patches_row, task_pool, task_row,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A tile of rows, of a pool's patches or behind them of its task tokens, with task tokens."""
    pool = tl.program_id(2).to(tl.int64)
    tile = tl.program_id(0)
    tiles = tl.cdiv(count, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    task += pool * task_pool
    is_task = tile >= tiles
    x = patches + pool * patches_pool
    out = logits + pool * count * length
    if is_task:
        x = task
        out = gram + pool * length * length
    stride = tl.where(is_task, task_row, patches_row)
    rows = tl.where(is_task, length, count)
    row = tl.where(is_task, tile - tiles, tile) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    row_squares = tl.zeros((ROWS,), tl.float32)
    column_squares = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, WIDTH, INNER):
        k = start + tl.arange(0, INNER)
        inside = (k < WIDTH)[None, :]
        a = tl.load(x + row[:, None] * stride + k[None, :], mask=(row < rows)[:, None] & inside,
                    other=0)  # fmt: skip
        b = tl.load(task + column[:, None] * task_row + k[None, :],
                    mask=(column < length)[:, None] & inside, other=0)  # fmt: skip
        total = dot(a, b.T, total)
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        row_squares += tl.sum(wide_a * wide_a, axis=1)
        column_squares += tl.sum(wide_b * wide_b, axis=1)
    row_factor = tl.rsqrt(row_squares / WIDTH + EPSILON)
    column_factor = tl.rsqrt(column_squares / WIDTH + EPSILON) * (1 / WIDTH**0.5)
    y = total * row_factor[:, None] * column_factor[None, :]
    inside = (row < rows)[:, None] & (column < length)[None, :]
    tl.store(out + row[:, None] * length + column[None, :], y, mask=inside)


@jit
def scores(
    logits, gram, task_mask, scores, count, length, mask_pool, mask_token,
    ROOT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TASK: tl.constexpr,
):  # fmt: skip
    """A tile of rows of scores, from the logits of all patches."""
    pool = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, TASK)
    is_task = t < length
    is_valid = tl.load(task_mask + pool * mask_pool + t * mask_token, mask=is_task, other=0) != 0
    has_task = tl.max(is_valid.to(tl.int32), axis=0) > 0
    logits += pool * count * length
    gram += pool * length * length
    scores += pool * count * count

    place = logits + row[:, None] * length
    inside = (row < count)[:, None]
    mine = tl.load(place + t[None, :], mask=inside & is_task[None, :], other=0)
    mine = tl.where(is_valid[None, :], mine, float("-inf"))
    top = tl.max(mine, axis=1)
    weight = tl.exp(mine - top[:, None])
    sum = tl.sum(weight, axis=1)
    weight = weight / sum[:, None]

    square = tl.zeros((ROWS,), tl.float32)
    for start in range(0, length, COLUMNS):
        s = start + tl.arange(0, COLUMNS)
        both = (s < length)[:, None] & is_task[None, :]
        g = tl.load(gram + s[:, None] * length + t[None, :], mask=both, other=0)
        # The weights of these tokens, once more: a tile's columns cannot be cut out of another's.
        w = tl.load(place + s[None, :], mask=inside & (s < length)[None, :], other=0)
        of_s = task_mask + pool * mask_pool + s * mask_token
        visible = tl.load(of_s, mask=s < length, other=0) != 0
        w = tl.where(visible[None, :], w, float("-inf"))
        w = tl.exp(w - top[:, None]) / sum[:, None]
        square += tl.sum(dot(weight, g.T, tl.zeros((ROWS, COLUMNS), tl.float32)) * w, axis=1)
    factor = tl.rsqrt(tl.maximum(square, 0) / ROOT + EPSILON)

    for start in range(0, count, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        both = (j < count)[:, None] & is_task[None, :]
        theirs = tl.load(logits + j[:, None] * length + t[None, :], mask=both, other=0)
        found = dot(weight, theirs.T, tl.zeros((ROWS, COLUMNS), tl.float32)) * factor[:, None]
        own = tl.where(row[:, None] == j[None, :], ROOT, 0.0)
        found = tl.where(has_task, found, own)
        to = scores + row[:, None] * count + j[None, :]
        tl.store(to, found, mask=inside & (j < count)[None, :])


@jit
def elect(
    scores, patch_mask, budget, kept, counts, votes_of, best_of, count, keep_tokens, min_keep,
    mask_pool, mask_patch,
    HAS_BUDGET: tl.constexpr, HAS_KEEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pool: its ballot, and the ranks by it."""
    pool = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    is_j = j < count
    patch_mask += pool * mask_pool
    valid = tl.load(patch_mask + j * mask_patch, mask=is_j, other=0) != 0
    scores += pool * count * count
    votes_of += pool * count
    best_of += pool * count
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    votes = tl.zeros((BLOCK,), tl.int32)
    nonfinite = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, ROWS):
        i = start + tl.arange(0, ROWS)
        is_voter = tl.load(patch_mask + i * mask_patch, mask=i < count, other=0) != 0
        pair = is_voter[:, None] & valid[None, :]
        place = scores + i[:, None] * count + j[None, :]
        score = tl.load(place, mask=(i < count)[:, None] & is_j[None, :], other=0)
        finite = tl.abs(score) < float("inf")
        eligible = tl.where(pair & finite, score, float("-inf"))
        largest = tl.max(eligible, axis=1)[:, None]
        choice = tl.min(tl.where(eligible == largest, j[None, :], BLOCK), axis=1)
        # Where a row has no finite score its largest is -inf, and it casts no vote.
        voted = (choice[:, None] == j[None, :]) & (largest > float("-inf"))
        votes += tl.sum(voted.to(tl.int32), axis=0)
        best = tl.maximum(best, tl.max(eligible, axis=0))
        nonfinite += tl.sum((pair & (finite == 0)).to(tl.int32), axis=0)
    votes = tl.where(valid, votes, -1)

    # Each is compared with all, who come from memory in another order.
    tl.store(votes_of + j, votes, mask=is_j)
    tl.store(best_of + j, best, mask=is_j)
    tl.debug_barrier()
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, ROWS):
        i = start + tl.arange(0, ROWS)
        their_votes = tl.load(votes_of + i, mask=i < count, other=-2)[:, None]
        their_best = tl.load(best_of + i, mask=i < count, other=float("-inf"))[:, None]
        before = (their_best == best[None, :]) & (i[:, None] < j[None, :])
        before = (their_votes == votes[None, :]) & (before | (their_best > best[None, :]))
        rank += tl.sum((before | (their_votes > votes[None, :])).to(tl.int32), axis=0)
    if HAS_BUDGET:
        seats = tl.load(budget + pool).to(tl.int32)
    elif HAS_KEEP:
        seats = keep_tokens
    else:
        seats = tl.maximum(tl.sum((votes > 0).to(tl.int32), axis=0), min_keep)
    is_kept = (rank < seats) & valid
    tl.store(kept + pool * count + j, is_kept, mask=is_j)
    tl.store(counts + pool * 2, tl.sum(is_kept.to(tl.int32), axis=0).to(tl.int64))
    tl.store(counts + pool * 2 + 1, tl.sum(nonfinite, axis=0).to(tl.int64))


@jit
def pack_prefix(
    patches, prompt, camera_mask, prompt_mask, kept, counts, tokens, valid, positions, lengths,
    count, length, capacity, pools, of_camera, patches_sample, patches_row,
    prompt_sample, prompt_row, camera_sample, camera, mask_sample, mask_token,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PROMPT: tl.constexpr, POOLS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One token of the prefix."""
    slot = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, BLOCK)
    is_j = j < count
    is_kept = tl.load(kept + sample * count + j, mask=is_j, other=0) != 0
    of_j = camera_mask + sample * camera_sample + j // of_camera * camera
    is_patch = tl.load(of_j, mask=is_j, other=0) != 0
    t = tl.arange(0, PROMPT)
    of_t = prompt_mask + sample * mask_sample + t * mask_token
    is_token = tl.load(of_t, mask=t < length, other=0) != 0
    all_patches = tl.sum(is_patch.to(tl.int32), axis=0)

    if slot < capacity:
        # Patches that are kept, in their order; then the others in theirs.
        order = tl.cumsum(is_kept.to(tl.int32), axis=0)
        most = tl.sum(is_kept.to(tl.int32), axis=0)
        place = tl.where(is_kept, order - 1, most + j - order)
        index = tl.sum(tl.where((place == slot) & is_j, j, 0), axis=0)
        position = tl.sum((is_patch & (j <= index)).to(tl.int32), axis=0) - 1
        holds = slot < most
        source = patches + sample * patches_sample + index * patches_row
        p = tl.arange(0, POOLS)
        bad = tl.load(counts + (sample * pools + p) * 2 + 1, mask=p < pools, other=0)
        broken = tl.sum(bad, axis=0) > 0
    else:
        token = slot - capacity
        position = all_patches + tl.sum((is_token & (t <= token)).to(tl.int32), axis=0) - 1
        holds = tl.sum((is_token & (t == token)).to(tl.int32), axis=0) > 0
        source = prompt + sample * prompt_sample + token * prompt_row
        broken = slot < 0

    to = sample * (capacity + length) + slot
    k = tl.arange(0, COLUMNS)
    x = tl.load(source + k, mask=k < WIDTH, other=0)
    x = tl.where(broken, float("nan"), x.to(tl.float32)).to(x.dtype)
    tl.store(tokens + to * WIDTH + k, x, mask=k < WIDTH)
    tl.store(valid + to, holds)
    tl.store(positions + to, position.to(tl.int64))
    if slot == 0:
        tl.store(
            lengths + sample, (all_patches + tl.sum(is_token.to(tl.int32), axis=0)).to(tl.int64)
        )

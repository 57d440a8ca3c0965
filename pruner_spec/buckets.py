"""Static lengths for data of varying length, so that compiled functions are few.

Whatever is padded to a bucket carries a mask of what is valid, and the padding changes no result.
"""

from collections.abc import Sequence

PROMPT_BUCKETS = (16, 32, 48, 64, 96, 128, 160, 200, 256, 384, 512)
PATCH_BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768)


def bucket(length: int, buckets: Sequence[int], limit: int | None = None) -> int:
    """The smallest bucket that holds `length`, or `limit` where that is smaller.

    Args:
        length: how many entries must fit, >= 0.
        buckets: ascending lengths.
        limit: the length that there is; nothing is ever padded beyond it.

    Raises:
        ValueError: `length` is above the limit, or, without one, above the last bucket.
    """
    most = buckets[-1] if limit is None else limit
    if not 0 <= length <= most:
        raise ValueError(f"length: expected 0..{most}, got {length}")
    fitting = (size for size in buckets if size >= length)
    return min(next(fitting, most), most)

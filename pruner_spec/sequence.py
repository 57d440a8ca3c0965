"""Which tokens may attend to which, and where each one stands.

Written with operators and methods that NumPy, JAX and PyTorch arrays share, so that both backends
call these very functions on their own arrays.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from pruner_spec.config import Pi0Config

MASKED_LOGIT = -2.3819763e38  # openpi's; finite, so that no row is without a softmax

ROPE_MAX_WAVELENGTH = 10_000

Array = Any  # of NumPy, JAX or PyTorch


def attention_mask(valid: Array, block_start: Array) -> Array:
    """The block rule of π0: a token sees its own block and all blocks before it.

    Args:
        valid: bool [B, S], False for padding.
        block_start: bool [S] or [B, S], True where a new block begins.

    Returns:
        bool [B, S, S]; entry [b, i, j] says that token i may attend to token j. Tokens that are
        not valid neither attend nor are attended to.
    """
    block = block_start.cumsum(-1)
    visible = block[..., None, :] <= block[..., :, None]
    return visible & valid[:, None, :] & valid[:, :, None]


def positions(valid: Array) -> Array:
    """RoPE positions: how many valid tokens stand before each token of valid [..., S]."""
    return valid.cumsum(-1) - 1


def block_start(config: Pi0Config, place: Array, prefix_length: int) -> Array:
    """Where attention blocks begin in the sequence [prefix ; suffix].

    The actions are one block; in π0 the state token before them is another.

    Args:
        place: integer [S], 0, 1, 2 ... along the sequence.
        prefix_length: where the suffix begins.
    """
    starts = place == prefix_length
    return starts if config.pi05 else starts | (place == prefix_length + 1)


def rope_timescales(head_dim: int, dtype: str = "float32") -> Float[np.ndarray, "half_head_dim"]:
    """Positions per radian of each rotated pair, from 1 to nearly `ROPE_MAX_WAVELENGTH`.

    Args:
        head_dim: width of a head, even.
        dtype: "float32" or "float64", that of the angles.
    """
    exponents = np.dtype(dtype).type(2.0 / head_dim) * np.arange(head_dim // 2, dtype=dtype)
    # In float64, then rounded once: NumPy's power in float32 is not rounded correctly, XLA's is.
    return np.power(ROPE_MAX_WAVELENGTH, exponents, dtype=np.float64).astype(dtype)

"""Which patches were kept, as an answer carries it: a bit a patch, in bytes.

Bytes, since openpi's action-chunk broker cuts every array in an answer along its first axis.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool

KEY = "kept_bits"


def packed(kept: Bool[np.ndarray, "N"]) -> bytes:
    """The bits, the first patch's the highest of the first byte."""
    return np.packbits(kept).tobytes()


def kept_patches(answer: Mapping[str, Any]) -> dict[str, Bool[np.ndarray, "N"]]:
    """Which patches a policy's or a server's answer was made from, by camera.

    Nothing where it does not say: of a model that does not prune, or of another server.

    Raises:
        ValueError: it says something else.
    """
    pruning = answer.get("pruning", {})
    bits = pruning.get(KEY, {})
    patches = pruning["patches"] // len(bits) if bits else 0
    for camera, each in bits.items():
        if not isinstance(each, bytes) or len(each) != -(-patches // 8):
            found = f"{len(each)} {type(each).__name__}"
            raise ValueError(f"{KEY}/{camera}: expected bytes for {patches} patches, got {found}")
    return {
        camera: np.unpackbits(np.frombuffer(each, np.uint8))[:patches].astype(bool)
        for camera, each in bits.items()
    }

"""What the fast way computes of images, over `Deployed` weights; see `forward`.

Dimension letters: B images, N patches, D width, K heads.
"""

from types import ModuleType

import jax.numpy as jnp
from jaxtyping import Array, Float

from pruner_jax import kernels_plain
from pruner_jax.deployed import Affine, Norm, Vision, VisionBlock
from pruner_jax.layers import LAYER_NORM_EPSILON, wide
from pruner_jax.siglip import patchify
from pruner_jax.tables import value_of
from pruner_spec.config import VisionVariant


def see(
    weights: Vision,
    images: Float[Array, "B height width 3"],
    variant: VisionVariant,
    dtype: jnp.dtype,
    operations: ModuleType = kernels_plain,
) -> Float[Array, "B N D"]:
    """The vision tower: `SigLip.__call__`."""
    pixels = patchify(images.astype(wide(dtype)), variant.patch_size)
    x = apply_affine(pixels, weights.patch_embedding).astype(dtype)
    norms = [*(block.attention_norm for block in weights.blocks), weights.final_norm]
    normed = _layer_norm(x, norms[0])
    for block, following in zip(weights.blocks, norms[1:], strict=True):
        x, normed = _vision_block(block, following, x, normed, variant.num_heads, operations)
    return apply_affine(normed, weights.head)


def apply_affine(
    x: Float[Array, "*batch inputs"], affine: Affine
) -> Float[Array, "*batch outputs"]:
    """x · kernel + bias."""
    y = x @ affine.kernel
    return y if affine.bias is None else y + value_of(affine.bias)


def _vision_block(
    block: VisionBlock,
    following: Norm,
    x: Float[Array, "B N D"],
    normed: Float[Array, "B N D"],
    num_heads: int,
    operations: ModuleType,
) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"]]:
    """A block's output, and that through the norm of the block that follows; so are its inputs.

    Whoever reads a product adds its bias.
    """
    qkv = normed @ block.qkv.kernel
    attended = operations.attend_patches(qkv, block.qkv.bias, num_heads)
    x, normed = _add_layer_norm(x, attended, block.out, block.mlp_norm, operations)
    activated = operations.gelu_bias(normed @ block.up.kernel, block.up.bias)
    return _add_layer_norm(x, activated, block.down, following, operations)


def _add_layer_norm(
    x: Float[Array, "B N D"],
    y: Float[Array, "B N inputs"],
    affine: Affine,
    norm: Norm,
    operations: ModuleType,
) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"]]:
    """x + affine(y), and its layer norm."""
    product, bias = y @ affine.kernel, affine.bias
    vectors = (bias, norm.scale, norm.shift)
    return operations.add_layer_norm(x, product, *vectors, LAYER_NORM_EPSILON)


def _layer_norm(x: Float[Array, "B N D"], norm: Norm) -> Float[Array, "B N D"]:
    assert norm.shift is not None
    return kernels_plain.layer_norm(x, norm.scale, norm.shift, LAYER_NORM_EPSILON)

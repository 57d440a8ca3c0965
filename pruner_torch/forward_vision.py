"""What the fast way computes of images, over `Deployed` weights; see `forward`.

Dimension letters: B images, N patches, D width, K heads.
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pruner_spec.config import VisionVariant
from pruner_torch import kernels_plain
from pruner_torch.deployed import Affine, Norm, Vision, VisionBlock
from pruner_torch.layers import LAYER_NORM_EPSILON, gelu, wide
from pruner_torch.recomputation import optimized
from pruner_torch.siglip import patchify


def see(
    weights: Vision,
    images: Float[Tensor, "B height width 3"],
    variant: VisionVariant,
    dtype: torch.dtype,
    compiled: bool = False,
    operations: ModuleType = kernels_plain,
) -> Float[Tensor, "B N D"]:
    """The vision tower: `SigLip.__call__`."""
    pixels = patchify(images.to(wide(dtype)), variant.patch_size)
    x = apply_affine(pixels, weights.patch_embedding).to(dtype)
    block_of = optimized(_vision_block, compiled)
    norms = [*(block.attention_norm for block in weights.blocks), weights.final_norm]
    normed = _layer_norm(x, norms[0])
    for block, following in zip(weights.blocks, norms[1:], strict=True):
        x, normed = block_of(block, following, x, normed, variant.num_heads, operations)
    return apply_affine(normed, weights.head)


def apply_affine(
    x: Float[Tensor, "*batch inputs"], affine: Affine
) -> Float[Tensor, "*batch outputs"]:
    """x · kernel + bias."""
    if affine.bias is None or affine.bias.ndim == 1:
        return F.linear(x, affine.kernel.T, affine.bias)
    return x @ affine.kernel + affine.bias


def _vision_block(
    block: VisionBlock,
    following: Norm,
    x: Float[Tensor, "B N D"],
    normed: Float[Tensor, "B N D"],
    num_heads: int,
    operations: ModuleType,
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N D"]]:
    """A block's output, and that through the norm of the block that follows; so are its inputs."""
    qkv = apply_affine(normed, block.qkv)
    attended = operations.attend_patches(qkv, num_heads)
    x, normed = _add_layer_norm(x, apply_affine(attended, block.out), block.mlp_norm, operations)
    activated = _gelu_affine(normed, block.up)
    return _add_layer_norm(x, apply_affine(activated, block.down), following, operations)


def _add_layer_norm(
    x: Float[Tensor, "B N D"], y: Float[Tensor, "B N D"], norm: Norm, operations: ModuleType
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N D"]]:
    """x + y, and its layer norm."""
    assert norm.shift is not None
    return operations.add_layer_norm(x, y, norm.scale, norm.shift, LAYER_NORM_EPSILON)


def _gelu_affine(x: Float[Tensor, "B N inputs"], affine: Affine) -> Float[Tensor, "B N outputs"]:
    """GELU of a product. cuBLASLt has its tanh approximation; on a CPU the operation is exact."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    if affine.bias is None or not (x.is_cuda and half) or torch.compiler.is_compiling():
        return gelu(apply_affine(x, affine))
    rows = x.flatten(0, 1)
    return torch._addmm_activation(affine.bias, rows, affine.kernel, use_gelu=True).view(
        *x.shape[:2], -1
    )


def _layer_norm(x: Float[Tensor, "B N D"], norm: Norm) -> Float[Tensor, "B N D"]:
    return F.layer_norm(x, norm.scale.shape, norm.scale, norm.shift, LAYER_NORM_EPSILON)

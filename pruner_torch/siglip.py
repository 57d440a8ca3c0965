"""SigLIP, the vision tower: an image to patch tokens of the language model's width.

Dimension letters: B batch, N patches, P patch pixels, D width, K heads, H head dim.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from pruner_spec.config import VisionVariant
from pruner_spec.training import GradientCheckpointing
from pruner_torch.layers import LayerNorm, Linear, attend, gelu, stack, wide
from pruner_torch.recomputation import layer_function


class Attention(nn.Module):
    """Self-attention of all patches to all, with biases."""

    def __init__(self, variant: VisionVariant) -> None:
        super().__init__()
        self.num_heads = variant.num_heads
        self.query = Linear(variant.width, variant.width)
        self.key = Linear(variant.width, variant.width)
        self.value = Linear(variant.width, variant.width)
        self.out = Linear(variant.width, variant.width)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        q, k, v = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        return self.out(attend(q * q.shape[-1] ** -0.5, k, v))

    def _heads(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N K H"]:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)


class Mlp(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, variant: VisionVariant) -> None:
        super().__init__()
        self.up = Linear(variant.width, variant.mlp_dim)
        self.down = Linear(variant.mlp_dim, variant.width)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.down(gelu(self.up(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, variant: VisionVariant) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(variant.width)
        self.attention = Attention(variant)
        self.mlp_norm = LayerNorm(variant.width)
        self.mlp = Mlp(variant)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class SigLip(nn.Module):
    """The tower and its linear head; no pooling and no class token."""

    def __init__(self, variant: VisionVariant, outputs: int) -> None:
        super().__init__()
        self.patch_size = variant.patch_size
        self.patch_embedding = Linear(variant.patch_size**2 * 3, variant.width)
        self.position_embedding = nn.Parameter(torch.empty(variant.num_patches, variant.width))
        self.blocks = stack(lambda: Block(variant), variant.depth)
        self.final_norm = LayerNorm(variant.width)
        self.head = Linear(variant.width, outputs)

    def forward(
        self,
        images: Float[Tensor, "B height width 3"],
        dtype: torch.dtype,
        gradient_checkpointing: GradientCheckpointing = "none",
        compiled: bool = False,
    ) -> Float[Tensor, "B N D"]:
        """Patch tokens, row by row of the image.

        Args:
            images: in [-1, 1].
            dtype: of the blocks. Patches and positions are embedded in `wide` precision.
            gradient_checkpointing: what blocks compute again in the backward pass.
            compiled: whether blocks are.
        """
        x = self.patch_embedding(patchify(images.to(wide(dtype)), self.patch_size))
        x = (x + self.position_embedding.to(x.dtype)).to(dtype)
        apply = layer_function(_apply, gradient_checkpointing, compiled)
        for block in self.blocks:
            x = apply(block, x)
        return self.head(self.final_norm(x))


def _apply(block: Block, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    return block(x)


def patchify(
    images: Float[Tensor, "B height width 3"], patch_size: int
) -> Float[Tensor, "B N P*P*3"]:
    """The pixels of each patch, in (row, column, channel) order; the patch convolution's input.

    Pixels beyond the last whole patch are left out, as by a convolution without padding.
    """
    rows, columns = (size // patch_size for size in images.shape[1:3])
    whole = images[:, : rows * patch_size, : columns * patch_size]
    return rearrange(whole, "b (r p) (c q) d -> b (r c) (p q d)", p=patch_size, q=patch_size)

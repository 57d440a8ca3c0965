"""SigLIP, the vision tower: an image to patch tokens of the language model's width.

Dimension letters: B batch, N patches, P patch pixels, D width, K heads, H head dim.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from pruner_jax.layers import LayerNorm, Linear, attend, gelu, stack, wide
from pruner_jax.recomputation import layer_function
from pruner_spec.config import VisionVariant
from pruner_spec.training import GradientCheckpointing


class Attention(nnx.Module):
    """Self-attention of all patches to all, with biases."""

    def __init__(self, variant: VisionVariant) -> None:
        self.num_heads = variant.num_heads
        self.query = Linear(variant.width, variant.width)
        self.key = Linear(variant.width, variant.width)
        self.value = Linear(variant.width, variant.width)
        self.out = Linear(variant.width, variant.width)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        q, k, v = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        return self.out(attend(q * q.shape[-1] ** -0.5, k, v))

    def _heads(self, x: Float[Array, "B N D"]) -> Float[Array, "B N K H"]:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)


class Mlp(nnx.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, variant: VisionVariant) -> None:
        self.up = Linear(variant.width, variant.mlp_dim)
        self.down = Linear(variant.mlp_dim, variant.width)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        return self.down(gelu(self.up(x)))


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, variant: VisionVariant) -> None:
        self.attention_norm = LayerNorm(variant.width)
        self.attention = Attention(variant)
        self.mlp_norm = LayerNorm(variant.width)
        self.mlp = Mlp(variant)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class SigLip(nnx.Module):
    """The tower and its linear head; no pooling and no class token."""

    def __init__(self, variant: VisionVariant, outputs: int) -> None:
        self.patch_size = variant.patch_size
        self.patch_embedding = Linear(variant.patch_size**2 * 3, variant.width)
        self.position_embedding = nnx.Param(
            jnp.zeros((variant.num_patches, variant.width), jnp.float32)
        )
        self.blocks = stack(lambda: Block(variant), variant.depth)
        self.final_norm = LayerNorm(variant.width)
        self.head = Linear(variant.width, outputs)

    def __call__(
        self,
        images: Float[Array, "B height width 3"],
        dtype: jnp.dtype,
        gradient_checkpointing: GradientCheckpointing = "none",
    ) -> Float[Array, "B N D"]:
        """Patch tokens, row by row of the image.

        Args:
            images: in [-1, 1].
            dtype: of the blocks. Patches and positions are embedded in `wide` precision.
            gradient_checkpointing: what blocks compute again in the backward pass.
        """
        x = self.patch_embedding(patchify(images.astype(wide(dtype)), self.patch_size))
        x = (x + self.position_embedding[...].astype(x.dtype)).astype(dtype)
        graph, stacked = nnx.split(self.blocks)

        def block(x: Float[Array, "B N D"], weights: nnx.State) -> tuple[Array, None]:
            return nnx.merge(graph, weights)(x), None

        x, _ = jax.lax.scan(layer_function(block, gradient_checkpointing), x, stacked)
        return self.head(self.final_norm(x))


def patchify(
    images: Float[Array, "B height width 3"], patch_size: int
) -> Float[Array, "B N P*P*3"]:
    """The pixels of each patch, in (row, column, channel) order; the patch convolution's input.

    Pixels beyond the last whole patch are left out, as by a convolution without padding.
    """
    rows, columns = (size // patch_size for size in images.shape[1:3])
    whole = images[:, : rows * patch_size, : columns * patch_size]
    return rearrange(whole, "b (r p) (c q) d -> b (r c) (p q d)", p=patch_size, q=patch_size)

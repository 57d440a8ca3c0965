"""Low-rank adapters, as openpi applies them: see `pruner_spec.lora`.

What an adapter adds to its kernel is never formed: it has the kernel's size, and so would its
gradient.

Dimension letters: R rank, K heads.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pruner_spec.config import GemmaVariant
from pruner_spec.lora import A, B, adapter_scale, adapter_shapes


class Adapter(nnx.Module):
    """What the adapter of one kernel adds to the kernel's product.

    Args:
        projection: which kernel's, such as "attention.query" or "mlp.up".
        variant: the expert's, with adapters.
    """

    def __init__(self, projection: str, variant: GemmaVariant) -> None:
        assert variant.lora is not None
        shapes = adapter_shapes(projection, variant)
        self.a = nnx.Param(jnp.zeros(shapes[A], jnp.float32))
        self.b = nnx.Param(jnp.zeros(shapes[B], jnp.float32))
        self.scale = adapter_scale(f"layers.{projection}.kernel", variant.lora)
        self.sums_heads = projection == "attention.out"

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        y = self._product(x, self.a[...].astype(x.dtype), self.b[...].astype(x.dtype))
        return y if self.scale == 1 else y * self.scale

    def _product(
        self,
        x: Float[Array, "*batch inputs"],
        a: Float[Array, "*K _ R"],
        b: Float[Array, "*K R _"],
    ) -> Float[Array, "*batch outputs"]:
        if a.ndim == 2:
            return x @ a @ b
        if self.sums_heads:
            return x @ a.reshape(-1, a.shape[-1]) @ b.sum(axis=0)
        y = jnp.einsum("...kr,kro->...ko", jnp.einsum("...i,kir->...kr", x, a), b)
        return y.reshape(*x.shape[:-1], -1)

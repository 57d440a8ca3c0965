"""Low-rank adapters, as openpi applies them: see `pruner_spec.lora`.

What an adapter adds to its kernel is never formed: it has the kernel's size, and so would its
gradient.

Dimension letters: R rank, K heads.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruner_spec.config import GemmaVariant
from pruner_spec.lora import A, B, adapter_scale, adapter_shapes


class Adapter(nn.Module):
    """What the adapter of one kernel adds to the kernel's product.

    Args:
        projection: which kernel's, such as "attention.query" or "mlp.up".
        variant: the expert's, with adapters.
    """

    def __init__(self, projection: str, variant: GemmaVariant) -> None:
        super().__init__()
        assert variant.lora is not None
        shapes = adapter_shapes(projection, variant)
        self.a = nn.Parameter(torch.empty(shapes[A]))
        self.b = nn.Parameter(torch.empty(shapes[B]))
        self.scale = adapter_scale(f"layers.{projection}.kernel", variant.lora)
        self.sums_heads = projection == "attention.out"

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        y = self._product(x, self.a.to(x.dtype), self.b.to(x.dtype))
        # The scale is rounded first, as JAX rounds it.
        return y if self.scale == 1 else y * y.new_full((), self.scale)

    def _product(
        self,
        x: Float[Tensor, "*batch inputs"],
        a: Float[Tensor, "*K _ R"],
        b: Float[Tensor, "*K R _"],
    ) -> Float[Tensor, "*batch outputs"]:
        if a.ndim == 2:
            return x @ a @ b
        if self.sums_heads:
            return x @ a.flatten(0, 1) @ b.sum(dim=0)
        y = torch.einsum("...kr,kro->...ko", torch.einsum("...i,kir->...kr", x, a), b)
        return y.flatten(-2)

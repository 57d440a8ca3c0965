"""Low-rank adapters as openpi applies them, and what they add to a kernel.

In the attention every head has its own pair of factors (openpi adapts the einsum's weight, whose
first axis is the heads), in the MLP every kernel has one:

    query, key, value   x · a[k] · b[k], the output of head k
    out                 (sum over heads of x[k] · a[k]) · (sum over heads of b[k])
    MLP                 x · a · b

The second line is not a misprint. openpi derives its einsums from the kernel's "BTNH,NHD->BTD" by
putting the rank in the place of one axis, and so sums the heads away in each of the two; adding
a[k] · b[k] to every head's kernel would be another model.

Source: openpi, `models/lora.py`, `Einsum._make_lora_eqns` and `FeedForward._dot`.
"""

import numpy as np
from jaxtyping import Float

from pruner_spec.config import GemmaVariant, LoraVariant

A, B = "lora.a", "lora.b"


def is_adapter(name: str) -> bool:
    """Whether a parameter, by our name, is a factor of an adapter."""
    return name.endswith((f".{A}", f".{B}"))


def adapter_names(kernel: str) -> tuple[str, str]:
    """The names of the two factors beside a kernel, by our names."""
    module = kernel.removesuffix(".kernel")
    return f"{module}.{A}", f"{module}.{B}"


def adapter_shapes(projection: str, variant: GemmaVariant) -> dict[str, tuple[int, ...]]:
    """The shapes of one layer's factors.

    Args:
        projection: such as "attention.query" or "mlp.up".
        variant: the expert's, with adapters.
    """
    assert variant.lora is not None
    width, head_dim, rank = variant.width, variant.head_dim, variant.lora.rank
    if projection in ("attention.query", "attention.key", "attention.value"):
        heads = variant.num_heads if projection == "attention.query" else variant.num_kv_heads
        return {A: (heads, width, rank), B: (heads, rank, head_dim)}
    if projection == "attention.out":
        return {A: (variant.num_heads, head_dim, rank), B: (variant.num_heads, rank, width)}
    inputs, outputs = (
        (variant.mlp_dim, width)
        if projection == "mlp.down"
        else (
            width,
            variant.mlp_dim,
        )
    )
    return {A: (inputs, rank), B: (rank, outputs)}


def adapter_scale(name: str, variant: LoraVariant) -> float:
    """What an adapter is multiplied by, from the name of its kernel or of a factor."""
    return variant.scale if ".attention." in name else 1.0


def delta(
    kernel: str, a: Float[np.ndarray, "*a"], b: Float[np.ndarray, "*b"], scale: float
) -> Float[np.ndarray, "inputs outputs"]:
    """What one layer's adapter adds to its kernel, in the dtype of the factors.

    Args:
        kernel: the kernel's name, which says how the factors are applied.
        a: [heads, inputs, rank]; [inputs, rank] in the MLP.
        b: [heads, rank, outputs]; [rank, outputs] in the MLP.
        scale: see `adapter_scale`.
    """
    if a.ndim == 2:
        added = a @ b
    elif kernel.endswith(".out.kernel"):
        added = a.reshape(-1, a.shape[-1]) @ b.sum(axis=0)
    else:
        added = np.moveaxis(a @ b, 0, 1).reshape(a.shape[1], -1)
    return added * np.asarray(scale, dtype=added.dtype)

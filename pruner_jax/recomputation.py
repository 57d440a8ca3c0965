"""What a layer keeps for its backward pass, and what it computes again.

See `pruner_spec.training.GradientCheckpointing`.
"""

from collections.abc import Callable
from typing import Any

import jax

from pruner_spec.training import GradientCheckpointing


def layer_function(
    function: Callable[..., Any], keeps: GradientCheckpointing
) -> Callable[..., Any]:
    """A layer as a scan calls it in training: the same function, its backward pass as asked for.

    Args:
        function: a scan's.
        keeps: what it keeps for the backward pass.
    """
    if keeps == "none":
        return function
    policy = _is_product if keeps == "products" else None
    # A scan's body runs again in the backward pass anyway: nothing there can be merged with it.
    return jax.checkpoint(function, policy=policy, prevent_cse=False)


def _is_product(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    """Whether its results are kept, as `jax.checkpoint` asks for it.

    Attention's logits are no product here: they are as large as all that a layer keeps else.
    """
    if primitive.name.startswith("dot_product_attention_fwd"):
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
        primitive, *arguments, **parameters
    )

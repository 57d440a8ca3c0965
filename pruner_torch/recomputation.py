"""What a layer keeps for its backward pass, and what it computes again; and what is compiled.

See `pruner_spec.training.GradientCheckpointing`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from pruner_spec.training import GradientCheckpointing

# Attention's logits are no product here: they are as large as all that a layer keeps else.
_PRODUCTS = {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
}


@functools.cache
def layer_function(
    function: Callable[..., Any], keeps: GradientCheckpointing, compiled: bool
) -> Callable[..., Any]:
    """A layer as training calls it: the same function, its backward pass as it is asked for.

    Args:
        function: a layer, of modules and tensors; it is given back unchanged where nothing is
            computed again and nothing compiled.
        keeps: what it keeps for the backward pass.
        compiled: whether Inductor compiles it, once for all layers that are alike.
    """
    if keeps == "full":
        function = functools.partial(checkpoint, function, use_reentrant=False)
    if keeps == "products":
        contexts = functools.partial(create_selective_checkpoint_contexts, _choose)
        function = functools.partial(checkpoint, function, use_reentrant=False, context_fn=contexts)
    return optimized(function, compiled)


@functools.cache
def optimized(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """The function as Inductor compiles it, for every shape anew, or as it is."""
    return torch.compile(function, dynamic=False) if compiled else function


def _choose(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """As `create_selective_checkpoint_contexts` asks for it."""
    if operation in _PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE

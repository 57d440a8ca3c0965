"""The pieces both the vision tower and Gemma are built of.

Every layer computes in the dtype of what it is given and casts its parameters to that, so that the
same code runs float64, float32, bfloat16, and bfloat16 over float32 master weights.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Shaped

from pruner_jax.lora import Adapter
from pruner_spec.sequence import MASKED_LOGIT

LAYER_NORM_EPSILON = 1e-6

Module = TypeVar("Module", bound=nnx.Module)


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype for what bfloat16 is too coarse for: float32, or float64 in a float64 model."""
    return jnp.promote_types(dtype, jnp.float32)


def as_float(image: Shaped[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """An image in [-1, 1], which may be uint8."""
    is_bytes = image.dtype == jnp.uint8
    image = image.astype(dtype)
    return image / 255 * 2 - 1 if is_bytes else image


def constant(
    table: Callable[..., np.ndarray], sizes: tuple[int, ...], dtype: jnp.dtype
) -> Float[Array, "*shape"]:
    """A table of the spec, `table(*sizes, dtype's name)`, as an array."""
    return jnp.asarray(table(*sizes, jnp.dtype(dtype).name))


def stack(make: Callable[[], Module], layers: int) -> Module:
    """`layers` modules of one kind in one, their parameters stacked on the first axis."""
    graph, state = nnx.split(nnx.eval_shape(make))
    stacked = jax.tree.map(lambda leaf: jnp.zeros((layers, *leaf.shape), leaf.dtype), state)
    return nnx.merge(graph, stacked)


class Linear(nnx.Module):
    """y = x · kernel + bias, and what an adapter adds if there is one."""

    def __init__(
        self, inputs: int, outputs: int, *, use_bias: bool = True, lora: Adapter | None = None
    ) -> None:
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if use_bias else None
        self.lora = lora

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        y = x @ self.kernel[...].astype(x.dtype)
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        return y if self.lora is None else y + self.lora(x)


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias, computed in `wide` precision."""

    def __init__(self, width: int) -> None:
        self.scale = nnx.Param(jnp.zeros(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        dtype = wide(x.dtype)
        scale, bias = self.scale[...].astype(dtype), self.bias[...].astype(dtype)
        centred = x.astype(dtype) - x.astype(dtype).mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
        return (normed * scale + bias).astype(x.dtype)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """GELU in its tanh approximation."""
    return nnx.gelu(x, approximate=True)


def attend(
    query: Float[Array, "B S K H"],
    key: Float[Array, "B T G H"],
    value: Float[Array, "B T G H"],
    mask: Bool[Array, "B S T"] | None = None,
) -> Float[Array, "B S K*H"]:
    """Softmax attention of queries that are scaled already; K is a multiple of G.

    Logits and softmax are in `wide` precision. A row with nothing to attend to averages all
    values, as in openpi.
    """
    if _has_flash_attention(query):
        return _flash_attend(query, key, value, mask)
    batch, length, heads, head_dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, head_dim)
    logits = jnp.einsum("bsgkh,btgh->bgkst", grouped, key, preferred_element_type=wide(query.dtype))
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    attended = jnp.einsum("bgkst,btgh->bsgkh", weights, value)
    return attended.reshape(batch, length, heads * head_dim)


def _has_flash_attention(query: Float[Array, "B S K H"]) -> bool:
    """Whether cuDNN has a kernel for these: on NVIDIA's GPUs, in half precision."""
    device = jax.devices()[0]
    if device.platform != "gpu" or query.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    if "cuda" not in device.client.platform_version:
        return False
    generation = float(device.compute_capability)
    largest = 256 if generation >= 9 else 128  # Hopper's, Ampere's
    return generation >= 8 and query.shape[-1] <= largest and query.shape[-1] % 8 == 0


def _flash_attend(
    query: Float[Array, "B S K H"],
    key: Float[Array, "B T G H"],
    value: Float[Array, "B T G H"],
    mask: Bool[Array, "B S T"] | None,
) -> Float[Array, "B S K*H"]:
    """`attend` with cuDNN, which has no logits in memory."""
    length, bias = query.shape[1], None
    if mask is not None:
        # With a bias its backward pass wants even lengths; nobody attends to what is added.
        query, key, value = (_even(x, (1,)) for x in (query, key, value))
        # A finite number as large as this absorbs any logit, and leaves no row without a softmax.
        bias = jnp.where(_even(mask, (1, 2)), 0, MASKED_LOGIT).astype(query.dtype)[:, None]
    attended = jax.nn.dot_product_attention(
        query, key, value, bias=bias, scale=1.0, implementation="cudnn"
    )
    return attended[:, :length].reshape(len(query), length, -1)


def _even(x: Shaped[Array, "*shape"], axes: tuple[int, ...]) -> Shaped[Array, "*shape"]:
    """With zeros at the end of those axes whose length is odd."""
    return jnp.pad(x, [(0, x.shape[axis] % 2 * (axis in axes)) for axis in range(x.ndim)])

"""The chain of a Gemma layer at inference, and of a vision block, in Triton where it applies.

A denoising step multiplies 50 rows with 0.6 GB of weights and does little else: it is bound by
memory and by launches, so each function here is one launch that reads each weight once. Of many
rows a library's product is as fast, and Triton computes what stands around it.

Triton applies in functions that `jax.jit` compiles for NVIDIA GPUs from Ampere on, in bfloat16 and
float32. Elsewhere the functions compute the same with JAX's operations (`kernels_plain`). The
kernels themselves are `pruner_kernels`'s, which PyTorch launches too.

`project`, `gated` and `merge` take a `kernel` that lies in memory outputs first: `stored.T`, of an
array [outputs, inputs], which XLA does not compute. Of few rows they would copy any other. In the
prefix kernels lie inputs first, so there a library multiplies however few the rows are: `product`,
and what follows it is `rotate`, `gelu_product` or `add_scaled`.

On Hopper π0.5's denoising steps launch none of these, but a `Chain`'s: see `packs`.

No gradients. Triton compiles a kernel when a program is lowered (seconds, kept on disk). Two calls
with the same numbers give the same bits.

Dimension letters: R rows, B batch, S tokens, T room for keys, D width, N outputs, F MLP, K heads,
G kv heads, H head_dim (of actions: horizon), A action dim, E width of the action expert.
In a vision block N are patches.
"""

from types import ModuleType
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pruner_jax import kernels_plain as plain
from pruner_jax import triton_call
from pruner_jax.float8 import Quantized
from pruner_jax.kernels_plain import MAX_ROWS, Rows
from pruner_jax.layers import attend as attend_all
from pruner_jax.tables import TableRow
from pruner_kernels import few_rows, tiles

if TYPE_CHECKING:
    from pruner_jax.deployed import ExpertLayer

_DTYPES = (jnp.bfloat16, jnp.float32)


def available(tensor: Array) -> bool:
    """Whether the Triton kernels apply to arrays like this one."""
    return tensor.dtype in _DTYPES and triton_call.available()


def _launch() -> ModuleType:
    from pruner_jax import kernels_launch  # here, since it imports Triton

    return kernels_launch


def _vision() -> ModuleType:
    from pruner_jax import kernels_vision

    return kernels_vision


def _pointwise() -> ModuleType:
    from pruner_jax import kernels_pointwise

    return kernels_pointwise


def packs(rows: int, layer: "ExpertLayer", head_dim: int, actions: int) -> bool:
    """Whether a layer's products are the fastest of packed rows, as a `Chain` launches them.

    A Hopper GPU in bfloat16, few rows, and sizes like those of an action expert.

    Args:
        rows: tokens of all samples.
        layer: its kernels, outputs first.
        head_dim: of its heads.
        actions: numbers of an action.
    """
    major, minor = few_rows.CAPABILITY
    if not available(layer.qkv) or triton_call.capability() != 10 * major + minor:
        return False
    (outputs, width), heads = layer.qkv.shape, layer.out.shape[1] // head_dim
    groups, mlp = (outputs // head_dim - heads) // 2, layer.down.shape[1]
    sizes = rows, width, mlp, heads, groups, head_dim, 8 * layer.qkv.dtype.itemsize
    if not (few_rows.applies(*sizes) and few_rows.steps(actions)):
        return False
    return few_rows.compiles(few_rows.gated(rows, width, width // 64, mlp))


def product(x: Float[Array, "R D"], kernel: Float[Array, "D N"] | Quantized) -> Float[Array, "R N"]:
    """x · kernel, a library's; what Triton does is to round x where the kernel is in float8.

    Args:
        x: of many tokens; of few the result may be in `wide` precision.
        kernel: of x's dtype, or in float8.
    """
    if not available(x):
        return plain.product(x, kernel)
    from pruner_jax import kernels_float8  # here, since it imports Triton

    return kernels_float8.product(x, kernel)


def scale_rows(x: Float[Array, "R D"], scale: Float[Array, "D"] | TableRow) -> Rows:
    """Hidden states as a norm with this scale takes them.

    Args:
        x: of R tokens.
        scale: in `wide` precision, with the one of "one plus scale" in it.
    """
    if not available(x):
        return plain.scale_rows(x, scale)
    return _pointwise().add_scaled(x, None, None, scale)


def rotate(
    qkv: Float[Array, "R N"],
    rows: Rows,
    added: Float[Array, "N"] | TableRow | None,
    cos: Float[Array, "B S half"],
    sin: Float[Array, "B S half"],
    key: Float[Array, "B T G H"] | jax.ShapeDtypeStruct,
    value: Float[Array, "B T G H"] | jax.ShapeDtypeStruct,
    place: int,
    num_heads: int,
) -> tuple[Float[Array, "B S K H"], Float[Array, "B T G H"], Float[Array, "B T G H"]]:
    """What `project` does to its product.

    Args:
        qkv: `rows.scaled` times the kernel.
        rows, added, cos, sin, place, num_heads: as in `project`.
        key, value: as in `project`; or, where there are none yet, what they are to be. All but
            these S tokens are then undefined, for someone to write before they are read.
    """
    call = _pointwise().rotate if available(rows.x) else plain.rotate
    return call(qkv, rows, added, cos, sin, key, value, place, num_heads)


def gelu_product(
    gate_up: Float[Array, "R 2*F"], rows: Rows, added: Float[Array, "2*F"] | TableRow | None
) -> Float[Array, "R F"]:
    """What `gated` does to its product.

    Args:
        gate_up: `rows.scaled` times the kernel.
        rows, added: as in `gated`.
    """
    call = _pointwise().gelu_product if available(rows.x) else plain.gelu_product
    return call(gate_up, rows, added)


def add_scaled(
    x: Float[Array, "R D"],
    added: Float[Array, "R D"],
    gate: Float[Array, "D"] | TableRow | None,
    scale: Float[Array, "D"] | TableRow,
) -> Rows:
    """x + added * gate, as the norm that follows takes it: what `merge` does to its product.

    Args:
        x: the residual.
        added: the product.
        gate, scale: as in `merge`.
    """
    call = _pointwise().add_scaled if available(x) else plain.add_scaled
    return call(x, added, gate, scale)


def project(
    rows: Rows,
    kernel: Float[Array, "D N"],
    added: Float[Array, "N"] | TableRow | None,
    cos: Float[Array, "B S half"],
    sin: Float[Array, "B S half"],
    key: Float[Array, "B T G H"],
    value: Float[Array, "B T G H"],
    place: int,
    num_heads: int,
) -> tuple[Float[Array, "B S K H"], Float[Array, "B T G H"], Float[Array, "B T G H"]]:
    """A norm, a packed projection, RoPE of queries and keys over the halves of a head.

    Args:
        rows: of B * S tokens.
        kernel: heads of queries, then of keys, then of values.
        added: the norm's shift times the kernel, in `wide` precision; None for none.
        cos, sin: in `wide` precision.
        key, value: of T tokens, of which S from `place` on are replaced.
        place: of the first token.
        num_heads: K; 0 for keys and values alone.

    Returns:
        queries, `key`, `value`; the last two in place, where nobody reads what they were before.
    """
    fits = _is_of_few(rows.x) and num_heads > 0 and key.shape[-1] % 32 == 0
    if fits:
        return _launch().project(rows, kernel, added, cos, sin, key, value, place, num_heads)
    qkv = product(rows.scaled, kernel)
    return rotate(qkv, rows, added, cos, sin, key, value, place, num_heads)


def gated(
    rows: Rows, gate_up: Float[Array, "D 2*F"], added: Float[Array, "2*F"] | TableRow | None
) -> Float[Array, "R F"]:
    """A norm, gate and up in one product, gelu(gate) * up; GELU in its tanh approximation.

    Args:
        rows: as in `project`.
        gate_up: the gate first.
        added: as in `project`.
    """
    if _is_of_few(rows.x):
        return _launch().gated(rows, gate_up, added)
    return gelu_product(product(rows.scaled, gate_up), rows, added)


def merge(
    x: Float[Array, "R F"],
    kernel: Float[Array, "F D"],
    residual: Float[Array, "R D"],
    gate: Float[Array, "D"] | TableRow | None,
    scale: Float[Array, "D"] | TableRow,
) -> Rows:
    """residual + (x · kernel) * gate, rounded once, as the norm that follows takes it.

    Args:
        x: of R tokens.
        kernel: of x's dtype.
        residual: like the result.
        gate: of any dtype; None for 1.
        scale: of the norm that follows, as in `scale_rows`.
    """
    if _is_of_few(x):
        return _launch().merge(x, kernel, residual, gate, scale)
    return add_scaled(residual, product(x, kernel), gate, scale)


def attend(
    query: Float[Array, "B S K H"],
    key: Float[Array, "B T 1 H"],
    value: Float[Array, "B T 1 H"],
    key_mask: Bool[Array, "B _"] | None,
) -> Float[Array, "B S K*H"]:
    """Softmax attention of queries that are scaled already, all heads to the same keys.

    Args:
        query: of S tokens.
        key, value: values of masked keys are to be finite: they are multiplied by 0.
        key_mask: False for keys that nobody attends to; where all are, values are averaged. Keys
            past its end are not there. None for all T.
    """
    call = _launch().attend if available(query) else plain.attend
    return call(query, key, value, key_mask)


def embed_actions(
    noisy: Float[Array, "B H A"],
    kernel: Float[Array, "A E"],
    bias: Float[Array, "E"],
    scale: Float[Array, "E"] | TableRow,
    dtype: jnp.dtype,
) -> Rows:
    """Tokens of noisy actions, as the first norm takes them; `wide` until they are written.

    Args:
        noisy, kernel, bias: in `wide` precision.
        scale: as in `scale_rows`.
        dtype: of the tokens.
    """
    if not available(noisy):
        return plain.embed_actions(noisy, kernel, bias, scale, dtype)
    return _launch().embed_actions(noisy.reshape(-1, len(kernel)), kernel, bias, scale, dtype)


def euler_step(
    rows: Rows,
    scale: Float[Array, "E"] | TableRow,
    shift: Float[Array, "E"] | TableRow | None,
    kernel: Float[Array, "E A"],
    bias: Float[Array, "A"],
    noisy: Float[Array, "B H A"],
    step: float,
) -> Float[Array, "B H A"]:
    """noisy + step * velocity: the final norm, and a map in `wide` precision.

    Args:
        rows: of B samples, each of whose last H tokens are its actions.
        scale, shift: of the final norm, in `wide` precision.
        kernel, bias, noisy: in `wide` precision.
        step: dt, negative.
    """
    is_here = available(noisy) and available(rows.x)
    call = _launch().euler_step if is_here else plain.euler_step
    return call(rows, scale, shift, kernel, bias, noisy, step)


def attend_patches(
    qkv: Float[Array, "B N 3*D"], bias: Float[Array, "3*D"] | TableRow, num_heads: int
) -> Float[Array, "B N D"]:
    """Softmax attention of an image's patches to each other.

    Args:
        qkv: a packed projection without its bias: heads of queries, then of keys, then of values.
        bias: of qkv.
        num_heads: K.
    """
    if available(qkv) and tiles.has_patch_tiles(len(qkv), qkv.dtype.itemsize):
        return _vision().attend_patches(qkv, bias, num_heads)
    return attend_all(*split_bias(qkv, bias, num_heads))


def split_bias(
    x: Float[Array, "B N 3*D"], bias: Float[Array, "3*D"] | TableRow, num_heads: int
) -> tuple[Float[Array, "B N K H"], Float[Array, "B N K H"], Float[Array, "B N K H"]]:
    """Queries, keys and values of a packed projection, which comes without its bias.

    Args:
        x: heads of queries, then of keys, then of values.
        bias: of x.
        num_heads: K.

    Returns:
        queries, scaled by head_dim^-0.5; keys; values.
    """
    call = _vision().split_bias if available(x) else plain.split_bias
    return call(x, bias, num_heads)


def gelu_bias(
    x: Float[Array, "B N F"], bias: Float[Array, "F"] | TableRow
) -> Float[Array, "B N F"]:
    """gelu(x + bias), in its tanh approximation."""
    call = _vision().gelu_bias if available(x) else plain.gelu_bias
    return call(x, bias)


def add_layer_norm(
    x: Float[Array, "B N D"],
    y: Float[Array, "B N D"],
    bias: Float[Array, "D"] | TableRow,
    scale: Float[Array, "D"] | TableRow,
    shift: Float[Array, "D"] | TableRow,
    epsilon: float,
) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"]]:
    """x + y + bias in x's dtype, and its layer norm, computed in `wide` precision.

    Args:
        x: of a residual stream.
        y: a product without its bias.
        bias: of y.
        scale, shift: of the norm, of any dtype.
        epsilon: added to the variance.
    """
    call = _vision().add_layer_norm if available(x) else plain.add_layer_norm
    return call(x, y, bias, scale, shift, epsilon)


def _is_of_few(x: Float[Array, "R D"]) -> bool:
    return available(x) and 0 < len(x) <= MAX_ROWS

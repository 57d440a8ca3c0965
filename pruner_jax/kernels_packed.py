"""Launches of `pruner_kernels/few_rows.cu`, of packed rows on Hopper.

Names and arguments are those of `kernels`. Each finds its vectors in tables, all at one step. XLA
launches one after the other, so that not all weights are asked for ahead.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from pruner_jax.kernels_plain import PackedQuery, Rows
from pruner_jax.tables import TableRow
from pruner_jax.triton_call import Compiled, launched
from pruner_kernels import few_rows
from pruner_kernels.few_rows import Launch, packed_shape


def project(
    given: Rows,
    kernel: Float[Array, "D N"],
    added: TableRow,
    cos: Float[Array, "B S half"],
    sin: Float[Array, "B S half"],
    key: Float[Array, "B T 1 H"],
    value: Float[Array, "B T 1 H"],
    place: int,
    num_heads: int,
) -> tuple[Float[Array, "B S K H"] | PackedQuery, Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]:
    """`kernels.project`."""
    (batch, length), (room, _, head_dim) = cos.shape[:2], key.shape[1:]
    rows, width = given.x.shape
    packed = few_rows.attends(place + length, head_dim)
    launch = few_rows.project(
        rows, width, len(given.squares), num_heads, head_dim, length, room, place, packed
    )
    shape = batch, length, num_heads, head_dim
    query = jax.ShapeDtypeStruct(few_rows.queries_shape(*shape) if packed else shape, key.dtype)
    given_arrays = {
        **_normed(given, kernel, added),
        "cos": cos,
        "sin": sin,
        "key": key,
        "value": value,
    }
    query, key, value = _run(launch, given_arrays, {"query": query, "key": key, "value": value})
    return PackedQuery(query, length, num_heads) if packed else query, key, value


def attend(
    query: PackedQuery,
    key: Float[Array, "B T 1 H"],
    value: Float[Array, "B T 1 H"],
    key_mask: Bool[Array, "B _"] | None,
) -> Float[Array, "K*H/32 4 N 8"]:
    """`kernels.attend`."""
    batch, room, _, head_dim = key.shape
    length, heads, masked = query.length, query.heads, key_mask is not None
    mask = jnp.zeros((batch, room), bool) if key_mask is None else key_mask  # or of no meaning
    launch = few_rows.attend(batch, length, heads, head_dim, mask.shape[1], room, masked)
    out = jax.ShapeDtypeStruct(packed_shape(batch * length, heads * head_dim), key.dtype)
    given = {"query": query.packed, "key": key, "value": value, "mask": mask}
    (out,) = _run(launch, given, {"out": out})
    return out


def gated(
    given: Rows, gate_up: Float[Array, "D 2*F"], added: TableRow
) -> Float[Array, "F/32 4 N 8"]:
    """`kernels.gated`."""
    (rows, width), places = given.x.shape, gate_up.shape[1] // 2
    launch = few_rows.gated(rows, width, len(given.squares), places)
    out = jax.ShapeDtypeStruct(packed_shape(rows, places), given.x.dtype)
    (out,) = _run(launch, _normed(given, gate_up, added), {"out": out})
    return out


def merge(
    x: Float[Array, "F/32 4 N 8"],
    kernel: Float[Array, "F D"],
    residual: Float[Array, "R D"],
    gate: TableRow,
    scale: TableRow,
) -> Rows:
    """`kernels.merge`."""
    (rows, width), inputs = residual.shape, len(kernel)
    given = {
        "x": x,
        "kernel": kernel.T,
        "residual": residual,
        "gate": gate.table,
        "scale": scale.table,
        "step": scale.place,
    }
    outputs = {
        "out": jax.ShapeDtypeStruct((rows, width), x.dtype),
        "scaled": jax.ShapeDtypeStruct(packed_shape(rows, width), x.dtype),
        "squares": jax.ShapeDtypeStruct((width // 64, rows), jnp.float32),
    }
    return Rows(*_run(few_rows.merge(rows, inputs, width), given, outputs))


def _normed(given: Rows, kernel: Float[Array, "D N"], added: TableRow) -> dict[str, Array]:
    """Arguments of a product with a norm. In memory the kernel's outputs lie first."""
    return {
        "x": given.scaled,
        "squares": given.squares,
        "kernel": kernel.T,
        "added": added.table,
        "step": jnp.asarray(added.place),
    }


def _run(
    launch: Launch,
    given: Mapping[str, Shaped[Array, "..."]],
    outputs: Mapping[str, jax.ShapeDtypeStruct | Shaped[Array, "..."]],
) -> tuple[Shaped[Array, "..."], ...]:
    """The outputs; one that is given, too, is written over."""
    name, code = few_rows.compiled(launch, "ptx", tabled=True, depth=few_rows.AMONG)
    aliased = given.keys() & outputs.keys()
    binary = Compiled(
        name=name,
        ptx=code.decode(),
        threads=launch.threads,
        shared=launch.shared,
        pointers=len(launch.arg_names) + len(aliased),
    )
    specs = {name: jax.ShapeDtypeStruct(each.shape, each.dtype) for name, each in outputs.items()}
    return tuple(launched(binary, launch.arg_names, given, specs, launch.grid))

"""Training over several devices, of one process or of many: what lies where.

Every device computes its share of the batch. Weights, moments and average are split over the mesh's
axis "fsdp", by openpi's rule, and repeated over "data"; what has to be gathered or summed up for
that, XLA works out.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from pruner_spec.training import Batch

AXES = ("data", "fsdp")
SPLIT_FROM_BYTES = 4 * 2**20  # smaller arrays are repeated

jax.tree_util.register_dataclass(Batch, [field.name for field in dataclasses.fields(Batch)], [])


def make_mesh(fsdp_devices: int = 1) -> Mesh:
    """All devices of all processes, as ("data", "fsdp").

    Args:
        fsdp_devices: over how many of them weights are split.

    Raises:
        ValueError: the devices cannot be divided so.
    """
    count = jax.device_count()
    if fsdp_devices < 1 or count % fsdp_devices:
        raise ValueError(f"fsdp_devices: expected a divisor of {count} devices, got {fsdp_devices}")
    shape = (count // fsdp_devices, fsdp_devices)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def place(array: np.ndarray, mesh: Mesh | None) -> Shaped[Array, "..."]:
    """A weight, or what goes with it, where it belongs; a copy. Every process gives all of it."""
    if mesh is None:
        return jnp.array(array)
    return jax.make_array_from_callback(
        array.shape, _of_weight(array, mesh), lambda index: np.array(array[index])
    )


def kept(tree: Any, mesh: Mesh | None) -> Any:
    """Weights that were computed, in a compiled function, where `place` would place them."""
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda each: jax.lax.with_sharding_constraint(each, _of_weight(each, mesh)), tree
    )


def share(batch: Batch, mesh: Mesh | None) -> Batch:
    """A batch over the devices, from each process's share of it."""
    if mesh is None:
        return batch
    by_sample = NamedSharding(mesh, PartitionSpec(AXES))
    return jax.tree.map(
        lambda each: jax.make_array_from_process_local_data(by_sample, np.asarray(each)), batch
    )


def largest(number: int, mesh: Mesh) -> Int[Array, ""]:
    """The largest of the numbers that the processes give, all of which must; not waited for."""
    by_device = NamedSharding(mesh, PartitionSpec(AXES))
    given = np.full(mesh.local_mesh.size, number, np.int32)
    return _largest(jax.make_array_from_process_local_data(by_device, given))


_largest = jax.jit(jnp.max)


def whole(array: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """An array from its parts; all processes must ask for it."""
    if array.is_fully_addressable:
        return array
    return multihost_utils.process_allgather(array, tiled=True)


def _of_weight(array: Any, mesh: Mesh) -> NamedSharding:
    """Matrices and larger are split along their largest axis that can be divided."""
    count, size = mesh.shape["fsdp"], array.size * array.dtype.itemsize
    axes = sorted(range(array.ndim), key=lambda axis: array.shape[axis], reverse=True)
    for axis in axes if count > 1 and array.ndim > 1 and size >= SPLIT_FROM_BYTES else ():
        if array.shape[axis] % count == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))
    return NamedSharding(mesh, PartitionSpec())

"""The way of today's tools: Orbax restores the whole tree, and safetensors saves it whole.

It is spared what openpi's script does besides: the weights are restored in their final dtype, what
was converted is let go of, no model is built, and PyTorch is not imported.
"""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.big_checkpoints import CONFIGS
from convert.lazy_array import LazyArray
from convert.mapping import Side, convert_group, groups
from pruner_spec.layout import OPENPI_JAX, OPENPI_TORCH, flatten


def main(checkpoint: Path, output: Path, size: str, precision: str) -> None:
    from safetensors.numpy import save_file

    dtype = np.dtype(ml_dtypes.bfloat16 if precision == "bfloat16" else np.float32)
    arrays = _restored(checkpoint / "params", dtype)
    source, target = Side(OPENPI_JAX, CONFIGS[size]), Side(OPENPI_TORCH, CONFIGS[size])
    tensors: dict[str, np.ndarray] = {}

    def keep(name: str, start: int | None, tensor: np.ndarray) -> None:
        assert start in (None, 0)
        tensors[name] = np.ascontiguousarray(tensor)

    for group in groups(source, target):
        needed = {row.theirs: _in_memory(arrays.pop(row.theirs)) for row in group.sources}
        convert_group(group, needed, source, target, keep)
    output.mkdir()
    save_file(tensors, output / "model.safetensors", {"format": "pt"})


def _restored(folder: Path, dtype: np.dtype) -> dict[str, np.ndarray]:
    """As openpi restores them."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.metadata(folder)
        item = {"params": getattr(found, "item_metadata", found)["params"]}
        options = ocp.ArrayRestoreArgs(restore_type=np.ndarray, dtype=dtype)
        arguments = ocp.args.PyTreeRestore(
            item=item, restore_args=jax.tree.map(lambda _: options, item)
        )
        return flatten(checkpointer.restore(folder, arguments))


def _in_memory(array: np.ndarray) -> LazyArray:
    return LazyArray(
        array.shape,
        array.dtype,
        lambda index: array[index],
        lambda rows: iter([array]) if rows > 1 else (array[i : i + 1] for i in range(len(array))),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])

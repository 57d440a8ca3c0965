"""A folder of random weights, as openpi's PyTorch saves them in bfloat16, made quickly.

One block of normals is repeated as often as it takes, by each parameter's own scale: reading and
placing such weights takes as long as with any others, and what they compute is finite.
"""

import os
from pathlib import Path

import numpy as np

from convert import config_file
from convert.folders import PytorchFolder
from convert.lazy_array import LazyArray
from convert.writing import closing
from pruner_spec.config import Pi0Config
from pruner_spec.layout import OPENPI_TORCH, from_named
from pruner_spec.parameters import Parameter, parameter_dtype, parameter_table, random_scale

_BLOCK = 1 << 22  # numbers that are drawn


def write(folder: Path, config: Pi0Config) -> None:
    """Writes a model's weights and its config, in full or not at all.

    Raises:
        OSError: they cannot be written, or there is something at the folder.
    """
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    block = np.random.default_rng(0).standard_normal(_BLOCK, dtype=np.float32)
    named = {name: _array(parameter, block) for name, parameter in parameter_table(config).items()}
    with closing(PytorchFolder(beside, config, "bfloat16", unused=False)) as sink:
        for name, tensor in from_named(named, config, OPENPI_TORCH):
            if name not in OPENPI_TORCH.aliases:
                sink.write(name, None, tensor)
    (beside / config_file.NAME).write_bytes(config_file.write(config, "bfloat16", ()))
    beside.rename(folder)


def _array(parameter: Parameter, block: np.ndarray) -> LazyArray:
    dtype = np.dtype(parameter_dtype(parameter.name, "bfloat16"))
    shape = parameter.stacked_shape

    def read(index: object) -> np.ndarray:
        assert index is ...
        mean, deviation = random_scale(parameter)
        return np.resize((mean + deviation * block).astype(dtype), shape)

    return LazyArray(shape, dtype, read)

"""Weights into a model and out of it; the layouts are `pruner_spec.layout`'s."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Shaped

from convert.reading import LazyArray, open_checkpoint
from pruner_spec import layout
from pruner_spec.config import Pi0Config
from pruner_spec.parameters import Parameter, parameter_table

if TYPE_CHECKING:
    from pruner_jax.pi0 import Pi0


def load(source: str | os.PathLike[str] | Mapping[str, Any], config: Pi0Config) -> "Pi0":
    """A model with the weights of a checkpoint, in the dtypes of the config.

    Args:
        source: a checkpoint's path (see `convert.reading.open_checkpoint`), or a tree of arrays of
            JAX or NumPy; in openpi's layouts or ours, the names say which.
        config: the model the weights are for.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: the path is no checkpoint, or the weights are not exactly those of the config's
            model; lists all differences, before any array is read.
    """
    from pruner_jax.pi0 import Pi0  # here, since pi0 imports this module

    named = read(source, config)
    model = nnx.eval_shape(lambda: Pi0(config, seed=None))
    assign(model, named)
    return model


def read(
    source: str | os.PathLike[str] | Mapping[str, Any],
    config: Pi0Config,
    *,
    missing: Sequence[str] = (),
    ignored: Sequence[str] = (),
) -> Iterator[tuple[str, np.ndarray]]:
    """The weights of a checkpoint by our names, each read when it is asked for.

    Arguments and errors are those of `load`, the errors raised by the call; `missing` and
    `ignored` are `layout.to_named`'s.
    """
    tree = open_checkpoint(source) if isinstance(source, str | os.PathLike) else source
    return layout.to_named(tree, config, missing=missing, ignored=ignored)


def named_parameters(model: "Pi0") -> dict[str, np.ndarray]:
    """A model's parameters by our names, layers stacked, in their dtypes; not to be written to."""
    parameters = _parameters(model)
    return {name: np.asarray(parameters[name][...]) for name in parameter_table(model.config)}


def assign(model: "Pi0", named: Iterable[tuple[str, np.ndarray]]) -> None:
    """Gives a model all its parameters, cast to the dtypes it stores them in.

    Args:
        model: abstract or not; what it had is replaced, one parameter at a time.
        named: pairs of our name and array [layers, ...], which is copied.

    Raises:
        ValueError: they are not exactly the model's parameters; the model is then half assigned.
    """
    parameters = _parameters(model)
    assert parameters.keys() == parameter_table(model.config).keys()
    for parameter, array in layout.stored(named, model.config):
        for name, value in unstacked(array, parameter).items():
            parameters[name].set_value(value)


def stacked(arrays: Mapping[str, Shaped[Array, "..."]], parameter: Parameter) -> np.ndarray:
    """A family's array [layers, ...] from arrays by the names in the model; a copy."""
    return np.array(arrays[parameter.name])


def lazily_stacked(arrays: Mapping[str, Shaped[Array, "..."]], parameter: Parameter) -> LazyArray:
    """As `stacked`, but each layer is read when it is used, if the arrays are still there."""
    array = arrays[parameter.name]
    return LazyArray(array.shape, array.dtype, lambda index: np.array(array[index]))


def unstacked(array: np.ndarray, parameter: Parameter) -> dict[str, Shaped[Array, "..."]]:
    """The inverse of `stacked`: arrays by the names in the model, as copies."""
    return {parameter.name: _array(array)}


def _array(array: np.ndarray, large: int = 1 << 20) -> Shaped[Array, "..."]:
    """A copy, sent as it lies in memory: another layout's kernels are transposed on the device.

    Args:
        array: NumPy's or JAX's.
        large: bytes from which on that is worth compiling a transposition.
    """
    if not isinstance(array, np.ndarray) or array.flags.c_contiguous or array.nbytes < large:
        return jnp.array(array)
    order = np.argsort([-stride for stride in array.strides], kind="stable")
    return jnp.array(array.transpose(order)).transpose(np.argsort(order).tolist())


def _parameters(model: "Pi0") -> dict[str, nnx.Param]:
    return {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param)
    }

"""Weights into both backends' models and out again, bit for bit."""

import dataclasses
import functools
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from parity_tests.cases import ADAPTERS, tiny_config
from parity_tests.harness import BACKENDS
from pruner_spec import layout
from pruner_spec.layout import LAYOUTS, OPENPI_JAX, OPENPI_TORCH
from pruner_spec.parameters import (
    initial_parameters,
    parameter_dtype,
    parameter_table,
    random_parameters,
)

CONFIGS = {
    f"{model}, {dtype}": tiny_config(pi05=pi05, dtype=dtype)
    for model, pi05 in (("π0", False), ("π0.5", True))
    for dtype in ("float64", "float32", "bfloat16")
} | {
    "π0, adapters in both, float32": tiny_config(pi05=False, dtype="float32", **ADAPTERS["both"]),
    "π0.5, adapters in both, bfloat16": tiny_config(dtype="bfloat16", **ADAPTERS["both"]),
    "π0.5, language adapters, bfloat16": tiny_config(dtype="bfloat16", **ADAPTERS["language"]),
    "π0.5, action adapters, bfloat16": tiny_config(dtype="bfloat16", **ADAPTERS["action"]),
}
CONFIG = CONFIGS["π0.5, bfloat16"]

backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
layouts = pytest.mark.parametrize("source", LAYOUTS, ids=[known.name for known in LAYOUTS])
with_jax = pytest.mark.skipif("jax" not in BACKENDS, reason="Orbax needs JAX")


def weights(config):
    return dict(random_parameters(config, seed=3))


def expected(named, config):
    """The parameters in the dtypes in which the model is to hold them."""
    return {
        name: array.astype(np.dtype(parameter_dtype(name, config.dtype)))
        for name, array in named.items()
    }


def parameters_of(backend, model):
    return backend.module("checkpoint").named_parameters(model)


def load(backend, source, config):
    with backend.precision(config.dtype):
        return backend.module("checkpoint").load(source, config)


def assert_identical(found, wanted):
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@backends
@configs
@layouts
def test_load(backend, config, source):
    tree = dict(layout.from_named(weights(config), config, source))
    model = load(backend, tree, config)
    assert_identical(parameters_of(backend, model), expected(weights(config), config))


@with_jax
def test_what_lies_transposed_is_sent_as_it_lies(monkeypatch):
    """And transposed on the device, if it is large: here everything is."""
    import jax.numpy as jnp

    backend = BACKENDS["jax"]
    checkpoint = backend.module("checkpoint")
    monkeypatch.setattr(checkpoint, "_array", functools.partial(checkpoint._array, large=0))
    sent, array = [], jnp.array
    monkeypatch.setattr(jnp, "array", lambda x, **options: sent.append(x) or array(x, **options))
    tree = dict(layout.from_named(weights(CONFIG), CONFIG, OPENPI_TORCH))
    model = load(backend, tree, CONFIG)
    assert len(sent) >= len(parameter_table(CONFIG))
    assert all(x.flags.c_contiguous for x in sent if isinstance(x, np.ndarray))
    assert_identical(parameters_of(backend, model), expected(weights(CONFIG), CONFIG))


@backends
@layouts
def test_load_from_safetensors(backend, source, tmp_path):
    tensors = dict(layout.from_named(weights(CONFIG), CONFIG, source))
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, tmp_path / "model.safetensors")
    model = load(backend, tmp_path, CONFIG)
    assert_identical(parameters_of(backend, model), expected(weights(CONFIG), CONFIG))


@with_jax
@backends
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_load_from_orbax(backend, dtype, tmp_path):
    import orbax.checkpoint as ocp

    named = {name: array.astype(dtype) for name, array in weights(CONFIG).items()}
    tree = {"params": dict(layout.from_named(named, CONFIG, OPENPI_JAX))}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", tree)
    model = load(backend, os.fspath(tmp_path), CONFIG)
    assert_identical(parameters_of(backend, model), expected(named, CONFIG))


@backends
@configs
def test_load_from_a_model_of_the_backend(backend, config):
    model = load(backend, weights(config), config)
    again = load(backend, native_tree(backend, model), config)
    assert_identical(parameters_of(backend, again), parameters_of(backend, model))


def native_tree(backend, model):
    """A model's parameters as its framework gives them."""
    if backend.name == "torch":
        return model.state_dict()
    from flax import nnx

    return nnx.state(model, nnx.Param)


@backends
@configs
def test_seed_gives_the_initial_parameters(backend, config):
    with backend.precision(config.dtype):
        model = backend.module("pi0").Pi0(config, seed=7)
    initial = dict(initial_parameters(config, seed=7))
    assert_identical(parameters_of(backend, model), expected(initial, config))


@backends
def test_model_does_not_share_memory_with_its_source(backend):
    config = dataclasses.replace(CONFIG, dtype="float32")
    named = weights(config)
    model = load(backend, named, config)
    for array in named.values():
        array.fill(0)
    assert_identical(parameters_of(backend, model), weights(config))


@backends
def test_assign_replaces_what_a_model_had(backend):
    model = backend.module("pi0").Pi0(CONFIG, seed=0)
    backend.module("checkpoint").assign(model, weights(CONFIG).items())
    assert_identical(parameters_of(backend, model), expected(weights(CONFIG), CONFIG))


@backends
def test_parameters_are_native_and_trainable(backend):
    model = load(backend, weights(CONFIG), CONFIG)
    if backend.name == "torch":
        names = [name for row in parameter_table(CONFIG).values() for name in row.torch_names]
        assert sorted(model.state_dict()) == sorted(names)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert all(parameter.is_contiguous() for parameter in model.parameters())
    else:
        import jax

        leaves = jax.tree.leaves(native_tree(backend, model))
        assert len(leaves) == len(parameter_table(CONFIG))
        assert all(isinstance(leaf, jax.Array) for leaf in leaves)


@backends
def test_weights_of_another_model_are_refused(backend):
    other = dataclasses.replace(CONFIG, pi05=False)
    tree = dict(layout.from_named(weights(other), other, OPENPI_TORCH))
    with pytest.raises(ValueError, match=r"hint: .* weights of π0, and pi05=True means π0\.5"):
        load(backend, tree, CONFIG)


@backends
def test_assign_wants_every_parameter(backend):
    model = backend.module("pi0").Pi0(CONFIG, seed=0)
    named = weights(CONFIG)
    del named["vision.head.bias"]
    with pytest.raises(ValueError, match=r"missing: vision\.head\.bias: expected \(72,\)"):
        backend.module("checkpoint").assign(model, named.items())


@backends
def test_no_such_checkpoint(backend, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        load(backend, tmp_path / "nothing_here", CONFIG)

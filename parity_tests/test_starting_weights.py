"""What a run starts with: a checkpoint, in whole or in part, and random numbers for the rest."""

import dataclasses

import numpy as np
import pytest

from parity_tests.cases import TINY_ADAPTED, tiny_config
from parity_tests.convert.checkpoints import jax_tensors, save_jax, save_torch, torch_tensors
from parity_tests.harness import BACKENDS, DEVICE
from pruner_spec.layout import OPENPI_JAX, OPENPI_TORCH, to_named
from pruner_spec.lora import is_adapter
from pruner_spec.parameters import completed, initial_parameters, parameter_table, random_parameters
from pruner_spec.training import ADAPTERS, TrainingSettings

SETTINGS = TrainingSettings(seed=5)
BASE = tiny_config(dtype="float32", vision_variant="tiny/56")
ADAPTED = dataclasses.replace(BASE, **TINY_ADAPTED)

backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
layouts = pytest.mark.parametrize("layout", [OPENPI_JAX, OPENPI_TORCH], ids=["jax", "torch"])


def tensors(config, layout):
    """Weights to start from, as openpi stores them."""
    return (jax_tensors if layout is OPENPI_JAX else torch_tensors)(config)


def weights(config):
    """The same by our names."""
    return dict(random_parameters(config, seed=3))


def started(backend, config, source, **settings):
    """The parameters of a run before its first step."""
    device = {"device": DEVICE} if backend.name == "torch" else {}
    settings = dataclasses.replace(SETTINGS, **settings)
    with backend.precision(config.dtype):
        trainer = backend.module("training").Trainer(config, settings, source, **device)
        return trainer.state().parameters


def assert_parts(found, config, *, given, fresh):
    """Every parameter is bit for bit the checkpoint's, or the initial one."""
    initial = dict(initial_parameters(config, SETTINGS.seed))
    assert found.keys() == parameter_table(config).keys() == given.keys() | fresh
    for name, array in found.items():
        expected = initial[name] if name in fresh else given[name]
        np.testing.assert_array_equal(array, expected, err_msg=name)


@backends
@layouts
def test_lora_starts_from_a_base_model(backend, layout, tmp_path, caplog):
    if layout is OPENPI_JAX:
        pytest.importorskip("orbax.checkpoint")
        path = save_jax(tmp_path / "base", tensors(BASE, layout))
    else:
        path = save_torch(tmp_path / "base", tensors(BASE, layout))
    with caplog.at_level("INFO"):
        found = started(backend, ADAPTED, path)
    adapters = {name for name in parameter_table(ADAPTED) if is_adapter(name)}
    assert_parts(found, ADAPTED, given=weights(BASE), fresh=adapters)
    assert f"{len(adapters)} parameters start at random" in caplog.text


@backends
def test_adapters_that_a_checkpoint_has_are_taken(backend, caplog):
    with caplog.at_level("INFO"):
        found = started(backend, ADAPTED, weights(ADAPTED))
    assert_parts(found, ADAPTED, given=weights(ADAPTED), fresh=set())
    assert "start at random" not in caplog.text


@backends
def test_other_parameters_must_not_be_missing(backend):
    partial = weights(BASE)
    del partial["action_out_proj.bias"]
    message = r"missing: action_out_proj\.bias: expected \(7,\), got none"
    with pytest.raises(ValueError, match=message) as raised:
        started(backend, ADAPTED, partial)
    assert str(raised.value).count("missing: ") == 1
    with pytest.raises(ValueError, match=r"missing: .*lora"):
        started(backend, ADAPTED, weights(BASE), weight_missing=())


def test_all_of_a_parameters_layers_are_missing_or_none():
    partial = tensors(ADAPTED, OPENPI_TORCH)
    lost = next(name for name in partial if ".layers.1." in name and "lora" in name)
    del partial[lost]
    with pytest.raises(ValueError, match=rf"missing: {lost}: expected .*, got none"):
        to_named(partial, ADAPTED, missing=[ADAPTERS])


@layouts
def test_a_new_head_for_another_robot(layout):
    """Whose actions have other sizes; and what only π0 has is ignored by a π0.5."""
    other = dataclasses.replace(BASE, action_dim=9)
    pi0 = tensors(dataclasses.replace(BASE, pi05=False), layout)
    source = tensors(BASE, layout) | {k: v for k, v in pi0.items() if k.startswith("state_proj")}
    ignored = [r"^action_(in|out)_proj\.", "^state_proj"]
    found = dict(completed(to_named(source, other, ignored=ignored), other, SETTINGS.seed))
    fresh = {name for name in parameter_table(BASE) if name.startswith(("action_in", "action_out"))}
    given = {name: array for name, array in weights(BASE).items() if name not in fresh}
    assert_parts(found, other, given=given, fresh=fresh)
    with pytest.raises(ValueError, match=r"extra: state_proj.*(?s:.)*shape: action_in_proj"):
        to_named(source, other)


def test_patterns_that_are_none():
    for field in ("weight_missing", "weight_ignored", "freeze"):
        with pytest.raises(ValueError, match=rf"{field}: expected regular expressions, got '\('"):
            dataclasses.replace(SETTINGS, **{field: ("(",)})

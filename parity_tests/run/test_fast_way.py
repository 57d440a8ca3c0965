"""Which way through the model a backend takes, and that it is tried before it is trusted."""

import logging

import numpy as np
import pytest

from parity_tests.cases import tiny_config
from parity_tests.harness import BACKENDS, draw_batch, error, parameters
from parity_tests.record import check
from pruner_run import backend as backends
from pruner_spec.inference import InferenceSettings

CONFIG = tiny_config(dtype="float32", token_pruning_enabled=True)


def model(name, **options):
    """A backend's model on the CPU."""
    return backends.load(name).model(CONFIG, parameters(CONFIG), **options)


@pytest.mark.parametrize("name", BACKENDS)
def test_both_ways_give_the_same(name, compile_fast):
    batch = draw_batch(CONFIG)
    fast, plain = (model(name, fast=fast) for fast in (True, False))
    found, expected = (
        each.sample_actions(batch.observation, batch.noise, 2) for each in (fast, plain)
    )
    check("same computation", "float32", f"{name}, deployed", error(found, expected))
    assert fast.stats()["kept_per_sample"] == plain.stats()["kept_per_sample"]
    for camera, kept in plain.kept().items():
        np.testing.assert_array_equal(fast.kept()[camera], kept)


@pytest.mark.parametrize("name", BACKENDS)
def test_on_a_cpu_the_way_is_plain_unless_it_is_asked_for(name):
    sampling = BACKENDS[name].module("sampling")
    assert isinstance(model(name, fast=None)._stages, sampling.PlainStages)


CHANGES = (
    *({name: False} for name in ("graphs", "kernels", "guess")),
    *({name: True} for name in ("autotune", "float8")),
)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_settings_reach_the_sampler(name, changes):
    settings = InferenceSettings(**changes)
    assert settings.changed == changes
    assert model(name, fast=True, settings=settings)._stages.settings == settings
    assert model(name, fast=True)._stages.settings == InferenceSettings()


def test_who_compiles_layers():
    """PyTorch, if it is asked to; JAX says so before it reads a weight."""
    settings = InferenceSettings(compiled=True)
    if "torch" in BACKENDS:
        assert model("torch", fast=True, settings=settings)._stages.settings.compiled
    if "jax" in BACKENDS:
        with pytest.raises(ValueError, match="compiled: expected False in JAX"):
            backends.load("jax").model(CONFIG, "/nowhere", fast=True, settings=settings)


@pytest.mark.skipif("torch" not in BACKENDS, reason="is about PyTorch")
def test_settings_reach_what_is_on_trial():
    batch, settings = draw_batch(CONFIG), InferenceSettings(kernels=False)
    tried = on_trial(settings=settings)
    tried.warm_up(batch.observation, batch.noise, 2)
    assert tried._stages.settings == settings


def on_trial(**options):
    """PyTorch's model as it begins on a GPU."""
    found = model("torch", **options)
    found._is_to_try = True
    return found


@pytest.mark.skipif("torch" not in BACKENDS, reason="is about PyTorch")
def test_what_passes_its_trial_is_kept(caplog):
    batch, tried = draw_batch(CONFIG), on_trial()
    tried.warm_up(batch.observation, batch.noise, 2)
    assert isinstance(tried._stages, BACKENDS["torch"].module("inference").Sampler)
    assert not caplog.records


def fails(*_, **__):
    raise RuntimeError("no kernel image is available\nfor this GPU")


@pytest.mark.skipif("torch" not in BACKENDS, reason="is about PyTorch")
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (fails, "RuntimeError: no kernel image is available;"),
        (lambda *arguments, **_: arguments[5] * np.nan, "inf from the plain way's"),
        (lambda *arguments, **_: arguments[5], "from the plain way's"),
    ],
    ids=["fails", "not a number", "wrong"],
)
def test_what_fails_its_trial_is_not_taken(monkeypatch, caplog, broken, said):
    """A compiler that fails on some GPU, or a kernel that is wrong there: actions are right."""
    batch = draw_batch(CONFIG)
    expected = model("torch").sample_actions(batch.observation, batch.noise, 2)
    monkeypatch.setattr("pruner_torch.forward.denoise", broken)
    tried = on_trial()
    with caplog.at_level(logging.WARNING):
        tried.warm_up(batch.observation, batch.noise, 2)
    [record] = caplog.records
    assert "the fast way is not taken" in record.getMessage()
    assert said in record.getMessage()
    np.testing.assert_array_equal(tried.sample_actions(batch.observation, batch.noise, 2), expected)

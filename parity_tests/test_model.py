"""The models: JAX against PyTorch with the same weights, from the vision tower to whole runs."""

from typing import Any

import numpy as np
import pytest

from parity_tests.cases import (
    ADAPTERS,
    BATCHES,
    MODEL_CASES,
    PRUNING,
    UNADAPTED_CASES,
    tiny_config,
)
from parity_tests.harness import BACKENDS, draw_batch, error, parameters, relative_norm
from parity_tests.record import check, report
from pruner_spec.config import Pi0Config
from pruner_spec.parameters import parameter_table

pytestmark = pytest.mark.skipif(len(BACKENDS) < 2, reason="compares the two backends")

dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])
versions = pytest.mark.parametrize("pi05", [True, False], ids=["pi05", "pi0"])
cases = pytest.mark.parametrize("case", MODEL_CASES.values(), ids=MODEL_CASES)

BOTH = "jax | torch"


def models(config: Pi0Config) -> list[Any]:
    """The same weights in JAX and in PyTorch."""
    weights = parameters(config)
    return [BACKENDS[name].model(config, weights) for name in ("jax", "torch")]


def both(function: Any, config: Pi0Config, *arrays: Any) -> list[Any]:
    """The results of a function of (module, *arrays) in JAX and in PyTorch."""
    return [model.compiled(function)(*arrays) for model in models(config)]


@dtypes
def test_siglip(dtype):
    config = tiny_config(dtype=dtype)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 224, 224, 3)).astype(dtype)
    found, expected = both(lambda module, x: module.vision(x, module.dtype), config, images)
    check("SigLIP", dtype, BOTH, error(found, expected))


@dtypes
@versions
def test_gemma_layers(dtype, pi05):
    """Both experts' layers over one sequence, from random tokens."""
    config = tiny_config(dtype=dtype, pi05=pi05)
    generator = np.random.default_rng(0)
    prefix = generator.standard_normal((2, 13, config.paligemma.width)).astype(dtype)
    suffix = generator.standard_normal((2, 9, config.action_expert.width)).astype(dtype)
    condition = generator.standard_normal((2, config.action_expert.width)).astype(dtype)
    mask = generator.random((2, 22, 22)) < 0.7
    mask[:, np.arange(22), np.arange(22)] = True
    positions = np.cumsum(generator.integers(0, 3, (2, 22)), axis=-1)

    def run(module, prefix, suffix, condition, mask, positions):
        condition = condition if pi05 else None
        return module.gemma(prefix, suffix, condition, mask, positions)

    arrays = (prefix, suffix, condition, mask, positions)
    for found, expected in zip(*both(run, config, *arrays), strict=True):
        check("Gemma layer", dtype, BOTH, error(found, expected))


@dtypes
@pytest.mark.parametrize("case", UNADAPTED_CASES.values(), ids=UNADAPTED_CASES)
def test_prefix(dtype, case):
    """Tokens, positions and validity, pruned for inference and for training."""
    config = case.config(dtype)
    drawn = draw_batch(config, **BATCHES[case.batch], pruner_noise=config.token_pruning_enabled)
    arrays = (drawn.observation,)
    if drawn.pruner_noise is not None:
        arrays += (drawn.pruner_noise,)

    def prefixes(module, observation, noise=None):
        observation = module.prepare(observation)
        ways = (module.embed_prefix(observation), module.embed_prefix(observation, noise, True))
        return [(way.tokens, way.valid, way.positions, way.length) for way in ways]

    found, expected = both(prefixes, config, *arrays)
    for (tokens, *places), (want, *want_places) in zip(found, expected, strict=True):
        for place, want_place in zip(places, want_places, strict=True):
            np.testing.assert_array_equal(place, want_place)
        check("prefix", dtype, BOTH, error(tokens, want))


@dtypes
@cases
@pytest.mark.parametrize("mode", ["train", "train, noise", "eval"])
def test_loss(dtype, case, mode):
    config = case.config(dtype)
    if mode == "train, noise" and not config.token_pruning_enabled:
        pytest.skip("noise is for the pruner")
    batch = draw_batch(config, **BATCHES[case.batch], pruner_noise="noise" in mode)
    found, expected = (model.loss(batch, train=mode != "eval") for model in models(config))
    assert found.shape == (batch.observation.batch_size, config.action_horizon)
    check("loss", dtype, BOTH, error(found, expected))


@dtypes
@versions
@pytest.mark.parametrize(
    ("name", "adapters"),
    [("unpruned", "none"), ("implicit", "none"), ("implicit, joint", "none"), ("implicit", "both")],
)
def test_gradient_of_every_parameter(dtype, pi05, name, adapters):
    config = tiny_config(dtype=dtype, pi05=pi05, **PRUNING[name], **ADAPTERS[adapters])
    batch = draw_batch(config, pruner_noise=config.token_pruning_enabled)
    found, expected = (model.gradients(batch, train=True) for model in models(config))
    assert found.keys() == expected.keys() == parameter_table(config).keys()
    for parameter, want in expected.items():
        measured = relative_norm(found[parameter], want)
        if parameter.endswith("attention.key.bias"):
            # 0 in exact arithmetic, a softmax being the same for shifted logits: only rounding.
            query = expected[parameter.replace("key", "query")]
            measured = float(np.linalg.norm(found[parameter] - want) / np.linalg.norm(query))
        check("parameter gradient", dtype, BOTH, measured, parameter)


@dtypes
@cases
def test_sampled_actions(dtype, case):
    config = case.config(dtype)
    drawn = draw_batch(config, **BATCHES[case.batch])
    pair = models(config)
    found, expected = (model.sample(drawn.observation, drawn.noise) for model in pair)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(*map(_kept, pair))
    check("sampled actions", dtype, BOTH, error(found, expected))


@pytest.mark.parametrize("keeps", ["products", "full"])
@pytest.mark.parametrize(
    ("pi05", "adapters"), [(True, "none"), (False, "both")], ids=["pi05", "pi0-adapted"]
)
def test_gradient_checkpointing_changes_nothing(pi05, adapters, keeps):
    config = tiny_config(pi05=pi05, token_pruning_enabled=True, **ADAPTERS[adapters])
    batch = draw_batch(config, pruner_noise=True)
    for model in models(config):
        expected = model.gradients(batch, train=True)
        model.module.gradient_checkpointing = keeps
        found = model.gradients(batch, train=True)
        for name, want in expected.items():
            floor = np.linalg.norm(expected["vision.head.kernel"])
            measured = float(np.linalg.norm(found[name] - want) / floor)
            who = f"{model.backend.name}, checkpointed, {keeps}"
            check("same computation", "float64", who, measured)


@versions
@pytest.mark.parametrize("name", ["unpruned", "implicit", "5 a camera"])
def test_bfloat16(pi05, name):
    """Reported beside the float32 truth: how far the actions are, and the kept sets' overlap."""
    weights = parameters(tiny_config(pi05=pi05))
    wide, narrow = (
        tiny_config(pi05=pi05, dtype=dtype, **PRUNING[name]) for dtype in ("float32", "bfloat16")
    )
    batch = draw_batch(wide)
    truth_model = BACKENDS["torch"].model(wide, weights)
    truth = truth_model.sample(batch.observation, batch.noise)
    masks = [_kept(truth_model)]
    for backend in BACKENDS.values():
        model = backend.model(narrow, weights)
        actions = model.sample(batch.observation, batch.noise).astype(np.float64)
        version = "π0.5" if pi05 else "π0"
        measured = relative_norm(actions, truth)
        report(f"actions, {name}, {version}", "bfloat16", f"{backend.name} | float32", measured)
        assert np.isfinite(actions).all()
        masks.append(_kept(model))
    if masks[0] is not None:
        truth_mask, *narrow_masks = masks
        for backend, mask in zip(BACKENDS, narrow_masks, strict=True):
            overlap = float((mask & truth_mask).sum() / (mask | truth_mask).sum())
            level = f"kept sets, overlap, {name}, {'π0.5' if pi05 else 'π0'}"
            report(level, "bfloat16", f"{backend} | float32", overlap)
            assert overlap > 0.5


def _kept(model: Any) -> np.ndarray | None:
    last = model.module.record.last
    return None if last is None else model.backend.numpy(last[2].kept)

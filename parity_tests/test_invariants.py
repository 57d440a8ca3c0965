"""What must not change a result, in each backend: padding, batching, buckets, a budget of all."""

import dataclasses

import numpy as np
import pytest

from parity_tests.cases import ADAPTERS, BATCHES, PRUNING, UNADAPTED_CASES, tiny_config
from parity_tests.harness import BACKENDS, draw_batch, error, parameters
from parity_tests.record import check
from pruner_spec.buckets import PATCH_BUCKETS
from pruner_spec.config import CAMERAS
from pruner_spec.pruner import NonFiniteScoresError

backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
cases = pytest.mark.parametrize("case", UNADAPTED_CASES.values(), ids=UNADAPTED_CASES)
dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])


def model_of(backend, config):
    """A model with weights in which nothing is constant."""
    return backend.model(config, parameters(config))


def sample_whole(model, batch):
    """Actions without the savings: every camera and all of the prompt, at the largest capacity."""

    def run(module, observation, noise):
        observation = module.prepare(observation)
        encoded = module.encode(observation)
        selection = module.select(encoded)
        prefix = module.assemble(encoded)
        if module.config.prunes_at_inference:
            prefix = module.prune(encoded, selection, encoded.patches.shape[1] * 49)
        sampling = model.backend.module("sampling")
        cache = module.prefill(prefix)
        return sampling.denoise(module, prefix, cache, observation.state, noise, 10)

    return model.compiled(run)(batch.observation, batch.noise)


@backends
@cases
def test_dropping_cameras_and_padding_changes_nothing(backend, case):
    config = case.config("float64")
    model, drawn = model_of(backend, config), draw_batch(config, **BATCHES[case.batch])
    found = model.sample(drawn.observation, drawn.noise)
    measured = error(found, sample_whole(model, drawn))
    check("same computation", "float64", f"{backend.name}, savings", measured)


@backends
@dtypes
@pytest.mark.parametrize("pruning", ["unpruned", "implicit", "implicit, joint", "5 a camera"])
def test_a_batch_is_its_samples_one_by_one(backend, dtype, pruning):
    config = tiny_config(dtype=dtype, **PRUNING[pruning])
    model, batch = model_of(backend, config), draw_batch(config, **BATCHES["4, all kinds"])
    together = model.sample(batch.observation, batch.noise)
    for place in range(4):
        one = batch.sample(place)
        alone = model.sample(one.observation, one.noise)
        measured = error(together[place : place + 1], alone)
        check("same computation", dtype, f"{backend.name}, batching", measured, f"sample {place}")


@backends
@pytest.mark.parametrize("scope", ["camera", "joint"])
@pytest.mark.parametrize("capacity", [100, 128, 147])
def test_the_result_does_not_depend_on_the_bucket(backend, scope, capacity):
    config = tiny_config(token_pruning_enabled=True, token_prune_scope=scope)
    model, batch = model_of(backend, config), draw_batch(config)
    sampling = backend.module("sampling")

    def run(module, observation, noise):
        observation = module.prepare(observation)
        encoded = module.encode(observation)
        prefix = module.prune(encoded, module.select(encoded), capacity)
        cache = module.prefill(prefix)
        return sampling.denoise(module, prefix, cache, observation.state, noise, 10)

    found = model.compiled(run)(batch.observation, batch.noise)
    measured = error(found, model.sample(batch.observation, batch.noise))
    check("same computation", "float64", f"{backend.name}, buckets", measured)


@backends
@dtypes
@pytest.mark.parametrize("scope", ["camera", "joint"])
@pytest.mark.parametrize(
    "budget", [{"token_prune_keep_ratio": 1.0}, {"token_prune_keep_tokens": 49}], ids=str
)
def test_keeping_all_is_exactly_unpruned(backend, dtype, scope, budget):
    pruned = tiny_config(dtype=dtype, token_pruning_enabled=True, token_prune_scope=scope, **budget)
    unpruned = tiny_config(dtype=dtype)
    batch = draw_batch(pruned)
    model = model_of(backend, pruned)
    found = model.sample(batch.observation, batch.noise)
    expected = model_of(backend, unpruned).sample(batch.observation, batch.noise)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(
        model.loss(batch, train=False), model_of(backend, unpruned).loss(batch, train=False)
    )
    assert model.stats()["kept_per_sample"] == [147, 98]


@backends
def test_an_empty_prompt_keeps_everything(backend):
    config = tiny_config(token_pruning_enabled=True)
    batch = draw_batch(config, lengths=(0, 12), present=((True, False, True), (True, True, True)))
    model = model_of(backend, config)
    found = model.sample(batch.observation, batch.noise)
    stats = model.stats()
    assert stats["kept_per_sample"][0] == 98
    assert stats["kept_per_sample"][1] < 147
    unpruned = model_of(backend, tiny_config()).sample(batch.observation, batch.noise)
    check(
        "same computation", "float64", f"{backend.name}, empty prompt", error(found[0], unpruned[0])
    )


@backends
def test_kept_patches_keep_their_positions(backend):
    """Positions of pruned prefixes are those of the same patches in the unpruned prefix."""
    config = tiny_config(token_pruning_enabled=True, token_prune_keep_tokens=5)
    model, batch = model_of(backend, config), draw_batch(config)

    def run(module, observation):
        observation = module.prepare(observation)
        encoded = module.encode(observation)
        pruned = module.prune(encoded, module.select(encoded), 15)
        whole = module.assemble(encoded)
        return (whole.tokens, whole.positions), (pruned.tokens, pruned.positions, pruned.valid)

    (tokens, positions), (kept, kept_positions, valid) = model.compiled(run)(batch.observation)
    for sample in range(2):
        assert valid[sample, :15].sum() == 5 * (3, 2)[sample]
        for token, place in zip(
            kept[sample][valid[sample]], kept_positions[sample][valid[sample]], strict=True
        ):
            [row] = np.flatnonzero((tokens[sample] == token).all(axis=-1))
            assert positions[sample, row] == place


@backends
@pytest.mark.parametrize("scope", ["camera", "joint"])
def test_budgets_are_kept_to(backend, scope):
    config = tiny_config(
        token_pruning_enabled=True, token_prune_keep_tokens=7, token_prune_scope=scope
    )
    model, batch = model_of(backend, config), draw_batch(config)
    model.sample(batch.observation, batch.noise)
    stats = model.stats()
    assert stats["kept_per_sample"] == [21, 14]
    assert stats["kept_per_camera"]["right_wrist_0_rgb"][1] == 0
    if scope == "camera":
        assert stats["kept_per_camera"]["base_0_rgb"] == [7, 7]


@backends
def test_statistics_name_everything(backend):
    config = tiny_config(token_pruning_enabled=True)
    model, batch = model_of(backend, config), draw_batch(config)
    assert model.stats() == {"enabled": True, "noise_scale": 0.0}
    model.module.set_token_pruner_noise_scale(0.25)
    model.sample(batch.observation, batch.noise)
    stats = model.stats()
    assert stats["noise_scale"] == 0.25
    assert list(stats["kept_per_camera"]) == list(CAMERAS)
    assert sum(stats["kept_per_sample"]) == sum(map(sum, stats["kept_per_camera"].values()))
    assert stats["nonfinite_scores"] == [0, 0]
    diagnostics = stats["diagnostics"]
    assert np.shape(diagnostics["queries_spread"]) == (2, 3)
    assert np.all(np.array(diagnostics["top_votes"])[0] >= 1)
    model.module.set_token_pruner_noise_scale(None)
    assert model.module.token_pruner_noise_scale == 0.0
    with pytest.raises(ValueError, match="noise_scale"):
        model.module.set_token_pruner_noise_scale(-1.0)


@backends
def test_images_that_are_not_finite(backend):
    """The implicit selection raises; with a budget the sample's actions are NaN, not confident."""
    implicit = tiny_config(token_pruning_enabled=True)
    batch = draw_batch(implicit)
    images = {camera: image.copy() for camera, image in batch.observation.images.items()}
    images["base_0_rgb"][1, 5, 5] = np.nan
    broken = dataclasses.replace(batch.observation, images=images)
    with pytest.raises(NonFiniteScoresError):
        model_of(backend, implicit).sample(broken, batch.noise)
    budget = tiny_config(token_pruning_enabled=True, token_prune_keep_tokens=5)
    model = model_of(backend, budget)
    actions = model.sample(broken, batch.noise)
    assert np.isfinite(actions[0]).all()
    assert np.isnan(actions[1]).all()
    nonfinite = model.stats()["nonfinite_scores"]
    assert nonfinite[0] == 0 < nonfinite[1]


@pytest.mark.skipif("jax" not in BACKENDS, reason="is about JAX")
def test_jax_traces_nothing_twice_within_a_bucket():
    """Other images, prompts and kept counts within the buckets run what is compiled already."""
    backend = BACKENDS["jax"]
    config = tiny_config(token_pruning_enabled=True, dtype="float32", token_prune_min_keep=25)
    model, sampling = model_of(backend, config), backend.module("sampling")
    traced = []
    for seed, lengths in enumerate([(9, 20), (17, 30), (31, 1)]):
        batch = draw_batch(config, lengths=lengths, seed=seed)
        model.sample(batch.observation, batch.noise)
        traced.append((sampling._encode._cache_size(), sampling._act._cache_size()))
    assert traced[0] == traced[1] == traced[2]


@pytest.mark.slow
@pytest.mark.skipif("torch" not in BACKENDS, reason="is about PyTorch")
@pytest.mark.parametrize("adapters", ["none", "both"])
def test_torch_compiles_whole_and_recompiles_nothing_within_a_bucket(adapters):
    """`torch.compile` takes both halves of sampling as one graph each, and meets them once."""
    import torch

    backend = BACKENDS["torch"]
    pruning = PRUNING["5 a camera"]
    config = tiny_config(dtype="float32", **pruning, **ADAPTERS[adapters])
    model = model_of(backend, config)
    module, sampling = model.module, backend.module("sampling")

    def observe(observation):
        encoded = module.encode(observation)
        return encoded, module.select(encoded)

    def act(encoded, selection, state, noise):
        prefix = module.prune(encoded, selection, 15)
        return sampling.denoise(module, prefix, module.prefill(prefix), state, noise, 2)

    observe, act = (torch.compile(half, fullgraph=True, backend="eager") for half in (observe, act))
    for seed in range(3):
        batch = draw_batch(config, lengths=(9 + seed, 20), seed=seed)
        observation = module.prepare(batch.observation)
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            found = act(*observe(observation), observation.state, backend.array(batch.noise))
        expected = model.sample(batch.observation, batch.noise, num_steps=2)
        check(
            "same computation", "float32", "torch, compiled", error(backend.numpy(found), expected)
        )


def test_buckets_hold_a_whole_prefix():
    assert PATCH_BUCKETS[-1] == 3 * 256

"""The fast way to actions against the plain one, in each backend, and JAX's against PyTorch's."""

import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys
import types
from typing import Any
from unittest import mock

import numpy as np
import pytest

from parity_tests.cases import BATCHES, MODEL_CASES, PRUNING, tiny_config
from parity_tests.harness import BACKENDS, DEVICE, draw_batch, error, parameters, relative_norm
from parity_tests.record import check, report
from parity_tests.tolerances import tolerance
from pruner_spec.buckets import PATCH_BUCKETS, PROMPT_BUCKETS, bucket
from pruner_spec.config import Pi0Config
from pruner_spec.inference import InferenceSettings
from pruner_spec.observation import Observation

pytestmark = pytest.mark.usefixtures("compile_fast")

backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)

FLOAT32_CASES = (
    "pi05-implicit-2, third camera masked in one",
    "pi0-unpruned-4, all kinds",
    "pi05-unpruned-1-adapted",
)
FLOAT64_CASES = (
    "pi05-implicit, joint-4, all kinds",
    "pi05-5 a camera-4, all kinds",
    "pi05-at least 20-1",
    "pi0-implicit-2, third camera masked in one",
    "pi05-implicit-2, third camera masked in one-adapted",
    "pi0-5 a camera-1-adapted",
)
ROWS = [
    *((name, "float64") for name in FLOAT64_CASES),
    *((name, "float32") for name in FLOAT32_CASES),
]


class Deployed:
    """A model and its sampler, NumPy in and out."""

    def __init__(self, backend: Any, config: Pi0Config, weights: dict, **settings: Any) -> None:
        self.backend, self.dtype = backend, config.dtype
        self.plain = backend.model(config, weights)
        with backend.precision(config.dtype):
            sampler = backend.module("inference").Sampler
            self.sampler = sampler(self.plain.module, InferenceSettings(**settings))

    def sample(self, observation: Any, noise: np.ndarray, num_steps: int = 10) -> np.ndarray:
        with self.backend.precision(self.dtype):
            actions = self.sampler.sample_actions(observation, noise, num_steps)
            return self.backend.numpy(actions)


@pytest.mark.parametrize(("name", "dtype"), ROWS)
def test_the_fast_way_is_the_plain_one(name, dtype):
    """In each backend the same actions as the model's own layers give, and in both the same."""
    case = MODEL_CASES[name]
    config = case.config(dtype)
    batch, weights = draw_batch(config, **BATCHES[case.batch]), parameters(config)
    found = []
    for backend in BACKENDS.values():
        model = Deployed(backend, config, weights)
        expected = model.plain.sample(batch.observation, batch.noise)
        stats = model.plain.stats()
        found.append(model.sample(batch.observation, batch.noise))
        check("same computation", dtype, f"{backend.name}, deployed", error(found[-1], expected))
        left = model.plain.stats()  # the sampler leaves what the model would
        assert {key: left[key] for key in left if key != "diagnostics"} == {
            key: stats[key] for key in stats if key != "diagnostics"
        }
    if len(found) == 2:
        check("sampled actions", dtype, "jax | torch, deployed", error(*found))


@backends
def test_another_number_of_steps(backend):
    config = tiny_config()
    batch = draw_batch(config)
    model = Deployed(backend, config, parameters(config))
    for num_steps in (1, 4):
        found = model.sample(batch.observation, batch.noise, num_steps)
        expected = model.plain.sample(batch.observation, batch.noise, num_steps=num_steps)
        check("same computation", "float64", f"{backend.name}, deployed", error(found, expected))
    with backend.precision(config.dtype):
        noise = backend.array(batch.noise)
        apart = model.sampler.distance(model.plain.module, batch.observation, noise, 4)
    check("same computation", "float64", f"{backend.name}, deployed", apart)


@backends
def test_whose_arrays_an_observation_has_changes_nothing(backend):
    """NumPy's, the framework's, and some of each."""
    config = tiny_config(dtype="float32", token_pruning_enabled=True)
    weights = parameters(config)
    for name in ("2, third camera masked in one", "1, one camera"):
        batch = draw_batch(config, **BATCHES[name])
        given = batch.observation
        there = given.map(backend.array)
        tokens = {"tokenized_prompt": there.tokenized_prompt}
        masks = {"image_masks": there.image_masks}
        mixed = [dataclasses.replace(given, **changes) for changes in (tokens, masks)]
        mixed.append(dataclasses.replace(there, tokenized_prompt_mask=given.tokenized_prompt_mask))
        sampler = Deployed(backend, config, weights)
        first, *others = (sampler.sample(each, batch.noise) for each in (given, there, *mixed))
        for found in others:
            np.testing.assert_array_equal(found, first)


@backends
def test_bytes_are_what_they_become(backend):
    """Images of uint8, which the model scales on its device; a camera is missing."""
    config = tiny_config(dtype="float32", token_pruning_enabled=True)
    batch = draw_batch(config)
    images = {
        camera: np.random.default_rng(place).integers(0, 256, image.shape, np.uint8)
        for place, (camera, image) in enumerate(batch.observation.images.items())
        if place > 0
    }
    data = {
        "image": images,
        "state": batch.observation.state,
        "tokenized_prompt": batch.observation.tokenized_prompt,
        "tokenized_prompt_mask": batch.observation.tokenized_prompt_mask,
    }
    floats, kept = (Observation.from_dict(data, each) for each in (False, True))
    assert all(image.dtype == np.uint8 for image in kept.images.values())
    model = Deployed(backend, config, parameters(config))
    for way in (model.sample, model.plain.sample):
        apart = error(way(kept, batch.noise), way(floats, batch.noise))
        check("same computation", "float32", f"{backend.name}, bytes", apart)


@backends
def test_a_wrong_guess_changes_nothing(backend):
    """The last call's bucket is tried first; an observation that needs another gets its own."""
    config = tiny_config(token_pruning_enabled=True, dtype="float32", vision_variant="tiny/14")
    weights = parameters(config)
    model, fresh = Deployed(backend, config, weights), Deployed(backend, config, weights)
    one, other = draw_batch(config), draw_batch(config)
    # All patches of a uniform image are alike, and vote for the same one.
    dull = {camera: np.full_like(image, 0.5) for camera, image in one.observation.images.items()}
    dull = dataclasses.replace(one.observation, images=dull)
    expected = [fresh.sample(each, one.noise) for each in (dull, other.observation)]
    kept = []
    for each in (dull, other.observation, dull, other.observation, other.observation):
        found = model.sample(each, one.noise)
        kept.append(max(model.plain.stats()["kept_per_sample"]))
        assert np.array_equal(found, expected[each is not dull])
    assert len({bucket(most, PATCH_BUCKETS) for most in kept}) > 1


@backends
def test_without_a_guess_the_device_is_asked_first(backend):
    """One `act` a call, whatever the last call kept; and the same actions."""
    config = tiny_config(token_pruning_enabled=True, dtype="float32", vision_variant="tiny/14")
    batch, found, calls = draw_batch(config), [], []
    dull = {camera: np.full_like(image, 0.5) for camera, image in batch.observation.images.items()}
    dull = dataclasses.replace(batch.observation, images=dull)
    for guess in (True, False):
        model = Deployed(backend, config, parameters(config), guess=guess)
        with mock.patch.object(model.sampler, "act", wraps=model.sampler.act) as act:
            observations = (dull, batch.observation, batch.observation)
            found.append([model.sample(each, batch.noise) for each in observations])
        calls.append(act.call_count)
    np.testing.assert_array_equal(*found)
    assert calls == [4, 3]  # the guess after the dull one is wrong


@backends
@pytest.mark.parametrize("pi05", [True, False])
def test_tiles_are_timed_before_they_are_used(backend, pi05, monkeypatch):
    """Once for each length of the prefix, with the suffix of one sample; if that is asked for."""
    config = tiny_config(dtype="float32", pi05=pi05, **PRUNING["5 a camera"])
    expert = dataclasses.replace(config.action_expert, num_kv_heads=1)
    language = dataclasses.replace(config.paligemma, num_kv_heads=1)
    config = dataclasses.replace(config, action_expert_variant=expert, paligemma_variant=language)
    weights, told = parameters(config), []

    def autotune(layers, rows, keys, head_dim):
        told.append((len(layers), rows, keys, head_dim))

    monkeypatch.setattr(backend.module("kernels_autotune"), "autotune", autotune)
    model = Deployed(backend, config, weights, autotune=True)
    for lengths in ((9, 20), (9, 20), (9, 39)):
        batch = draw_batch(config, lengths=lengths)
        model.sample(batch.observation, batch.noise)
    prefixes = [15 + bucket(length, PROMPT_BUCKETS, config.max_token_len) for length in (20, 39)]
    rows = config.suffix_length
    keys = [prefix + rows if pi05 else None for prefix in prefixes]
    assert told == [(expert.depth, rows, each, expert.head_dim) for each in keys]
    for settings in ({}, {"autotune": True, "kernels": False}):
        Deployed(backend, config, weights, **settings).sample(batch.observation, batch.noise)
    assert len(told) == 2


@pytest.mark.skipif("jax" not in BACKENDS, reason="is about JAX")
@pytest.mark.parametrize(
    ("graphs", "dtype"), [(True, "float32"), (False, "float32"), (True, "float64")]
)
def test_what_jax_compiles_with(graphs, dtype, monkeypatch):
    """On a GPU each of the sampler's functions may be without command buffers, and nothing else
    changes; products are cuBLAS's but in float64.
    """
    import jax

    config = tiny_config(dtype=dtype, **PRUNING["5 a camera"])
    batch, weights = draw_batch(config), parameters(config)
    expected = Deployed(BACKENDS["jax"], config, weights).sample(batch.observation, batch.noise)
    plain = BACKENDS["jax"].model(config, weights)
    jit = mock.Mock(wraps=jax.jit)
    act = mock.Mock(wraps=BACKENDS["jax"].module("inference").act)
    monkeypatch.setattr(BACKENDS["jax"].module("inference"), "act", act)
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(jax, "default_backend", lambda: "gpu")
        on_gpu.setattr(jax, "jit", jit)
        sampler = BACKENDS["jax"].module("inference").Sampler
        with BACKENDS["jax"].precision(dtype):
            sampler = sampler(plain.module, InferenceSettings(graphs=graphs))
    given = [call.kwargs["compiler_options"] for call in jit.call_args_list[-7:]]
    options = {} if dtype == "float64" else {"xla_gpu_enable_triton_gemm": False}
    assert given == 7 * [options if graphs else options | {"xla_gpu_enable_command_buffer": ""}]
    with BACKENDS["jax"].precision(dtype):
        found = sampler.sample_actions(batch.observation, BACKENDS["jax"].array(batch.noise))
    np.testing.assert_array_equal(np.asarray(found), expected)
    assert act.call_args.kwargs["graphs"] == graphs  # what a `Chain` launches


@pytest.mark.skipif("jax" not in BACKENDS, reason="is about JAX")
def test_jax_has_no_layers_that_are_compiled_apart():
    config = tiny_config(dtype="float32")
    with pytest.raises(ValueError, match="compiled: expected False in JAX, where XLA compiles"):
        Deployed(BACKENDS["jax"], config, parameters(config), compiled=True)


@backends
def test_nobody_reads_what_is_behind_the_last_keys_and_values(backend):
    """The language model's last layer gives keys and values alone: the rest may be anything."""
    config = tiny_config()
    batch, weights = draw_batch(config), parameters(config)
    spoilt = dict(weights)
    for name in ("attention.query", "attention.out", "mlp.gate", "mlp.up", "mlp.down"):
        kernel = f"gemma.language.layers.{name}.kernel"
        spoilt[kernel] = weights[kernel].copy()
        spoilt[kernel][-1] = np.nan
    expected = Deployed(backend, config, weights).sample(batch.observation, batch.noise)
    found = Deployed(backend, config, spoilt).sample(batch.observation, batch.noise)
    np.testing.assert_array_equal(found, expected)


@backends
def test_the_sampler_does_without_the_model(backend):
    """A model's arrays may go, or be replaced by others."""
    config = tiny_config()
    batch = draw_batch(config)
    model = Deployed(backend, config, parameters(config))
    expected = model.sample(batch.observation, batch.noise)
    with backend.precision(config.dtype):
        checkpoint = backend.module("checkpoint")
        options = {"device": "cpu"} if backend.name == "torch" else {}
        checkpoint.assign(model.plain.module, parameters(config, seed=9).items(), **options)
    np.testing.assert_array_equal(model.sample(batch.observation, batch.noise), expected)


@backends
@pytest.mark.parametrize("name", ["unpruned", "implicit"])
def test_bfloat16_is_no_farther_from_the_truth_than_the_plain_way(backend, name):
    """Over several batches, against float32 with the same weights."""
    narrow = tiny_config(dtype="bfloat16", **PRUNING[name])
    weights = {
        key: value.astype("bfloat16").astype(np.float32)
        for key, value in parameters(narrow).items()
    }
    model = Deployed(backend, narrow, weights)
    truth = backend.model(dataclasses.replace(narrow, dtype="float32"), weights)
    fast, plain, true = [], [], []
    for seed in range(6):
        batch = draw_batch(narrow, seed=seed)
        true.append(truth.sample(batch.observation, batch.noise))
        fast.append(model.sample(batch.observation, batch.noise).astype(np.float64))
        plain.append(model.plain.sample(batch.observation, batch.noise).astype(np.float64))
    farther, before = (relative_norm(np.stack(x), np.stack(true)) for x in (fast, plain))
    report(f"deployed actions, {name}", "bfloat16", f"{backend.name} | float32", farther)
    assert farther <= before * tolerance("deployed over plain error", "bfloat16"), before


@pytest.mark.skipif("jax" not in BACKENDS, reason="is about JAX")
def test_jax_compiles_once_a_bucket():
    """Other images, prompts and numbers of kept patches in the same buckets compile nothing."""
    config = tiny_config(token_pruning_enabled=True, dtype="float32")
    model = Deployed(BACKENDS["jax"], config, parameters(config))
    kept, buckets = set(), set()
    for seed in range(4):
        batch = draw_batch(config, lengths=(17 + seed, 20 + seed), seed=seed)
        model.sample(batch.observation, batch.noise)
        most = max(model.plain.stats()["kept_per_sample"])
        kept.add(most)
        buckets.add(bucket(most, PATCH_BUCKETS))
    assert len(kept) > len(buckets)
    assert model.sampler._encode._cache_size() == 1
    assert model.sampler._act._cache_size() == len(buckets)


@pytest.mark.skipif("jax" not in BACKENDS, reason="is about JAX")
def test_after_the_warm_up_nothing_is_compiled():
    """For every number of patches that may be kept."""
    config = tiny_config(token_pruning_enabled=True, dtype="float32", vision_variant="tiny/56")
    backend = BACKENDS["jax"]
    model, batch = Deployed(backend, config, parameters(config)), draw_batch(config)
    model.sampler.warm_up(batch.observation, backend.array(batch.noise))
    compiled = model.sampler._act._cache_size()
    assert compiled == len(backend.module("sampling").capacities(model.sampler.model, 3))
    model.sample(batch.observation, batch.noise)
    assert model.sampler._act._cache_size() == compiled


@backends
def test_a_warm_up_meets_images_as_they_will_come(backend):
    """Bytes stay bytes: what is compiled, or captured, for floats no call would take."""
    config = tiny_config(dtype="float32", **PRUNING["5 a camera"])
    model, batch = Deployed(backend, config, parameters(config)), draw_batch(config)
    images = {
        camera: np.zeros(image.shape, np.uint8)
        for camera, image in batch.observation.images.items()
    }
    observation = dataclasses.replace(batch.observation, images=images)
    with mock.patch.object(model.sampler, "encode", wraps=model.sampler.encode) as encode:
        model.sampler.warm_up(observation, backend.array(batch.noise, "float32"))
    [(given, _)] = (call.args for call in encode.call_args_list)
    assert {image.dtype for image in given.images.values()} == {np.dtype(np.uint8)}


@pytest.mark.skipif("jax" not in BACKENDS, reason="is about JAX")
@pytest.mark.parametrize("autotune", [False, True])
def test_kernels_that_do_not_run_are_left_to_xla(monkeypatch, caplog, autotune):
    """Here for want of a GPU; elsewhere for a compiler's or a driver's reasons."""
    pytest.importorskip("triton")
    backend = BACKENDS["jax"]
    monkeypatch.setattr(backend.module("triton_call"), "available", lambda: True)
    config = tiny_config(dtype="float32", **PRUNING["implicit"])
    model = Deployed(backend, config, parameters(config), autotune=autotune)
    batch = draw_batch(config)
    model.sampler._tune(20)
    found = model.sample(batch.observation, batch.noise)
    assert ("none of the tiles that were tried runs" in caplog.text) == autotune
    assert "the Triton kernels do not run here" in caplog.text
    expected = model.plain.sample(batch.observation, batch.noise)
    check("same computation", "float32", "jax, deployed, without kernels", error(found, expected))


@pytest.mark.skipif("torch" not in BACKENDS, reason="is about PyTorch")
@pytest.mark.slow
def test_compiled_layers_do_not_compile_again_within_a_bucket():
    """`torch.compile` with pruning on: other inputs and other numbers of kept patches."""
    import torch

    config = tiny_config(dtype="float32", **PRUNING["implicit"])
    weights = parameters(config)
    model = Deployed(BACKENDS["torch"], config, weights, compiled=True)
    first = draw_batch(config)
    expected = model.plain.sample(first.observation, first.noise)
    found = model.sample(first.observation, first.noise)
    check("same computation", "float32", "torch, deployed, compiled", error(found, expected))
    kept = {max(model.plain.stats()["kept_per_sample"])}
    room = bucket(*kept, PATCH_BUCKETS)
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(1, 9):
            batch = draw_batch(config, seed=seed)
            most = max(_kept_by(model.plain, batch))
            if bucket(most, PATCH_BUCKETS) == room:
                kept.add(most)
                model.sample(batch.observation, batch.noise)
    assert len(kept) > 1


def _kept_by(model: Any, batch: Any) -> list[int]:
    model.sample(batch.observation, batch.noise, num_steps=1)
    return model.stats()["kept_per_sample"]


IN_TRITON = """
import dataclasses
from parity_tests.cases import tiny_config
from parity_tests.harness import BACKENDS, DEVICE, draw_batch, error, parameters
from parity_tests.tolerances import tolerance
from pruner_spec.config import GemmaVariant
from pruner_spec.inference import InferenceSettings
from pruner_torch import kernels
from pruner_torch.inference import Sampler

def variant(width, mlp_dim):
    return GemmaVariant(
        width=width, depth=2, mlp_dim=mlp_dim, num_heads=3, num_kv_heads=1, head_dim=32,
        vocab_size=256,
    )

for pi05 in (True, False):
    config = tiny_config(
        dtype="float32", pi05=pi05, token_pruning_enabled=True,
        paligemma_variant=variant(72, 136), action_expert_variant=variant(56, 104),
    )
    model, batch = BACKENDS["torch"].model(config, parameters(config)), draw_batch(config)
    noise = BACKENDS["torch"].array(batch.noise)
    assert kernels.available(noise)
    found = Sampler(model.module).sample_actions(batch.observation, noise, 2).cpu()
    expected = model.sample(batch.observation, batch.noise, num_steps=2)
    assert error(found, expected) <= tolerance("same computation", "float32")
"""


@pytest.mark.skipif("torch" not in BACKENDS, reason="is about PyTorch")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.slow
def test_a_whole_call_over_triton_s_kernels():
    """Interpreted where there is no GPU, which Triton must be told before it is imported."""
    environment = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IN_TRITON],
        cwd=pathlib.Path(__file__).parent.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif("torch" not in BACKENDS or DEVICE != "cuda", reason="needs a GPU")
def test_graphs_are_replayed_and_bounded():
    """The same actions again, other inputs other actions, and no more graphs than are asked for."""
    config = tiny_config(dtype="bfloat16", **PRUNING["5 a camera"])
    weights = parameters(config)
    model = Deployed(BACKENDS["torch"], config, weights, max_graphs=3)
    plain = Deployed(BACKENDS["torch"], config, weights, graphs=False)
    for lengths in ((9, 20), (9, 33), (9, 20), (9, 39)):
        for seed in range(2):
            batch = draw_batch(config, lengths=lengths, seed=seed)
            found = model.sample(batch.observation, batch.noise)
            np.testing.assert_array_equal(found, plain.sample(batch.observation, batch.noise))
    assert len(model.sampler._graphs) == 3


@pytest.mark.skipif("torch" not in BACKENDS, reason="is about PyTorch")
def test_the_cache_of_graphs(monkeypatch):
    """What it copies, what it reads where it stands, and which graph goes first."""
    import torch

    graphs = BACKENDS["torch"].module("graphs")
    captured, pools = [], []

    def capture(_, pool, function, fresh, standing):
        inputs, outputs = (*(x.clone() for x in fresh), *standing), torch.zeros(2)
        graph = types.SimpleNamespace(replay=lambda: outputs.copy_(function(*inputs)))
        captured.append(inputs)
        pools.append(pool)
        return graphs._Graph(graph, pool, inputs, outputs)

    monkeypatch.setattr(graphs.Graphs, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", iter(range(1, 9)).__next__)
    cache, stands = graphs.Graphs(torch.device("cpu"), 2), torch.tensor([10.0, 20.0])

    def call(key, value, standing=stands, stage="encode"):
        return cache(stage, key, torch.add, (torch.full((2,), value),), (standing,)).tolist()

    assert call("a", 1.0) == [11.0, 21.0]
    assert call("a", 2.0) == [12.0, 22.0]
    assert captured[0][1] is stands
    assert call("a", 2.0, torch.tensor([30.0, 40.0])) == [32.0, 42.0]
    assert stands.tolist() == [30.0, 40.0]  # another call's output, copied to where it is read
    for key in ("b", "a", "c", "a"):  # "b" was used least recently when "c" came
        call(key, 0.0)
    assert len(cache) == 2
    assert len(captured) == 3
    call("b", 0.0)
    assert len(captured) == 4
    # One stage's graphs, and not another's, write where the others do; none has memory of graphs
    # that are gone.
    assert pools == [1, 1, 1, 1]
    call("b", 0.0, stage="act")
    call("c", 0.0, stage="act")
    call("b", 0.0)
    assert pools[4:] == [2, 2, 3]

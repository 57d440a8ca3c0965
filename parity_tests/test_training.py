"""Training: every step is the spec's, and a run is the same run in either backend."""

import dataclasses

import numpy as np
import pytest

from convert.lazy_array import LazyArray
from parity_tests.harness import BACKENDS, DEVICE, error, parameters
from parity_tests.harness import Batch as LossBatch
from parity_tests.record import check, report
from parity_tests.training_runs import (
    ADAPTED,
    PRUNED,
    RUNS,
    SIZE,
    THE_RUN,
    Course,
    Trained,
    Votes,
    computed_in,
    course,
    draw_batch,
    flips,
    until_flip,
    varied,
)
from pruner_spec import augmentation, optimization, randomness
from pruner_spec import pruner as spec_pruner
from pruner_spec.config import CAMERAS
from pruner_spec.observation import Observation
from pruner_spec.optimization import CosineDecaySchedule, Moments
from pruner_spec.parameters import parameter_table
from pruner_spec.randomness import Stream
from pruner_spec.training import Batch, TrainState, master_dtype, pruner_noise_shape

pytestmark = pytest.mark.usefixtures("compile_fast")

backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
both = pytest.mark.skipif(len(BACKENDS) < 2, reason="compares the backends")

# Runs


@both
@pytest.mark.slow
@pytest.mark.parametrize("name", ["pruned", "adapted", "accumulated", "checkpointed"])
def test_a_run_is_the_same_in_both_backends(name):
    found, expected = (course(backend, name) for backend in BACKENDS)
    who = f"{' | '.join(BACKENDS)}, {name}"
    for step, (ours, theirs) in enumerate(zip(found.metrics, expected.metrics, strict=True)):
        check("training loss", "float64", who, error(ours["loss"], theirs["loss"]), f"step {step}")
        assert ours.keys() == theirs.keys()
        for metric, value in ours.items():
            measured = error(value, theirs[metric])
            check("training metrics", "float64", who, measured, f"{metric}, step {step}")
    same_parameters(who, found.final, expected.final)


def same_parameters(who, found, expected):
    """The parameters and their average, array by array."""
    assert (found.average is None) == (expected.average is None)
    for field in ("parameters", "average"):
        for name, want in (getattr(expected, field) or {}).items():
            measured = error(getattr(found, field)[name], want)
            check("trained parameters", "float64", f"{who}, {field}", measured, name)


@pytest.mark.slow
@pytest.mark.skipif("jax" not in BACKENDS, reason="is about JAX")
def test_jax_compiles_a_step_once():
    backend = BACKENDS["jax"]
    step = backend.module("training")._step
    trained = Trained(backend, THE_RUN)
    trained.step(draw_batch(PRUNED, 0))
    before = step._cache_size()
    for number in (1, 2):
        trained.step(draw_batch(PRUNED, number))
    Trained(backend, THE_RUN).step(draw_batch(PRUNED, 0))
    assert step._cache_size() == before


@pytest.mark.slow
@pytest.mark.skipif("torch" not in BACKENDS, reason="is about PyTorch")
def test_compilation_changes_nothing():
    run = varied(THE_RUN, steps=2, gradient_checkpointing="products")
    trainer = (
        BACKENDS["torch"]
        .module("training")
        .Trainer(run.config, run.settings, parameters(run.config), device=DEVICE, compiled=True)
    )
    for step, expected in enumerate(course("torch", "pruned").metrics[: run.steps]):
        for metric, value in trainer.step(draw_batch(run.config, step)).items():
            measured = error(float(value), expected[metric])
            check("training metrics", "float64", "torch, compiled", measured, metric)


@backends
@pytest.mark.slow
@pytest.mark.parametrize("name", ["accumulated", "checkpointed"])
def test_parts_and_recomputation_change_nothing(backend, name):
    found, expected = course(backend.name, name), course(backend.name, "pruned")
    who = f"{backend.name}, {name}"
    for ours, theirs in zip(found.metrics, expected.metrics[:10], strict=True):
        check("training loss", "float64", who, error(ours["loss"], theirs["loss"]))
        for metric, value in ours.items():  # gradients' norms too: clipping hides a factor
            check("training metrics", "float64", who, error(value, theirs[metric]), metric)
    same_parameters(who, found.final, expected.after_10)


@both
@pytest.mark.slow
def test_a_float32_run_is_the_same_in_both_backends():
    found, expected = (course(backend, "float32") for backend in BACKENDS)
    for ours, theirs in zip(found.losses(), expected.losses(), strict=True):
        check("training loss", "float32", " | ".join(BACKENDS), error(ours, theirs))


@backends
@pytest.mark.slow
def test_bfloat16_trains_float32_weights(backend):
    found, wide = course(backend.name, "bfloat16"), course(backend.name, "pruned")
    assert np.isfinite(found.losses()).all()
    apart = error(found.losses()[:5], wide.losses()[:5])
    report("training loss, 5 steps", "bfloat16", f"{backend.name} | float64", apart)
    assert 0 < apart < 0.1
    for field in ("parameters", "average", "first", "second"):
        assert {array.dtype.name for array in getattr(found.final, field).values()} == {"float32"}
    moved = found.final.parameters["gemma.language.layers.mlp.up.kernel"]
    assert (moved.astype("bfloat16") != moved).any()


@both
@pytest.mark.slow
def test_float32_with_pruning_is_the_same_up_to_a_flip():
    found, expected = (course(backend, "float32, pruned", votes=True) for backend in BACKENDS)
    until = until_flip(flips(found, expected), len(found.votes))
    assert until > 0, "with the same weights the same is selected"
    pairs = zip(found.losses()[:until], expected.losses()[:until], strict=True)
    for step, (ours, theirs) in enumerate(pairs):
        who = f"{' | '.join(BACKENDS)}, pruned"
        check("training loss", "float32", who, error(ours, theirs), f"step {step}")


@backends
@pytest.mark.slow
def test_votes_are_those_of_the_steps(backend):
    found = course(backend.name, "float32, pruned", votes=True)
    for votes, metrics in zip(found.votes[:10], found.metrics, strict=False):
        assert votes.kept().mean() == metrics["prune/noisy_kept_tokens_mean"]
        assert votes.kept().max() == metrics["prune/noisy_kept_tokens_max"]


def test_a_flip_is_found():
    """Of the second valid patch, whose two best scores tie but for rounding."""
    valid = np.array([[True, True, False], [True, True, True]])
    scores = np.array([[[0.1, 2, 9], [1, 1 - 2**-20, 9], [9, 0, 0]], [[3, 1, 2]] * 3])
    other = scores.copy()
    other[0, 1] = [1 - 2**-19, 1, 9]
    ours, theirs = (Course([], [Votes(each, valid)] * 2, None, None) for each in (scores, other))
    assert ours.votes[0].choices().tolist() == [[1, 0, -1], [0, 0, 0]]
    assert theirs.votes[0].choices().tolist() == [[1, 1, -1], [0, 0, 0]]
    assert flips(ours, ours) == []
    flip, _ = flips(ours, theirs)
    assert (flip.step, flip.count, flip.of) == (0, 1, 5)
    assert (flip.gap, flip.apart) == (2**-20, 2**-19)


@both
@pytest.mark.slow
def test_bfloat16s_curves_are_nearer_than_two_seeds():
    jax, torch = (course(backend, "bfloat16").losses() for backend in ("jax", "torch"))
    other_seed = course("torch", "bfloat16, another seed").losses()
    backends_apart, seeds_apart = np.abs(jax - torch), np.abs(torch - other_seed)
    assert 0 < backends_apart.mean() < seeds_apart.mean()
    assert backends_apart.max() < seeds_apart.max()
    assert abs(jax.mean() - torch.mean()) < abs(torch.mean() - other_seed.mean())


@backends
@pytest.mark.slow
def test_a_run_learns(backend):
    losses = course(backend.name, "pruned").losses()
    assert losses[-10:].mean() < losses[:10].mean()


@backends
@pytest.mark.slow
def test_what_is_frozen_stays_bit_for_bit(backend):
    run, weights = RUNS["adapted"], parameters(ADAPTED)
    final = course(backend.name, "adapted").final
    assert list(final.parameters) == list(parameter_table(ADAPTED))
    trained = {name for name in weights if run.settings.is_trained(name)}
    assert set(final.first) == set(final.second) == trained
    assert "gemma.language.layers.attention.query.kernel" not in trained
    for name, array in weights.items():
        assert (final.parameters[name] == array).all() == (name not in trained), name


# States


@backends
@pytest.mark.slow
def test_a_restored_run_goes_on_bit_for_bit(backend):
    batches = [draw_batch(PRUNED, step) for step in range(6)]
    straight, begun, resumed = (Trained(backend, THE_RUN) for _ in range(3))
    expected = [straight.step(batch) for batch in batches]
    for batch in batches[:3]:
        begun.step(batch)
    state = begun.state()
    begun.step(batches[3])  # does not write into the state that was given
    resumed.restore(state)
    assert resumed.trainer.step_count == 3
    assert [resumed.step(batch) for batch in batches[3:]] == expected[3:]
    for field in ("parameters", "average", "first", "second"):
        found, wanted = (getattr(each.state(), field) or {} for each in (resumed, straight))
        assert found.keys() == wanted.keys()
        for each, array in found.items():
            np.testing.assert_array_equal(array, wanted[each], each)


@both
@pytest.mark.slow
@pytest.mark.parametrize("first", BACKENDS)
def test_a_run_begun_in_one_backend_is_finished_in_the_other(first):
    """Begun in the one, 10 steps; 20 in the other; and 20 in the first again."""
    (second,) = BACKENDS.keys() - {first}
    expected, state = course(first, "pruned"), course(first, "pruned").after_10
    for backend, steps in ((second, range(10, 30)), (first, range(30, 50))):
        trained = Trained(BACKENDS[backend], THE_RUN)
        trained.restore(state)
        for step in steps:
            found = trained.step(draw_batch(PRUNED, step))["loss"]
            measured = error(found, expected.metrics[step]["loss"])
            check("training loss", "float64", f"{first} to {second}", measured, f"step {step}")
        state = trained.state()
    same_parameters(f"{first} to {second}", state, expected.final)


@backends
@pytest.mark.parametrize("name", ["adapted", "bfloat16"])
def test_a_state_given_is_the_state_that_was_taken(backend, name):
    """Exactly, in every backend: a state is moved, not computed."""
    run = RUNS[name]
    generator = np.random.default_rng(0)

    def filled(arrays):
        return {
            each: generator.standard_normal(np.shape(array)).astype(array.dtype)
            for each, array in arrays.items()
        }

    trained = Trained(backend, run)
    begun = trained.state()
    given = TrainState(
        step=17,
        parameters=filled(begun.parameters),
        average=None if begun.average is None else filled(begun.average),
        first=filled(begun.first),
        second=filled(begun.second),
    )
    trained.restore(given)
    taken = trained.state()
    assert taken.step == trained.trainer.step_count == 17
    for field in ("parameters", "average", "first", "second"):
        found, expected = (getattr(each, field) or {} for each in (taken, given))
        assert list(found) == list(expected)
        for each, array in expected.items():
            np.testing.assert_array_equal(found[each], array)
            assert found[each].dtype == array.dtype


@backends
@pytest.mark.parametrize("name", ["adapted", "bfloat16"])
def test_a_state_to_be_saved_is_no_copy(backend, name):
    """The host may not have room for all of it once more."""
    trained = Trained(backend, RUNS[name])
    expected = trained.state()
    with backend.precision(trained.dtype):
        given = trained.trainer.state(everywhere=False)
        for field in ("parameters", "average", "first", "second"):
            found, wanted = (getattr(each, field) or {} for each in (given, expected))
            assert list(found) == list(wanted)
            for each, array in wanted.items():
                lazy = found[each]
                assert isinstance(lazy, LazyArray)
                assert (lazy.shape, lazy.dtype) == (array.shape, array.dtype)
                for index in (..., 0, slice(1, 3)):
                    np.testing.assert_array_equal(lazy.read(index), array[index], each)


# One step


def specs_draws(run, step):
    """The random numbers of a step, and what the model sees with them, by the spec alone."""
    config, settings = run.config, run.settings
    batch, dtype = draw_batch(config, step), master_dtype(config)

    def keys(stream):
        return randomness.stream_key(settings.seed, step, stream, batch.places)

    uniform = randomness.uniform(keys(Stream.AUGMENTATION), (len(CAMERAS), augmentation.DRAWS))
    images = {
        camera: augmentation.augment(
            batch.images[camera].astype(dtype) / 255 * 2 - 1,
            augmentation.parameters(uniform[:, place].astype(dtype), camera, 224),
        )
        for place, camera in enumerate(CAMERAS)
    }
    pruner_noise = randomness.uniform(keys(Stream.PRUNER_NOISE), pruner_noise_shape(config))
    chunk = (config.action_horizon, config.action_dim)
    return LossBatch(
        observation=Observation(
            images=images,
            image_masks=batch.image_masks,
            state=batch.state,
            tokenized_prompt=batch.tokenized_prompt,
            tokenized_prompt_mask=batch.tokenized_prompt_mask,
        ),
        actions=batch.actions,
        noise=randomness.normal(keys(Stream.NOISE), chunk, dtype),
        time=randomness.flow_matching_time(keys(Stream.TIME), dtype),
        pruner_noise=pruner_noise.astype(dtype) * settings.noise_scale(step),
    )


@pytest.mark.slow
@backends
@pytest.mark.parametrize("name", ["pruned", "adapted"])
def test_two_steps_are_the_specs(backend, name):
    """Loss, clipping, AdamW and average: but for the gradients, the reference is NumPy alone."""
    run = RUNS[name]
    optimizer, decay = run.settings.optimizer, run.settings.ema_decay
    trained, weights = Trained(backend, run), parameters(run.config)
    reference = BACKENDS.get("torch", backend)  # the gradients' parity is shown elsewhere
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    average = weights
    names = [each for each in weights if run.settings.is_trained(each)]
    zeros = {each: np.zeros_like(weights[each]) for each in names}
    moments = Moments(zeros, zeros)
    for step in range(2):
        model, drawn = reference.model(run.config, weights), specs_draws(run, step)
        gradients = model.gradients(drawn, train=True)
        gradients, norm = optimization.clipped({each: gradients[each] for each in names}, optimizer)
        assert (norm > optimizer.clip_gradient_norm) == (name == "pruned")
        updated, moments = optimization.adamw_step(
            {each: weights[each] for each in names},
            gradients,
            moments,
            step,
            run.settings.schedule.learning_rate(step),
            optimizer,
        )
        weights = weights | updated
        found = trained.step(draw_batch(run.config, step))
        expected = {
            "loss": model.loss(drawn, train=True).mean(),
            "grad_norm": norm,
            "param_norm": optimization.global_norm(updated.values()),
        }
        for metric, want in expected.items():
            measured = error(found[metric], want)
            check("training step", "float64", f"{backend.name} | spec", measured, metric)
        if decay is not None:
            average = optimization.averaged(average, weights, decay)
    state = trained.state()
    assert state.step == 2
    assert (state.average is None) == (decay is None)
    for field, wanted in (
        ("parameters", weights),
        ("average", average if decay is not None else {}),
        ("first", moments.first),
        ("second", moments.second),
    ):
        for each, want in wanted.items():
            if not each.endswith("attention.key.bias"):  # 0 in exact arithmetic
                measured = error(getattr(state, field)[each], want)
                check("training step", "float64", f"{backend.name} | spec", measured, each)


@pytest.mark.slow
@backends
@pytest.mark.parametrize("name", ["pruned", "adapted"])
def test_metrics_of_the_pruning_are_the_specs(backend, name):
    run = RUNS[name]
    drawn = specs_draws(run, 0)
    found = Trained(backend, run).step(draw_batch(run.config, 0))

    def pools(module, observation):
        return module.pools(module.encode(module.prepare(observation)))

    arrays = backend.model(run.config, parameters(run.config)).compiled(pools)(drawn.observation)
    patches, task, task_mask, patch_mask = arrays
    noise = drawn.pruner_noise.reshape(len(patches), *drawn.pruner_noise.shape[-2:])
    scores = spec_pruner.importance_score(patches, task, task_mask)
    diagnostics = spec_pruner.diagnose(patches, task, task_mask, patch_mask)
    valid = patch_mask.any(axis=-1)
    expected = {
        "prune/argmax_top1_share": diagnostics.top_votes_share[valid].mean(),
        "prune/score_top1_gap": diagnostics.score_gap[valid].mean(),
        "prune/queries_spread": diagnostics.queries_spread[valid].mean(),
        "prune/patches_spread": diagnostics.patches_spread[valid].mean(),
        "prune/task_valid_len": drawn.observation.tokenized_prompt_mask.sum() / SIZE,
    }
    for prefix, seen in (("", scores), ("noisy_", scores + noise)):
        kept = spec_pruner.select_hard(seen, patch_mask).reshape(SIZE, -1).sum(axis=-1)
        expected |= {
            f"prune/{prefix}kept_tokens_mean": kept.mean(),
            f"prune/{prefix}kept_tokens_min": kept.min(),
            f"prune/{prefix}kept_tokens_max": kept.max(),
            f"prune/{prefix}kept_ratio": kept.sum() / patch_mask.sum(),
        }
    assert found.keys() == expected.keys() | {"loss", "grad_norm", "param_norm"}
    for metric, want in expected.items():
        measured = error(found[metric], want)
        check("training metrics", "float64", f"{backend.name} | spec", measured, metric)


@pytest.mark.slow
@backends
def test_evaluating_tells_what_the_step_will_and_changes_nothing(backend):
    trained, batch = Trained(backend, THE_RUN), draw_batch(PRUNED, 0)
    told = trained.evaluate(batch)
    assert trained.trainer.step_count == 0
    made = trained.step(batch)
    assert trained.trainer.step_count == 1
    assert made.keys() - told.keys() == {"grad_norm", "param_norm"}
    for name, value in told.items():
        check("training metrics", "float64", f"{backend.name}, evaluated", error(value, made[name]))


@backends
def test_the_noise_scale_can_be_overridden(backend):
    trained, batch = Trained(backend, THE_RUN), draw_batch(PRUNED, 0)
    noisy = trained.evaluate(batch)
    trained.trainer.set_token_pruner_noise_scale(0.0)
    silent = trained.evaluate(batch)
    assert silent["prune/kept_ratio"] == noisy["prune/kept_ratio"]
    assert silent["prune/noisy_kept_ratio"] == silent["prune/kept_ratio"]
    assert noisy["prune/noisy_kept_ratio"] != noisy["prune/kept_ratio"]
    trained.trainer.set_token_pruner_noise_scale(None)
    assert trained.evaluate(batch) == noisy
    with pytest.raises(ValueError, match="noise_scale"):
        trained.trainer.set_token_pruner_noise_scale(-1.0)


# The spec's own


@pytest.mark.skipif("jax" not in BACKENDS, reason="needs Optax")
@pytest.mark.parametrize(
    ("warmup", "decay", "last"), [(5, 60, 1e-4), (0, 7, 0.0), (1, 2, 1e-3), (1000, 30_000, 2.5e-6)]
)
def test_the_schedule_is_optaxs(warmup, decay, last):
    import jax
    import optax

    ours = CosineDecaySchedule(warmup, peak_lr=1e-3, decay_steps=decay, decay_lr=last)
    with jax.enable_x64(True):
        theirs = optax.warmup_cosine_decay_schedule(1e-3 / (warmup + 1), 1e-3, warmup, decay, last)
        for step in sorted({0, 1, 3, warmup, warmup + 1, decay // 2, decay - 1, decay, decay + 9}):
            measured = error(ours.learning_rate(step), theirs(step))
            check("learning rate", "float64", "spec | Optax", measured, f"step {step}")


# What the model is shown


@backends
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("camera", CAMERAS)
def test_augmentation_is_the_specs(backend, dtype, camera):
    """Against float64, on noise and on fields with hard edges, to the ends of what is drawn.

    From one pixel of the noise to the next lies up to half the range: no photograph is as hard on
    the places that are sampled, of which float32 knows 2e-6 of a pixel.
    """
    generator = np.random.default_rng(1)
    images = generator.uniform(-0.5, 0.5, (5, 224, 224, 3))
    images[3:] = generator.uniform(-1, 1, (2, 8, 8, 3)).repeat(28, axis=1).repeat(28, axis=2)
    uniform = generator.random((5, augmentation.DRAWS))
    uniform[0], uniform[1] = 0, 1 - 2.0**-23
    images, uniform = (x.astype(dtype) for x in (images, uniform))
    drawn = augmentation.parameters(uniform.astype(np.float64), camera, 224)
    expected = augmentation.augment(images.astype(np.float64), drawn)
    with backend.precision(dtype):
        augment = backend.module("augmentation").augment
        found = backend.numpy(augment(backend.array(images), backend.array(uniform), camera))
    assert found.dtype == dtype
    assert (np.abs(expected - images).max(axis=(1, 2, 3)) > 0.1).all()
    measured = float(np.abs(found - expected).max())
    check("augmentation", dtype, f"{backend.name} | spec", measured)


@backends
def test_bytes_become_numbers_from_minus_one_to_one(backend):
    config = computed_in(THE_RUN, "float32").config
    batch = draw_batch(config, 0)
    given = dataclasses.replace(
        batch, images=batch.images | {CAMERAS[0]: np.full((SIZE, 224, 224, 3), 0.25, np.float32)}
    )
    arrays = {
        field.name: {key: backend.array(value) for key, value in array.items()}
        if isinstance(array := getattr(given, field.name), dict)
        else backend.array(array)
        for field in dataclasses.fields(Batch)
    }
    dtype = backend.array(np.zeros(1), "float32").dtype
    seen = backend.module("objective").observe(Batch(**arrays), None, dtype)
    assert (backend.numpy(seen.images[CAMERAS[0]]) == np.float32(0.25)).all()
    for camera in CAMERAS[1:]:
        expected = batch.images[camera] / 255 * 2 - 1
        measured = error(backend.numpy(seen.images[camera]), expected)
        check("augmentation", "float32", f"{backend.name}, bytes", measured)


# What a user may get wrong


@backends
def test_a_batch_that_cannot_be_cut_is_refused(backend):
    trained = Trained(backend, varied(THE_RUN, 1, accumulation=3))
    with pytest.raises(ValueError, match=r"batch: .* accumulation=3 times 1 device divides, got 4"):
        trained.step(draw_batch(PRUNED, 0))


@backends
def test_something_must_be_trained(backend):
    with pytest.raises(ValueError, match=r"freeze: expected .*, got \['\.'\]"):
        Trained(backend, varied(THE_RUN, 1, freeze=(".",)))


@backends
def test_weights_of_another_model_are_refused(backend):
    with pytest.raises(ValueError, match=r"extra: .*lora"):
        Trained(backend, THE_RUN, parameters(ADAPTED))


@backends
@pytest.mark.parametrize("field", ["parameters", "average", "first", "second"])
def test_a_state_of_another_run_is_refused(backend, field):
    trained = Trained(backend, THE_RUN)
    state = trained.state()
    without = dict(getattr(state, field))
    without.pop("gemma.embedder.embedding")
    with pytest.raises(ValueError, match=rf"{field}: expected the \d+ arrays .*, got \d+"):
        trained.restore(dataclasses.replace(state, **{field: without}))
    cut = dict(getattr(state, field))
    cut["gemma.embedder.embedding"] = cut["gemma.embedder.embedding"][1:]
    with pytest.raises(ValueError, match=rf"{field}: expected .*\(1023, 72\)"):
        trained.restore(dataclasses.replace(state, **{field: cut}))


@backends
def test_an_average_must_be_there_if_and_only_if_the_run_has_one(backend):
    trained = Trained(backend, THE_RUN)
    state = trained.state()
    with pytest.raises(ValueError, match=r"average: expected one, of 0\.99, got none"):
        trained.restore(dataclasses.replace(state, average=None))
    without = Trained(backend, varied(THE_RUN, 1, ema_decay=None))
    with pytest.raises(ValueError, match="average: expected none, got one"):
        without.restore(state)


# Nothing waits


@pytest.mark.skipif("torch" not in BACKENDS, reason="is about PyTorch")
def test_torch_reads_nothing_back_in_a_step():
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    waiting = {
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
    }

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            assert operation not in waiting, operation
            return operation(*arguments, **options or {})

    trained = Trained(BACKENDS["torch"], THE_RUN)
    with Watch():
        metrics = trained.trainer.step(draw_batch(PRUNED, 0))
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            metrics["loss"].item()

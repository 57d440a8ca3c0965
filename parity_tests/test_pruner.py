"""The pruner: each backend against the float64 reference, and selection exactly."""

import dataclasses

import numpy as np
import pytest

from parity_tests.cases import BUDGETS, PRUNER_CASES
from parity_tests.harness import BACKENDS, error, relative_norm
from parity_tests.record import check, report
from parity_tests.tolerances import tolerance
from pruner_spec import pruner as reference

DTYPES = ("float64", "float32")

backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
cases = pytest.mark.parametrize("case", PRUNER_CASES.values(), ids=PRUNER_CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
budgets = pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)


def score(backend, inputs, dtype):
    """The backend's scores of inputs rounded to a dtype."""
    with backend.precision(dtype):
        return backend.numpy(
            backend.module("pruner").importance_score(
                backend.array(inputs.patches, dtype),
                backend.array(inputs.task, dtype),
                backend.array(inputs.task_mask),
            )
        )


def select(backend, scores, patch_mask, dtype, **budget):
    """The backend's hard selection."""
    with backend.precision(dtype):
        scores, patch_mask = backend.array(scores, dtype), backend.array(patch_mask)
        return backend.numpy(backend.module("pruner").select_hard(scores, patch_mask, **budget))


@backends
@cases
@dtypes
def test_scores(backend, case, dtype):
    inputs = case.inputs()
    expected = reference.importance_score(inputs.patches, inputs.task, inputs.task_mask)
    found = score(backend, inputs, dtype)
    assert found.dtype == dtype
    check("scores", dtype, f"{backend.name} | reference", error(found, expected), case.name)


@backends
def test_scores_of_bfloat16_tokens_are_float32_scores_of_the_rounded_tokens(backend):
    inputs = PRUNER_CASES["full width"].inputs()
    found = score(backend, inputs, "bfloat16")
    with backend.precision("float32"):
        rounded = [
            backend.numpy(backend.array(tokens, "bfloat16")).astype(np.float64)
            for tokens in (inputs.patches, inputs.task)
        ]
    assert found.dtype == np.float32
    expected = reference.importance_score(*rounded, inputs.task_mask)
    check(
        "scores", "float32", f"{backend.name}, bfloat16 tokens | reference", error(found, expected)
    )


@backends
@cases
@budgets
@dtypes
def test_hard_selection_on_shared_scores_is_identical(backend, case, budget, dtype):
    inputs = case.inputs()
    scores = reference.importance_score(inputs.patches, inputs.task, inputs.task_mask)
    scores = scores.astype(dtype)
    expected = reference.select_hard(scores, inputs.patch_mask, **budget)
    found = select(backend, scores, inputs.patch_mask, dtype, **budget)
    np.testing.assert_array_equal(found, expected)


@backends
@budgets
def test_ties_go_to_the_lowest_index(backend, budget):
    generator = np.random.default_rng(3)
    scores = generator.integers(0, 3, (4, 40, 40)).astype(np.float32)
    patch_mask = np.arange(40)[None, :] >= np.array([0, 4, 30, 40])[:, None]
    expected = reference.select_hard(scores, patch_mask, **budget)
    found = select(backend, scores, patch_mask, "float32", **budget)
    np.testing.assert_array_equal(found, expected)


def test_ties_by_hand():
    """Patches 1 and 2 tie in both rows: 1 gets the votes, and 2 is next by its best score."""
    scores = np.array([[[0.0, 1.0, 1.0], [0.5, 1.0, 1.0], [0.0, 1.0, 0.0]]])
    assert reference.select_hard(scores).tolist() == [[False, True, False]]
    assert reference.select_hard(scores, keep_tokens=2).tolist() == [[False, True, True]]
    assert reference.select_hard(scores, min_keep=2).tolist() == [[False, True, True]]
    masked = reference.select_hard(scores, np.array([[True, False, True]]), keep_tokens=2)
    assert masked.tolist() == [[True, False, True]]


@backends
@cases
@dtypes
def test_hard_selection_end_to_end_where_the_margin_allows(backend, case, dtype):
    """Rows whose first two scores differ by more than twice the score tolerance vote alike."""
    inputs = case.inputs()
    expected = reference.importance_score(inputs.patches, inputs.task, inputs.task_mask)
    margin = 2 * tolerance("scores", dtype) * np.abs(expected).max()
    eligible = np.where(inputs.patch_mask[:, None, :], expected, -np.inf)
    top = np.sort(eligible, axis=-1)[..., -2:]
    with np.errstate(invalid="ignore"):
        clear = top[..., 1] - top[..., 0] > margin
    clear |= ~inputs.patch_mask
    assert clear.all(), "the case has a near-tie: draw other inputs"
    found = select(backend, score(backend, inputs, dtype), inputs.patch_mask, dtype)
    np.testing.assert_array_equal(found, reference.select_hard(expected, inputs.patch_mask))


@backends
@cases
@dtypes
@pytest.mark.parametrize("noisy", [False, True], ids=["no noise", "noise"])
def test_straight_through(backend, case, dtype, noisy):
    """The selected patches, and the gradients with respect to patches and task."""
    inputs = case.inputs()
    noise = inputs.noise if noisy else None
    expected = reference.prune_for_training(
        inputs.patches, inputs.task, inputs.cotangent, inputs.task_mask, inputs.patch_mask, noise
    )
    with backend.precision(dtype):
        patches, task, cotangent = (
            backend.array(x, dtype) for x in (inputs.patches, inputs.task, inputs.cotangent)
        )
        masks = [backend.array(x) for x in (inputs.task_mask, inputs.patch_mask)]
        noise = None if noise is None else backend.array(noise, dtype)

        def prune(patches, task):
            pruner = backend.module("pruner").ImageTokenPruner()
            return pruner(patches, task, *masks, noise, train=True)

        output = backend.numpy(prune(patches, task).tokens)
        gradients = backend.gradient(
            lambda patches, task: (prune(patches, task).tokens * cotangent).sum(), patches, task
        )
    who = f"{backend.name} | reference"
    check("straight-through output", dtype, who, relative_norm(output, expected.output), case.name)
    for found, want in zip(gradients, (expected.grad_patches, expected.grad_task), strict=True):
        check("straight-through gradient", dtype, who, relative_norm(found, want), case.name)


@backends
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_straight_through_weights_are_exactly_one_hot(backend, dtype):
    inputs = PRUNER_CASES["masked cameras"].inputs()
    with backend.precision(dtype):
        weights = backend.numpy(
            backend.module("pruner").select_straight_through(
                backend.array(inputs.noise, dtype), backend.array(inputs.patch_mask)
            )
        ).astype(np.float64)
    assert set(np.unique(weights)) == {0.0, 1.0}
    np.testing.assert_array_equal(weights.sum(axis=-1), inputs.patch_mask)


def test_the_references_gradients_are_the_softmaxs():
    """The hand-derived gradients against finite differences of the relaxed selection."""
    inputs = PRUNER_CASES["short prompts"].inputs()
    patches, task, masks = inputs.patches, inputs.task, (inputs.task_mask, inputs.patch_mask)
    found = reference.prune_for_training(patches, task, inputs.cotangent, *masks)
    hard = reference.select_straight_through(
        reference.importance_score(patches, task, inputs.task_mask), inputs.patch_mask
    )

    def relaxed(moved_patches, moved_task):
        """hard + soft - soft0, whose derivative at 0 is the straight-through gradient."""
        scores = reference.importance_score(moved_patches, moved_task, inputs.task_mask)
        soft = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
        weights = hard + soft - soft0
        return float((np.einsum("bnm,bmd->bnd", weights, moved_patches) * inputs.cotangent).sum())

    scores = reference.importance_score(patches, task, inputs.task_mask)
    soft0 = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    generator, step = np.random.default_rng(0), 1e-6
    for place, gradient in enumerate((found.grad_patches, found.grad_task)):
        direction = generator.standard_normal(gradient.shape)
        ahead, behind = [patches, task], [patches, task]
        ahead[place] = ahead[place] + step * direction
        behind[place] = behind[place] - step * direction
        slope = (relaxed(*ahead) - relaxed(*behind)) / (2 * step)
        measured = error(slope, (gradient * direction).sum())
        assert measured <= tolerance("finite differences", "float64")


@backends
@cases
@dtypes
def test_diagnostics(backend, case, dtype):
    inputs = case.inputs()
    arguments = (inputs.patches, inputs.task, inputs.task_mask, inputs.patch_mask)
    expected = reference.diagnose(*arguments)
    with backend.precision(dtype):
        found = backend.module("diagnostics").diagnose(
            *(backend.array(x, dtype) for x in arguments)
        )
    for field in dataclasses.fields(expected):
        value, want = backend.numpy(getattr(found, field.name)), getattr(expected, field.name)
        measured = float(np.abs(value - want).max() / max(np.abs(want).max(), 1.0))
        check("diagnostics", dtype, f"{backend.name} | reference", measured, field.name)


def test_diagnostics_show_a_collapse():
    """Queries that are almost equal vote for one patch, and the diagnostics say so."""
    inputs = PRUNER_CASES["one camera"].inputs()
    healthy = reference.diagnose(inputs.patches, inputs.task)
    collapsed = reference.diagnose(inputs.patches, inputs.task[:, :1])
    assert collapsed.top_votes_share == [1.0]
    rounding = tolerance("collapsed spread", "float64")
    assert collapsed.queries_normalized_spread < rounding < healthy.queries_normalized_spread
    assert healthy.top_votes_share < 0.7


@backends
def test_scores_that_are_not_finite_raise(backend):
    inputs = PRUNER_CASES["masked cameras"].inputs()
    module = backend.module("pruner")
    with backend.precision("float32"):
        scores, patch_mask = backend.array(inputs.noise, "float32"), inputs.patch_mask
        broken = inputs.noise.copy()
        broken[1, 0, 2] = np.nan
        with pytest.raises(ValueError, match=r"finite.*got 1 that"):
            module.select_hard(backend.array(broken, "float32"), backend.array(patch_mask))
        with pytest.raises(ValueError, match=r"finite.*got 1 that"):
            module.select_straight_through(
                backend.array(broken, "float32"), backend.array(patch_mask)
            )
        # What no valid patch says of a valid patch does not matter.
        ignored = inputs.noise.copy()
        ignored[1, 40], ignored[1, :, 40] = np.inf, np.nan
        found = module.select_hard(backend.array(ignored, "float32"), backend.array(patch_mask))
        expected = module.select_hard(scores, backend.array(patch_mask))
    np.testing.assert_array_equal(backend.numpy(found), backend.numpy(expected))


@backends
def test_a_sample_with_scores_that_are_not_finite_is_reported_and_poisoned(backend):
    """The compiled path cannot raise: it counts them, and the sample's patches become NaN."""
    inputs = PRUNER_CASES["batch of 2"].inputs()
    patches = inputs.patches.copy()
    patches[1, 3, 0] = np.nan
    module = backend.module("pruner")
    with backend.precision("float32"):
        patches, task = (backend.array(x, "float32") for x in (patches, inputs.task))
        selection = module.ImageTokenPruner(keep_tokens=5).select(patches, task)
        packed = backend.numpy(module.pack(patches, selection, 5).tokens)
        nonfinite = backend.numpy(selection.nonfinite)
    assert nonfinite[0] == 0 < nonfinite[1]
    assert np.isfinite(packed[0]).all()
    assert np.isnan(packed[1]).all()


@backends
def test_packed_patches_by_hand(backend):
    """Those that are kept in their order, then, as padding, the others in theirs."""
    module = backend.module("pruner")
    kept = np.array([[False, True, False, True, True], [True, False, False, False, False]])
    counts = np.array([[[3, 0]], [[1, 2]]])
    patches = np.arange(10, dtype=np.float32).reshape(2, 5, 1)
    with backend.precision("float32"):
        selection = module.Selection(backend.array(kept), backend.array(counts))
        packed = module.pack(backend.array(patches), selection, 4)
        found = {
            name: backend.numpy(getattr(packed, name)) for name in ("tokens", "index", "valid")
        }
    assert found["index"].tolist() == [[1, 3, 4, 0], [0, 1, 2, 3]]
    assert found["valid"].tolist() == [[True, True, True, False], [True, False, False, False]]
    assert found["tokens"][0, :, 0].tolist() == [1, 3, 4, 0]
    assert np.isnan(found["tokens"][1]).all()


@backends
def test_what_a_selection_counts(backend):
    """Patches kept, which the fullest sample has most of, and scores that are not finite."""
    module, inputs = backend.module("pruner"), PRUNER_CASES["masked cameras"].inputs()
    with backend.precision("float32"):
        arrays = [backend.array(x, "float32") for x in (inputs.patches, inputs.task)]
        patch_mask = backend.array(inputs.patch_mask)
        pruner = module.ImageTokenPruner(keep_tokens=20)
        selection = pruner.select(*arrays, patch_mask=patch_mask)
        assert backend.numpy(selection.counts).tolist() == [[[n, 0]] for n in (20, 20, 16, 0)]
        assert module.most_kept(selection, 48) == 20
        kept = backend.numpy(selection.kept)
        np.testing.assert_array_equal(kept.sum(axis=-1), [20, 20, 16, 0])
        two = backend.array(np.array([0, 2, 0, 0]))
        broken = module.Selection.of(selection.kept, two)
        with pytest.raises(ValueError, match=r"finite.*got 2 that"):
            module.most_kept(broken, 48)


@pytest.mark.skipif(len(BACKENDS) < 2, reason="compares the two backends")
def test_bfloat16_selections_overlap():
    """bfloat16 tokens: reported beside the float32 truth, and the same in both backends."""
    inputs = PRUNER_CASES["full width"].inputs()
    truth = reference.select_hard(reference.importance_score(inputs.patches, inputs.task))
    kept = {
        name: select(backend, score(backend, inputs, "bfloat16"), inputs.patch_mask, "float32")
        for name, backend in BACKENDS.items()
    }
    np.testing.assert_array_equal(kept["jax"], kept["torch"])
    overlap = (kept["jax"] & truth).sum() / (kept["jax"] | truth).sum()
    report("kept sets, overlap with float64", "bfloat16", "both backends", float(overlap))
    assert overlap > 0.8

"""LightVLA's own outputs, from both backends' `TokenPruner` and scores."""

import pathlib

import numpy as np
import pytest

from parity_tests.golden import golden_inputs
from parity_tests.harness import BACKENDS
from parity_tests.record import check

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "lightvla_pruner.npz")
CASES = [name for name, case in golden_inputs.PRUNER_CASES.items() if case[4] == "float32"]
CLEAR = 1e-4  # a row's first minus second score, above which float32 selects alike

backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
cases = pytest.mark.parametrize("case", CASES)


def largest(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, over the largest value but at least over 1."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1.0))


@backends
@cases
def test_scores_and_hard_selection(backend, case):
    inputs, module = golden_inputs.pruner_inputs(case), backend.module("pruner")
    patches, task = (backend.array(inputs[name]) for name in ("patches", "task"))
    scores = module.importance_score(patches, task)
    stride = max(1, inputs["N"] // 32)
    found = backend.numpy(scores)
    who = f"{backend.name} | LightVLA: scores"
    measured = largest(found[:, ::stride, ::stride], GOLDEN[f"{case}/lightvla/score"])
    check("LightVLA", "float32", who, measured, case)
    clear = GOLDEN[f"{case}/lightvla/top2gap"] > CLEAR
    argmax = found.argmax(axis=-1)
    np.testing.assert_array_equal(argmax[clear], GOLDEN[f"{case}/lightvla/argmax"][clear])
    if clear.all():
        np.testing.assert_array_equal(
            backend.numpy(module.select_hard(scores)), GOLDEN[f"{case}/lightvla/hard_mask"]
        )


@backends
@cases
def test_training_selection_and_its_gradients(backend, case):
    inputs, module = golden_inputs.pruner_inputs(case), backend.module("pruner")
    patches, task, noise, cotangent = (
        backend.array(inputs[name]) for name in ("patches", "task", "noise", "cot")
    )
    assert (GOLDEN[f"{case}/lightvla/train_top2gap"] > 0).all()

    def select(patches, task):
        return module.ImageTokenPruner()(patches, task, noise=noise, train=True)

    pruned = select(patches, task)
    gradients = backend.gradient(
        lambda *tokens: (select(*tokens).tokens * cotangent).sum(), patches, task
    )
    clear = GOLDEN[f"{case}/lightvla/train_top2gap"] > CLEAR
    argmax = GOLDEN[f"{case}/lightvla/train_argmax"]
    np.testing.assert_array_equal(backend.numpy(pruned.index)[clear], argmax[clear])
    found = {
        "train_out": backend.numpy(pruned.tokens),
        "grad_patches": gradients[0],
        "grad_task": gradients[1],
    }
    width_stride = max(1, inputs["D"] // 64)
    strides = {"grad_task": max(1, inputs["T"] // 16)}
    for name, value in found.items():
        stride = strides.get(name, max(1, inputs["N"] // 64))
        part = value[:, ::stride, ::width_stride]
        measured = largest(part, GOLDEN[f"{case}/lightvla/{name}"])
        check("LightVLA", "float32", f"{backend.name} | LightVLA: {name}", measured, case)


@backends
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_sequences_at_any_batch_size(backend, train):
    """`[cls, patches, task]`: a batch gives what its samples give, with padding where it must."""
    inputs, module = golden_inputs.pruner_inputs("p05"), backend.module("pruner")
    count, length = inputs["N"], 1 + inputs["N"] + inputs["T"]
    generator = np.random.default_rng(0)
    cls = generator.standard_normal((2, 1, inputs["D"])).astype(np.float32)
    tokens = np.concatenate([cls, inputs["patches"], inputs["task"]], axis=1)
    positions = np.broadcast_to(np.arange(length) + 3, (2, length))
    attention = np.ones((2, length), dtype=bool)
    attention[1, -9:] = False
    pruner = module.TokenPruner(num_patches=count)

    def run(rows: slice):
        arrays = (tokens[rows], positions[rows], attention[rows])
        noise = backend.array(inputs["noise"][rows]) if train else None
        pruned = pruner(*map(backend.array, arrays), noise=noise, train=train)
        return [
            backend.numpy(x) for x in (pruned.tokens, pruned.position_ids, pruned.attention_mask)
        ]

    together = run(slice(0, 2))
    for sample in range(2):
        alone = run(slice(sample, sample + 1))
        valid, valid_alone = together[2][sample], alone[2][0]
        for found, expected in zip(together[:2], alone[:2], strict=True):
            np.testing.assert_array_equal(found[sample][valid], expected[0][valid_alone])
        kept = together[1][sample][valid]
        if train:
            assert valid.sum() == attention[sample].sum()
            continue
        assert (np.diff(kept) > 0).all()
        assert alone[0].shape[1] == 1 + valid_alone.sum() + (~attention[sample]).sum() - 1
        np.testing.assert_array_equal(found_tokens(together, sample), tokens[sample][kept - 3])


def found_tokens(arrays: list[np.ndarray], sample: int) -> np.ndarray:
    """The valid tokens of a sample."""
    return arrays[0][sample][arrays[2][sample]]

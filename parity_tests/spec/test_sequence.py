"""Masks and positions as literal matrices, on the arrays of every framework."""

import numpy as np
import pytest

from parity_tests.harness import BACKENDS
from pruner_spec import sequence
from pruner_spec.config import Pi0Config

CONVERT = {"numpy": (np.asarray, np.asarray)} | {
    name: (backend.array, backend.numpy) for name, backend in BACKENDS.items()
}
needs_jax = pytest.mark.skipif("jax" not in BACKENDS, reason="compares with JAX")
arrays = pytest.mark.parametrize(("to_array", "to_numpy"), CONVERT.values(), ids=CONVERT)

# A patch, a patch of a masked camera, a prompt token and the prompt's padding; then the suffix:
# two actions, and in π0 the state before them.
PI05_VALID = [1, 0, 1, 0, 1, 1]
PI05_STARTS = [0, 0, 0, 0, 1, 0]
PI05_MASK = [
    [1, 0, 1, 0, 0, 0],
    [0, 0, 0, 0, 0, 0],
    [1, 0, 1, 0, 0, 0],
    [0, 0, 0, 0, 0, 0],
    [1, 0, 1, 0, 1, 1],
    [1, 0, 1, 0, 1, 1],
]
PI05_POSITIONS = [0, 0, 1, 1, 2, 3]

PI0_VALID = [1, 0, 1, 0, 1, 1, 1]
PI0_STARTS = [0, 0, 0, 0, 1, 1, 0]
PI0_MASK = [
    [1, 0, 1, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0],
    [1, 0, 1, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0],
    [1, 0, 1, 0, 1, 0, 0],
    [1, 0, 1, 0, 1, 1, 1],
    [1, 0, 1, 0, 1, 1, 1],
]
PI0_POSITIONS = [0, 0, 1, 1, 2, 3, 4]

models = pytest.mark.parametrize(
    ("pi05", "valid", "starts", "mask", "positions"),
    [
        pytest.param(True, PI05_VALID, PI05_STARTS, PI05_MASK, PI05_POSITIONS, id="π0.5"),
        pytest.param(False, PI0_VALID, PI0_STARTS, PI0_MASK, PI0_POSITIONS, id="π0"),
    ],
)


def booleans(values):
    return np.array(values, dtype=bool)


@arrays
@models
def test_blocks_masks_and_positions(to_array, to_numpy, pi05, valid, starts, mask, positions):
    config = Pi0Config(pi05=pi05, action_horizon=2)
    place = to_array(np.arange(len(valid)))
    found_starts = sequence.block_start(config, place, prefix_length=4)
    found = sequence.attention_mask(to_array(booleans([valid])), found_starts)
    found_positions = sequence.positions(to_array(booleans([valid])))
    assert to_numpy(found).dtype == bool
    assert to_numpy(found_starts).astype(int).tolist() == starts
    assert to_numpy(found).astype(int).tolist() == [mask]
    assert to_numpy(found_positions).tolist() == [positions]


@arrays
def test_samples_of_a_batch_have_their_own_padding(to_array, to_numpy):
    valid = to_array(booleans([[1, 1, 0], [0, 1, 1], [0, 0, 0]]))
    starts = to_array(booleans([0, 0, 1]))
    assert to_numpy(sequence.attention_mask(valid, starts)).astype(int).tolist() == [
        [[1, 1, 0], [1, 1, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 1, 0], [0, 1, 1]],
        [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
    ]
    assert to_numpy(sequence.positions(valid)).tolist() == [[0, 1, 1], [-1, 0, 1], [-1, -1, -1]]


@arrays
def test_samples_of_a_batch_may_have_their_own_blocks(to_array, to_numpy):
    """Causal, one block, and a block that begins with the sequence, as openpi's masks may."""
    valid = to_array(booleans([[1, 1, 1]] * 3))
    starts = to_array(booleans([[1, 1, 1], [0, 0, 0], [1, 0, 1]]))
    assert to_numpy(sequence.attention_mask(valid, starts)).astype(int).tolist() == [
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
        [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
        [[1, 1, 0], [1, 1, 0], [1, 1, 1]],
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rope_timescales(dtype):
    found = sequence.rope_timescales(8, dtype)
    assert found.dtype == dtype
    assert found.tolist() == [1.0, 10.0, 100.0, 1000.0]


@needs_jax
@pytest.mark.parametrize("head_dim", [16, 20, 256])
def test_rope_timescales_are_bit_for_bit_openpis(head_dim):
    import jax

    @jax.jit
    def openpi():
        exponents = (2.0 / head_dim) * jax.numpy.arange(head_dim // 2, dtype=jax.numpy.float32)
        return 10_000**exponents

    np.testing.assert_array_equal(sequence.rope_timescales(head_dim), np.asarray(openpi()))

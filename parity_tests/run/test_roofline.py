"""The floor is counted as the reference measurements' was."""

import pytest

from pruner_run.roofline import PHASES, Ceilings, Load, floor, work
from pruner_spec.config import Pi0Config

H200 = Ceilings(bandwidth=4.30e12, rate=794e12)

# Patches, prompt, cameras and horizon; vision, prefix, denoising and total in ms; TFLOP.
TABLE = {
    "unpruned": ((768, 200, 3, 50), (0.83, 4.73, 1.49, 7.05), 4.80),
    "padding dropped": ((768, 50, 3, 50), (0.83, 3.98, 1.48, 6.29), 4.19),
    "64 a camera": ((192, 50, 3, 50), (0.83, 1.15, 1.46, 3.44), 1.91),
    "60 in all": ((60, 50, 3, 50), (0.83, 0.87, 1.45, 3.16), 1.40),
    "two cameras, horizon 10": ((60, 50, 2, 10), (0.55, 0.87, 1.45, 2.88), 0.92),
}


def phases(sizes, **others):
    kept, prompt, cameras, horizon = sizes
    config = Pi0Config(pi05=True, action_horizon=horizon)
    return work(config, Load(kept=kept, prompt=prompt, cameras=cameras, **others))


@pytest.mark.parametrize("name", TABLE)
def test_the_reference_table_to_its_printed_digits(name):
    sizes, milliseconds, teraflop = TABLE[name]
    found = phases(sizes)
    rounded = {phase: round(ms, 2) for phase, ms in floor(found, H200).items()}
    assert rounded == dict(zip((*PHASES, "total"), milliseconds, strict=True))
    assert round(sum(phase.operations for phase in found.values()) / 1e12, 2) == teraflop


def test_weights_that_a_call_reads():
    found = phases(TABLE["60 in all"][0], num_steps=1)
    # The reference says 0.82, of the blocks alone; here the projections around them are counted.
    assert round(found["vision"].bytes / 1e9, 2) == 0.83
    assert round(found["prefix"].bytes / 1e9, 2) == 3.75
    assert round(found["denoising"].bytes / 1e9, 2) == 0.62


def test_a_batch_computes_more_and_reads_the_same_weights():
    sizes = TABLE["64 a camera"][0]
    one, eight = phases(sizes), phases(sizes, batch=8)
    for phase in PHASES:
        assert eight[phase].operations == 8 * one[phase].operations
    assert eight["prefix"].bytes == one["prefix"].bytes
    assert one["denoising"].bytes < eight["denoising"].bytes < 1.2 * one["denoising"].bytes
